"""Modules that stand in for torch.nn.LSTM, GRU, LSTMCell and GRUCell.

Constructors, parameters, state dicts, initialisation, inputs, outputs and errors are torch's; its
documentation applies. What is added is keyword-only:

``weight_dropout`` (default 0.0), of the constructor, and an attribute
    The probability in [0, 1] of zeroing an entry of every hidden-to-hidden weight (DropConnect:
    Wan et al. 2013; Merity et al. 2017), in training mode only. Each forward call draws one mask
    for each layer and direction from torch's generator and uses it at every step; what is kept is
    scaled by 1 / (1 - weight_dropout). Nothing else about the module changes: the weights
    themselves are never modified.
``lengths`` (default None), of LSTM's and GRU's forward
    How many steps of each row of a padded batch are real: int64 [B], from 0 to T, in any order, on
    any device. Replaces packing: outputs past a row's end are 0, the final states are those at its
    end, and the second direction begins there. Nothing is sorted or read back, so it compiles.
``return_cell_states`` (default False), of LSTM's forward
    Returns a third value, c_t of the last layer at all steps, with the output's size and form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.nn.utils.rnn import PackedSequence

from lstmx import ops

States = tuple[Tensor, ...]
# One layer and direction: its output, final states, and the cell states of all steps or None.
LayerResult = tuple[Tensor, States, Tensor | None]


def checked_probability(p: float) -> float:
    """p, or the error for what is no probability."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"weight_dropout must be a probability in [0, 1], got {p!r}")
    return float(p)


def _draw_seeds(module: nn.Module, count: int, device: torch.device) -> tuple[Tensor | None, ...]:
    """One seed for each recurrent weight, or None where no mask is due. Never read back."""
    # Not "> 0": a NaN set as the attribute must reach the op, which rejects it.
    if not module.training or module.weight_dropout == 0:
        return (None,) * count
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device).unbind()


@cache
def _face(cls: Any) -> type:
    """What an instance of cls claims to be: cls, and a subclass of the torch class as well."""
    if issubclass(cls, cls._torch_class):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_plain": cls}
    return type(cls.__name__, (cls, cls._torch_class), names)


def _new(cls: type[Any]) -> Any:
    return object.__new__(cls)


class _StandIn(type):
    """Equal to the torch class that it stands in for, so that ``type(m) == nn.LSTM`` is true, and
    ``{nn.LSTM: initialise}[type(m)]`` is found. Subclasses that users derive are equal to nothing
    but themselves, as torch's are."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and vars(cls).get("_torch_class") is other)

    def __hash__(cls) -> int:
        return hash(vars(cls)["_torch_class"]) if "_torch_class" in vars(cls) else id(cls)


def _rows(x: Tensor, batch_sizes: Tensor | None) -> int:
    """B of x [T, B, I], or of [N, I] with batch_sizes."""
    return x.size(1) if batch_sizes is None else int(batch_sizes[0])


def _mask_past(x: Tensor, lengths: Tensor) -> Tensor:
    """x [T, B, ...] with zeros from each row's length on."""
    steps = torch.arange(x.size(0), device=x.device).view(-1, 1, 1)
    return x.masked_fill(steps >= lengths.view(1, -1, 1), 0)


def _turn_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """x [T, B, F] with each row's real steps in reverse order; the others stay."""
    steps = torch.arange(x.size(0), device=x.device).unsqueeze(1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(0, index.unsqueeze(2).expand_as(x))


def _at_end(initial: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
    """[B, H]: of states [T, B, H] those after each row's last step; before the first, initial."""
    all_states = torch.cat([initial.unsqueeze(0), states])
    index = lengths.view(1, -1, 1).expand(1, -1, states.size(2))
    return all_states.gather(0, index).squeeze(0)


class _RecurrentModule(nn.RNNBase, metaclass=_StandIn):
    """What LSTM and GRU share: torch's module around other kernels.

    It is no subclass of the torch class that it stands in for, because torch.compile refuses to
    trace those; but its ``__class__``, and so ``isinstance``, says it is, except to the compiler.
    See docs/adr/0001-class-hierarchy.md.
    """

    _torch_class: ClassVar[type[nn.RNNBase]]
    _states: ClassVar[int]
    weight_dropout: float

    # ---- Being torch's class --------------------------------------------------------------------

    def _get_class(self) -> type:
        return type(self) if TracingContext.try_get() is not None else _face(cast(Any, type(self)))

    def _set_class(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, vars(cls).get("_plain", cls))

    __class__ = property(_get_class, _set_class)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle refuses an object whose __class__ is not what it is about to create.
        return (_new, (vars(type(self)).get("_plain", type(self)),), self.__getstate__())

    # ---- Weights: looked up at each call, so that whatever replaces them is seen --------------

    @property
    def _flat_weights(self) -> list[Tensor | None]:  # type: ignore[override]  # a list in torch
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _weight(self, name: str) -> Tensor:
        """As getattr, which takes ten times as long to find a parameter."""
        found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def _init_flat_weights(self) -> None: ...

    def _update_flat_weights(self) -> None: ...

    def flatten_parameters(self) -> None:
        """Does nothing: there is no flat copy of the weights to keep up to date."""

    def _replicate_for_data_parallel(self) -> nn.Module:
        return nn.Module._replicate_for_data_parallel(self)

    def extra_repr(self) -> str:
        p = self.weight_dropout
        return super().extra_repr() + (f", weight_dropout={p}" if p != 0 else "")

    # ---- Forward --------------------------------------------------------------------------------

    def _run(
        self,
        input: Tensor | PackedSequence,
        hx: States | None,
        lengths: Tensor | None,
        cell_states: bool = False,
    ) -> tuple[Any, States, Any]:
        """All layers. Returns the output as the input came, the final states, and the cell states
        of the last layer in the output's form, or None."""
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths must be None with a PackedSequence, which has its own")
            x, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is None:
                self.check_input(x, batch_sizes)
            else:
                hx = tuple(h if sorted_indices is None else h[:, sorted_indices] for h in hx)
                self._check(x, hx, batch_sizes)
            y, hx, c = self._run_layers(x, hx, batch_sizes, None, cell_states)
            if unsorted_indices is not None:
                hx = tuple(h[:, unsorted_indices] for h in hx)
            indices = (batch_sizes, sorted_indices, unsorted_indices)
            return PackedSequence(y, *indices), hx, c if c is None else PackedSequence(c, *indices)

        if input.dim() not in (2, 3):
            name = self._torch_class.__name__
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None and any(h.dim() != input.dim() for h in hx):
            rank, word = (3, "batched") if batched else (2, "unbatched")
            names = "hx and cx" if len(hx) == 2 else "hx"
            got = ", ".join(f"{h.dim()}-D" for h in hx)
            got = f"({got}) tensors" if len(hx) == 2 else f"{got} tensor"
            raise RuntimeError(
                f"For {word} {rank}-D input, {names} should also be {rank}-D but got {got}"
            )
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if hx is None:
            # What torch would check, in a quarter of the time; the words of an error are its own.
            if x.size(-1) != self.input_size or x.dtype != self._weight("weight_ih_l0").dtype:
                self.check_input(x, None)
        else:
            hx = hx if batched else tuple(h.unsqueeze(1) for h in hx)
            self._check(x, hx, None)
        x = x.transpose(0, 1) if self.batch_first else x
        if lengths is not None:
            lengths = self._checked_lengths(lengths, x, batched)
        y, hx, c = self._run_layers(x, hx, None, lengths, cell_states)

        def as_input(v: Tensor) -> Tensor:
            v = v.transpose(0, 1) if self.batch_first else v
            return v if batched else v.squeeze(batch_dim)

        hx = hx if batched else tuple(h.squeeze(1) for h in hx)
        return as_input(y), hx, None if c is None else as_input(c)

    def _checked_lengths(self, lengths: Tensor, x: Tensor, batched: bool) -> Tensor:
        """On x's device, and in range there even where the values cannot be looked at."""
        T, B = x.size(0), x.size(1)
        if not batched:
            raise ValueError("lengths must be None with unbatched input")
        if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be a tensor of dtype int64, got {got}")
        if lengths.dim() != 1 or lengths.size(0) != B:
            raise ValueError(f"lengths must have size [B] = [{B}], got {list(lengths.shape)}")
        if self.proj_size > 0:
            raise ValueError("lengths must be None with proj_size; pack the sequence instead")
        on_host = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not ((lengths >= 0) & (lengths <= T)).all():
            raise ValueError(f"lengths must be from 0 to T = {T}, got {lengths.tolist()}")
        return lengths.to(x.device).clamp(0, T)

    def _check(self, x: Tensor, hx: States, batch_sizes: Tensor | None) -> None:
        raise NotImplementedError

    def _layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        *,
        cell_states: bool,
        **options: Any,
    ) -> LayerResult:
        raise NotImplementedError

    def _padded_layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        lengths: Tensor,
        *,
        reverse: bool,
        **options: Any,
    ) -> LayerResult:
        """As _layer for rows of several lengths. The padding comes last and is computed too; what
        lies before it does not depend on it."""
        x = _turn_rows(x, lengths) if reverse else x
        options["cell_states"] = True
        y, _, c = self._layer(x, states, weights, reverse=False, **options)
        last = [_at_end(states[0], y, lengths)]
        if c is not None:
            last.append(_at_end(states[1], c, lengths))
            c = _mask_past(c, lengths)
        y = _mask_past(y, lengths)
        if reverse:
            y = _turn_rows(y, lengths)
            c = None if c is None else _turn_rows(c, lengths)
        return y, tuple(last), c

    def _run_layers(
        self,
        x: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        cell_states: bool,
    ) -> LayerResult:
        """x is [T, B, I], or [N, I] with batch_sizes; each of hx is [layers * directions, B, H]."""
        directions = 2 if self.bidirectional else 1
        if hx is None:
            zeros = (x.new_zeros(_rows(x, batch_sizes), self.hidden_size),) * self._states
        seeds = _draw_seeds(self, self.num_layers * directions, x.device)
        last: list[States] = []
        all_cells: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                states = zeros if hx is None else tuple(h[index] for h in hx)
                weights = [self._weight(name) for name in self._all_weights[index]]
                options: dict[str, Any] = {
                    "reverse": direction == 1,
                    "seed": seeds[index],
                    "weight_dropout": self.weight_dropout,
                    "cell_states": cell_states and layer == self.num_layers - 1,
                }
                if lengths is None:
                    options["batch_sizes"] = batch_sizes
                    y, states, c = self._layer(x, states, weights, **options)
                else:
                    y, states, c = self._padded_layer(x, states, weights, lengths, **options)
                outputs.append(y)
                last.append(states)
                if c is not None and layer == self.num_layers - 1:
                    all_cells.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        cells = torch.cat(all_cells, -1) if cell_states else None
        return x, tuple(torch.stack(states) for states in zip(*last, strict=True)), cells


class LSTM(_RecurrentModule):
    """``torch.nn.LSTM`` on fused kernels, with ``weight_dropout``; see the module's docstring.

    Raises:
        ValueError: ``weight_dropout`` is outside [0, 1]; else what ``torch.nn.LSTM`` raises.
    """

    _torch_class = nn.LSTM
    _states = 2

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        nn.RNNBase.__init__(self, "LSTM", *args, **kwargs)
        self.weight_dropout = checked_probability(weight_dropout)

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]  # wider, as torch's
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]  # likewise

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = ...,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = ...,
        return_cell_states: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...

    def forward(self, input, hx=None, *, lengths=None, return_cell_states=False):
        """As ``torch.nn.LSTM``; see the module's docstring for ``lengths``.

        Returns:
            The output and (h_n, c_n); with ``return_cell_states`` also c_t of the last layer at
            all steps, [T, B, directions * H] as the output.

        Raises:
            TypeError: ``lengths`` is not an int64 tensor.
            ValueError: ``lengths`` has another size than [B], a value outside [0, T] (looked at
                on the CPU only), or comes with a packed or unbatched input or with ``proj_size``;
                ``return_cell_states`` comes with ``proj_size``; else what ``torch.nn.LSTM`` raises.
        """
        if return_cell_states and self.proj_size > 0:
            raise ValueError("return_cell_states must be False with proj_size")
        y, hx, c = self._run(input, hx, lengths, return_cell_states)
        return (y, hx, c) if return_cell_states else (y, hx)

    def _check(self, x: Tensor, hx: States, batch_sizes: Tensor | None) -> None:
        nn.LSTM.check_forward_args(cast(nn.LSTM, self), x, (hx[0], hx[1]), batch_sizes)

    def _layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        *,
        cell_states: bool,
        **options: Any,
    ) -> LayerResult:
        y, h_n, c_n, c = ops.lstm_sequence(x, *states, *weights, cell_states=cell_states, **options)
        return y, (h_n, c_n), c if cell_states else None

    def _run_layers(
        self,
        x: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        cell_states: bool,
    ) -> LayerResult:
        if self.proj_size == 0:
            return super()._run_layers(x, hx, batch_sizes, lengths, cell_states)
        # Projections are left to torch's own kernels; masked weights go in their place.
        if hx is None:
            sizes = (len(self._all_weights), _rows(x, batch_sizes))
            hx = tuple(x.new_zeros(*sizes, n) for n in (self.proj_size, self.hidden_size))
        weights = [[getattr(self, name) for name in names] for names in self._all_weights]
        for layer, seed in zip(weights, _draw_seeds(self, len(weights), x.device), strict=True):
            if seed is not None:
                w_hh = layer[1]
                mask = ops.weight_mask(seed, w_hh.shape, self.weight_dropout, dtype=w_hh.dtype)
                layer[1] = w_hh * mask
        flat = [weight for layer in weights for weight in layer]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is None:
            y, h_n, c_n = torch._VF.lstm(x, hx, flat, *options, False)
        else:
            y, h_n, c_n = torch._VF.lstm(x, batch_sizes, hx, flat, *options)
        return y, (h_n, c_n), None


class GRU(_RecurrentModule):
    """``torch.nn.GRU`` on fused kernels, with ``weight_dropout``; see the module's docstring.

    Raises:
        ValueError: ``weight_dropout`` is outside [0, 1]; else what ``torch.nn.GRU`` raises.
    """

    _torch_class = nn.GRU
    _states = 1

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        nn.RNNBase.__init__(self, "GRU", *args, **kwargs)
        self.weight_dropout = checked_probability(weight_dropout)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input, hx=None, *, lengths=None):
        """As ``torch.nn.GRU``: returns the output and h_n. ``lengths`` as for :class:`LSTM`."""
        states = None if hx is None else (hx,)
        y, (h_n,), _ = self._run(input, states, lengths)
        return y, h_n

    def _check(self, x: Tensor, hx: States, batch_sizes: Tensor | None) -> None:
        self.check_forward_args(x, hx[0], batch_sizes)

    def _layer(
        self,
        x: Tensor,
        states: States,
        weights: list[Tensor],
        *,
        cell_states: bool,
        **options: Any,
    ) -> LayerResult:
        y, h_n = ops.gru_sequence(x, *states, *weights, **options)
        return y, (h_n,), None


def _one_step(
    cell: nn.LSTMCell | nn.GRUCell,
    op: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    hx: States | None,
    states: int,
) -> States:
    """The op over a single step. Returns the new states, with a batch only if the input has one."""
    if input.dim() not in (1, 2):
        name = type(cell).__name__
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    x = input if input.dim() == 2 else input.unsqueeze(0)
    if hx is None:
        hx = (x.new_zeros(x.size(0), cell.hidden_size),) * states
    elif input.dim() == 1:
        hx = tuple(h.unsqueeze(0) for h in hx)
    if cell.hidden_size == 0:  # torch's cells allow it; sizes are checked, nothing is computed
        empty = nn.functional.linear(x, cell.weight_ih, cell.bias_ih)
        for h in hx:
            empty = empty + nn.functional.linear(h, cell.weight_hh, cell.bias_hh)
        return (empty if input.dim() == 2 else empty.squeeze(0),) * states
    (seed,) = _draw_seeds(cell, 1, x.device)
    _, *new = op(
        x.unsqueeze(0),
        *hx,
        cell.weight_ih,
        cell.weight_hh,
        cell.bias_ih,
        cell.bias_hh,
        seed=seed,
        weight_dropout=cell.weight_dropout,
    )
    return tuple(h if input.dim() == 2 else h.squeeze(0) for h in new[:states])


class LSTMCell(nn.LSTMCell, metaclass=_StandIn):
    """``torch.nn.LSTMCell`` on fused kernels, with ``weight_dropout``; each call draws a mask.

    Raises:
        ValueError: ``weight_dropout`` is outside [0, 1]; else what ``torch.nn.LSTMCell`` raises.
    """

    _torch_class = nn.LSTMCell

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_dropout = checked_probability(weight_dropout)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``torch.nn.LSTMCell``: returns (h, c)."""
        for index, value in enumerate(hx or ()):
            if value.dim() not in (1, 2):
                raise ValueError(
                    f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {value.dim()}D instead"
                )
        h, c = _one_step(self, ops.lstm_sequence, input, hx, states=2)
        return h, c


class GRUCell(nn.GRUCell, metaclass=_StandIn):
    """``torch.nn.GRUCell`` on fused kernels, with ``weight_dropout``; each call draws a mask.

    Raises:
        ValueError: ``weight_dropout`` is outside [0, 1]; else what ``torch.nn.GRUCell`` raises.
    """

    _torch_class = nn.GRUCell

    def __init__(self, *args: Any, weight_dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_dropout = checked_probability(weight_dropout)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As ``torch.nn.GRUCell``: returns h."""
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"GRUCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        states = None if hx is None else (hx,)
        (h,) = _one_step(self, ops.gru_sequence, input, states, states=1)
        return h

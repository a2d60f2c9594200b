"""The recurrent nets in plain PyTorch: to be read, and to check the kernels against.

Written independently of the C++. Everything here is ordinary tensor code, one step at a time, and
so differentiable in every way that PyTorch knows. Shapes are named as in :mod:`lstmx.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

States = tuple[Tensor, ...]
Step = Callable[[Tensor, States, Tensor, Tensor, Tensor | None, Tensor | None], States]

# ---- One step ----------------------------------------------------------------------------------
# Each takes x [B, I], the states [B, H], the weights and biases, and returns the new states.


def rnn_step(
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    """Elman's recurrent net (1990): h' = tanh(W_ih x + W_hh h + b)."""
    (h,) = states
    return (torch.tanh(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)),)


def lstm_step(
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    """Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000); gates i f g o."""
    h, c = states
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    """Cho et al. (2014) in the form of cuDNN; gates r z n, r applied to W_hn h + b_hn."""
    (h,) = states
    x_r, x_z, x_n = F.linear(x, w_ih, b_ih).chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,)


# ---- Weight dropout ----------------------------------------------------------------------------


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random words from four of counter and two of key.

    All words are int64 tensors that hold unsigned 32-bit numbers.
    """
    low = 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """The high and the low word of a * b; in halves, which int64 can hold exactly."""
        small, big = a * (b & 0xFFFF), a * (b >> 16)
        middle = (small >> 16) + (big & 0xFFFF)
        return (big >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (small & 0xFFFF)

    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def weight_mask(
    seed: Tensor, size: Sequence[int], p: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """As :func:`lstmx.weight_mask`: 0 with probability p, else 1 / (1 - p)."""
    count = math.prod(size)
    block = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(block)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = philox4x32((block & 0xFFFFFFFF, block >> 32, zero, zero), key)
    kept = torch.stack(words, -1).flatten()[:count] >= math.floor(p * 2**32 + 0.5)
    return (kept.to(torch.float64) * (1 / (1 - p) if p < 1 else 0.0)).to(dtype).view(*size)


# ---- A sequence --------------------------------------------------------------------------------


def run_sequence(
    step: Step,
    x: Tensor,
    states: States,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    seed: Tensor | None = None,
    weight_dropout: float = 0.0,
) -> tuple[list[Tensor], States]:
    """One layer, one direction. Returns each state at all steps, and the final states."""
    if seed is not None and weight_dropout > 0:
        w_hh = w_hh * weight_mask(seed, w_hh.shape, weight_dropout, dtype=w_hh.dtype)
    inputs = x.unbind(0) if batch_sizes is None else x.split(batch_sizes.tolist())
    order = range(len(inputs) - 1, -1, -1) if reverse else range(len(inputs))
    history: list[States] = [()] * len(inputs)
    for t in order:
        # Sequences are sorted by length: those that take part in a step are the first rows.
        rows = inputs[t].size(0)
        new = step(inputs[t], tuple(s[:rows] for s in states), w_ih, w_hh, b_ih, b_hh)
        states = tuple(torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True))
        history[t] = new
    join = torch.stack if batch_sizes is None else torch.cat
    return [join(list(steps)) for steps in zip(*history, strict=True)], states


def rnn_sequence(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """A vanilla RNN over a sequence; arguments as for :func:`lstmx.gru_sequence`, with G = 1."""
    (y,), (h_n,) = run_sequence(rnn_step, x, (h0,), w_ih, w_hh, *biases, **options)
    return y, h_n


def lstm_sequence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    *biases: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`lstmx.lstm_sequence` with ``cell_states=True``."""
    (y, c), (h_n, c_n) = run_sequence(lstm_step, x, (h0, c0), w_ih, w_hh, *biases, **options)
    return y, h_n, c_n, c


def gru_sequence(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """As :func:`lstmx.gru_sequence`."""
    (y,), (h_n,) = run_sequence(gru_step, x, (h0,), w_ih, w_hh, *biases, **options)
    return y, h_n


# ---- Cells as a reader of the chapter meets them -----------------------------------------------


class LSTMCellPlain(nn.Module):
    """An LSTM cell with a matrix for each gate, applied to h and x joined.

    The chapter's first LSTMCell, with its two slips mended: h and x must be concatenated (the
    chapter stacks them), and the output gate has to have a name.

    Args:
        ni: inputs I.
        nh: hidden units H.
    """

    def __init__(self, ni: int, nh: int) -> None:
        super().__init__()
        self.forget_gate = nn.Linear(ni + nh, nh)
        self.input_gate = nn.Linear(ni + nh, nh)
        self.cell_gate = nn.Linear(ni + nh, nh)
        self.output_gate = nn.Linear(ni + nh, nh)

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, States]:
        """x [B, I] and (h, c) [B, H] to h and (h, c)."""
        h, c = state
        h = torch.cat([h, input], dim=1)
        forget = torch.sigmoid(self.forget_gate(h))
        c = c * forget
        inp = torch.sigmoid(self.input_gate(h))
        cell = torch.tanh(self.cell_gate(h))
        c = c + inp * cell
        out = torch.sigmoid(self.output_gate(h))
        h = out * torch.tanh(c)
        return h, (h, c)


class LSTMCell(nn.Module):
    """The same cell, refactored: one matrix for x, one for h, and ``chunk`` to take them apart.

    Args:
        ni: inputs I.
        nh: hidden units H.
    """

    def __init__(self, ni: int, nh: int) -> None:
        super().__init__()
        self.ih = nn.Linear(ni, 4 * nh)
        self.hh = nn.Linear(nh, 4 * nh)

    def forward(self, input: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, States]:
        """x [B, I] and (h, c) [B, H] to h and (h, c)."""
        h, c = state
        gates = (self.ih(input) + self.hh(h)).chunk(4, 1)
        ingate, forgetgate, outgate = (
            torch.sigmoid(gate) for gate in (gates[0], gates[1], gates[3])
        )
        cellgate = torch.tanh(gates[2])
        c = (forgetgate * c) + (ingate * cellgate)
        h = outgate * torch.tanh(c)
        return h, (h, c)


class GRUCell(nn.Module):
    """A GRU cell from scratch, in the same manner.

    Args:
        ni: inputs I.
        nh: hidden units H.
    """

    def __init__(self, ni: int, nh: int) -> None:
        super().__init__()
        self.ih = nn.Linear(ni, 3 * nh)
        self.hh = nn.Linear(nh, 3 * nh)

    def forward(self, input: Tensor, state: tuple[Tensor]) -> tuple[Tensor, States]:
        """x [B, I] and (h,) [B, H] to h and (h,)."""
        (h,) = state
        x_reset, x_update, x_new = self.ih(input).chunk(3, 1)
        h_reset, h_update, h_new = self.hh(h).chunk(3, 1)
        reset = torch.sigmoid(x_reset + h_reset)
        update = torch.sigmoid(x_update + h_update)
        new = torch.tanh(x_new + reset * h_new)
        h = (1 - update) * new + update * h
        return h, (h,)


# ---- Modules -----------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    """Layers and directions, with torch's parameter names, so that state dicts interchange."""

    step: Step
    gates: int
    states: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        weight_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.bidirectional, self.weight_dropout = bidirectional, weight_dropout
        rows, directions = self.gates * hidden_size, 2 if bidirectional else 1
        bound = 1 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            width = input_size if layer == 0 else directions * hidden_size
            for suffix in self._suffixes(layer):
                sizes: dict[str, tuple[int, ...]] = {
                    "weight_ih": (rows, width),
                    "weight_hh": (rows, hidden_size),
                }
                if bias:
                    sizes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
                for name, size in sizes.items():
                    weight = torch.empty(size, device=device, dtype=dtype)
                    self.register_parameter(name + suffix, nn.Parameter(weight))
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As the torch module of the same name, for batched input."""
        packed = isinstance(input, PackedSequence)
        x: Tensor
        batch_sizes: Tensor | None = None
        sorted_indices = unsorted_indices = None
        if isinstance(input, PackedSequence):
            x, batch_sizes, sorted_indices, unsorted_indices = input
            batch = int(input.batch_sizes[0])
        else:
            x = input.transpose(0, 1) if self.batch_first else input
            batch = x.size(1)
        suffixes = [s for layer in range(self.num_layers) for s in self._suffixes(layer)]
        if hx is None:
            hx = [x.new_zeros(len(suffixes), batch, self.hidden_size)] * self.states
        else:
            hx = [hx] if self.states == 1 else list(hx)
            if sorted_indices is not None:
                hx = [h[:, sorted_indices] for h in hx]
        seeds: Any = [None] * len(suffixes)
        if self.training and self.weight_dropout > 0:
            count = (len(suffixes),)
            seeds = torch.randint(-(2**63), 2**63 - 1, count, dtype=torch.int64, device=x.device)

        finals = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                index = suffixes.index(suffix)
                names = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if self.bias else [])
                history, final = run_sequence(
                    type(self).step,
                    x,
                    tuple(h[index] for h in hx),
                    *(getattr(self, name + suffix) for name in names),
                    batch_sizes=batch_sizes,
                    reverse=direction == 1,
                    seed=seeds[index],
                    weight_dropout=self.weight_dropout,
                )
                outputs.append(history[0])
                finals.append(final)
            x = torch.cat(outputs, -1)
        last = [torch.stack(states) for states in zip(*finals, strict=True)]
        if packed:
            if unsorted_indices is not None:
                last = [h[:, unsorted_indices] for h in last]
            output: Any = PackedSequence(x, batch_sizes, sorted_indices, unsorted_indices)
        else:
            output = x.transpose(0, 1) if self.batch_first else x
        return output, last[0] if self.states == 1 else tuple(last)


class RNN(_Recurrent):
    """``torch.nn.RNN`` with tanh, readable; constructor of ``torch.nn.RNN`` and weight_dropout."""

    step = staticmethod(rnn_step)
    gates, states = 1, 1


class LSTM(_Recurrent):
    """``lstmx.LSTM``, readable."""

    step = staticmethod(lstm_step)
    gates, states = 4, 2


class GRU(_Recurrent):
    """``lstmx.GRU``, readable."""

    step = staticmethod(gru_step)
    gates, states = 3, 1

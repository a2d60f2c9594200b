"""Putting our modules into an existing model, and torch's back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lstmx.modules import GRU, LSTM, GRUCell, LSTMCell, checked_probability

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
}
_TORCHS = {id(ours): theirs for theirs, ours in _OURS.items()}


@dataclass(frozen=True)
class Conversion:
    """What was done to a model.

    Attributes:
        changed: names of the modules that changed, as ``named_modules`` gives them.
        left: names of the recurrent modules that did not, and why.
    """

    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(the model)'}: changed" for name in self.changed]
        lines += [f"{name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no recurrent modules"


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """The module stays the same object: its parameters, hooks, mode and everyone who holds it."""
    object.__dict__["__class__"].__set__(module, cls)


def _is_ours(module: nn.Module) -> bool:
    return issubclass(type(module), (LSTM, GRU, LSTMCell, GRUCell))


def _why_left(module: nn.Module) -> str | None:
    """Why a module that looks like one of torch's recurrent nets stays; None for all others."""
    name = type(module).__name__
    if isinstance(module, (nn.RNN, nn.RNNCell)):
        return f"there is no kernel for {name}"
    if hasattr(module, "parametrizations"):
        return "it is parametrized; convert first, parametrize then"
    if isinstance(module, tuple(_OURS)):
        return f"{name} is a subclass, and may do more than torch's"
    if isinstance(module, nn.RNNBase):
        return f"there is no kernel for {name}"
    return None


def convert(model: nn.Module, *, weight_dropout: float = 0.0) -> Conversion:
    """Makes every ``torch.nn.LSTM``, ``GRU``, ``LSTMCell`` and ``GRUCell`` of a model one of ours.

    In place, the model itself included: each module stays the same object, with the same
    parameters, hooks, mode and names; optimizers and other references stay valid.

    Args:
        model: any module.
        weight_dropout: probability in [0, 1] for all modules that are changed.

    Returns:
        What changed, and what was left and why; printable.

    Raises:
        ValueError: ``weight_dropout`` is not a probability.
    """
    p = checked_probability(weight_dropout)
    done = Conversion()
    for name, module in model.named_modules():
        # By identity: our classes are equal to torch's.
        ours = next((v for k, v in _OURS.items() if type(module) is k), None)
        if ours is not None:
            module.__dict__.pop("_flat_weights", None)  # looked up at each call by ours
            _set_class(module, ours)
            attributes: Any = module
            attributes.weight_dropout = p
            done.changed.append(name)
        elif not _is_ours(module) and (why := _why_left(module)) is not None:
            done.left[name] = why
    return done


def restore(model: nn.Module) -> Conversion:
    """Makes our modules torch's again, in place: for exporters and quantizers that know only those.

    Weight dropout is not applied any more, but remembered as the attribute ``weight_dropout``.

    Returns:
        What changed, and what was left and why; printable.
    """
    done = Conversion()
    for name, module in model.named_modules():
        theirs = _TORCHS.get(id(type(module)))
        if theirs is not None:
            _set_class(module, theirs)
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
            done.changed.append(name)
        elif _is_ours(module):
            done.left[name] = f"{type(module).__name__} is a subclass of ours"
    return done

"""Who can run a case: modules of one layer and one direction, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lstmx
from lstmx import reference

NAMES = ("torch", "torch+reassigned", "lstmx", "lstmx+low", "reference")


class DroppedWeight(nn.Module):
    """torch.nn's module with weight dropout put on from outside, as one would have to.

    ``mask`` [G*H, H], if set, replaces the one that dropout draws.
    """

    mask: Tensor | None = None

    def __init__(self, module: nn.Module, p: float) -> None:
        super().__init__()
        self.module, self.p = module, p

    def dropped(self, w_hh: Tensor) -> Tensor:
        """W_hh as a call is to find it."""
        if self.mask is None:
            return nn.functional.dropout(w_hh, self.p, self.training)
        return w_hh * self.mask

    def forward(self, x: Tensor, states: Any = None) -> Any:
        weights = dict(self.module.named_parameters())
        weights["weight_hh_l0"] = self.dropped(weights["weight_hh_l0"])
        return torch.func.functional_call(self.module, weights, (x, states))


class ReassignedWeight(DroppedWeight):
    """The same as fastai's ``WeightDropout`` does it: the module's weight is a new tensor in each
    call, made of a parameter beside it."""

    def __init__(self, module: nn.Module, p: float) -> None:
        super().__init__(module, p)
        self.raw = nn.Parameter(module.weight_hh_l0.data)
        del module.weight_hh_l0
        module.weight_hh_l0 = self.raw.clone()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """In the order of the module's own."""
        named = dict(self.module.named_parameters())
        order = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return iter([named.get(name, self.raw) for name in order])

    def forward(self, x: Tensor, states: Any = None) -> Any:
        self.module.weight_hh_l0 = self.dropped(self.raw)
        return self.module(x, states)


class _LowMemory:
    """The gates recomputed in backward: the ops offer it, the modules have no argument for it."""

    def _layer(self, *args: Any, **options: Any) -> Any:
        return super()._layer(*args, memory="low", **options)  # type: ignore[misc]  # a mixin


class _LowMemoryLSTM(_LowMemory, lstmx.LSTM): ...


class _LowMemoryGRU(_LowMemory, lstmx.GRU): ...


def make(provider: str, cell: str, I: int, H: int, p: float, dtype: torch.dtype) -> nn.Module:
    """A module that maps [T, B, I] to ([T, B, H], states).

    Its weights are those of seed 0, for all providers: they all initialise as torch does.

    Raises:
        ValueError: there is no such provider.
    """
    name = cell.upper()
    classes: dict[str, dict[str, Any]] = {
        "torch": vars(nn),
        "torch+reassigned": vars(nn),
        "lstmx": vars(lstmx),
        "lstmx+low": {"LSTM": _LowMemoryLSTM, "GRU": _LowMemoryGRU},
        "reference": vars(reference),
    }
    if provider not in classes:
        raise ValueError(f"provider must be one of {', '.join(NAMES)}, got {provider!r}")
    torch.manual_seed(0)
    module_class = classes[provider][name]
    if not provider.startswith("torch"):
        return module_class(I, H, weight_dropout=p, dtype=dtype)
    module = module_class(I, H, dtype=dtype)
    if p == 0:
        return module
    return DroppedWeight(module, p) if provider == "torch" else ReassignedWeight(module, p)

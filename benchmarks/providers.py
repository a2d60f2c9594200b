"""Who can run a case: modules of one layer and one direction, with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lstmx
from lstmx import reference

Forward = Callable[[Tensor], Tensor]


class DroppedWeight(nn.Module):
    """torch.nn's module with weight dropout put on from outside, as one would have to."""

    def __init__(self, module: nn.Module, p: float) -> None:
        super().__init__()
        self.module, self.p = module, p

    def forward(self, x: Tensor, states=None):
        weights = dict(self.module.named_parameters())
        dropped = nn.functional.dropout(weights["weight_hh_l0"], self.p, self.training)
        weights["weight_hh_l0"] = dropped
        return torch.func.functional_call(self.module, weights, (x, states))


def make(provider: str, cell: str, I: int, H: int, p: float, dtype: torch.dtype) -> nn.Module:
    """A module that maps [T, B, I] to ([T, B, H], states).

    Raises:
        ValueError: there is no such provider.
    """
    name = cell.upper()
    if provider == "lstmx":
        return getattr(lstmx, name)(I, H, weight_dropout=p, dtype=dtype)
    if provider == "reference":
        return getattr(reference, name)(I, H, weight_dropout=p, dtype=dtype)
    if provider == "torch":
        module = getattr(nn, name)(I, H, dtype=dtype)
        return DroppedWeight(module, p) if p > 0 else module
    raise ValueError(f"provider must be one of lstmx, torch, reference, got {provider!r}")

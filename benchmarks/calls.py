"""What is measured: one call of a module, forward alone or with its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.cases import Case

MODES = ("forward", "training")
Call = Callable[[], list[Tensor]]


def tensors(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x [T, B, I], a leaf, and the gradient of the output, [T, B, H]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.T, case.B, case.I, generator=generator)
    dy = torch.randn(case.T, case.B, case.H, generator=generator)
    return x.to(device, dtype).requires_grad_(), dy.to(device, dtype)


def call(module: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Call:
    """A call that returns y, the final states and, for training, the gradients of x and weights.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")

    def forward() -> list[Tensor]:
        y, states = module(x)
        return [y, *([states] if isinstance(states, Tensor) else states)]

    if mode == "forward":
        return torch.no_grad()(forward)
    inputs = [x, *module.parameters()]

    def training() -> list[Tensor]:
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs[0], inputs, dy)]

    return training

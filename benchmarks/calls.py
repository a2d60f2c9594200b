"""What is measured: one call of a module, forward alone or with its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.cases import Case

# The last is training from states that are given and not zero, as every window but a text's first.
MODES = ("forward", "training", "carried")
Call = Callable[[], list[Tensor]]


def tensors(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x [T, B, I], a leaf, the gradient of the output, [T, B, H], and states [1, B, H]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.T, case.B, case.I, generator=generator)
    dy = torch.randn(case.T, case.B, case.H, generator=generator)
    states = torch.rand(2 if case.cell == "lstm" else 1, 1, case.B, case.H, generator=generator)
    return (
        x.to(device, dtype).requires_grad_(),
        dy.to(device, dtype),
        states.to(device, dtype).unbind(),
    )


def call(module: nn.Module, x: Tensor, dy: Tensor, states: tuple[Tensor, ...], mode: str) -> Call:
    """A call that returns y, the final states and, for training, the gradients of x and weights.

    ``states`` are given to the module in the mode "carried" only; the others begin at zeros.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")

    given = () if mode != "carried" else (states,) if len(states) > 1 else states

    def forward() -> list[Tensor]:
        y, last = module(x, *given)
        return [y, *([last] if isinstance(last, Tensor) else last)]

    if mode == "forward":
        return torch.no_grad()(forward)
    inputs = [x, *module.parameters()]

    def training() -> list[Tensor]:
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs[0], inputs, dy)]

    return training

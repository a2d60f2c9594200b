"""Penalties on activations (Merity, McCann & Socher 2017). Activations are [B, T, H]."""

from __future__ import annotations

from torch import Tensor


def activation_regularisation(dropped: Tensor, alpha: float) -> Tensor:
    """AR: alpha times the mean square of the activations after dropout.

    Weight decay keeps weights small, this keeps activations small.
    """
    return alpha * dropped.float().pow(2).mean()


def temporal_activation_regularisation(raw: Tensor, beta: float) -> Tensor:
    """TAR: beta times the mean square of the change from one step to the next, before dropout.

    A sequence of one step has no change, and costs nothing.
    """
    if raw.size(1) < 2:
        return raw.new_zeros(())
    return beta * (raw[:, 1:] - raw[:, :-1]).float().pow(2).mean()

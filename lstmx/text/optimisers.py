"""What torch lacks: NT-ASGD, and a cycle of the learning rate for each stage of unfreezing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler


class NTASGD(torch.optim.Optimizer):
    """SGD that averages once validation stops improving (Merity, Keskar & Socher 2017, Alg. 1).

    Plain SGD, until :meth:`validated` is told a loss that is higher than the lowest one of more
    than ``patience`` validations before. From then on it keeps the mean of the parameters after
    each step as well; training goes on with the last ones. :meth:`averaged` puts the mean in their
    place. The state dict holds the means, the losses, and whether averaging has begun.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        weight_decay: factor of the L2 penalty's gradient.
        patience: the non-monotone interval n, of the paper 5.

    Raises:
        ValueError: ``lr`` is not positive, ``weight_decay`` negative, or ``patience`` below 1.
    """

    def __init__(
        self, params: Any, lr: float, *, weight_decay: float = 0.0, patience: int = 5
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        # In a group, because a state dict has groups and tensors, and nothing else.
        self.param_groups[0].update(patience=patience, losses=[], averaged_steps=None)

    @property
    def averaging(self) -> bool:
        """Whether averaging has begun."""
        return self.param_groups[0]["averaged_steps"] is not None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of SGD, and of the mean if it is kept."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads: Any = [p.grad for p in params]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, grads, alpha=-group["lr"])
        if self.averaging:
            self.param_groups[0]["averaged_steps"] += 1
            weight = 1 / self.param_groups[0]["averaged_steps"]
            for p in self._all():
                # The first mean has weight 1, whatever stood there.
                self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p, weight)
        return loss

    def validated(self, loss: float) -> bool:
        """Takes the loss of a validation; returns whether averaging begins with it."""
        group = self.param_groups[0]
        older = group["losses"][: -group["patience"]]
        group["losses"].append(loss)
        if self.averaging or not older or loss <= min(older):
            return False
        group["averaged_steps"] = 0
        return True

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the parameters and their means, if there are means."""
        for p in self._all():
            if "mean" in self.state[p]:
                mean = self.state[p]["mean"]
                last = p.clone()
                p.copy_(mean)
                mean.copy_(last)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters are their means, if there are means, as long as the context lasts."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]


class Cycle(NamedTuple):
    """One cycle of the learning rate: its steps, its peak, and how many depths it trains."""

    steps: int
    lr: float
    unfrozen: int | None = None


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


class Cycles(LRScheduler):
    """One cycle (Smith 2018) with cosine slopes after the other, as ULMFiT unfreezes.

    A cycle is that of :class:`torch.optim.lr_scheduler.OneCycleLR` with its peak at a quarter: from
    ``lr / 25`` to ``lr`` to ``lr / 1e5``, with Adam's beta1 the other way. A parameter group may
    have a key ``depth``, 0 for the last layers, 1 for those below, and so on. Its rate is divided
    by ``factor ** depth``, and it is frozen (rate 0; see :meth:`freeze`) as long as it is deeper
    than the cycle trains (Howard & Ruder 2018: discriminative fine-tuning, gradual unfreezing).

    Args:
        optimizer: AdamW, or another one with ``betas``.
        cycles: one after the other; after the last one its last rate stays.
        factor: between neighbouring depths.
        momentum: beta1 at the peak, and at both ends.

    Raises:
        ValueError: there is no cycle, or one without steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cycles: Sequence[Cycle],
        *,
        factor: float = 1.0,
        momentum: tuple[float, float] = (0.85, 0.95),
    ) -> None:
        if not cycles or min(cycle.steps for cycle in cycles) < 1:
            raise ValueError(f"cycles must have at least one step each, got {list(cycles)}")
        self._cycles, self._factor, self._momentum = list(cycles), factor, momentum
        super().__init__(optimizer)

    def _now(self) -> tuple[Cycle, int]:
        """The cycle of the next step, and the steps done in it."""
        step = self.last_epoch
        for cycle in self._cycles:
            if step < cycle.steps:
                return cycle, step
            step -= cycle.steps
        return self._cycles[-1], self._cycles[-1].steps - 1

    def _trained(self, group: dict[str, Any], cycle: Cycle) -> bool:
        return cycle.unfrozen is None or group.get("depth", 0) < cycle.unfrozen

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate of each group; sets its beta1 too."""
        cycle, step = self._now()
        peak, last = max(0.25 * cycle.steps - 1, 0.0), cycle.steps - 1
        low, high = self._momentum
        if step <= peak:
            part = step / peak if peak else 1.0
            lr, beta = _cosine(cycle.lr / 25, cycle.lr, part), _cosine(high, low, part)
        else:
            part = (step - peak) / (last - peak)
            lr, beta = _cosine(cycle.lr, cycle.lr / 1e5, part), _cosine(low, high, part)
        rates: list[float | torch.Tensor] = []
        for group in self.optimizer.param_groups:
            group["betas"] = (beta, *group["betas"][1:])
            trained = self._trained(group, cycle)
            rates.append(lr / self._factor ** group.get("depth", 0) if trained else 0.0)
        return rates

    def freeze(self) -> None:
        """Parameters that the current cycle does not train need no gradient, the others do."""
        cycle, _ = self._now()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.requires_grad_(self._trained(group, cycle))

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken; what they are comes with the constructor."""
        return {"last_epoch": self.last_epoch, "_last_lr": self._last_lr}

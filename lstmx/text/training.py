"""Training with Lightning: the chapter's optimiser, schedule and bookkeeping of state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lstmx.text.data import Batch
from lstmx.text.models import Activations, StatefulModel
from lstmx.text.regularisers import (
    activation_regularisation,
    temporal_activation_regularisation,
)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training batches.
        lr: peak of the learning rate.
        weight_decay: decoupled, times the learning rate; not on the biases of Linear layers.
        momentum: Adam's beta1 at the peak of the learning rate, and at both ends.
        alpha: factor of activation regularisation.
        beta: factor of temporal activation regularisation.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.01
    momentum: tuple[float, float] = (0.85, 0.95)
    alpha: float = 0.0
    beta: float = 0.0


class LanguageModelTask(pl.LightningModule):
    """A language model with its loss, its accuracy and its optimiser.

    Logs ``train_loss``, ``valid_loss`` (mean cross-entropy in nats, without penalties) and
    ``accuracy`` (share of right next words), once an epoch.

    Args:
        model: takes ids [B, T]; returns logits [B, V] or [B, T, V], or :class:`Activations`, as
            does its method ``activations`` if it has one.
        recipe: how to train it.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Any]:
        x, y = batch
        output = getattr(self.model, "activations", self.model)(x)
        logits = output.logits if isinstance(output, Activations) else output
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        return loss, logits, output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, _, output = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        if isinstance(output, Activations):
            loss = loss + activation_regularisation(output.dropped, self.recipe.alpha)
            loss = loss + temporal_activation_regularisation(output.raw, self.recipe.beta)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, logits, _ = self._loss(batch)
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        self.log_dict({"valid_loss": loss, "accuracy": accuracy}, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        """AdamW (Loshchilov & Hutter 2019) under one cycle (Smith 2018) with cosine slopes."""
        recipe = self.recipe
        biases = {
            module.bias
            for module in self.model.modules()
            if isinstance(module, nn.Linear) and module.bias is not None
        }
        decayed = [p for p in self.model.parameters() if p not in biases]
        low, high = recipe.momentum
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.weight_decay},
                {"params": list(biases), "weight_decay": 0.0},
            ],
            lr=recipe.lr,
            betas=(high, 0.99),
            eps=1e-5,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=recipe.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.25,
            div_factor=25,  # begins at lr / 25
            final_div_factor=1e5 / 25,  # ends at lr / 1e5
            base_momentum=low,
            max_momentum=high,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class ModelResetter(pl.Callback):
    """Each epoch's stream begins with an empty state, and validation leaves training's alone.

    Lightning may validate before training (its sanity check) or in the middle of an epoch; the
    state that training had then is set aside and put back.
    """

    def __init__(self) -> None:
        self._set_aside: Any = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if isinstance(pl_module.model, StatefulModel):
            pl_module.model.reset()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if isinstance(pl_module.model, StatefulModel):
            self._set_aside = pl_module.model.h
            pl_module.model.reset()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if isinstance(pl_module.model, StatefulModel):
            pl_module.model.h, self._set_aside = self._set_aside, None


class History(pl.Callback):
    """The metrics of each epoch, as a list of dictionaries."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Validation of the epoch is over by now, and its metrics are there.
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})

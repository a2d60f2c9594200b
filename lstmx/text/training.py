"""Training with Lightning: what is computed from a batch, the optimisers, the bookkeeping of state.

:class:`LanguageModelTask` is the chapter's. :class:`StreamTask` and :class:`ClassifierTask` are for
the AWD-LSTM; :mod:`lstmx.text.fit` puts them together with data, checkpoints and logs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lstmx.text.config import ClassifierTraining, LanguageModelTraining
from lstmx.text.data import Batch
from lstmx.text.models import Activations, StatefulModel
from lstmx.text.optimisers import NTASGD, Cycle, Cycles
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


class RunTask(pl.LightningModule):
    """What the training of a language model and of a classifier have in common.

    Logs ``train_loss`` (mean cross-entropy in nats, without penalties), ``lr`` (of the last layers)
    and ``tokens_per_second`` (of all processes, since the last line of the log) by step, and
    ``valid_loss`` by epoch.

    Args:
        model: has ``parameter_groups()``, the last layers last.
        settings: how to train it.
    """

    def __init__(self, model: Any, settings: LanguageModelTraining | ClassifierTraining) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        # By default it leaves out what is NaN, and with "disable" the weights (torchmetrics 1.9).
        self.valid_loss = MeanMetric(nan_strategy=math.nan)
        self._start_clock()

    def configure_optimizers(self) -> Any:
        """AdamW (Loshchilov & Hutter 2019) with one cycle for each stage, or NT-ASGD."""
        settings, decay = self.settings, self.settings.weight_decay
        if isinstance(settings, LanguageModelTraining) and settings.optimizer == "nt-asgd":
            return NTASGD(
                self.model.parameters(),
                settings.lr,
                weight_decay=1.2e-6 if decay is None else decay,
                patience=settings.patience_of_averaging,
            )
        decay = 0.01 if decay is None else decay
        # As fastai: no decay of the biases of Linear layers, nor of batch norm.
        free = {
            p
            for module in self.model.modules()
            for name, p in module.named_parameters(recurse=False)
            if isinstance(module, nn.BatchNorm1d)
            or (isinstance(module, nn.Linear) and name == "bias")
        }
        groups = []
        for depth, params in enumerate(reversed(self.model.parameter_groups())):
            decayed = [p for p in params if p not in free]
            others = [p for p in params if p in free]
            groups += [
                {"params": decayed, "weight_decay": decay, "depth": depth},
                {"params": others, "weight_decay": 0.0, "depth": depth},
            ]
        low, high = settings.momentum
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(high, 0.99), eps=1e-5
        )
        epochs = sum(stage.epochs for stage in settings.stages)
        steps = int(self.trainer.estimated_stepping_batches) // epochs
        schedule = Cycles(
            optimizer,
            [Cycle(s.epochs * steps, s.lr, s.unfrozen) for s in settings.stages],
            factor=settings.factor,
            momentum=(low, high),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _compute(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, int]:
        """The loss, the activations for AR and for TAR, and the number of tokens."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, dropped, raw, tokens = self._compute(batch)
        self._tokens += tokens
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = loss + activation_regularisation(dropped, self.settings.alpha)
        return loss + temporal_activation_regularisation(raw, self.settings.beta)

    def on_validation_epoch_end(self) -> None:
        self.log("valid_loss", self.valid_loss.compute(), prog_bar=True)
        self.valid_loss.reset()

    def _start_epoch(self) -> None:
        schedule = self.lr_schedulers()
        if isinstance(schedule, Cycles):
            schedule.freeze()
        self._start_clock()

    def _start_clock(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_start(self) -> None:
        # An epoch that is resumed has no on_train_epoch_start.
        self._start_epoch()

    def on_train_epoch_start(self) -> None:
        self._start_epoch()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step % self.settings.log_every == 0:
            seconds = time.perf_counter() - self._since
            rate = self._tokens * self.trainer.world_size / seconds
            self.log("tokens_per_second", rate, prog_bar=True)
            self._start_clock()


class StreamTask(RunTask):
    """An AWD-LSTM language model on a stream of text: batches (x [B, T], y [B, T]).

    The learning rate of a step is in proportion to T (Merity et al. 2017, section 5). With NT-ASGD
    the averaged weights are validated. Logs ``perplexity`` of validation too.

    Args:
        model: an :class:`lstmx.text.awd_lstm.AWDLSTMLanguageModel`.
        settings: how to train it.
        bptt: the T that the learning rate is meant for.
    """

    def __init__(self, model: Any, settings: LanguageModelTraining, bptt: int) -> None:
        super().__init__(model, settings)
        self.bptt = bptt
        self._scale = 1.0

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, int]:
        x, y = batch
        raw, dropped = self.model.features(x)
        return self.model.loss(dropped, y), dropped, raw, y.numel()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._scale = batch[0].size(1) / self.bptt

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        groups = self.trainer.optimizers[0].param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * self._scale
        super().optimizer_step(*args, **kwargs)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss, _, _, tokens = self._compute(batch)
        self.valid_loss.update(loss, tokens)

    def _swap(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, NTASGD):
            optimizer.swap()

    def on_validation_start(self) -> None:
        self._swap()

    def on_validation_end(self) -> None:
        self._swap()

    def on_validation_epoch_end(self) -> None:
        loss = self.valid_loss.compute()
        self.log("perplexity", loss.exp(), prog_bar=True)
        super().on_validation_epoch_end()
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, NTASGD):
            optimizer.validated(float(loss))


class ClassifierTask(RunTask):
    """A text classifier: batches (ids [B, T], lengths [B], labels [B]).

    Logs ``accuracy`` of validation too.

    Args:
        model: an :class:`lstmx.text.classifier.TextClassifier`.
        settings: how to train it.
    """

    def __init__(self, model: Any, settings: ClassifierTraining) -> None:
        super().__init__(model, settings)
        self.accuracy = MulticlassAccuracy(model.classes, average="micro")

    def _compute(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, int]:
        ids, lengths, labels = batch
        output = self.model(ids, lengths)
        loss = F.cross_entropy(output.logits, labels)
        return loss, output.dropped, output.raw, ids.numel()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids, lengths, labels = batch
        logits = self.model(ids, lengths).logits
        self.valid_loss.update(F.cross_entropy(logits, labels), len(labels))
        self.accuracy.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self.log("accuracy", self.accuracy.compute(), prog_bar=True)
        self.accuracy.reset()
        super().on_validation_epoch_end()

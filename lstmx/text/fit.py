"""A run: data, model, task, Lightning's trainer, checkpoints, logs; and evaluation.

A run has a folder with ``config.toml``, ``model.safetensors`` (the model of the epoch with the
lowest validation loss, with its tokenizer), ``last.ckpt`` (to resume from) and ``log/`` (read by
:func:`read_log`). Under ``torchrun`` each process trains its rows of every batch.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMLanguageModel
from lstmx.text.batches import DocumentBatches, StreamBatches
from lstmx.text.checkpoints import (
    CHECKPOINT,
    MODEL,
    CheckpointError,
    CheckpointFile,
    EarlyStopping,
    Keeper,
    RunError,
    StreamState,
)
from lstmx.text.classifier import TextClassifier
from lstmx.text.config import (
    ClassifierConfig,
    LanguageModelConfig,
    RunConfig,
    write_config,
)
from lstmx.text.corpus import Corpus, LabelledCorpus, LabelledSplit, read_labelled
from lstmx.text.interchange import match_embeddings
from lstmx.text.models import StatefulModel
from lstmx.text.storage import load_model
from lstmx.text.tokenizer import Tokenizer
from lstmx.text.training import ClassifierTask, RunTask, StreamTask

CONFIG = "config.toml"
LOG = "log"


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on a split.

    Attributes:
        loss: mean cross-entropy in nats, for each token of a language model, or document.
        accuracy: share of right classes; None for a language model.
        tokens: how many were read.
        seconds: how long it took.
    """

    loss: float
    accuracy: float | None
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: of the run.
        model: path of the best model.
        best_epoch: the epoch that it is of, from 0.
        valid_loss: its loss on the validation split, mean cross-entropy in nats.
        epochs: how many were done.
    """

    folder: Path
    model: Path
    best_epoch: int
    valid_loss: float
    epochs: int


# ---- Runs

# What may change when a run is resumed.
_FREE = {"source", "pretrained", "checkpoint_every", "log_every", "tensorboard", "accelerator"}


def _identity(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint must have been made with, by name."""
    parts = {"data": config.data, "model": config.model, "train": config.train}
    values = {
        f"{part}.{name}": value
        for part, section in parts.items()
        for name, value in asdict(section).items()
        if name not in _FREE
    }
    vocabulary = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    return {"kind": config.kind, **values, "vocabulary": vocabulary}


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without advice on devices, on workers for batches in memory, and on short epochs."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*LeafSpec.*is deprecated",  # its own call
                ".*does not have many workers",
                ".*smaller than the logging interval",
                ".*sync_dist=True",  # what is logged has been computed over all processes
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trainer(config: RunConfig, **options: Any) -> pl.Trainer:
    """A trainer for this process, or all that torchrun started."""
    processes: dict[str, Any] = {"devices": 1}
    if "LOCAL_WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        # Layers that are frozen get no gradient.
        strategy = DDPStrategy(find_unused_parameters=config.kind == "classifier")
        processes = {"devices": local, "num_nodes": _world_size() // local, "strategy": strategy}
    try:
        return pl.Trainer(
            accelerator=config.train.accelerator,
            **processes,
            precision=config.train.precision,
            gradient_clip_val=config.train.clip or None,
            log_every_n_steps=config.train.log_every,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the loaders give each process its rows
            **options,
        )
    except MisconfigurationException as error:
        raise RunError(f"train.accelerator {config.train.accelerator!r}: {error}") from error


def _loggers(folder: Path, tensorboard: bool) -> list[Any]:
    loggers: list[Any] = [CSVLogger(folder, name=LOG)]
    if tensorboard:
        try:
            loggers.append(TensorBoardLogger(folder, name="tensorboard"))
        except ModuleNotFoundError as error:
            raise RunError(
                "train.tensorboard needs the package tensorboard: pip install tensorboard"
            ) from error
    return loggers


def _run(
    config: RunConfig,
    folder: Path,
    task: RunTask,
    loaders: tuple[Any, Any],
    tokenizer: Tokenizer,
    classes: list[str] | None = None,
    *,
    resume: bool,
    progress: bool,
    callbacks: Sequence[pl.Callback],
) -> Result:
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise RunError(f"{folder} holds a run already: resume it, or choose another folder")
    if resume and not checkpoint.exists():
        raise CheckpointError(f"there is no checkpoint {checkpoint} to resume from")
    if _rank() == 0 and not resume:
        write_config(config, folder / CONFIG)
    train = config.train
    keeper = Keeper(folder, train.checkpoint_every, tokenizer, classes)
    own: list[pl.Callback] = [StreamState(loaders[0]), *callbacks, keeper]
    if train.patience:
        own.append(EarlyStopping("valid_loss", patience=train.patience))
    if progress:
        own.append(pl_callbacks.RichProgressBar())
    with _quiet_lightning():
        trainer = _trainer(
            config,
            max_epochs=sum(stage.epochs for stage in train.stages),
            logger=_loggers(folder, train.tensorboard),
            callbacks=own,
            plugins=[CheckpointFile(_identity(config, tokenizer))],
            default_root_dir=folder,
            enable_progress_bar=progress,
        )
        try:
            trainer.fit(task, *loaders, ckpt_path=checkpoint if resume else None)
        except OSError as error:
            raise RunError(
                f"{error}; {folder} still has what was written to it before: make room and resume"
            ) from error
    return Result(
        folder, folder / MODEL, keeper.best_epoch, keeper.best_loss, trainer.current_epoch
    )


def _pretrained(path: str) -> tuple[AWDLSTMLanguageModel, Tokenizer]:
    saved = load_model(path)
    if not isinstance(saved.model, AWDLSTMLanguageModel) or saved.tokenizer is None:
        raise RunError(
            f"model.pretrained must be a language model with its tokenizer, {path} has "
            f"{type(saved.model).__name__} and {saved.tokenizer!r}"
        )
    return saved.model, saved.tokenizer


def _language_model(config: LanguageModelConfig, tokenizer: Tokenizer) -> AWDLSTMLanguageModel:
    section = config.model
    if section.pretrained is None:
        return AWDLSTMLanguageModel(
            len(tokenizer),
            section.encoder,
            tied=section.tied,
            bias=section.bias,
            cutoffs=section.cutoffs or None,
        )
    old, words = _pretrained(section.pretrained)
    model = AWDLSTMLanguageModel(
        len(words),
        old.config.with_dropouts(section.encoder),
        tied=old.tied,
        bias=old.bias,
        cutoffs=old.cutoffs,
    )
    model.load_state_dict(old.state_dict())
    if words != tokenizer:
        match_embeddings(model, words.words, tokenizer.words)
    return model


def _stream_loaders(
    config: LanguageModelConfig, corpus: Corpus
) -> tuple[StreamBatches, StreamBatches]:
    data = config.data
    shard: dict[str, Any] = {"rank": _rank(), "world_size": _world_size()}
    train = StreamBatches(
        corpus.split("train"),
        data.batch_size,
        data.bptt,
        random_length=data.random_length,
        seed=config.train.seed,
        **shard,
    )
    return train, StreamBatches(corpus.split("valid"), data.eval_batch_size, data.bptt, **shard)


def _stream_task(config: LanguageModelConfig, corpus: Corpus) -> StreamTask:
    pl.seed_everything(config.train.seed, verbose=False)
    return StreamTask(_language_model(config, corpus.tokenizer), config.train, config.data.bptt)


def fit_language_model(
    config: LanguageModelConfig,
    corpus: Corpus,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> Result:
    """Trains a language model, and keeps the best one.

    Args:
        config: the run. Its ``data.source`` is not looked at.
        corpus: the text.
        folder: of the run; made if it is not there.
        resume: go on from the folder's checkpoint.
        progress: show a bar.
        callbacks: more of them for Lightning.

    Raises:
        RunError: the folder holds a run already; the loss is no longer finite; a package is absent.
        CheckpointError: the checkpoint cannot be written or read, or is of another run.
        ValueError: a split has too few tokens for the batch, or the sizes do not fit.
    """
    task, loaders = _stream_task(config, corpus), _stream_loaders(config, corpus)
    return _run(
        config,
        folder,
        task,
        loaders,
        corpus.tokenizer,
        resume=resume,
        progress=progress,
        callbacks=callbacks,
    )


def read_documents(config: ClassifierConfig, tokenizer: Tokenizer) -> LabelledCorpus:
    """The labelled documents of a run, in the tokens of its language model.

    Raises:
        CorpusError: what :func:`lstmx.text.corpus.read_labelled` raises.
    """
    data = config.data
    return read_labelled(
        Path(data.source),
        tokenizer,
        valid_fraction=data.valid_fraction,
        seed=config.train.seed,
        text_column=data.text_column,
        label_column=data.label_column,
    )


def _classifier_task(config: ClassifierConfig, classes: int) -> ClassifierTask:
    pl.seed_everything(config.train.seed, verbose=False)
    section = config.model
    trained, tokenizer = _pretrained(section.pretrained)
    encoder = AWDLSTM(len(tokenizer), trained.config.with_dropouts(section.encoder))
    if not section.scratch:
        encoder.load_state_dict(trained.encoder.state_dict())
    model = TextClassifier(
        encoder,
        classes,
        hidden=section.hidden,
        drops=section.drops,
        bptt=section.bptt,
        max_length=section.max_length or None,
    )
    return ClassifierTask(model, config.train)


def _document_loaders(
    config: ClassifierConfig, corpus: LabelledCorpus
) -> tuple[DocumentBatches, DocumentBatches]:
    shard: dict[str, Any] = {"rank": _rank(), "world_size": _world_size()}
    size = config.data.batch_size
    return (
        DocumentBatches(corpus.train, size, shuffle=True, seed=config.train.seed, **shard),
        DocumentBatches(corpus.valid, size, **shard),
    )


def fit_classifier(
    config: ClassifierConfig,
    corpus: LabelledCorpus,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> Result:
    """Trains a text classifier from a language model, unfreezing it by stages; keeps the best one.

    Args:
        config: the run.
        corpus: the documents; :func:`read_documents` reads them.
        folder, resume, progress, callbacks: as of :func:`fit_language_model`.

    Raises:
        RunError, CheckpointError: as :func:`fit_language_model`.
        ModelFileError: ``model.pretrained`` cannot be read.
        ValueError: the sizes do not fit.
    """
    return _run(
        config,
        folder,
        _classifier_task(config, len(corpus.classes)),
        _document_loaders(config, corpus),
        corpus.tokenizer,
        corpus.classes,
        resume=resume,
        progress=progress,
        callbacks=callbacks,
    )


def fit(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> Result:
    """Reads the data that a run names and trains what it says.

    Args, errors: as of :func:`fit_language_model` and :func:`fit_classifier`; and CorpusError.
    """
    options: dict[str, Any] = {"resume": resume, "progress": progress, "callbacks": callbacks}
    if isinstance(config, LanguageModelConfig):
        return fit_language_model(config, Corpus.open(config.data.source), folder, **options)
    _, tokenizer = _pretrained(config.model.pretrained)
    return fit_classifier(config, read_documents(config, tokenizer), folder, **options)


# ---- Learning rate


@dataclass(frozen=True)
class RateSearch:
    """Training loss by learning rate.

    Attributes:
        rates: rising.
        losses: smoothed, in nats.
        suggestion: the rate at which the loss falls fastest.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float


class _RateSweep(pl.Callback):
    """Raises the learning rate from step to step, until the loss is four times its lowest."""

    def __init__(self, low: float, high: float, steps: int, factor: float) -> None:
        self.low, self.high, self.steps, self.factor = low, high, steps, factor
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._mean = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        part = len(self.rates) / (self.steps - 1)
        self.rates.append(self.low * (self.high / self.low) ** part)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[-1] / self.factor ** group.get("depth", 0)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        loss, keep = float(trainer.callback_metrics["train_loss"]), 0.9
        self._mean = keep * self._mean + (1 - keep) * loss
        self.losses.append(self._mean / (1 - keep ** len(self.rates)))
        if not self.losses[-1] <= 4 * min(self.losses):  # NaN too
            trainer.should_stop = True


def find_lr(
    config: RunConfig, *, low: float = 1e-5, high: float = 10.0, steps: int = 100
) -> RateSearch:
    """Tries rising learning rates on the model of a run, which is not kept (Smith 2017).

    Args:
        config: the run; its data are read.
        low: first rate.
        high: last rate, if the loss does not rise before.
        steps: how many.

    Raises:
        ValueError: not 0 < low < high, or fewer than 2 steps; what the run's parts raise.
    """
    if not 0 < low < high or steps < 2:
        raise ValueError(
            f"low, high and steps must be 0 < low < high and at least 2, got {low}, {high}, {steps}"
        )
    task: RunTask
    loaders: tuple[Any, Any]
    if isinstance(config, LanguageModelConfig):
        corpus = Corpus.open(config.data.source)
        task, loaders = _stream_task(config, corpus), _stream_loaders(config, corpus)
    else:
        documents = read_documents(config, _pretrained(config.model.pretrained)[1])
        task = _classifier_task(config, len(documents.classes))
        loaders = _document_loaders(config, documents)
    sweep = _RateSweep(low, high, steps, config.train.factor)
    with _quiet_lightning():
        trainer = _trainer(
            config,
            max_steps=steps,
            max_epochs=-1,
            logger=False,
            callbacks=[StreamState(loaders[0]), sweep],
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(task, *loaders)
    count = sum(map(math.isfinite, sweep.losses))
    slopes = [b - a for a, b in pairwise(sweep.losses[:count])]
    steepest = min(range(len(slopes)), key=slopes.__getitem__, default=0)
    return RateSearch(sweep.rates[:count], sweep.losses[:count], sweep.rates[steepest])


# ---- Evaluation and logs


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; the model is then as it was, its state included."""
    training = model.training
    state = model.h if isinstance(model, StatefulModel) else None
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if isinstance(model, StatefulModel):
            model.h = state


def evaluate(
    model: AWDLSTMLanguageModel, ids: Tensor, *, batch_size: int = 1, bptt: int = 70
) -> Evaluation:
    """The perplexity of a language model on a text, the last words included.

    The text is read as ``batch_size`` parts side by side, with the state carried through each, and
    every token but the first of a part is predicted. With a batch size of 1 the text is read in one
    piece, as for the numbers in papers; the tokens that do not fill larger batches are left out.

    Args:
        model: the language model.
        ids: token ids [n].
        batch_size: parts.
        bptt: steps at a time, which the result does not depend on.

    Raises:
        ValueError: what :class:`lstmx.text.batches.StreamBatches` raises.
    """
    batches = StreamBatches(ids, batch_size, bptt)
    device = next(model.parameters()).device
    total, tokens, start = 0.0, 0, time.perf_counter()
    with _evaluating(model):
        model.reset()
        for x, y in batches:
            _, dropped = model.features(x.to(device))
            total += float(model.loss(dropped, y.to(device))) * y.numel()
            tokens += y.numel()
    return Evaluation(total / tokens, None, tokens, time.perf_counter() - start)


def evaluate_classifier(
    model: TextClassifier, split: LabelledSplit, *, batch_size: int = 32
) -> Evaluation:
    """The loss and the accuracy of a classifier on labelled documents.

    Args:
        model: the classifier.
        split: the documents.
        batch_size: how many at a time, which the result does not depend on.

    Raises:
        ValueError: what :class:`lstmx.text.batches.DocumentBatches` raises.
    """
    device = next(model.parameters()).device
    loss, right, tokens, start = 0.0, 0, 0, time.perf_counter()
    with _evaluating(model):
        for ids, lengths, labels in DocumentBatches(split, batch_size):
            logits = model(ids.to(device), lengths.to(device)).logits.float().cpu()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(1) == labels).sum())
            tokens += int(lengths.sum())
    seconds = time.perf_counter() - start
    return Evaluation(loss / len(split), right / len(split), tokens, seconds)


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log of a run, one dictionary for each line, by rising ``step``.

    A run that was resumed has a log for each part; what a part did after the checkpoint that the
    next one went on from is left out.

    Raises:
        RunError: the folder has no log.
    """
    paths = sorted((folder / LOG).glob("version_*/metrics.csv"), key=_version)
    if not paths:
        raise RunError(f"{folder} has no log of a run in {LOG}/")
    rows: list[dict[str, float]] = []
    for path in paths:
        text = path.read_text()
        lines = text[: text.rfind("\n") + 1].splitlines()  # a killed run may leave half of one
        part = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
        if part:
            rows = [row for row in rows if row["step"] < part[0]["step"]] + part
    return rows


def _version(path: Path) -> int:
    return int(path.parent.name.removeprefix("version_"))

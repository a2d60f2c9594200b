"""The chapter's experiments: each model, how it is trained, and what the book printed."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from lstmx.environment import environment
from lstmx.text import data
from lstmx.text import models as m
from lstmx.text.training import History, LanguageModelTask, ModelResetter, Recipe

BATCH_SIZE = 64
HIDDEN = 64
PROMPT = "one thousand twenty one . one thousand"
VOCABULARY = 30


@dataclass(frozen=True)
class Experiment:
    """One row of the chapter's table.

    Attributes:
        title: what is new in this model.
        make: builds it, given the name of a backend.
        batches: its data.
        recipe: how it is trained.
        book: validation loss and accuracy that the book prints, if it does.
        floor: the accuracy that the mean over seeds must reach, if the recipe is tuned for it.
    """

    title: str
    make: Callable[[str], nn.Module]
    batches: Callable[[list[int]], data.Split]
    recipe: Recipe
    book: tuple[float, float] | None
    floor: float | None


def _three_words(ids: list[int]) -> data.Split:
    return data.triples(ids, BATCH_SIZE, stateful=False)


def _three_words_in_order(ids: list[int]) -> data.Split:
    return data.triples(ids, BATCH_SIZE, stateful=True)


def _sequences(ids: list[int]) -> data.Split:
    return data.sequences(ids, BATCH_SIZE)


def _layered(model: Any, *args: Any, **options: Any) -> Callable[[str], nn.Module]:
    return lambda backend: model(VOCABULARY, HIDDEN, 2, *args, backend=backend, **options)


_AWD = Recipe(15, 1e-2, weight_decay=0.1, momentum=(0.7, 0.8), alpha=2, beta=1)

EXPERIMENTS = {
    "1": Experiment(
        "three words, unrolled",
        lambda _: m.LMModel1(VOCABULARY, HIDDEN),
        _three_words,
        Recipe(4, 1e-3),
        (1.651, 0.494),
        0.46,
    ),
    "2": Experiment(
        "three words in a loop",
        lambda _: m.LMModel2(VOCABULARY, HIDDEN),
        _three_words,
        Recipe(4, 1e-3),
        (1.657, 0.470),
        0.46,
    ),
    "3": Experiment(
        "state kept",
        lambda _: m.LMModel3(VOCABULARY, HIDDEN),
        _three_words_in_order,
        Recipe(10, 3e-3),
        (1.651, 0.589),
        0.585,
    ),
    "4": Experiment(
        "every step predicted",
        lambda _: m.LMModel4(VOCABULARY, HIDDEN),
        _sequences,
        Recipe(15, 3e-3),
        (1.878, 0.640),
        0.62,
    ),
    "5": Experiment(
        "two-layer RNN",
        _layered(m.LMModel5),
        _sequences,
        Recipe(15, 3e-3),
        (2.180, 0.488),
        0.52,
    ),
    "5-gru": Experiment(
        "two-layer GRU, trained as 5",
        _layered(m.LMModel5, cell="GRU"),
        _sequences,
        Recipe(15, 3e-3),
        None,
        None,
    ),
    "6": Experiment(
        "two-layer LSTM",
        _layered(m.LMModel6),
        _sequences,
        Recipe(15, 1e-2),
        (1.368, 0.758),
        0.72,
    ),
    "6-gru": Experiment(
        "two-layer GRU, trained as 6",
        _layered(m.LMModel6, cell="GRU"),
        _sequences,
        Recipe(15, 1e-2),
        None,
        None,
    ),
    "7": Experiment(
        "AWD-LSTM: dropout, AR, TAR, tied",
        _layered(m.LMModel7, 0.4),
        _sequences,
        _AWD,
        (0.458, 0.869),
        0.87,
    ),
    "7-gru": Experiment(
        "the same with a GRU",
        _layered(m.LMModel7, 0.4, cell="GRU"),
        _sequences,
        _AWD,
        None,
        0.93,
    ),
}


@dataclass(frozen=True)
class Run:
    """One model trained from one seed. Losses in nats, times in seconds."""

    seed: int
    valid_loss: float
    accuracy: float
    seconds: float
    epochs: list[dict[str, float]]


class _Bar(pl.Callback):
    """Moves a bar of rich by one for each training batch."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task

    def on_train_batch_end(self, *_: Any) -> None:
        self.progress.advance(self.task)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        accuracy = trainer.callback_metrics["accuracy"]
        self.progress.update(self.task, metric=f"accuracy {accuracy:.3f}")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without advice on devices, and on workers for batches that are already in memory."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # its own call
            yield
    finally:
        logger.setLevel(level)


def find(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"models must be among {', '.join(EXPERIMENTS)}, got {name!r}")
    return EXPERIMENTS[name]


def train(
    name: str,
    seed: int,
    *,
    backend: str = "lstmx",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    epochs: int | None = None,
) -> tuple[Run, nn.Module]:
    """Trains one model from one seed.

    Args:
        name: key of :data:`EXPERIMENTS`.
        seed: of torch's generator.
        backend: name of :data:`lstmx.text.models.BACKENDS`.
        progress: draws a bar there.
        checkpoint: directory for ``NAME-seedN.ckpt``.
        epochs: in place of the recipe's.

    Returns:
        The run, and the trained model.
    """
    experiment = find(name)
    pl.seed_everything(seed, verbose=False)
    model = experiment.make(backend)
    batches: Any = experiment.batches(data.human_number_ids())
    history = History()
    callbacks: list[pl.Callback] = [ModelResetter(), history]
    epochs = epochs or experiment.recipe.epochs
    if progress is not None:
        total = epochs * len(batches.train)
        bar = progress.add_task(f"model {name}, seed {seed}", total=total, metric="")
        callbacks.append(_Bar(progress, bar))
    with _quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        start = time.perf_counter()
        # batch_size=None: the batches are made already, and stay in their order.
        loaders: list[Any] = [DataLoader(part, batch_size=None) for part in batches]
        trainer.fit(LanguageModelTask(model, experiment.recipe), loaders[0], loaders[1])
        seconds = time.perf_counter() - start
        if checkpoint is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(checkpoint / f"{name}-seed{seed}.ckpt")
    last = history.epochs[-1]
    return Run(seed, last["valid_loss"], last["accuracy"], seconds, history.epochs), model


def progress_bar(**options: Any) -> Progress:
    """The bar that :func:`train` moves."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metric]}"),
        **options,
    )


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(results: dict[str, list[Run]]) -> Table:
    """The book beside ours; mean and standard deviation over seeds."""
    seeds = max(len(runs) for runs in results.values())
    drawn = Table(title=f"Human numbers, {seeds} seed{'s' if seeds > 1 else ''}")
    for column in ("model", "", "valid loss", "book", "accuracy", "book", "seconds"):
        drawn.add_column(column, justify="left" if column in ("model", "") else "right")
    for name, runs in results.items():
        experiment = find(name)
        book = ["", ""] if experiment.book is None else [f"{v:.3f}" for v in experiment.book]
        drawn.add_row(
            name,
            experiment.title,
            _mean_and_spread([run.valid_loss for run in runs]),
            book[0],
            _mean_and_spread([run.accuracy for run in runs]),
            book[1],
            f"{statistics.mean(run.seconds for run in runs):.1f}",
        )
    return drawn


def as_json(results: dict[str, list[Run]], backend: str) -> dict[str, Any]:
    """All results, with what they were measured on."""
    rows = []
    for name, runs in results.items():
        experiment = find(name)
        rows.append(
            {
                "model": name,
                "title": experiment.title,
                "book": None
                if experiment.book is None
                else dict(zip(("valid_loss", "accuracy"), experiment.book, strict=True)),
                "recipe": asdict(experiment.recipe),
                "mean": {
                    key: statistics.mean(getattr(run, key) for run in runs)
                    for key in ("valid_loss", "accuracy", "seconds")
                },
                "runs": [asdict(run) for run in runs],
            }
        )
    return {"environment": environment(), "backend": backend, "results": rows}

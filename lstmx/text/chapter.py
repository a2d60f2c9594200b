"""The chapter's experiments: each model, how it is trained, and what the book printed."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

from lstmx.text import data
from lstmx.text import models as m
from lstmx.text.generation import continue_text
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
    book: tuple[float, float] | None = None
    floor: float | None = None


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
        floor=0.93,
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
    """Moves the bar of one model, which is as long as its trainings from all seeds."""

    def __init__(self, progress: Progress, name: str, seeds: int) -> None:
        self.progress, self.seeds = progress, seeds
        self.task = progress.add_task(f"model {name}", total=None, metric="")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        total = self.seeds * trainer.estimated_stepping_batches
        self.progress.update(self.task, total=total)

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
    accelerator: str = "cpu",
    checkpoint: Path | None = None,
    epochs: int | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> tuple[Run, nn.Module]:
    """Trains one model from one seed.

    Args:
        name: key of :data:`EXPERIMENTS`.
        seed: of torch's generator.
        backend: name of :data:`lstmx.text.models.BACKENDS`.
        accelerator: Lightning's: "auto", "cpu" or "gpu".
        checkpoint: directory for ``NAME-seedN.ckpt``.
        epochs: in place of the recipe's.
        callbacks: more of them for Lightning.

    Returns:
        The run, and the trained model.
    """
    experiment = find(name)
    pl.seed_everything(seed, verbose=False)
    model = experiment.make(backend)
    # batch_size=None: the batches are made already, and stay in their order.
    batches: Any = experiment.batches(data.human_number_ids())
    loaders: list[Any] = [DataLoader(part, batch_size=None) for part in batches]
    history = History()
    with _quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=epochs or experiment.recipe.epochs,
            accelerator=accelerator,
            callbacks=[ModelResetter(), history, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        start = time.perf_counter()
        trainer.fit(LanguageModelTask(model, experiment.recipe), *loaders)
        seconds = time.perf_counter() - start
        if checkpoint is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(checkpoint / f"{name}-seed{seed}.ckpt")
    last = history.epochs[-1]
    return Run(seed, last["valid_loss"], last["accuracy"], seconds, history.epochs), model


Results = dict[str, list[Run]]


def train_all(
    names: Sequence[str],
    seeds: int,
    *,
    backend: str = "lstmx",
    accelerator: str = "cpu",
    progress: Progress,
    checkpoint: Path | None = None,
) -> tuple[Results, dict[str, str]]:
    """Trains models from seeds 0 to ``seeds`` - 1, with a bar for each model.

    Returns:
        The runs of each model, and how its last one continues :data:`PROMPT`, if it predicts after
        every word.
    """
    results: Results = {}
    continued = {}
    for name in names:
        bar = _Bar(progress, name, seeds)
        results[name] = []
        for seed in range(seeds):
            run, model = train(
                name,
                seed,
                backend=backend,
                accelerator=accelerator,
                checkpoint=checkpoint,
                callbacks=[bar],
            )
            results[name].append(run)
        if find(name).batches is _sequences:
            continued[name] = continue_text(model, PROMPT, 24)
    return results, continued

"""Results for the terminal and for files: progress, tables, JSON."""

from __future__ import annotations

import datetime
import json
import math
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lstmx.environment import environment
from lstmx.text.chapter import Results, find
from lstmx.text.commands import Classified
from lstmx.text.corpus import SPLITS, Corpus
from lstmx.text.fit import Evaluation, Result
from lstmx.text.memory import CELLS, NAMES, MemoryResult
from lstmx.text.tokenizer import UNK


def progress_bar(**options: Any) -> Progress:
    """A bar of batches, with room for a metric."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metric]}"),
        **options,
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def chapter_table(results: Results) -> Table:
    """The book beside ours; mean and standard deviation over seeds."""
    seeds = max(len(runs) for runs in results.values())
    table = _table(f"Human numbers, {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("model", no_wrap=True)
    table.add_column()
    for column in ("valid loss", "book", "accuracy", "book", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, runs in results.items():
        experiment = find(name)
        book = ["", ""] if experiment.book is None else [f"{v:.3f}" for v in experiment.book]
        table.add_row(
            name,
            experiment.title,
            _mean_and_spread([run.valid_loss for run in runs]),
            book[0],
            _mean_and_spread([run.accuracy for run in runs]),
            book[1],
            f"{statistics.mean(run.seconds for run in runs):.1f}",
        )
    return table


def memory_table(results: Sequence[MemoryResult]) -> Table:
    """Accuracy by distance, mean over seeds."""
    table = _table("Accuracy, mean over seeds")
    table.add_column("distance", justify="right")
    for cell in CELLS:
        table.add_column(cell, justify="right")
    for distance in dict.fromkeys(result.distance for result in results):
        means = [
            statistics.mean(r.accuracy for r in results if (r.cell, r.distance) == (cell, distance))
            for cell in CELLS
        ]
        table.add_row(str(distance), *(f"{mean:.3f}" for mean in means))
    table.caption = f"guessing gives {1 / len(NAMES):.3f}"
    return table


def chapter_json(results: Results, backend: str) -> dict[str, Any]:
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


def memory_json(results: Sequence[MemoryResult]) -> dict[str, Any]:
    """All results, with what they were measured on."""
    return {"environment": environment(), "results": [asdict(result) for result in results]}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds)))


def perplexity(loss: float) -> str:
    """exp(loss), which a model that is not trained yet can have very large."""
    return f"{math.exp(loss):.1f}" if loss < 16 else f"e^{loss:.1f}"


class TrainingProgress(pl.Callback):
    """A line for each epoch, and below them a bar with loss, perplexity and tokens per second.

    Used as a context manager around the training. Only the first process of several shows anything.
    What the bar shows is read every ``log_every`` steps, so that a GPU need not wait for it.

    Args:
        console: where to.

    Attributes:
        interrupted: whether the training was stopped by Ctrl-C.
    """

    _ROW = "{:>5}  {:>10}  {:>10}  {:>10}  {:>9}  {:>8}"

    def __init__(self, console: Console) -> None:
        self.console, self.interrupted = console, False
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[metric]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        measure = "accuracy" if hasattr(pl_module, "accuracy") else "perplexity"
        header = self._ROW.format("epoch", "train loss", "valid loss", measure, "tokens/s", "time")
        self.console.print(header, style="bold", highlight=False)
        self._task = self._progress.add_task("", total=None, metric="")
        self._start_epoch(trainer)

    def _start_epoch(self, trainer: pl.Trainer) -> None:
        self._begin = self._end = time.perf_counter()
        self._losses: Any = 0.0
        self._batches = self._tokens = 0
        if self._task is not None:
            self._progress.reset(
                self._task,
                description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
                total=trainer.num_training_batches,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start_epoch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._task is None:
            return
        self._losses = self._losses + trainer.callback_metrics["train_loss"]
        self._batches += 1
        self._tokens += batch[0].numel() * trainer.world_size
        self._end = time.perf_counter()
        self._progress.update(self._task, completed=batch_idx + 1)
        if self._batches % pl_module.settings.log_every == 1:
            loss = float(trainer.callback_metrics["train_loss"])
            shown = f"loss {loss:.2f} ppl {perplexity(loss)} {self._rate()} tokens/s"
            self._progress.update(self._task, metric=shown)

    def _rate(self) -> str:
        return f"{self._tokens / (self._end - self._begin):,.0f}"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._task is not None:
            self._progress.update(self._task, metric="validating")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._task is None:
            return
        metrics = trainer.callback_metrics
        loss = float(metrics["valid_loss"])
        accuracy = metrics.get("accuracy")
        row = self._ROW.format(
            trainer.current_epoch + 1,
            f"{float(self._losses) / max(self._batches, 1):.3f}",
            f"{loss:.3f}",
            perplexity(loss) if accuracy is None else f"{float(accuracy):.3f}",
            self._rate(),
            _duration(time.perf_counter() - self._begin),
        )
        self.console.print(row, highlight=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)


def corpus_table(corpus: Corpus) -> Table:
    """The sizes of a prepared corpus, and how much of it the vocabulary does not have."""
    table = _table(f"{corpus.folder}: {len(corpus.tokenizer):,} words")
    for column in ("split", "tokens", "unknown"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in SPLITS:
        ids = corpus.split(split)
        unknown = sum(int((part == UNK).sum()) for part in ids.split(1 << 20))
        table.add_row(split, f"{len(ids):,}", f"{unknown / len(ids):.2%}")
    return table


def run_summary(result: Result) -> str:
    """Where the best model of a run is, and how good it is."""
    return (
        f"best: epoch {result.best_epoch + 1} of {result.epochs}, validation loss "
        f"{result.valid_loss:.3f}\nmodel: {result.model}"
    )


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """What a model reaches on a split."""
    table = _table(title)
    table.add_column("loss", justify="right")
    classifier = evaluation.accuracy is not None
    table.add_column("accuracy" if classifier else "perplexity", justify="right")
    for column in ("tokens", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{evaluation.loss:.4f}",
        perplexity(evaluation.loss)
        if evaluation.accuracy is None
        else f"{evaluation.accuracy:.4f}",
        f"{evaluation.tokens:,}",
        f"{evaluation.tokens / evaluation.seconds:,.0f}",
    )
    return table


def evaluation_json(
    evaluation: Evaluation, model: Path, source: Path, split: str
) -> dict[str, Any]:
    """The same, with what it was measured on."""
    measured = asdict(evaluation)
    if evaluation.accuracy is None:
        measured["perplexity"] = evaluation.perplexity
    return {
        "environment": environment(),
        "model": str(model),
        "source": str(source),
        "split": split,
        **measured,
    }


def classified_line(result: Classified) -> str:
    """The best class, its probability and the beginning of the document."""
    best = result.best
    width = max(map(len, result.probabilities))
    begin = textwrap.shorten(result.text, 60, placeholder=" ...")
    return f"{best:{width}}  {result.probabilities[best]:.3f}  {begin}"


def classified_json(result: Classified) -> str:
    """All probabilities, on a line."""
    return json.dumps({"class": result.best, **result._asdict()}, ensure_ascii=False)

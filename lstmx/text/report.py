"""Results for the terminal and for files: progress, tables, JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lstmx.environment import environment
from lstmx.text.chapter import Results, find
from lstmx.text.memory import CELLS, NAMES, MemoryResult


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
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)


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

"""Plots of results."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lstmx.text.chapter import Run, find


def save(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the name asks for; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    os.replace(temporary, path)


def learning_curves(results: dict[str, list[Run]]) -> Figure:
    """Validation loss and accuracy by epoch: mean and deviation over seeds, and the book."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    for axis, key, label, place in (
        (axes[0], "valid_loss", "validation loss (nats)", 0),
        (axes[1], "accuracy", "accuracy", 1),
    ):
        for index, (name, runs) in enumerate(results.items()):
            color = f"C{index}"
            curves = [[epoch[key] for epoch in run.epochs] for run in runs]
            epochs = range(1, len(curves[0]) + 1)
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axis.plot(epochs, mean, color=color, linewidth=2, label=f"model {name}")
            if len(curves) > 1:
                spread = [statistics.stdev(values) for values in zip(*curves, strict=True)]
                low = [m - s for m, s in zip(mean, spread, strict=True)]
                high = [m + s for m, s in zip(mean, spread, strict=True)]
                axis.fill_between(epochs, low, high, color=color, alpha=0.12, linewidth=0)
            book = find(name).book
            if book is not None:
                axis.axhline(book[place], color=color, linestyle="--", linewidth=1)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[1].plot([], [], color="gray", linestyle="--", linewidth=1, label="the book, last epoch")
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    return figure

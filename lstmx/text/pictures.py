"""Plots of results."""

from __future__ import annotations

import os
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
    """Validation loss and accuracy by epoch; every seed thin, the mean thick, the book dashed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, key, label, place in (
        (axes[0], "valid_loss", "validation loss (nats)", 0),
        (axes[1], "accuracy", "accuracy", 1),
    ):
        for index, (name, runs) in enumerate(results.items()):
            color = f"C{index}"
            curves = [[epoch[key] for epoch in run.epochs] for run in runs]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(epochs, curve, color=color, alpha=0.25, linewidth=0.8)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axis.plot(epochs, mean, color=color, linewidth=2, label=f"model {name}")
            book = find(name).book
            if book is not None:
                axis.axhline(book[place], color=color, linestyle="--", linewidth=1)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[1].plot([], [], color="gray", linestyle="--", linewidth=1, label="the book, last epoch")
    axes[1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    return figure

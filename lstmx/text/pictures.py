"""Plots of results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import nn

from lstmx.text.chapter import Run, find
from lstmx.text.diagrams import DIAGRAMS
from lstmx.text.fit import RateSearch
from lstmx.text.memory import NAMES, MemoryResult


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


def _norms_over_time(cell: nn.Module, steps: int, *, relu: bool) -> tuple[list[float], list[float]]:
    """Norm of the state at each step, and of the last step's gradient by that state."""
    hidden = 64
    states, x = [], torch.randn(steps, 1, hidden)
    h = torch.zeros(1, hidden, requires_grad=True)
    c = torch.zeros(1, hidden, requires_grad=True)
    for t in range(steps):
        if isinstance(cell, nn.LSTMCell):
            h, c = cell(x[t], (h, c))
            states.append(c)
        else:
            h = torch.relu(cell(h) + x[t]) if relu else torch.tanh(cell(h) + x[t])
            states.append(h)
    grads = torch.autograd.grad(h.sum(), states)
    return [s.norm().item() for s in states], [max(g.norm().item(), 1e-30) for g in grads]


def gradients(steps: int = 60) -> Figure:
    """What a net's activations, and the gradients of its last step, do over time."""
    torch.manual_seed(0)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    rotation = torch.linalg.qr(torch.randn(64, 64)).Q
    for index, (name, scale, relu) in enumerate(
        (
            ("RNN, ReLU, large weights", 1.8, True),
            ("RNN, ReLU, small weights", 1.0, True),
            ("RNN, tanh", 1.0, False),
            ("LSTM, cell state, forget gate near 1", None, False),
        )
    ):
        cell: nn.Module
        if scale is None:
            cell = nn.LSTMCell(64, 64)
            with torch.no_grad():
                cell.bias_hh[64:128] += 4.0  # remember, until training says otherwise
        else:
            cell = nn.Linear(64, 64, bias=False)
            with torch.no_grad():
                cell.weight.copy_(rotation * scale)
        activations, grads = _norms_over_time(cell, steps, relu=relu)
        for axis, values in zip(axes, (activations, grads), strict=True):
            axis.semilogy(range(1, steps + 1), values, color=f"C{index}", linewidth=2, label=name)
    axes[0].set_ylabel("norm of the state")
    axes[1].set_ylabel("norm of d(last output) / d(state)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, loc="upper left", fontsize=9)
    figure.tight_layout()
    return figure


def memory(results: list[MemoryResult]) -> Figure:
    """Accuracy by distance: every seed a dot, the mean a line."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for index, cell in enumerate(dict.fromkeys(result.cell for result in results)):
        of_cell = [result for result in results if result.cell == cell]
        width = (2, 6, 2)[index % 3]  # LSTM and GRU lie on each other: both are to be seen
        axis.plot(
            [result.distance for result in of_cell],
            [result.accuracy for result in of_cell],
            "o",
            color=f"C{index}",
            markersize=4 + width,
            alpha=0.4,
        )
        distances = sorted({result.distance for result in of_cell})
        means = [
            statistics.mean(r.accuracy for r in of_cell if r.distance == distance)
            for distance in distances
        ]
        axis.plot(distances, means, color=f"C{index}", linewidth=width, label=cell)
    axis.axhline(1 / len(NAMES), color="gray", linestyle="--", linewidth=1)
    axis.text(results[0].distance, 1 / len(NAMES) + 0.02, "guessing", color="gray", fontsize=9)
    axis.set_xscale("log", base=2)
    distances = sorted({result.distance for result in results})
    axis.set_xticks(distances, [str(distance) for distance in distances])
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("words between name and question")
    axis.set_ylabel("accuracy")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="center left")
    figure.tight_layout()
    return figure


Log = Sequence[Mapping[str, float]]


def _column(log: Log, name: str) -> tuple[list[float], list[float]]:
    """The steps at which a log has a value, and the values."""
    rows = [(row["step"], row[name]) for row in log if name in row]
    return [step for step, _ in rows], [value for _, value in rows]


def _smoothed(values: list[float], window: int) -> list[float]:
    """The mean of each value and those before it: the loss of one batch is noisy."""
    return [statistics.mean(values[max(0, i - window) : i + 1]) for i in range(len(values))]


def training_curves(runs: Mapping[str, Log]) -> Figure:
    """Losses, perplexity or accuracy of validation, and learning rate, by step.

    Args:
        runs: the log of each run, as of :func:`lstmx.text.fit.read_log`, by name.
    """
    classifiers = any("accuracy" in row for log in runs.values() for row in log)
    measure = "accuracy" if classifiers else "perplexity"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    for index, (name, log) in enumerate(runs.items()):
        color = f"C{index}"
        steps, losses = _column(log, "train_loss")
        axes[0].plot(steps, losses, color=color, linewidth=0.8, alpha=0.25)
        smooth = _smoothed(losses, len(losses) // 30)
        axes[0].plot(steps, smooth, color=color, linewidth=2, label=f"{name}: training")
        valid = {"color": color, "linestyle": "--", "marker": "o", "markersize": 4, "linewidth": 1}
        axes[0].plot(*_column(log, "valid_loss"), label=f"{name}: validation", **valid)
        axes[1].plot(*_column(log, measure), **{**valid, "linestyle": "-"})
        axes[2].plot(*_column(log, "lr"), color=color, linewidth=2)
    values = [value for log in runs.values() for value in _column(log, measure)[1]]
    if not classifiers and values and max(values) > 10 * min(values):
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_major_formatter(ScalarFormatter())
        axes[1].yaxis.set_minor_formatter(NullFormatter())
    labels = ("loss (nats)", f"validation {measure}", "learning rate")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    return figure


def learning_rates(search: RateSearch) -> Figure:
    """Loss by learning rate, and the rate at which it falls fastest."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    axis.plot(search.rates, search.losses, color="C0", linewidth=2)
    axis.axvline(search.suggestion, color="gray", linestyle="--", linewidth=1)
    axis.annotate(
        f"falls fastest: {search.suggestion:.2g}",
        (search.suggestion, max(search.losses)),
        (4, 0),
        textcoords="offset points",
        color="gray",
        fontsize=9,
    )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss (nats), smoothed")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    figure.tight_layout()
    return figure


def save_all(directory: Path, results: dict[str, list[Run]] | None = None) -> list[Path]:
    """All diagrams of the chapter, and the learning curves if there are results."""
    figures = DIAGRAMS | {"gradients": gradients}
    paths = []
    for name, draw in figures.items():
        paths.append(directory / f"{name}.png")
        save(draw(), paths[-1])
    if results:
        paths.append(directory / "learning-curves.png")
        save(learning_curves(results), paths[-1])
    return paths

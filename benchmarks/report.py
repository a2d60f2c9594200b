"""Shows measurements: tables for a terminal, geometric means, a plot.

A row is a record of the JSON file: the fields of ``benchmarks.harness.Measurement``.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
# What names a row, in the order of the tables.
KEY = (
    *("device", "dtype", "mode", "weight_dropout", "threads"),
    *("cell", "T", "B", "I", "H", "provider"),
)
GROUP, CASE = KEY[:5], KEY[5:10]
MEAN = (*GROUP, "cell", "provider")


def key(row: Row, names: Sequence[str] = KEY) -> tuple[Any, ...]:
    """The values that name a row, or a part of them."""
    return tuple(row[name] for name in names)


def title(row: Row) -> str:
    """A row's group in words."""
    dropout = f", weight dropout {row['weight_dropout']:g}" if row["weight_dropout"] > 0 else ""
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    return f"{row['mode']}{dropout}, {row['dtype']}, {threads}, {row['device']}"


def grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows with equal values of those names, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row, names), []).append(row)
    return groups


def geometric_means(rows: Iterable[Row]) -> dict[tuple[Any, ...], tuple[float, float, int]]:
    """For each group, cell and provider: the ratios' geometric mean, the smallest, their number."""
    means = {}
    for group, members in grouped(rows, MEAN).items():
        ratios = [row["ratio"] for row in members]
        means[group] = (statistics.geometric_mean(ratios), min(ratios), len(ratios))
    return means


def _providers(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows))


def _heading(provider: str, unit: str) -> str:
    """Short enough for a column."""
    return provider.replace("reference", "ref.").replace("+", "\n+") + "\n" + unit


def _ratio(row: Row) -> str:
    """The ratio and half the range of the middle half of its blocks, in percent of it."""
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} {(high - low) / 2 / row['ratio']:4.0%}"


def _megabytes(row: Row | None) -> str:
    return "" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"


def _group_table(rows: list[Row]) -> Table:
    """One line for each case: the first provider's time, the ratios of the others, the speed and
    the memory of all."""
    first, *others = _providers(rows)
    peak = max(row["peak"] for row in rows)
    table = Table(
        title=f"{title(rows[0])}; GEMM {peak:.0f} GFLOP/s", padding=(0, 1, 0, 0), box=None
    )
    table.add_column("T, B, I, H", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column(f"{first}\nms", justify="right", no_wrap=True)
    for name in others:
        table.add_column(_heading(name, "ratio ±  "), justify="right", no_wrap=True)
    main = "lstmx" if "lstmx" in others else (others or [first])[0]
    table.add_column(f"{main}\nGFLOP/s", justify="right", no_wrap=True)
    table.add_column("of\npeak", justify="right", no_wrap=True)
    for name in (first, *others):
        table.add_column(_heading(name, "MB"), justify="right", no_wrap=True)
    for members in grouped(rows, CASE).values():
        by = {row["provider"]: row for row in members}
        cells = [", ".join(str(members[0][name]) for name in "TBIH"), members[0]["cell"]]
        wrong = "" if first not in by or by[first].get("agrees", True) else "wrong "
        cells.append(f"{wrong}{by[first]['median'] * 1e3:.3g}" if first in by else "")
        for name in others:
            cells.append(_ratio(by[name]) if name in by else "")
        row = by.get(main)
        cells += [f"{row['gflops']:.0f}", f"{row['gflops'] / row['peak']:.0%}"] if row else ["", ""]
        table.add_row(*cells, *(_megabytes(by.get(name)) for name in (first, *others)))
    return table


def _mean_table(rows: list[Row]) -> Table:
    table = Table(title="Ratios: geometric mean over the cases, and smallest", box=None)
    others = _providers(rows)[1:]
    table.add_column("", no_wrap=True)
    for name in ("cell", *others):
        table.add_column(name, no_wrap=True, justify="left" if name == "cell" else "right")
    means = geometric_means(rows)
    for group, members in grouped(rows, (*GROUP, "cell")).items():
        cells = [title(members[0]), members[0]["cell"]]
        for name in others:
            mean = means.get((*group, name))
            cells.append("" if mean is None else f"{mean[0]:.2f} {mean[1]:.2f}")
        table.add_row(*cells)
    return table


def tables(rows: list[Row]) -> list[Table]:
    """A table for each mode, dtype and number of threads, then one of geometric means.

    Ratios are the first provider's time over another's; ± is half the range of the middle half of
    the blocks, in percent.
    """
    groups = grouped(rows, GROUP).values()
    return [*(_group_table(members) for members in groups), _mean_table(rows)]


def draw(rows: list[Row], path: Path) -> None:
    """Draws lstmx's ratios: a panel for each cell and dtype, a line for each case.

    Args:
        rows: of any provider; those of "lstmx" are drawn.
        path: of the picture; its suffix says which format.

    Raises:
        ValueError: there is no row of lstmx.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    ours = [row for row in rows if row["provider"] == "lstmx"]
    if not ours:
        raise ValueError("rows must have some of the provider lstmx, got none")
    cells = sorted({row["cell"] for row in ours}, reverse=True)
    dtypes = list(dict.fromkeys(row["dtype"] for row in ours))
    shapes = list(grouped(ours, "TBIH"))
    modes = list(grouped(ours, ("mode", "weight_dropout")))
    threads = sorted({row["threads"] for row in ours})
    lowest = min(0.9, *(row["ratio"] for row in ours))
    highest = max(1.1, *(row["ratio"] for row in ours))

    height = 1.4 + len(cells) * (0.7 + 0.3 * len(shapes))
    figure = Figure(figsize=(3 + 3.6 * len(dtypes), height), layout="constrained")
    panels = figure.subplots(len(cells), len(dtypes), sharex=True, sharey=True, squeeze=False)
    colours = dict(zip(modes, ("tab:gray", "tab:blue", "tab:orange", "tab:green"), strict=False))
    for (i, cell), (j, dtype) in itertools.product(enumerate(cells), enumerate(dtypes)):
        panel = panels[i, j]
        panel.axvline(1, color="black", linewidth=1)
        for row in ours:
            if (row["cell"], row["dtype"]) != (cell, dtype):
                continue
            mode = (row["mode"], row["weight_dropout"])
            # The modes of a case lie beside each other, so that none hides another.
            y = shapes.index(key(row, "TBIH")) + 0.26 * (modes.index(mode) - (len(modes) - 1) / 2)
            filled = row["threads"] == threads[0]
            panel.errorbar(
                row["ratio"],
                y,
                xerr=[[abs(row["ratio"] - limit)] for limit in row["ratio_quartiles"]],
                fmt="o" if filled else "s",
                markersize=4.5,
                color=colours[mode],
                markerfacecolor=colours[mode] if filled else "none",
                elinewidth=0.8,
            )
        panel.set_xscale("log", base=2)
        panel.set_xlim(lowest / 1.08, highest * 1.08)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_ylim(len(shapes) - 0.5, -0.5)
        panel.set_yticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
        panel.grid(axis="x", color="0.9")
        for line in range(1, len(shapes)):
            panel.axhline(line - 0.5, color="0.93", linewidth=0.8, zorder=0)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"{cell.upper()}, {dtype}", fontsize=10, fontweight="bold")
    handles, labels = [], []
    for mode, dropout in modes:
        for count in threads:
            filled = count == threads[0]
            colour = colours[mode, dropout]
            handles.append(
                panels[0, 0].plot(
                    [],
                    [],
                    "o" if filled else "s",
                    color=colour,
                    markerfacecolor=colour if filled else "none",
                    markersize=5,
                )[0]
            )
            words = mode + (f", weight dropout {dropout:g}" if dropout > 0 else "")
            labels.append(f"{words}, {count} thread{'s' * (count > 1)}")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(modes), frameon=False)
    for panel in panels[-1]:
        panel.set_xlabel("time of torch.nn / time of lstmx", fontsize=10)
    for panel in panels[:, 0]:
        panel.set_ylabel("T, B, I, H", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

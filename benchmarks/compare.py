"""What moved between two files of results: ``python -m benchmarks.compare A.json B.json``.

A row moved if its value changed by more than the threshold and the middle halves of its blocks in A
and B do not overlap. Exit status 1 if something of B is slower, 2 if there is nothing to compare.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# What names a row. Not from benchmarks.report, so that this file runs as a script too.
KEY = (
    *("device", "dtype", "mode", "weight_dropout", "threads"),
    *("cell", "T", "B", "I", "H", "provider"),
)
Row = dict[str, Any]


def speed(row: Row, by: str) -> tuple[float, float, float]:
    """Median and quartiles, low to high, of a value that is greater when faster."""
    if by == "ratio":
        low, high = row["ratio_quartiles"]
        return low, row["ratio"], high
    low, high = row["quartiles"]
    return 1 / high, 1 / row["median"], 1 / low


def change(a: Row, b: Row, by: str, threshold: float) -> tuple[float, bool]:
    """Speed of b over that of a, and whether it moved."""
    a_low, a_median, a_high = speed(a, by)
    b_low, b_median, b_high = speed(b, by)
    factor = b_median / a_median
    apart = b_low > a_high or b_high < a_low
    return factor, apart and abs(math.log(factor)) > math.log1p(threshold)


def _rows(path: Path) -> dict[tuple[Any, ...], Row]:
    rows = json.loads(path.read_text())["measurements"]
    return {tuple(row[name] for name in KEY): row for row in rows}


def main(
    a: Annotated[Path, typer.Argument(help="Results before.", exists=True, dir_okay=False)],
    b: Annotated[Path, typer.Argument(help="Results after.", exists=True, dir_okay=False)],
    by: Annotated[
        str,
        typer.Option(help="ratio: against what was timed beside it; time: in seconds."),
    ] = "ratio",
    threshold: Annotated[
        float, typer.Option(min=0, help="Changes up to this factor - 1 are no news.")
    ] = 0.05,
    provider: Annotated[str, typer.Option(help="Whose rows.")] = "lstmx",
) -> None:
    """Say which rows of B are faster or slower than in A, beyond their spread."""
    if by not in ("ratio", "time"):
        raise typer.BadParameter(f"by must be ratio or time, got {by!r}")
    before, after = _rows(a), _rows(b)
    common = [key for key in before if key in after and key[-1] == provider]
    console = Console()
    if not common:
        console.print(f"{a} and {b} share no row of {provider}")
        raise typer.Exit(2)
    table = Table("what", "case", "A", "B", "B / A", box=None)
    factors, slower, moved = [], 0, 0
    for key in sorted(common, key=lambda key: change(before[key], after[key], by, threshold)[0]):
        factor, has_moved = change(before[key], after[key], by, threshold)
        factors.append(factor)
        if not has_moved:
            continue
        moved += 1
        slower += factor < 1
        row, new = before[key], after[key]
        dropout = f" p{row['weight_dropout']:g}" if row["weight_dropout"] > 0 else ""
        values = [row["ratio"], new["ratio"]]
        if by == "time":
            values = [row["median"] * 1e3, new["median"] * 1e3]
        table.add_row(
            f"{row['mode']}{dropout} {row['dtype']} x{row['threads']} {row['device']}",
            f"{row['cell']} " + ",".join(str(row[name]) for name in "TBIH"),
            *(f"{value:.3g}" for value in values),
            f"{factor:.2f} " + ("slower" if factor < 1 else "faster"),
        )
    if moved:
        console.print(table)
    mean = math.exp(sum(map(math.log, factors)) / len(factors))
    console.print(
        f"{provider}, {len(common)} rows: {slower} slower, {moved - slower} faster by more than "
        f"{threshold:.0%} and the spread; speed by {by}, geometric mean: {mean:.3f}"
    )
    unpaired = sum(key[-1] == provider for key in before.keys() ^ after.keys())
    if unpaired:
        console.print(f"{unpaired} rows are in one file only")
    raise typer.Exit(1 if slower else 0)


if __name__ == "__main__":
    typer.run(main)

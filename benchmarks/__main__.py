"""``python -m benchmarks``: the table of ratios, torch.nn against lstmx."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import MODES, Measurement, as_json, measure
from lstmx.environment import environment, write_json
from tests.cases import BENCHMARK, CELLS, Case


def _selected(shape: list[str], cell: list[str]) -> list[Case]:
    if not shape:
        return [case for case in BENCHMARK if case.cell in cell]
    cases = []
    for text in shape:
        try:
            T, B, I, H = (int(number) for number in text.split(","))
        except ValueError as error:
            raise typer.BadParameter(f"shape must be T,B,I,H, got {text!r}") from error
        cases += [Case(name, T, B, I, H) for name in cell]
    return cases


def _table(measurements: list[Measurement]) -> Table:
    table = Table(title="torch.nn's time / each provider's, medians of interleaved blocks")
    for name in ("case", "mode", "provider"):
        table.add_column(name)
    for name in ("ms", "±", "ratio", "GFLOP/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in measurements:
        low, high = row.quartiles
        dropout = f" p{row.weight_dropout:g}" if row.weight_dropout > 0 else ""
        table.add_row(
            f"{row.cell} {row.T},{row.B},{row.I},{row.H}{dropout}",
            f"{row.mode} {row.dtype} x{row.threads}",
            row.provider,
            f"{row.median * 1e3:.3f}",
            f"{(high - low) / 2 * 1e3:.3f}",
            f"{row.ratio:.2f}",
            f"{row.gflops:.0f}",
            end_section=row.provider == measurements[-1].provider,
        )
    return table


def _list(default: list, help: str, **options: int) -> Any:
    return typer.Option(default_factory=lambda: list(default), help=help, **options)


PROVIDERS_HELP = "torch, lstmx, reference; +graph after it: as a CUDA graph."


def main(
    shape: Annotated[list[str], _list([], "T,B,I,H; none: all of tests/cases.py.")],
    cell: Annotated[list[str], _list(CELLS, "lstm, gru.")],
    mode: Annotated[list[str], _list(MODES, "forward, training.")],
    dtype: Annotated[list[str], _list(["float32"], "float32, float64, bfloat16, float16.")],
    provider: Annotated[
        list[str],
        _list(["torch", "lstmx"], "torch, lstmx, reference; on a GPU also torch+graph, ..."),
    ],
    threads: Annotated[list[int], _list([1, 2], "Threads.", min=1)],
    weight_dropout: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    seconds: Annotated[float, typer.Option(help="For each provider on each case.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Time torch.nn and lstmx side by side. Options may be given several times."""
    cases = [replace(case, weight_dropout=weight_dropout) for case in _selected(shape, cell)]
    jobs = [(n, d, m, case) for n in threads for d in dtype for m in mode for case in cases]
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {device!r}")
    console = Console()
    measurements: list[Measurement] = []
    for count, name, one_mode, case in track(jobs, "timing", console=console):
        torch.set_num_threads(count)
        measurements += measure(
            case,
            mode=one_mode,
            dtype=getattr(torch, name),
            providers=provider,
            seconds=seconds,
            device=device,
        )
        if json is not None:  # as it goes: what is cut off leaves what it has
            write_json({"environment": environment(), "measurements": as_json(measurements)}, json)
    console.print(_table(measurements))


if __name__ == "__main__":
    typer.run(main)

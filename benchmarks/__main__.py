"""``python -m benchmarks``: the tables of ratios, torch.nn against the others."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import report
from benchmarks.harness import as_json, float32_products, measure
from benchmarks.memory import Meter
from lstmx.environment import environment, write_json
from tests.cases import BENCHMARKS, CELLS, Case

MODES = ("forward", "training", "dropout", "carried")
# On a GPU float32 is exact, and tf32 the same tensors multiplied in TF32.
DTYPES = ("float32", "float64", "bfloat16", "float16", "tf32")
DEFAULT_PROVIDERS = ("torch", "lstmx", "lstmx+low", "reference")
# Two of them may differ between the parts of a file: the code, and when it ran.
SAME_MACHINE = ("torch", "python", "system", "processor", "cores", "instruction_set", "gpu")


def _shapes(shape: list[str], cell: list[str], device: str) -> list[Case]:
    if not shape:
        return [case for case in BENCHMARKS[device] if case.cell in cell]
    cases = []
    for text in shape:
        try:
            T, B, I, H = (int(number) for number in text.split(","))
        except ValueError as error:
            raise typer.BadParameter(f"shape must be T,B,I,H, got {text!r}") from error
        cases += [Case(name, T, B, I, H) for name in cell]
    return cases


def _checked(name: str, values: list[str], allowed: tuple[str, ...]) -> None:
    for value in values:
        if value not in allowed:
            raise typer.BadParameter(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _stored(path: Path | None) -> list[report.Row]:
    """The rows of an earlier run on this machine."""
    if path is None or not path.exists():
        return []
    results = json.loads(path.read_text())
    here = environment()
    for name in SAME_MACHINE:
        was = results["environment"][name]
        if was != here[name]:
            message = f"{path} was measured with {name} {was!r}, this is {here[name]!r}"
            raise typer.BadParameter(message, param_hint="--json")
    return results["measurements"]


def _list(default: Any, help: str, **options: int) -> Any:
    return typer.Option(default_factory=lambda: list(default), help=help, **options)


def main(
    shape: Annotated[list[str], _list([], "T,B,I,H; none: all of tests/cases.py.")],
    cell: Annotated[list[str], _list(CELLS, "lstm, gru.")],
    mode: Annotated[
        list[str],
        _list(
            MODES[:3],
            "forward (no gradients), training, dropout: training with weight dropout, carried: "
            "training from states that are given.",
        ),
    ],
    dtype: Annotated[list[str], _list(("float32", "bfloat16"), ", ".join(DTYPES) + ".")],
    provider: Annotated[
        list[str],
        _list(
            DEFAULT_PROVIDERS,
            "The first is what the others are compared with; lstmx+low recomputes gates in "
            "backward, torch+reassigned drops weights as fastai does; on a GPU also torch+graph, "
            "...: as a CUDA graph.",
        ),
    ],
    threads: Annotated[list[int], _list([1, 2], "Threads.", min=1)],
    weight_dropout: Annotated[float, typer.Option(min=0, max=1, help="In the mode dropout.")] = 0.5,
    seconds: Annotated[
        float, typer.Option(help="For each provider on each case, if a call is no slower.")
    ] = 0.5,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[
        Path | None,
        typer.Option(help="All numbers go here, beside those of other cases."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Leave out what the file has already.")] = False,
    minutes: Annotated[
        float, typer.Option(min=0, help="Begin no case after so many; go on with --resume.")
    ] = float("inf"),
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios here.")] = None,
) -> None:
    """Time torch.nn and lstmx side by side. Options may be given several times."""
    _checked("cell", cell, CELLS)
    _checked("mode", mode, MODES)
    _checked("dtype", dtype, DTYPES)
    _checked("device", [device], ("cpu", "cuda"))
    if device == "cpu" and "tf32" in dtype:
        raise typer.BadParameter("dtype tf32 needs --device cuda")
    if resume and json is None:
        raise typer.BadParameter("resume needs a file to go on with: --json", param_hint="--resume")
    p = {"dropout": weight_dropout}
    jobs = [
        (name, one_mode, count, replace(case, weight_dropout=p.get(one_mode, 0.0)))
        for name in dtype
        for one_mode in mode
        for count in threads
        for case in _shapes(shape, cell, device)
    ]
    rows = {report.key(row): row for row in _stored(json)}
    console = Console()
    asked: list[tuple[Any, ...]] = []
    end, left_out = time.monotonic() + 60 * minutes, 0
    wanted = memory and device == "cpu" and Meter.supported
    with Meter() if wanted else nullcontext() as meter:
        for name, one_mode, count, case in track(jobs, "timing", console=console):
            kind = "training" if one_mode == "dropout" else one_mode
            # Nothing is kept for backward there, one way or the other.
            able = [who for who in provider if kind != "forward" or "+low" not in who]
            if case.weight_dropout == 0:  # there it would be torch a second time
                able = [who for who in able if "+reassigned" not in who]
            job = (device, name, kind, case.weight_dropout, count)
            keys = [(*job, case.cell, case.T, case.B, case.I, case.H, who) for who in able]
            asked += keys
            if resume and all(one in rows for one in keys):
                continue
            if time.monotonic() > end:
                left_out += 1
                continue
            torch.set_num_threads(count)
            precision = "tf32" if name == "tf32" else "ieee"
            with float32_products(precision) if device == "cuda" else nullcontext():
                measured = measure(
                    case,
                    mode=kind,
                    dtype=torch.float32 if name == "tf32" else getattr(torch, name),
                    providers=able,
                    seconds=seconds,
                    device=device,
                    meter=meter,
                )
            here = environment()
            for row in as_json(measured):
                row |= {"dtype": name, "commit": here["commit"], "date": here["date"]}
                rows[report.key(row)] = row
            if json is not None:  # as it goes: what is cut off leaves what it has
                write_json({"environment": here, "measurements": list(rows.values())}, json)
    shown = [rows[one] for one in asked if one in rows]
    if left_out > 0:
        console.print(f"{left_out} of {len(jobs)} cases were left out: no time")
    if not shown:
        raise typer.Exit(1)
    wide = Console(width=max(100, console.width))
    for table in report.tables(shown):
        wide.print(table, "")
    if plot is not None:
        report.draw(shown, plot)


if __name__ == "__main__":
    typer.run(main)

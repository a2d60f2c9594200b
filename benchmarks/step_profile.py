"""Where the time of a step goes on a GPU: ``python -m benchmarks.step_profile --json OUT``.

A call is replayed as a CUDA graph under torch's profiler, which tells when each kernel began and
ended. What runs once for each step shows by its number in a call.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.calls import Call, call, tensors
from benchmarks.harness import captured
from benchmarks.providers import make
from lstmx.environment import environment, write_json
from tests.cases import Case

CALLS = 20
DTYPE = torch.bfloat16


class Kernel(NamedTuple):
    """Of one launch; microseconds on the device's clock."""

    name: str
    begin: float
    end: float


def summary(kernels: list[Kernel], calls: int) -> dict[str, Any]:
    """What each kernel takes, and what passes between two of them.

    Returns:
        call_us: from the first kernel's begin to the last one's end, the median of the calls.
        idle_us: of that, without any kernel, on average.
        between_us: from one kernel's end to the next one's begin, the median.
        kernels: name, number in a call, median and sum (in a call) of its microseconds; the
            largest sum first.

    Raises:
        ValueError: the kernels are not those of so many equal calls.
    """
    if not kernels or len(kernels) % calls:
        raise ValueError(f"{len(kernels)} kernels are not those of {calls} equal calls")
    count = len(kernels) // calls
    in_order = sorted(kernels, key=lambda kernel: kernel.begin)
    of_call = [in_order[first : first + count] for first in range(0, len(kernels), count)]
    gaps = [after.begin - before.end for call in of_call for before, after in pairwise(call)]
    times: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in kernels:
        times[name].append(end - begin)
    return {
        "call_us": statistics.median(call[-1].end - call[0].begin for call in of_call),
        "idle_us": sum(max(0.0, gap) for gap in gaps) / calls,
        "between_us": statistics.median(gaps) if gaps else 0.0,
        "kernels": [
            {
                "name": name,
                "count": len(of_name) / calls,
                "each_us": statistics.median(of_name),
                "sum_us": sum(of_name) / calls,
            }
            for name, of_name in sorted(times.items(), key=lambda item: -sum(item[1]))
        ],
    }


def _kernels(run: Call) -> list[Kernel]:
    """Of CALLS calls, after some that are not looked at."""
    for _ in range(CALLS):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def _table(title: str, found: dict[str, Any]) -> Table:
    table = Table(title=f"{title}: {found['call_us']:.0f} us, idle {found['idle_us']:.0f}")
    for name in ("kernel", "in a call", "us each", "us in a call"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in found["kernels"]:
        name = row["name"].removeprefix("void ").split("(")[0][:60]
        numbers = f"{row['count']:g}", f"{row['each_us']:.2f}", f"{row['sum_us']:.0f}"
        table.add_row(name, *numbers)
    return table


def main(json: Annotated[Path, typer.Option(help="The numbers go here.")]) -> None:
    """Profile lstmx and torch.nn at (70, 80, 1150, 1150) in bfloat16, forward and training."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("a profile of a GPU's kernels needs a GPU")
    console = Console()
    profiles = []
    for cell in ("lstm", "gru"):
        case = Case(cell, 70, 80, 1150, 1150)
        arguments = tensors(case, DTYPE, "cuda")
        for provider in ("lstmx", "torch"):
            module = make(provider, cell, case.I, case.H, 0.0, DTYPE).to("cuda")
            for mode in ("forward", "training"):
                run = captured(call(module.train(), *arguments, mode))
                found = summary(_kernels(run), CALLS)
                console.print(_table(f"{provider}, {cell}, {mode}", found))
                sizes = {name: getattr(case, name) for name in ("cell", "T", "B", "I", "H")}
                row = {**sizes, "dtype": "bfloat16", "mode": mode, "provider": provider}
                profiles.append(row | found)
    write_json({"environment": environment(), "profiles": profiles}, json)


if __name__ == "__main__":
    typer.run(main)

"""``python -m benchmarks.gpu_summary OUT MEASURED...``: one short record for each case on a GPU.

MEASURED are files of ``python -m benchmarks --device cuda --json``, and with ``--others`` files of
JSON lines about other libraries, whose times are in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lstmx.environment import write_json

MODES = {"forward": "fwd", "training": "fwd+bwd"}
PATHS = {"lstmx": "stepwise", "torch": "cuDNN"}
SIZES = ("cell", "T", "B", "I", "H", "dtype")
# What all files must agree in.
MACHINE = ("gpu", "driver", "cuda", "cudnn", "torch", "python")


def record(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ``python -m benchmarks``; times in milliseconds."""
    base, *how = row["provider"].split("+")
    return {
        **{key: row[key] for key in SIZES},
        "mode": MODES[row["mode"]],
        "weight_dropout": row["weight_dropout"],
        "provider": row["provider"],
        "median_ms": 1e3 * row["median"],
        "p20": 1e3 * row["p20"],
        "p80": 1e3 * row["p80"],
        "peak_bytes": row["peak_bytes"],
        "path": PATHS[base] + (", graph" if "graph" in how else ""),
    }


def other(row: dict[str, Any]) -> dict[str, Any]:
    """A line about another library."""
    name = row["library"]
    if row["padded_batch"] != row["B"]:
        name += f", batch padded to {row['padded_batch']}"
    if row["variant"]:
        name += f", {row['variant']}"
    return {
        **{key: row[key] for key in SIZES},
        "dtype": "tf32" if row["tf32"] else row["dtype"],
        "mode": MODES[row["mode"]],
        "weight_dropout": row["weight_dropout"],
        "provider": name + ("+graph" if row["graph"] else ""),
        "median_ms": 1e-3 * row["median_us"],
        "p20": 1e-3 * row["p20_us"],
        "p80": 1e-3 * row["p80_us"],
        "peak_bytes": None,
        "path": f"{row['library']} {row['commit'][:12]}",
        "note": row["note"],
    }


def main(
    out: Annotated[Path, typer.Argument(dir_okay=False)],
    measured: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False)],
    others: Annotated[
        list[Path],
        typer.Option(
            default_factory=lambda: [],
            exists=True,
            dir_okay=False,
            help="JSON lines of others.",
        ),
    ],
) -> None:
    """Write the summary."""
    results = [json.loads(path.read_text()) for path in measured]
    here = results[0]["environment"]
    for path, result in zip(measured, results, strict=True):
        for key in MACHINE:
            if result["environment"].get(key) != here.get(key):
                raise typer.BadParameter(
                    f"{path} was measured with {key} {result['environment'].get(key)!r}, "
                    f"{measured[0]} with {here.get(key)!r}"
                )
    cases = [record(row) for result in results for row in result["measurements"]]
    for path in others:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        cases += [other(line) for line in lines if line["mode"] in MODES]
    write_json(
        {
            "device": here["gpu"],
            **{key: here.get(key) for key in MACHINE[1:]},
            "commit": here["commit"],
            "date": here["date"],
            "cases": cases,
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)

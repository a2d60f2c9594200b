"""Writes the tables of the README from the committed results: ``python -m benchmarks.readme``.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``; a test checks that it is current.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _rows(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def chapter() -> str:
    """The chapter's models, mean and standard deviation over seeds."""
    rows = []
    for row in json.loads((RESULTS / "chapter-10-seeds.json").read_text())["results"]:
        book = row["book"] or {}
        cells = [f"{row['model']}: {row['title']}"]
        for key in ("valid_loss", "accuracy"):
            values = [run[key] for run in row["runs"]]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
            cells.append(f"{book[key]:.3f}" if book else "")
        cells.append(f"{row['mean']['seconds']:.1f}")
        rows.append(cells)
    return _rows(["model", "valid loss", "book", "accuracy", "book", "seconds"], rows)


def speed() -> str:
    """Ratios of training time, and the machine that they were measured on."""
    results = json.loads((RESULTS / "cpu-training-float32.json").read_text())
    found: dict[tuple[str, ...], dict[tuple[str, int], str]] = {}
    for row in results["measurements"]:
        if row["provider"] == "lstmx":
            shape = tuple(str(row[name]) for name in "TBIH")
            found.setdefault(shape, {})[row["cell"], row["threads"]] = f"{row['ratio']:.2f}"
    columns = [(cell, threads) for cell in ("lstm", "gru") for threads in (1, 2)]
    header = ["T, B, I, H"]
    header += [f"{cell.upper()}, {n} thread{'s' * (n > 1)}" for cell, n in columns]
    rows = [[", ".join(shape), *(by[column] for column in columns)] for shape, by in found.items()]
    machine = results["environment"]
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}, "
        f"torch {machine['torch']}; [all numbers](benchmarks/results/cpu-training-float32.json)."
    )
    return _rows(header, rows) + "\n\n" + note


def updated(text: str) -> str:
    """The README with both tables as the results have them."""
    for name, table in (("chapter", chapter()), ("speed", speed())):
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))

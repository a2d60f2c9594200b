"""Writes the tables of the documents from the committed results: ``python -m benchmarks.readme``.

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


def _runs(file: str) -> dict[str, dict]:
    """The rows of a file of the chapter's results, by model."""
    results = json.loads((RESULTS / file).read_text())["results"]
    return {row["model"]: row for row in results}


def _mean(row: dict, key: str) -> str:
    """Mean and standard deviation over seeds."""
    values = [run[key] for run in row["runs"]]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def chapter() -> str:
    """The chapter's models, mean and standard deviation over seeds."""
    rows = []
    for row in _runs("chapter-10-seeds.json").values():
        cells = [f"{row['model']}: {row['title']}"]
        for key in ("valid_loss", "accuracy"):
            cells += [_mean(row, key), f"{row['book'][key]:.3f}" if row["book"] else ""]
        rows.append([*cells, f"{row['mean']['seconds']:.1f}"])
    return _rows(["model", "valid loss", "book", "accuracy", "book", "seconds"], rows)


def gru() -> str:
    """The chapter's GRU on three backends."""
    files = {
        "from scratch (`reference.GRUCell`)": "chapter-gru-cells.json",
        "`torch.nn.GRU`": "chapter-gru-torch.json",
        "`lstmx.GRU`": "chapter-10-seeds.json",
    }
    rows = []
    for name, file in files.items():
        row = _runs(file)["7-gru"]
        cells = [_mean(row, "valid_loss"), _mean(row, "accuracy"), f"{row['mean']['seconds']:.1f}"]
        rows.append([name, *cells])
    return _rows(["model 7 with a GRU", "valid loss", "accuracy", "seconds"], rows)


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


TABLES = {"chapter": chapter, "speed": speed, "gru": gru}
PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial" / "questionnaire.md"]


def updated(text: str) -> str:
    """A page with its tables as the results have them."""

    def table(found: re.Match) -> str:
        name = found[1]
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))

"""Writes the tables of the documents from the committed results: ``python -m benchmarks.readme``.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``; a test checks that it is current.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from benchmarks import report

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
    """Ratios of all files cpu-*.json of results: geometric means, then the cases of training."""
    files = sorted(RESULTS.glob("cpu-*.json"), reverse=True)  # float32 before bfloat16
    results = [json.loads(file.read_text()) for file in files]
    measured = [row for result in results for row in result["measurements"]]
    ours = [row for row in measured if row["provider"] == "lstmx"]
    columns = sorted(
        {(row["cell"], row["threads"]) for row in ours}, key=lambda c: (c[0] == "gru", c)
    )
    names = [f"{cell.upper()}, {n} thread{'s' * (n > 1)}" for cell, n in columns]

    rows = []
    for (dtype, mode, p), group in report.grouped(
        ours, ("dtype", "mode", "weight_dropout")
    ).items():
        means = report.geometric_means(group)
        by = {(row["cell"], row["threads"]): means[report.key(row, report.MEAN)] for row in group}
        words = f"{mode}, {dtype}" + (f", weight dropout {p:g}" if p > 0 else "")
        rows.append([words, *(f"{by[c][0]:.2f}" if c in by else "" for c in columns)])
    parts = [_rows(["geometric mean", *names], rows)]

    training = [row for row in ours if row["mode"] == "training"]
    for (dtype,), group in report.grouped(training, ("dtype",)).items():
        dropouts = sorted({row["weight_dropout"] for row in group})
        rows = []
        for shape, members in report.grouped(group, "TBIH").items():
            found = {
                report.key(row, ("cell", "threads", "weight_dropout")): f"{row['ratio']:.2f}"
                for row in members
            }
            cells = [
                " / ".join(found.get((*column, p), "") for p in dropouts) for column in columns
            ]
            rows.append([", ".join(map(str, shape)), *cells])
        words = f"Forward and backward, {dtype}"
        if len(dropouts) > 1:
            words += f", without / with weight dropout of {dropouts[-1]:g}"
        parts += [words + ":", _rows(["T, B, I, H", *names], rows)]

    machine = results[0]["environment"]
    links = ", ".join(f"[{file.stem}](benchmarks/results/{file.name})" for file in files)
    parts.append(
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}, "
        f"torch {machine['torch']}; all numbers: {links}."
    )
    return "\n\n".join(parts)


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

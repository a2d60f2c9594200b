"""Writes the tables of the documents from the committed results: ``python -m benchmarks.readme``.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``; a test checks that it is current.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
ABSENT = "Not measured yet."


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


def speed(machine: str = "") -> str:
    """Ratios of all files cpu-[machine-]dtype.json: geometric means, then the cases of training."""
    # float32 before bfloat16
    files = sorted(RESULTS.glob(f"cpu-{machine}[bf]*[0-9].json"), reverse=True)
    if not files:
        return ABSENT
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

    here = results[0]["environment"]
    links = ", ".join(f"[{file.stem}](benchmarks/results/{file.name})" for file in files)
    parts.append(
        f"{here['processor']}, {here['cores']} cores, {here['instruction_set']}, "
        f"torch {here['torch']}; all numbers: {links}."
    )
    wrong = {
        (row["cell"], *(row[key] for key in "TBIH"))
        for row in measured
        if row["provider"] == "torch" and not row.get("agrees", True)
    }
    if wrong:
        names = "; ".join(
            f"{cell.upper()} ({', '.join(map(str, s))})" for cell, *s in sorted(wrong)
        )
        parts.append(
            f"torch's gradients are wrong there in bfloat16, compared with float32: {names}."
        )
    return "\n\n".join(parts)


def speed_amx() -> str:
    """The same of a processor with AMX."""
    return speed("amx-")


# ---- On a GPU ------------------------------------------------------------------------------------

Times = dict[str, float]
SHAPE = ("T", "B", "I", "H")


def _gpu_times() -> tuple[dict, dict[tuple, Times]]:
    """What h200-summary.json says of the machine, and each case's times by provider."""
    summary = json.loads((RESULTS / "h200-summary.json").read_text())
    times: dict[tuple, Times] = {}
    for row in summary["cases"]:
        names = ("dtype", "mode", "weight_dropout", "cell", *SHAPE)
        times.setdefault(report.key(row, names), {})[row["provider"]] = row["median_ms"]
    return summary, times


def _gpu_ratios(times: Times) -> tuple[float | None, float | None]:
    """torch's time over ours: as called, by torch's faster way; and both in a CUDA graph."""
    ways = [times[name] for name in ("torch", "torch+reassigned") if name in times]
    both = [times.get(f"{name}+graph") for name in ("torch", "lstmx")]
    called = min(ways) / times["lstmx"] if ways and "lstmx" in times else None
    return called, None if None in both else both[0] / both[1]


def _gpu_words(dtype: str, mode: str, p: float) -> str:
    names = {"tf32": "float32 in TF32"}
    words = f"{'forward' if mode == 'fwd' else 'training'}, {names.get(dtype, dtype)}"
    return words + (f", weight dropout {p:g}" if p > 0 else "")


def gpu() -> str:
    """Ratios on a GPU: geometric means, then the cases of bfloat16."""
    if not (RESULTS / "h200-summary.json").exists():
        return ABSENT
    summary, times = _gpu_times()
    columns = [(cell, way) for cell in ("lstm", "gru") for way in ("as called", "in graphs")]
    ratios: dict[tuple, dict[tuple[str, str], list[float]]] = {}
    slower, all_of = Counter[str](), Counter[str]()
    for (dtype, mode, p, cell, *_), of_case in times.items():
        for way, ratio in zip(("as called", "in graphs"), _gpu_ratios(of_case), strict=True):
            if ratio is not None:
                group = ratios.setdefault((dtype, mode, p), {})
                group.setdefault((cell, way), []).append(ratio)
                slower[way] += ratio < 1
                all_of[way] += 1
    rows = [
        [
            _gpu_words(*group),
            *(
                f"{statistics.geometric_mean(found[c]):.2f} ({min(found[c]):.2f})"
                if c in found
                else ""
                for c in columns
            ),
        ]
        for group, found in ratios.items()
    ]
    counted = [f"{slower[way]} of {count} {way}" for way, count in all_of.items()]
    names = ["LSTM, as called", "LSTM, graphs", "GRU, as called", "GRU, graphs"]
    parts = [_rows(["geometric mean (lowest)", *names], rows), gpu_cases("bfloat16")]
    parts.append(
        f"Below 1: {' and '.join(counted)}. {summary['device']}, driver {summary['driver']}, "
        f"CUDA {summary['cuda']}, cuDNN {summary['cudnn']}, torch {summary['torch']}; "
        "all numbers: [h200-summary](benchmarks/results/h200-summary.json)."
    )
    return "\n\n".join(parts)


def gpu_cases(dtype: str) -> str:
    """A line for each shape, training without and with weight dropout, in one dtype."""
    _, times = _gpu_times()
    shapes = list(dict.fromkeys(key[4:] for key in times if key[0] == dtype))
    rows = []
    for shape in shapes:
        cells = [", ".join(map(str, shape))]
        for cell in ("lstm", "gru"):
            plain = _gpu_ratios(times.get((dtype, "fwd+bwd", 0.0, cell, *shape), {}))
            dropped = _gpu_ratios(times.get((dtype, "fwd+bwd", 0.5, cell, *shape), {}))
            cells += ["" if x is None else f"{x:.2f}" for x in (*plain, dropped[0])]
        if any(cells[1:]):
            rows.append(cells)
    names = [
        f"{cell}, {way}" for cell in ("LSTM", "GRU") for way in ("as called", "graphs", "dropout")
    ]
    words = _gpu_words(dtype, "fwd+bwd", 0.0).replace("training", "Training")
    words += "; dropout: with weight dropout of 0.5, as called:"
    return f"{words}\n\n" + _rows(["T, B, I, H", *names], rows)


def gpu_others() -> str:
    """Milliseconds of a training step in CUDA graphs, beside other libraries."""
    if not (RESULTS / "h200-summary.json").exists():
        return ABSENT
    _, times = _gpu_times()
    parts = [gpu_cases(dtype) for dtype in ("float16", "tf32", "float32")]
    rows = []
    for (dtype, mode, p, cell, *shape), of_case in times.items():
        others = {
            library: [
                time
                for name, time in of_case.items()
                if name.startswith(library) and name.endswith("+graph")
            ]
            for library in ("flashrnn", "haste")
        }
        if (mode, p, cell) != ("fwd+bwd", 0.0, "lstm") or not any(others.values()):
            continue
        found = [of_case.get("torch+graph"), of_case.get("lstmx+graph")]
        found += [min(ms) if ms else None for ms in others.values()]
        rows.append(
            [
                f"{dtype}, {', '.join(map(str, shape))}",
                *("" if ms is None else f"{ms:.2f}" for ms in found),
            ]
        )
    parts.append("Milliseconds of a training step of an LSTM, all in CUDA graphs:")
    parts.append(_rows(["T, B, I, H", "cuDNN", "lstmx", "FlashRNN", "haste"], rows))
    return "\n\n".join(parts)


# ---- docs/results.md -----------------------------------------------------------------------------


def _measured(pattern: str) -> list[tuple[str, dict]]:
    """The results whose file matches, by name."""
    return [(file.stem, json.loads(file.read_text())) for file in sorted(RESULTS.glob(pattern))]


def _source(name: str, result: dict) -> str:
    """A picture if there is one, the command, and a link to the numbers."""
    machine = result["environment"]
    parts = [f"    {result['command']}"]
    if (PICTURES / f"{name}.png").exists():
        parts.insert(0, f"![{name}](pictures/{name}.png)")
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of "
    parts.append(
        f"[All numbers](../benchmarks/results/{name}.json): {threads if 'runs' in result else ''}"
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction_set']}, "
        f"torch {machine['torch']}."
    )
    return "\n\n".join(parts)


def _sizes(settings: dict) -> str:
    names = {"embedding": "embedding", "hidden": "hidden", "drop_mult": "`drop_mult`"}
    words = [f"{word} {settings[key]}" for key, word in names.items() if key in settings]
    if "tokens" in settings:
        epochs = settings["epochs"]
        words += [f"{settings['tokens']:,} tokens", f"{epochs} epoch{'s' * (epochs > 1)}"]
    words += [f"a vocabulary of {settings['vocabulary']:,}"]
    return ", ".join([*words, f"batches of {settings['batch_size']} × {settings['bptt']}"])


def _plus_minus(values: list[float], digits: int = 3) -> str:
    """The mean, and the standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def language_model_curves() -> str:
    """Validation losses on torch.nn and on lstmx, for each preset."""
    parts = []
    for name, result in _measured("language-model-curves-*.json"):
        settings, runs = result["settings"], result["runs"]
        rows = []
        for epoch, row in enumerate(result["valid_loss_by_epoch"]):
            losses = {key: [run["valid_loss"][epoch] for run in runs[key]] for key in runs}
            error = row["deviation"] / len(losses["lstmx"]) ** 0.5
            cells = [_plus_minus(losses[key]) for key in ("torch", "lstmx")]
            cells += [f"{row['difference']:+.3f}", f"{row['difference'] / error:+.1f}"]
            rows.append([str(epoch + 1), *cells])
        header = ["epoch", "`torch.nn`", "lstmx", "difference", "in standard errors"]
        words = f"`{settings['preset']}`, {settings['precision']}: {_sizes(settings)}."
        parts += [words, _rows(header, rows), _source(name, result)]
    return "\n\n".join(parts) or ABSENT


# Times as fast as torch.nn that training is meant to be.
AIMS = {"float32": 1.3, "bf16-mixed": 2.0, "bf16-true": 2.0}


def language_model_speed() -> str:
    """Tokens per second of training on both."""
    parts = []
    for name, result in _measured("language-model-speed*.json"):
        rows = []
        for row in result["results"]:
            rates = [row[key]["tokens_per_second"]["median"] for key in ("torch", "lstmx")]
            ratio, aim = row["ratio"], AIMS[row["precision"]]
            reached = "reached" if ratio["median"] >= aim else "not reached"
            rows.append(
                [
                    f"{row['precision']}, {row['threads']} thread{'s' * (row['threads'] > 1)}",
                    *(f"{rate:,.0f}" for rate in rates),
                    f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                    f"{aim:g}: {reached}",
                    f"{row['ratio_of_layers']['median']:.2f}",
                    f"{row['torch']['share']['layers']:.0%}",
                    f"{row['bound']:.2f}" if row["bound"] else "",
                ]
            )
        header = ["", "`torch.nn`, tokens/s", "lstmx, tokens/s", "ratio (quartiles)", "aim"]
        header += ["ratio of the layers alone", "their share of torch's step", "bound"]
        words = f"`{result['settings']['preset']}`: {_sizes(result['settings'])}."
        parts += [words, _rows(header, rows), _source(name, result)]
    return "\n\n".join(parts) or ABSENT


# What is judged, the run with it, the run without it.
JUDGED = {
    "dropout": ("all (AdamW, one cycle)", "no dropout"),
    "weight dropout": ("all (AdamW, one cycle)", "no weight dropout"),
    "AR and TAR": ("all (AdamW, one cycle)", "no AR, no TAR"),
    "averaging, with SGD": ("NT-ASGD", "SGD without averaging"),
    "NT-ASGD in place of AdamW": ("NT-ASGD", "all (AdamW, one cycle)"),
}


def _noise() -> float | None:
    """Two standard deviations of the difference of two runs that only their seeds tell apart."""
    groups = [
        [run["best_valid_loss"] for run in runs]
        for _, result in _measured("language-model-curves-*.json")
        for runs in result["runs"].values()
        if len(runs) > 1
    ]
    if not groups:
        return None
    return 2 * (2 * statistics.mean(statistics.variance(group) for group in groups)) ** 0.5


def language_model_ablation() -> str:
    """What each part of the recipe is worth at this size."""
    parts = []
    for name, result in _measured("language-model-ablation*.json"):
        runs = result["runs"]
        best = {key: [run["best_valid_loss"] for run in runs[key]] for key in runs}
        rows = [
            [
                key,
                _plus_minus(best[key]),
                _plus_minus([run["test_perplexity"] for run in runs[key]], 1),
            ]
            for key in runs
        ]
        seeds = len(next(iter(runs.values())))
        noise = _noise()
        if noise is not None:
            noise /= seeds**0.5
        judged = []
        for part, (with_it, without) in JUDGED.items():
            gain = statistics.mean(best[without]) - statistics.mean(best[with_it])
            verdict = "helps" if gain > 0 else "does not help: it is worse"
            if noise is not None and abs(gain) < noise:
                verdict = "not seen to help: within the noise"
            judged.append([part, f"{gain:+.3f}", verdict])
        settings = result["settings"]
        words = f"`{settings['preset']}`: {_sizes(settings)}; {seeds} seed{'s' * (seeds > 1)}."
        parts += [words, _rows(["run", "best validation loss", "test perplexity"], rows)]
        if noise is not None:
            parts.append(
                "By the runs above, what differs only in its seeds differs by less than "
                f"{noise:.3f} about nineteen times in twenty. Measured against that:"
            )
        header = ["at this size", "gain in validation loss", "verdict"]
        parts += [_rows(header, judged), _source(name, result)]
    return "\n\n".join(parts) or ABSENT


def text_classifier() -> str:
    """Test accuracy fine-tuned and from scratch."""
    parts = []
    for name, result in _measured("text-classifier*.json"):
        data = result["data"]
        rows = []
        for row in result["results"]:
            cells = [str(row["documents"] or "all"), str(row["training_documents"])]
            for key in ("scratch", "fine-tuned"):
                cells.append(_plus_minus([run["test_accuracy"] for run in row["runs"][key]]))
            gains = row["gain"]["by_seed"]
            cells.append(_plus_minus(gains))
            cells.append(f"{min(gains):+.3f} to {max(gains):+.3f}")
            rows.append(cells)
        seeds = len(result["results"][0]["gain"]["by_seed"])
        header = ["passages of each book", "in all", "from scratch", "fine-tuned", "gain", "range"]
        words = (
            f"Accuracy on {data['test_documents']} test passages of {len(data['classes'])} books, "
            f"mean and standard deviation over {seeds} seeds; always saying the largest class "
            f"would be right for {data['largest_class_of_test']:.3f}. "
            f"The language model: {_sizes(result['settings'])}."
        )
        parts += [words, _rows(header, rows), _source(name, result)]
    return "\n\n".join(parts) or ABSENT


TABLES = {
    "chapter": chapter,
    "speed": speed,
    "speed_amx": speed_amx,
    "gpu": gpu,
    "gpu_others": gpu_others,
    "gru": gru,
    "language_model_curves": language_model_curves,
    "language_model_speed": language_model_speed,
    "language_model_ablation": language_model_ablation,
    "text_classifier": text_classifier,
}
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "results.md",
    ROOT / "docs" / "tutorial" / "questionnaire.md",
]


def updated(text: str) -> str:
    """A page with its tables as the results have them."""

    def table(found: re.Match) -> str:
        name = found[1]
        return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))

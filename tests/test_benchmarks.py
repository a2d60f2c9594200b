"""The harness measures what it says; a small regression benchmark of the kernels themselves."""

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from cases import BENCHMARKS, CELLS, Case
from rich.console import Console
from typer.testing import CliRunner

import lstmx
from benchmarks import compare, gpu_summary, harness, readme, report, step_profile
from benchmarks.__main__ import DEFAULT_PROVIDERS, main
from benchmarks.calls import call, tensors
from benchmarks.harness import as_json, measure, products_flop
from benchmarks.memory import Meter
from benchmarks.providers import NAMES, make
from benchmarks.step_profile import Kernel
from lstmx.environment import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(command, *arguments):
    """The exit status and the output of a command line of 100 columns."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(word) for word in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    """Seconds less for each measurement; the peak is only compared with tiny layers here."""
    monkeypatch.setitem(harness.PEAK_SIZES, "cpu", (256,))


@pytest.mark.parametrize("mode", ["forward", "training", "carried"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measure(mode, dtype):
    case = Case("lstm", T=3, B=4, I=5, H=6, weight_dropout=0.5)
    rows = measure(case, mode=mode, dtype=dtype, providers=NAMES, seconds=0.01)
    assert [row.provider for row in rows] == list(NAMES)
    for row in rows:
        low, high = row.quartiles
        assert 0 < low <= row.median <= high
        assert 0 < row.ratio_quartiles[0] <= row.ratio <= row.ratio_quartiles[1]
        assert row.gflops == pytest.approx(products_flop(case, mode) / row.median / 1e9)
        assert row.blocks >= 3
        assert row.gflops < row.peak  # these products are tiny
        assert row.peak_bytes is None
    assert rows[0].ratio == 1


def test_the_precision_of_products_is_put_back():
    """torch.export, for one, raises an error where the flags of cuDNN differ."""
    flags = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    with harness.float32_products("ieee"):
        assert [flag.fp32_precision for flag in flags] == ["ieee", "ieee"]
    assert [flag.fp32_precision for flag in flags] == before
    torch.export.export(torch.nn.Linear(2, 2), (torch.randn(1, 2),))


def test_flop_counts_the_products():
    case = Case("gru", T=2, B=3, I=5, H=7)
    assert products_flop(case, "forward") == 2 * (2 * 3) * (3 * 7) * (5 + 7)
    assert products_flop(case, "training") == 3 * products_flop(case, "forward")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "sleep"}, "mode must be one of forward, training, carried, got 'sleep'"),
        ({"mode": "forward", "providers": ["jax"]}, "provider must be one of .*got 'jax'"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        measure(Case("lstm", 1, 1, 1, 1), **arguments)


@pytest.mark.parametrize("provider", ["torch", "lstmx"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_results_keep_no_graph_of_autograd(provider, p):
    """Which would hold the gradients of x to the stream they were first computed on."""
    case = Case("lstm", T=3, B=4, I=5, H=6, weight_dropout=p)
    x, dy, states = tensors(case, torch.float32)
    module = make(provider, "lstm", case.I, case.H, p, torch.float32)
    results = harness._results(module, call(module, x, dy, states, "training"), case, x.device)
    assert len(results) == 8
    assert not any(result.requires_grad for result in results)


class Wrong(torch.autograd.Function):
    """The identity with a wrong gradient."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("wrong", [lambda y: y + 1e-3, Wrong.apply], ids=["output", "gradient"])
def test_a_wrong_provider_is_not_timed(monkeypatch, wrong, p):
    case = Case("lstm", T=3, B=4, I=5, H=6, weight_dropout=p)
    original = lstmx.LSTM.forward

    def forward(self, *args):
        y, states = original(self, *args)
        return wrong(y), states

    measure(case, mode="training", seconds=0.001)
    monkeypatch.setattr(lstmx.LSTM, "forward", forward)
    with pytest.raises(AssertionError, match="lstmx: "):
        measure(case, mode="training", seconds=0.001)


def test_a_torch_that_is_wrong_is_timed_and_said_to_be(monkeypatch):
    original = torch.nn.LSTM.forward

    def forward(self, x, states=None):
        y, states = original(self, x, states)
        return y + (x.dtype == torch.bfloat16), states

    monkeypatch.setattr(torch.nn.LSTM, "forward", forward)
    case = Case("lstm", T=3, B=4, I=5, H=6)
    rows = measure(case, mode="forward", dtype=torch.bfloat16, seconds=0.001)
    assert [row.agrees for row in rows] == [False, True]
    console = Console(record=True)
    for table in report.tables(as_json(rows)):
        console.print(table)
    assert "wrong" in console.export_text()


@pytest.mark.skipif(not Meter.supported, reason="needs Linux's /proc")
def test_peak_memory():
    case = Case("lstm", T=64, B=64, I=32, H=128)
    y, gates = 64 * 64 * 128 * 4, 4 * 64 * 64 * 128 * 4
    with Meter() as meter:
        found = {
            (mode, provider): meter.peak_bytes(case, mode, provider, torch.float32)
            for mode, provider in (
                ("forward", "lstmx"),
                ("training", "lstmx"),
                ("training", "torch"),
            )
        }
        again = meter.peak_bytes(case, "training", "lstmx", torch.float32)
        with pytest.raises(RuntimeError, match=r"process that measures memory died on .*'jax'"):
            meter.peak_bytes(case, "forward", "jax", torch.float32)
        assert meter.peak_bytes(case, "forward", "torch", torch.float32) > y  # it goes on
    assert y < found["forward", "lstmx"] < found["training", "lstmx"]
    assert found["training", "lstmx"] == pytest.approx(again, rel=0.05)
    for provider in (
        "lstmx",
        "torch",
    ):  # lstmx's gates lie in its cache, torch's in oneDNN's buffer
        assert y + gates < found["training", provider] < 4 * (y + gates)


def rows_of(*ratios, spread=0.01, **changes):
    """Records of torch and of lstmx, so many times as fast, on as many cases."""
    rows = []
    for T, ratio in enumerate(ratios, start=1):
        for name, speed in (("torch", 1.0), ("lstmx", ratio)):
            row = dict.fromkeys(report.KEY, 1) | {"T": T, "provider": name, "cell": "gru"}
            row |= {"mode": "training", "dtype": "float32", "device": "cpu", "weight_dropout": 0.0}
            row |= {"median": 1 / speed, "ratio": speed, "gflops": 80.0, "peak": 100.0}
            row["quartiles"] = ((1 - spread) / speed, (1 + spread) / speed)
            row["ratio_quartiles"] = ((1 - spread) * speed, (1 + spread) * speed)
            rows.append(row | {"peak_bytes": 10**9} | changes)
    return rows


def test_geometric_means():
    means = report.geometric_means(rows_of(2.0, 8.0))
    group = ("cpu", "float32", "training", 0.0, 1, "gru")
    assert means == {(*group, "torch"): (1, 1, 2), (*group, "lstmx"): (pytest.approx(4), 2, 2)}


def written(path, rows):
    path.write_text(json.dumps({"measurements": rows}))
    return path


@pytest.mark.parametrize(
    ("after", "arguments", "status", "words"),
    [
        (rows_of(2.0, 3.0), [], 0, "2 rows: 0 slower, 0 faster"),
        (rows_of(2.0, 2.5), [], 1, "2 rows: 1 slower, 0 faster"),
        (rows_of(2.0, 4.0), [], 0, "2 rows: 0 slower, 1 faster"),
        (rows_of(2.0, 2.5), ["--threshold", "0.3"], 0, "2 rows: 0 slower, 0 faster"),
        (rows_of(2.0, 2.5, spread=0.3), [], 0, "2 rows: 0 slower, 0 faster"),  # within the spread
        (rows_of(2.0, 2.5), ["--by", "time"], 1, "2 rows: 1 slower, 0 faster"),
        (rows_of(2.0), [], 0, "1 rows are in one file only"),
        (rows_of(2.0, threads=2), [], 2, "share no row of lstmx"),
        (rows_of(2.0), ["--by", "luck"], 2, "by must be ratio or time, got 'luck'"),
    ],
)
def test_compare(tmp_path, after, arguments, status, words):
    before = written(tmp_path / "before.json", rows_of(2.0, 3.0))
    got, output = run(compare.main, before, written(tmp_path / "after.json", after), *arguments)
    assert words in " ".join(output.replace("│", " ").split())
    assert got == status


def test_the_table_of_speed(monkeypatch, tmp_path):
    for dtype in ("float32", "bfloat16"):
        rows = rows_of(2.0, 8.0, dtype=dtype) + rows_of(3.0, 3.0, dtype=dtype, weight_dropout=0.5)
        rows += rows_of(1.5, dtype=dtype, mode="forward")
        names = ("processor", "cores", "instruction_set", "torch")
        results = {"environment": dict.fromkeys(names, "abacus"), "measurements": rows}
        (tmp_path / f"cpu-{dtype}.json").write_text(json.dumps(results))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = readme.speed().splitlines()
    assert "| training, float32 | 4.00 |" in lines
    assert "| training, bfloat16, weight dropout 0.5 | 3.00 |" in lines
    assert "| forward, bfloat16 | 1.50 |" in lines
    start = lines.index("Forward and backward, float32, without / with weight dropout of 0.5:")
    table = ["| T, B, I, H | GRU, 1 thread |", "| --- | ---: |"]
    table += ["| 1, 1, 1, 1 | 2.00 / 3.00 |", "| 2, 1, 1, 1 | 8.00 / 3.00 |"]
    assert lines[start + 2 : start + 6] == table

    # Another machine's, where torch.nn was wrong once, in files of their own.
    results["measurements"] = rows_of(5.0, dtype="bfloat16")
    results["measurements"][0]["agrees"] = False
    (tmp_path / "cpu-amx-bfloat16.json").write_text(json.dumps(results))
    other = readme.speed_amx().splitlines()
    assert "| training, bfloat16 | 5.00 |" in other
    assert other[-1].endswith("in bfloat16, compared with float32: GRU (1, 1, 1, 1).")
    assert readme.speed().splitlines() == lines


# What documents say of a machine and of sizes.
MACHINE = {
    "processor": "abacus",
    "cores": 2,
    "instruction_set": "beads",
    "torch": "2",
    "threads": 1,
}
SETTINGS = {"preset": "fastai_lm", "vocabulary": 10, "batch_size": 2, "bptt": 3, "hidden": 8}
SETTINGS |= {"precision": "32-true", "tokens": 5000, "epochs": 1}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Writes results where the tables look for them, and pictures beside them."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setattr(readme, "PICTURES", tmp_path)

    def write(name, **values):
        values = {
            "command": "python -m this",
            "environment": MACHINE,
            "settings": SETTINGS,
        } | values
        (tmp_path / f"{name}.json").write_text(json.dumps(values))

    return write


def learned(*losses):
    return [{"valid_loss": [x], "best_valid_loss": x, "test_perplexity": 9.0} for x in losses]


def curves_of(*ours):
    runs = {"torch": learned(4.0, 4.1, 4.2), "lstmx": learned(*ours)}
    return {"runs": runs, "valid_loss_by_epoch": [{"difference": 0.2, "deviation": 0.1 * 2**0.5}]}


def test_the_table_of_curves(results, tmp_path):
    results("language-model-curves-fastai", **curves_of(4.2, 4.3, 4.4))
    found = readme.language_model_curves()
    assert "| 1 | 4.100 ± 0.100 | 4.300 ± 0.100 | +0.200 | +2.4 |" in found.splitlines()
    assert "    python -m this" in found.splitlines()
    assert "5,000 tokens" in found
    assert "![" not in found
    (tmp_path / "language-model-curves-fastai.png").write_bytes(b"")
    results("language-model-curves-merity", **curves_of(4.2, 4.3, 4.4))
    found = readme.language_model_curves()
    assert found.count("pictures/language-model-curves-fastai.png") == 1
    assert found.count("| 1 | 4.100") == 2


def test_the_table_of_the_language_models_speed(results):
    def row(precision, threads, ratio, bound):
        rates = {"tokens_per_second": {"median": 1000.0}, "share": {"layers": 0.75}}
        middle = {"low": ratio - 0.1, "median": ratio, "high": ratio + 0.1}
        row = {"precision": precision, "threads": threads, "ratio": middle, "bound": bound}
        return row | {"ratio_of_layers": middle, "torch": rates, "lstmx": rates}

    rows = [row("float32", 1, 1.4, 4.0), row("bf16-mixed", 2, 1.5, None)]
    results("language-model-speed", results=rows)
    lines = readme.language_model_speed().splitlines()
    assert (
        "| float32, 1 thread | 1,000 | 1,000 | 1.40 (1.30 to 1.50) | 1.3: reached | 1.40 | 75% "
        "| 4.00 |"
    ) in lines
    assert (
        "| bf16-mixed, 2 threads | 1,000 | 1,000 | 1.50 (1.40 to 1.60) | 2: not reached | 1.50 "
        "| 75% |  |"
    ) in lines


@pytest.mark.parametrize("with_curves", [False, True])
def test_the_table_of_what_helps(results, with_curves):
    losses = {
        "all (AdamW, one cycle)": 4.0,
        "no dropout": 5.0,
        "no weight dropout": 3.0,
        "no AR, no TAR": 4.1,
        "NT-ASGD": 4.3,
        "SGD without averaging": 4.9,
    }
    results("language-model-ablation", runs={name: learned(x) for name, x in losses.items()})
    if with_curves:  # two standard deviations of a difference: 0.283
        results("language-model-curves-fastai", **curves_of(4.2, 4.3, 4.4))
    lines = readme.language_model_ablation().splitlines()
    assert "| no AR, no TAR | 4.100 | 9.0 |" in lines
    assert "| dropout | +1.000 | helps |" in lines
    assert "| weight dropout | -1.000 | does not help: it is worse |" in lines
    small = "not seen to help: within the noise" if with_curves else "helps"
    assert f"| AR and TAR | +0.100 | {small} |" in lines
    assert "| averaging, with SGD | +0.600 | helps |" in lines
    assert any("less than 0.283" in line for line in lines) == with_curves


def test_the_table_of_the_classifier(results):
    def runs(*accuracies):
        return [{"test_accuracy": value} for value in accuracies]

    row = {"documents": 25, "training_documents": 200, "gain": {"by_seed": [0.1, 0.3]}}
    row["runs"] = {"fine-tuned": runs(0.6, 0.8), "scratch": runs(0.5, 0.5)}
    data = {"test_documents": 9, "classes": ["a", "b"], "largest_class_of_test": 0.4}
    results("text-classifier", data=data, results=[row])
    lines = readme.text_classifier().splitlines()
    cells = "0.500 ± 0.000 | 0.700 ± 0.141 | 0.200 ± 0.141 | +0.100 to +0.300"
    assert f"| 25 | 200 | {cells} |" in lines


def gpu_case(provider, seconds, **values):
    row = {"provider": provider, "median": seconds, "p20": seconds / 2, "p80": seconds * 2}
    row |= {"cell": "lstm", "T": 2, "B": 3, "I": 4, "H": 5, "dtype": "bfloat16"}
    return row | {"mode": "training", "weight_dropout": 0.0, "peak_bytes": 7} | values


GPU = {"gpu": "abacus", "driver": "1", "cuda": "2", "cudnn": 3, "torch": "4", "python": "5"}


def test_the_tables_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    rows = [
        *(gpu_case(name, s) for name, s in (("torch", 3e-3), ("lstmx", 2e-3))),
        *(gpu_case(f"{name}+graph", s) for name, s in (("torch", 1e-3), ("lstmx", 2e-3))),
        *(
            gpu_case(name, s, weight_dropout=0.5)
            for name, s in (("torch", 8e-3), ("torch+reassigned", 6e-3), ("lstmx", 2e-3))
        ),
    ]
    results = {"environment": GPU | {"commit": "c", "date": "d"}, "measurements": rows}
    other = {key: rows[0][key] for key in ("cell", "T", "B", "I", "H", "dtype", "weight_dropout")}
    other |= {"library": "flashrnn", "commit": "0123456789abcdef", "tf32": False, "note": "n"}
    check = other | {"mode": "check", "max_error": 0.1}
    other |= {"mode": "training", "padded_batch": 8, "variant": "", "graph": True}
    other |= {"median_us": 4000.0, "p20_us": 3000.0, "p80_us": 5000.0}
    measured, others, out = (tmp_path / name for name in ("m.json", "o.jsonl", "h200-summary.json"))
    measured.write_text(json.dumps(results))
    others.write_text(f"{json.dumps(check)}\n{json.dumps(other)}\n")
    assert run(gpu_summary.main, out, measured, "--others", others) == (0, "")

    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == len(rows) + 1
    assert cases[3]["path"] == "stepwise, graph"
    assert [cases[0][key] for key in ("mode", "median_ms", "p20", "p80")] == ["fwd+bwd", 3, 1.5, 6]
    assert cases[-1]["provider"] == "flashrnn, batch padded to 8+graph"
    lines = readme.gpu().splitlines()
    assert "| training, bfloat16 | 1.50 (1.50) | 0.50 (0.50) |  |  |" in lines
    assert "| training, bfloat16, weight dropout 0.5 | 3.00 (3.00) |  |  |  |" in lines
    assert "| 2, 3, 4, 5 | 1.50 | 0.50 | 3.00 |  |  |  |" in lines
    assert "| bfloat16, 2, 3, 4, 5 | 1.00 | 2.00 | 4.00 |  |" in readme.gpu_others().splitlines()

    another = tmp_path / "another.json"
    another.write_text(
        json.dumps(results | {"environment": results["environment"] | {"cuda": "9"}})
    )
    status, output = run(gpu_summary.main, out, measured, another)
    assert status == 2
    assert "was measured with cuda '9'" in " ".join(output.replace("│", " ").split())


def test_what_a_step_is_made_of():
    """Two calls of two steps and a sum, which the profiler does not tell in order."""
    kernels = [
        Kernel(name, call + begin, call + begin + took)
        for call in (1000.0, 0.0)
        for name, begin, took in (
            ("product", 0.0, 4.0),
            ("cell", 5.0, 2.0),
            ("product", 8.0, 4.0),
            ("cell", 13.0, 3.0),
            ("sum", 16.0, 1.0),
        )
    ]
    found = step_profile.summary(kernels, calls=2)
    assert (found["call_us"], found["idle_us"], found["between_us"]) == (17, 3, 1)
    assert found["kernels"] == [
        {"name": "product", "count": 2, "each_us": 4, "sum_us": 8},
        {"name": "cell", "count": 2, "each_us": 2.5, "sum_us": 5},
        {"name": "sum", "count": 1, "each_us": 1, "sum_us": 1},
    ]
    with pytest.raises(ValueError, match="10 kernels are not those of 3 equal calls"):
        step_profile.summary(kernels, calls=3)


def test_a_tree_without_its_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("LSTMX_COMMIT", "0123456789ab")
    assert environment()["commit"] == "0123456789ab"


def test_a_profile_of_steps_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, output = run(step_profile.main, "--json", tmp_path / "profile.json")
    assert status == 2
    assert "needs a GPU" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("results")
@pytest.mark.parametrize("name", [name for name in readme.TABLES if "_" in name or name == "gpu"])
def test_a_table_of_nothing(name):
    page = f"<!-- {name} -->\n<!-- /{name} -->"
    filled = readme.updated(page)
    assert filled == f"<!-- {name} -->\n{readme.ABSENT}\n<!-- /{name} -->"
    assert readme.updated(filled) == filled


def test_the_command_line(tmp_path):
    """Parts add up in one file; what it has is left out with --resume; tables fit 100 columns."""
    path, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    part = ["--shape", "2,3,4,5", "--cell", "gru", "--threads", 1, "--seconds", 0.001]
    part += ["--json", path, "--no-memory"]
    assert run(main, *part, "--dtype", "float32", "--mode", "training")[0] == 0
    first = json.loads(path.read_text())["measurements"]
    assert [row["provider"] for row in first] == list(DEFAULT_PROVIDERS)
    status, output = run(main, *part, "--resume", "--minutes", 0)
    assert status == 0
    assert "5 of 6 cases were left out: no time" in output
    assert json.loads(path.read_text())["measurements"] == first
    status, output = run(main, *part, "--resume", "--plot", plot)
    assert status == 0
    rows = json.loads(path.read_text())["measurements"]
    assert rows[: len(first)] == first
    assert len(rows) == 2 * (3 + 4 + 4)  # dtypes; forward has no lstmx+low
    assert len({report.key(row) for row in rows}) == len(rows)
    assert all(row["commit"] and row["date"] for row in rows) or not (ROOT / ".git").exists()
    assert max(map(len, output.splitlines())) <= 100
    assert "training, weight dropout 0.5, bfloat16, 1 thread, cpu" in output
    assert plot.read_bytes().startswith(b"\x89PNG")

    results = json.loads(path.read_text())
    results["environment"]["processor"] = "abacus"
    path.write_text(json.dumps(results))
    status, output = run(main, *part, "--resume")
    assert status == 2
    assert "was measured with processor 'abacus'" in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "1,2,3"], "shape must be T,B,I,H, got '1,2,3'"),
        (
            ["--mode", "sleep"],
            "mode must be one of forward, training, dropout, carried, got 'sleep'",
        ),
        (["--dtype", "int8"], "dtype must be one of .*got 'int8'"),
        (["--cell", "rnn"], "cell must be one of lstm, gru, got 'rnn'"),
        (["--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["--dtype", "tf32"], "dtype tf32 needs --device cuda"),
        (["--resume"], "resume needs a file to go on with: --json"),
    ],
)
def test_errors_of_the_command_line(arguments, words):
    status, output = run(main, *arguments)
    assert status == 2
    assert re.search(words, " ".join(output.replace("│", " ").split()))


@pytest.mark.benchmark(min_rounds=5, max_time=0.1, warmup=False)
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("shape", [(16, 64, 64, 64), (33, 7, 77, 131), (1, 1, 256, 256)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_speed(benchmark, cell, shape, mode):
    """For pytest-benchmark's comparison of runs; see CONTRIBUTING.md."""
    case = Case(cell, *shape)
    assert case in BENCHMARKS["cpu"]
    module = make("lstmx", cell, case.I, case.H, 0.0, torch.float32)
    y, *_ = benchmark(call(module, *tensors(case, torch.float32), mode))
    assert y.shape == (case.T, case.B, case.H)

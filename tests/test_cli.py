"""The command line: what it prints, what it writes, and how it refuses."""

import json

import pytest
from typer.testing import CliRunner

import lstmx
from lstmx.cli import app
from lstmx.text.diagrams import DIAGRAMS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:"),  # Lightning's own call
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def test_chapter(tmp_path):
    numbers, plot, models = tmp_path / "a" / "n.json", tmp_path / "b" / "p.png", tmp_path / "c"
    pictures = tmp_path / "d"
    files = ["--json", str(numbers), "--plot", str(plot), "--checkpoint", str(models)]
    files += ["--pictures", str(pictures)]
    done = run("chapter", "--models", "1,3", "--seeds", "2", *files)
    assert done.exit_code == 0, done.output
    assert "0.494" in done.output  # the book
    assert "0.589" in done.output
    written = json.loads(numbers.read_text())
    assert [row["model"] for row in written["results"]] == ["1", "3"]
    assert [len(run["epochs"]) for run in written["results"][0]["runs"]] == [4, 4]
    assert written["environment"]["lstmx"] == lstmx.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
    drawn = {path.stem for path in pictures.iterdir()}
    assert drawn == {*DIAGRAMS, "gradients", "learning-curves"}
    names = ["1-seed0.ckpt", "1-seed1.ckpt", "3-seed0.ckpt", "3-seed1.ckpt"]
    assert sorted(path.name for path in models.iterdir()) == names
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "9"], "models must be among"),
        (["--backend", "cudnn"], "backend must be one of"),
        (["--seeds", "0"], "greater than or equal to 1"),
        (["--threads", "0"], "greater than or equal to 1"),
        (["--accelerator", "tpu"], "accelerator must be cpu, gpu or auto"),
    ],
)
def test_refusals(arguments, words):
    done = run("chapter", *arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_memory(tmp_path):
    numbers, plot = tmp_path / "n.json", tmp_path / "p.png"
    files = ["--json", str(numbers), "--plot", str(plot)]
    done = run("memory", "--distances", "0,2", "--seeds", "1", *files)
    assert done.exit_code == 0, done.output
    results = json.loads(numbers.read_text())["results"]
    assert [(r["cell"], r["distance"]) for r in results] == [
        (cell, distance) for distance in (0, 2) for cell in ("RNN", "LSTM", "GRU")
    ]
    assert all(r["accuracy"] > 0.9 for r in results)  # so short a distance is easy
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("distances", ["5,x", "-1", ""])
def test_memory_refuses(distances):
    done = run("memory", "--distances", distances)
    assert done.exit_code == 2
    assert "distances must be numbers from 0 on" in done.output


def test_help():
    done = run("--help")
    assert "chapter" in done.output

"""The command line: what it prints, what it writes, and how it refuses."""

import json

import pytest
from typer.testing import CliRunner

import lstmx
from lstmx.cli import app

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:"),  # Lightning's own call
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def test_chapter(tmp_path):
    numbers, plot, models = tmp_path / "a" / "n.json", tmp_path / "b" / "p.png", tmp_path / "c"
    files = ["--json", str(numbers), "--plot", str(plot), "--checkpoint", str(models)]
    done = run("chapter", "--models", "1,3", "--seeds", "2", *files)
    assert done.exit_code == 0, done.output
    assert "0.494" in done.output  # the book
    assert "0.589" in done.output
    written = json.loads(numbers.read_text())
    assert [row["model"] for row in written["results"]] == ["1", "3"]
    assert [len(run["epochs"]) for run in written["results"][0]["runs"]] == [4, 4]
    assert written["environment"]["lstmx"] == lstmx.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
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
    ],
)
def test_refusals(arguments, words):
    done = run("chapter", *arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_help():
    done = run("--help")
    assert "chapter" in done.output

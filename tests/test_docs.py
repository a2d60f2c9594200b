"""Every block of Python and every command in the documents runs, every link leads somewhere."""

import concurrent.futures
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import readme
from lstmx.cli import app
from lstmx.text.config import read_config
from lstmx.text.storage import load_model

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page):
    names = {"__name__": "__main__"}
    for block in _blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def _run_as_typed(line, folder):
    """A line of a shell that finds this source tree's command."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-e", "-o", "pipefail", "-c", line]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").iterdir()), ids=lambda path: path.name)
def test_examples_are_read(path):
    config = read_config(path)
    assert config.model.preset == path.stem


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:")  # Lightning's own call
@pytest.mark.parametrize("name", ["train", "classify", "distributed"])
def test_commands_run(name, tmp_path, monkeypatch):
    page = ROOT / "docs" / f"{name}.md"
    shutil.copytree(ROOT / "tests" / "data" / "kjv", tmp_path / "text")
    shutil.copytree(ROOT / "tests" / "data" / "books", tmp_path / "books")
    monkeypatch.chdir(tmp_path)
    for block in _blocks(page, "toml"):
        file = Path(block.splitlines()[0].removeprefix("# "))
        file.write_text(block)
        read_config(file)
    lines = [line for block in _blocks(page, "sh") for line in block.splitlines()]
    assert lines
    for line in lines:
        command, *arguments = shlex.split(line)
        # In this process, to save the start of another one.
        if command == "lstmx" and "$(" not in line:
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}"
            output = done.stdout
        else:
            output = _run_as_typed(line, tmp_path)
        assert output, line


SMALL_RUN = """kind = "language-model"
data = { source = "corpus", batch_size = 16 }
model = { embedding = 32, hidden = 48, layers = 2 }
train = { epochs = 1 }
"""


@pytest.mark.slow
def test_the_command_for_several_machines_runs(tmp_path):
    """Typed twice here, as on two machines that meet on this one, with one process each."""
    page = (ROOT / "docs" / "distributed.md").read_text()
    typed = re.search(r"^    (torchrun --nnodes 2(?:.*\\\n)*.*)$", page, re.MULTILINE)
    assert typed is not None
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    line = typed[1].replace("\\\n", " ").replace("--nproc-per-node 8", "--nproc-per-node 1")
    line = line.replace("first-machine:29500", f"localhost:{port}")
    line = line.replace("/shared/run", "run")
    shutil.copytree(ROOT / "tests" / "data" / "kjv", tmp_path / "text")
    _run_as_typed("lstmx prepare text corpus --kind raw-word --min-count 2", tmp_path)
    (tmp_path / "config.toml").write_text(SMALL_RUN)
    with concurrent.futures.ThreadPoolExecutor(2) as machines:
        outputs = list(machines.map(lambda _: _run_as_typed(line, tmp_path), range(2)))
    assert sum("model: run/model.safetensors" in output for output in outputs) == 1
    assert load_model(tmp_path / "run" / "model.safetensors").model is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_api_pages_build(tmp_path):
    command = ["make", "docs", f"PAGES={tmp_path}", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "lstmx" / "modules.html").read_text()
    assert "return_cell_states" in page
    assert "weight_dropout" in page


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_tables_are_current(page):
    text = page.read_text()
    assert readme.updated(text) == text

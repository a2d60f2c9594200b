"""The benchmark of the language model runs, compares like with like, and goes on where it was."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.language_model import (
    ABLATIONS,
    TorchLayer,
    app,
    finish,
    precisions_of_both,
    use_torch,
)
from benchmarks.readme import RESULTS
from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel

SMALL = "--embedding 8 --hidden 12 --layers 2 --vocabulary 100 --tokens 3000 --batch-size 8"


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def invoke(command, data, work):
    arguments = f"{command} {data} --work {work} --json {work / 'out.json'} {SMALL}"
    done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads((work / "out.json").read_text())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_torchs_layers_are_the_same_model(cell):
    """In eval mode, and with a mask that drops nothing or all in training."""
    config = AWDLSTMConfig(embedding=6, hidden=10, layers=2, cell=cell).scaled(0)
    ours = AWDLSTMLanguageModel(20, config)
    theirs = AWDLSTMLanguageModel(20, config)
    theirs.load_state_dict(ours.state_dict())
    use_torch(theirs)
    assert all(isinstance(layer, TorchLayer) for layer in theirs.encoder.rnns)
    ids = torch.randint(20, (3, 7))
    for p in (0.0, 1.0):
        for mine, other in zip(ours.encoder.rnns, theirs.encoder.rnns, strict=True):
            mine.weight_dropout = other.p = p
        for _ in range(2):  # with the state of the first call
            torch.testing.assert_close(theirs(ids), ours(ids))
        ours.reset()
        theirs.reset()


def test_speed(data, tmp_path):
    found = invoke("speed --threads 1 --steps 2 --bptt 5", data, tmp_path)
    assert [row["precision"] for row in found["results"]] == precisions_of_both()
    for row in found["results"]:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        for name in ("torch", "lstmx"):
            assert row[name]["tokens_per_second"]["median"] > 0
            assert set(row[name]["share"]) == {"layers", "decoder", "optimiser"}
    assert found["environment"]["torch"] == torch.__version__


def test_the_command_that_is_written_names_no_place_of_this_machine(monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr(
        "sys.argv", ["x", "speed", "a/b", "--work", str(tmp_path / "w"), "--bptt", "5"]
    )
    finish({}, out)
    found = json.loads(out.read_text())
    assert found["command"] == "python -m benchmarks.language_model speed a/b --work w --bptt 5"
    for file in RESULTS.rglob("*.json*"):
        assert not re.search(r"""[\s"'=]/\w+/""", file.read_text()), file


def test_curves(data, tmp_path):
    command = "curves --epochs 2 --seeds 2 --bptt 10 --threads 1"
    found = invoke(f"{command} --plot {tmp_path / 'curves.png'}", data, tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert [run["seed"] for run in found["runs"]["torch"]] == [0, 1]
    assert len(found["valid_loss_by_epoch"]) == 2
    first = found["valid_loss_by_epoch"][0]
    assert abs(first["difference"]) < 0.1
    assert invoke(command, data, tmp_path)["runs"] == found["runs"]


def test_ablation(data, tmp_path):
    found = invoke("ablation --epochs 1 --bptt 10 --threads 1", data, tmp_path)
    assert list(found["runs"]) == list(ABLATIONS)
    assert all(runs[0]["test_perplexity"] > 1 for runs in found["runs"].values())


def test_a_wrong_precision(data, tmp_path):
    done = CliRunner().invoke(app, ["speed", str(data), "--precision", "int8"])
    assert done.exit_code == 2
    assert "int8" in done.output

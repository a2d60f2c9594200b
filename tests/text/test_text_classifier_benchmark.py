"""The benchmark of the classifier runs, compares like with like, and goes on where it was."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.text_classifier import STAGES, classifier_config, main, some_of_each
from lstmx.text.corpus import LabelledSplit

SMALL = "--embedding 8 --hidden 12 --vocabulary 300 --batch-size 8 --bptt 20 --seeds 2"


def split():
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    return LabelledSplit([torch.tensor([i + 10]) for i in range(7)], labels)


def test_some_of_each_class():
    drawn = [some_of_each(split(), 2, seed) for seed in range(8)]
    for some in drawn:
        assert some.labels.tolist() == [0, 0, 1, 1]
        places = [int(ids) - 10 for ids in some.ids]
        assert split().labels[places].tolist() == [0, 0, 1, 1]
        assert len(set(places)) == 4
    assert len({tuple(map(int, some.ids)) for some in drawn}) > 1
    again = some_of_each(split(), 2, 0)
    assert list(map(int, again.ids)) == list(map(int, drawn[0].ids))
    assert len(some_of_each(split(), 0, 0)) == 7
    with pytest.raises(ValueError, match="at most 3, a class has no more; got 4"):
        some_of_each(split(), 4, 0)


def test_the_two_differ_in_nothing_else(tmp_path):
    runs = dict(classifier_config(tmp_path, tmp_path / "lm", 10, 0.5, 1e-3))
    tuned, scratch = runs["fine-tuned"], runs["scratch"]
    assert tuned.data == scratch.data
    assert (tuned.model.scratch, scratch.model.scratch) == (False, True)
    assert tuned.model.encoder == scratch.model.encoder
    assert tuned.train.stages == STAGES
    (stage,) = scratch.train.stages
    assert stage.epochs == sum(stage.epochs for stage in STAGES)
    assert stage.unfrozen is None
    assert scratch.train.factor == 1


def test_it_runs_and_goes_on(data, tmp_path):
    app = typer.Typer()
    app.command()(main)

    def invoke(seeds):
        paths = f"{data} {data.parent / 'books'} --work {tmp_path} --json {tmp_path / 'out.json'}"
        arguments = f"{paths} {SMALL} --documents 3 --seeds {seeds}".split()
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "out.json").read_text())

    found, more = invoke(1), invoke(2)
    assert found["data"]["classes"] == ["1Jn", "Est", "SSol"]
    (row,), (longer,) = found["results"], more["results"]
    assert row["training_documents"] == 9
    for name, runs in longer["runs"].items():
        assert runs[:1] == row["runs"][name]
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(0 <= run["test_accuracy"] <= 1 for run in runs)
    gains = [
        ours["test_accuracy"] - scratch["test_accuracy"]
        for ours, scratch in zip(*longer["runs"].values(), strict=True)
    ]
    assert longer["gain"]["by_seed"] == pytest.approx(gains)
    assert longer["gain"]["mean"] == pytest.approx(sum(gains) / 2)
    assert more["language_model"] == found["language_model"]

"""Two gloo processes under torchrun train as one process does with the joined batch."""

import pytest
import torch
from runs import (
    NT_ASGD,
    BeginAveraging,
    classifier_run,
    fit_elsewhere,
    language_model_run,
    without_time,
)

from lstmx.text.fit import CHECKPOINT, MODEL, CheckpointError, fit, read_log
from lstmx.text.storage import load_model


def in_two_processes(config, folder, **options):
    done = fit_elsewhere(config, folder, processes=2, **options)
    assert done.returncode == 0, done.stderr
    return read_log(folder)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        pytest.param({"train": {"lr": 0.01, "epochs": 2}}, 1e-4, id="one-cycle"),
        # Few steps, because steps so large let rounding errors grow.
        pytest.param(
            {"train": NT_ASGD, "data": {"batch_size": 64, "bptt": 40}},
            1e-3,
            id="nt-asgd",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_language_model(changes, tolerance, kjv, tmp_path):
    config = language_model_run(kjv, model={"drop_mult": 0.0}, **changes)
    fit(config, tmp_path / "one", callbacks=[BeginAveraging()])
    in_two_processes(config, tmp_path / "two")
    if config.train.optimizer == "nt-asgd":  # and averaging had begun
        checkpoint = torch.load(tmp_path / "two" / CHECKPOINT, weights_only=True)
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["averaged_steps"] > 0
    logs = [without_time(read_log(tmp_path / name)) for name in ("one", "two")]
    assert len(logs[0]) > 20
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=tolerance)
    one, two = (load_model(tmp_path / name / MODEL).model for name in ("one", "two"))
    for (name, expected), value in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=10 * tolerance, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(kjv, tmp_path):
    """Each process with its own dropout masks, and its own rows' state."""
    config = language_model_run(kjv)
    whole = in_two_processes(config, tmp_path / "whole")
    assert fit_elsewhere(config, tmp_path / "killed", processes=2, kill_at=47).returncode != 0
    checkpoint = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)
    first, second = checkpoint["stream"]["processes"]
    assert not torch.equal(first["torch"], second["torch"])
    assert not torch.equal(first["h"][0][0], second["h"][0][0])
    resumed = in_two_processes(config, tmp_path / "killed", resume=True)
    assert without_time(resumed) == without_time(whole)
    with pytest.raises(CheckpointError, match=r"made by 2 processes.*got 1"):
        fit(config, tmp_path / "killed", resume=True)


@pytest.mark.slow
def test_classifier(kjv, tmp_path):
    """Frozen layers, too, under DDP."""
    config = classifier_run(kjv, tmp_path)
    log = in_two_processes(config, tmp_path / "run")
    losses = [row["valid_loss"] for row in log if "valid_loss" in row]
    assert len(losses) == 3
    assert max(losses) < 3

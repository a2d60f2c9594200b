"""A run that is killed in the middle of an epoch and resumed is the run that was not disturbed."""

import signal

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

from lstmx.text.fit import CHECKPOINT, MODEL, fit, read_log
from lstmx.text.storage import load_model


def killed_and_resumed(config, tmp_path, kill_at):
    """Asserts that both runs are the same; returns what the checkpoint had when it was resumed."""
    whole = fit(config, tmp_path / "whole", callbacks=[BeginAveraging()])
    done = fit_elsewhere(config, tmp_path / "killed", kill_at=kill_at)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoint = torch.load(tmp_path / "killed" / CHECKPOINT, weights_only=True)
    assert 0 < checkpoint["global_step"] < kill_at

    resumed = fit(config, tmp_path / "killed", resume=True, callbacks=[BeginAveraging()])
    assert (resumed.valid_loss, resumed.best_epoch) == (whole.valid_loss, whole.best_epoch)
    expected, got = (without_time(read_log(run.folder)) for run in (whole, resumed))
    assert [row["step"] for row in got if "train_loss" in row] == list(
        range(len(got) - epochs(got))
    )
    assert got == expected
    models = [load_model(run.folder / MODEL).model.state_dict() for run in (whole, resumed)]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
    return checkpoint


def epochs(log):
    return sum("valid_loss" in row for row in log)


def test_one_cycle(kjv, tmp_path):
    config = language_model_run(kjv)
    checkpoint = killed_and_resumed(config, tmp_path, kill_at=47)
    assert checkpoint["epoch"] == 1
    assert checkpoint["stream"]["loader"]["batch"] > 0


def test_nt_asgd_after_averaging_began(kjv, tmp_path):
    config = language_model_run(kjv, train=NT_ASGD)
    checkpoint = killed_and_resumed(config, tmp_path, kill_at=107)
    assert checkpoint["epoch"] == 3
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["averaged_steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kill_at", "epoch"), [(12, 0), (22, 2)])
def test_classifier(kill_at, epoch, kjv, tmp_path):
    """From the end of the first epoch and stage, and from the middle of the last one."""
    checkpoint = killed_and_resumed(classifier_run(kjv, tmp_path), tmp_path, kill_at=kill_at)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (epoch, {0: 9, 2: 20}[epoch])

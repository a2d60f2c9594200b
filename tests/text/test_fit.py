"""Runs: what they learn, log, keep and refuse; evaluation over a whole split."""

import math
import random
import resource

import lightning.pytorch as pl
import pytest
import torch
from runs import BOOKS, NT_ASGD, BeginAveraging, classifier_run, language_model_run
from torch.nn import functional as F

from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.checkpoints import CheckpointFile
from lstmx.text.config import read_config, updated
from lstmx.text.corpus import read_labelled
from lstmx.text.fit import (
    CHECKPOINT,
    CONFIG,
    MODEL,
    CheckpointError,
    RunError,
    evaluate,
    evaluate_classifier,
    find_lr,
    fit,
    fit_language_model,
    read_log,
)
from lstmx.text.storage import load_model, save_model


@pytest.fixture(scope="module")
def run(kjv, tmp_path_factory):
    """A finished run."""
    config = language_model_run(kjv, train={"lr": 0.05, "clip": 1.0, "tensorboard": True})
    folder = tmp_path_factory.mktemp("runs") / "run"
    return config, fit(config, folder)


def test_a_run_learns_and_leaves_its_files(run, kjv):
    config, result = run
    assert {path.name for path in result.folder.iterdir()} == {
        CONFIG,
        CHECKPOINT,
        MODEL,
        "log",
        "tensorboard",
    }
    assert read_config(result.folder / CONFIG) == config
    assert list((result.folder / "tensorboard").rglob("events.out.tfevents.*"))
    log = read_log(result.folder)
    steps = [row for row in log if "train_loss" in row]
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert all(row["lr"] > 0 and row["tokens_per_second"] > 0 for row in steps)
    first = sum(row["train_loss"] for row in steps[:5]) / 5
    assert first == pytest.approx(math.log(len(kjv.tokenizer)), abs=0.5)
    assert result.valid_loss < first - 1
    best = min((row for row in log if "valid_loss" in row), key=lambda row: row["valid_loss"])
    assert result.valid_loss == best["valid_loss"]
    assert best["perplexity"] == pytest.approx(math.exp(best["valid_loss"]), rel=1e-5)
    assert result.best_epoch == best["epoch"]


def test_the_saved_model_is_what_was_validated(run, kjv):
    config, result = run
    saved = load_model(result.model)
    model, tokenizer = saved.model, saved.tokenizer
    assert tokenizer == kjv.tokenizer
    found = evaluate(model, kjv.split("valid"), batch_size=config.data.eval_batch_size)
    assert found.loss == pytest.approx(result.valid_loss, rel=1e-5)


def test_a_config_repeats_its_run(run, tmp_path):
    _, result = run
    again = fit(read_config(result.folder / CONFIG), tmp_path / "again")
    assert again.valid_loss == result.valid_loss


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_is_of_every_token_in_one_piece(batch_size):
    """Against the model called once on each part of the text."""
    torch.manual_seed(0)
    model = AWDLSTMLanguageModel(50, AWDLSTMConfig(embedding=8, hidden=12, layers=2)).train()
    ids = torch.randint(50, (3 * 67 + 2,))
    model(ids[None, :5])
    state = model.h
    found = evaluate(model, ids, batch_size=batch_size, bptt=10)
    assert model.training
    assert model.h is state

    steps = (len(ids) - 1) // batch_size
    assert steps % 10  # there is a last, shorter window
    starts = [row * steps for row in range(batch_size)]
    x = torch.stack([ids[start : start + steps] for start in starts])
    y = torch.stack([ids[start + 1 : start + 1 + steps] for start in starts])
    model.reset()
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(x).flatten(0, 1), y.flatten())
    assert found.loss == pytest.approx(float(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(float(expected.exp()), rel=1e-5)
    assert found.tokens == steps * batch_size
    assert found.accuracy is None


class Look(pl.Callback):
    """What is seen at each step."""

    def __init__(self, see):
        self.see, self.seen = see, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(self.see(trainer, pl_module))


def test_the_rate_follows_the_length(kjv, tmp_path):
    class Lengths(Look):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.length = batch[0].size(1)

    look = Lengths(lambda t, _: (look.length, t.optimizers[0].param_groups[0]["lr"]))
    settings = {"optimizer": "nt-asgd", "lr": 2.0, "epochs": 1}
    fit(language_model_run(kjv, train=settings), tmp_path / "run", callbacks=[look])
    lengths = [length for length, _ in look.seen]
    assert len(set(lengths)) > 5
    assert [rate for _, rate in look.seen] == pytest.approx([2.0 * n / 20 for n in lengths])


def test_gradients_are_clipped(kjv, tmp_path):
    def norm(trainer, pl_module):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    class After(Look):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(norm(trainer, pl_module))

    before, after = Look(norm), After(lambda *_: None)
    settings = {"clip": 0.05, "epochs": 1}
    fit(language_model_run(kjv, train=settings), tmp_path / "run", callbacks=[before, after])
    clipped = [value for value in after.seen if value is not None]
    assert min(before.seen) > 0.05
    assert clipped == pytest.approx([0.05] * len(before.seen), rel=1e-3)


def test_nt_asgd_validates_and_saves_the_mean(kjv, tmp_path):
    config = language_model_run(kjv, train=NT_ASGD)
    result = fit(config, tmp_path / "run", callbacks=[BeginAveraging()])
    checkpoint = torch.load(result.folder / CHECKPOINT, weights_only=True)
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    losses = [row["valid_loss"] for row in read_log(result.folder) if "valid_loss" in row]
    assert group["losses"] == pytest.approx(losses)
    assert group["averaged_steps"] > 0
    assert result.best_epoch == 3
    model = load_model(result.model).model
    found = evaluate(model, kjv.split("valid"), batch_size=8).loss
    assert found == pytest.approx(losses[-1], rel=1e-5)
    last = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    assert not torch.equal(
        model.state_dict()["encoder.embedding.weight"], last["encoder.embedding.weight"]
    )
    # Which of the two is better after so few steps is chance.
    model.load_state_dict(last)
    assert abs(evaluate(model, kjv.split("valid"), batch_size=8).loss - found) > 1e-3


def test_mixed_precision(run, kjv, tmp_path):
    dtypes = Look(lambda _, module: {s.dtype for layer in module.model.h for s in layer})
    config = updated(run[0], {"train.precision": "bf16-mixed", "train.tensorboard": False})
    result = fit(config, tmp_path / "run", callbacks=[dtypes])
    assert set.union(*dtypes.seen) == {torch.bfloat16}
    assert result.valid_loss == pytest.approx(run[1].valid_loss, rel=0.01)
    assert load_model(result.model).model.decoder.weight.dtype == torch.float32


def test_early_stopping(kjv, tmp_path):
    """A rate at which nothing improves; and a run that was stopped does not go on."""
    config = language_model_run(kjv, train={"lr": 1e-12, "epochs": 9, "patience": 2})
    result = fit(config, tmp_path / "run")
    assert result.epochs < 9
    assert fit(config, tmp_path / "run", resume=True).epochs == result.epochs


def test_divergence_is_an_error(kjv, tmp_path):
    settings = {"optimizer": "nt-asgd", "lr": 1e30, "clip": 0.0}
    with pytest.raises(RunError, match=r"diverged\. Lower train\.lr or set train\.clip"):
        fit(language_model_run(kjv, train=settings), tmp_path / "run")


def test_adaptive_softmax(kjv, tmp_path):
    config = language_model_run(kjv, model={"tied": False, "cutoffs": [20, 200]})
    result = fit(config, tmp_path / "run")
    assert result.valid_loss < 6
    assert load_model(result.model).model.cutoffs == [20, 200]


def test_learning_rate_finder(kjv):
    found = find_lr(language_model_run(kjv), steps=60)
    assert found.rates == sorted(found.rates)
    assert len(found.losses) == len(found.rates) > 20
    assert 1e-3 < found.suggestion < 1
    with pytest.raises(ValueError, match=r"got 1, 0\.1, 100"):
        find_lr(language_model_run(kjv), low=1, high=0.1)


def test_a_pretrained_language_model_is_carried_over(run, kjv, tmp_path):
    """To a vocabulary with other ids."""
    words = kjv.tokenizer.words
    config = language_model_run(kjv, model={"pretrained": str(run[1].model)}, train={"lr": 1e-12})
    result = fit(config, tmp_path / "run")
    assert result.valid_loss == pytest.approx(run[1].valid_loss, rel=1e-4)
    assert load_model(result.model).model.vocabulary == len(words)


# ---- Classifiers


def test_classifier_unfreezes_by_stages(kjv, tmp_path):
    look = Look(
        lambda t, module: [
            (g["lr"], g["params"][0].requires_grad, g["params"][0].grad is not None)
            for g in t.optimizers[0].param_groups
            if g["weight_decay"]
        ]
    )
    result = fit(classifier_run(kjv, tmp_path), tmp_path / "run", callbacks=[look])
    assert len(look.seen) == 3 * 9
    for trained, epoch in ((1, look.seen[:9]), (2, look.seen[9:18]), (4, look.seen[18:])):
        for row in epoch:
            for depth, (lr, requires, has) in enumerate(row):
                assert requires == has == (depth < trained)
                assert lr == (row[0][0] / 2.6**depth if depth < trained else 0.0)
    saved = load_model(result.model)
    assert saved.classes == read_labelled(BOOKS, kjv.tokenizer).classes
    split = read_labelled(BOOKS, kjv.tokenizer).valid
    found = evaluate_classifier(saved.model, split, batch_size=7)
    assert found.loss == pytest.approx(result.valid_loss, rel=1e-4)
    rows = [row for row in read_log(result.folder) if row.get("valid_loss") == result.valid_loss]
    assert found.accuracy == pytest.approx(rows[0]["accuracy"])


@pytest.mark.parametrize("scratch", [False, True])
def test_classifier_begins_with_the_language_model(scratch, kjv, tmp_path):
    config = classifier_run(kjv, tmp_path, model={"scratch": scratch})
    trained = load_model(config.model.pretrained).model.encoder.state_dict()
    stages = [{"epochs": 1, "lr": 1e-12, "unfrozen": 1}]
    result = fit(updated(config, {"train.stages": stages}), tmp_path / "run")
    for name, value in load_model(result.model).model.encoder.state_dict().items():
        assert torch.equal(value, trained[name]) == (not scratch), name


def test_classifier_needs_a_language_model(kjv, tmp_path):
    config = classifier_run(kjv, tmp_path)
    model = load_model(config.model.pretrained).model
    save_model(model, config.model.pretrained)
    with pytest.raises(RunError, match="must be a language model with its tokenizer"):
        fit(config, tmp_path / "run")


# ---- What goes wrong


def test_a_folder_holds_one_run(run):
    with pytest.raises(RunError, match="holds a run already: resume it, or choose another folder"):
        fit(run[0], run[1].folder)


def test_nothing_to_resume(kjv, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.ckpt"):
        fit(language_model_run(kjv), tmp_path / "run", resume=True)


def test_resuming_another_run(run):
    with pytest.raises(CheckpointError, match=r"another train\.lr: 0\.05 there, 0\.1 here"):
        fit(updated(run[0], {"train.lr": 0.1}), run[1].folder, resume=True)


def test_resuming_with_another_vocabulary(run, kjv, tmp_path):
    class Other:
        tokenizer = type(kjv.tokenizer).train(["a b c"])
        split = kjv.split

    with pytest.raises(CheckpointError, match="another vocabulary"):
        fit_language_model(run[0], Other, run[1].folder, resume=True)


def test_too_little_text(kjv, tmp_path):
    with pytest.raises(ValueError, match="must have more tokens than batch_size"):
        fit(language_model_run(kjv, data={"batch_size": 10**6}), tmp_path / "run")


def test_no_tensorboard(kjv, tmp_path, monkeypatch):
    def absent(*_, **__):
        raise ModuleNotFoundError

    monkeypatch.setattr("lstmx.text.fit.TensorBoardLogger", absent)
    with pytest.raises(RunError, match="pip install tensorboard"):
        fit(language_model_run(kjv, train={"tensorboard": True}), tmp_path / "run")


class FullDisk(pl.Callback):
    """From a step on no file may grow beyond a size."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            limit_files(self.size)


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("step", "size", "error"),
    [
        (10, 20_000, CheckpointError),  # too little for the checkpoint of step 14
        (10, 100, RunError),  # nor for the log
    ],
)
def test_a_full_disk_loses_nothing(step, size, error, kjv, tmp_path):
    config = language_model_run(kjv)
    expected = fit(config, tmp_path / "whole").valid_loss
    folder = tmp_path / "run"
    try:
        with pytest.raises(error, match="make room and resume"):
            fit(config, folder, callbacks=[FullDisk(step, size)])
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert CheckpointFile({}).load_checkpoint(folder / CHECKPOINT)["global_step"] == 7
    assert not list(folder.glob(".*"))
    assert fit(config, folder, resume=True).valid_loss == expected


def test_a_log_that_ends_in_half_a_line(run, tmp_path):
    (log,) = run[1].folder.glob("log/version_*/metrics.csv")
    copy = tmp_path / log.relative_to(run[1].folder)
    copy.parent.mkdir(parents=True)
    copy.write_text(log.read_text()[:-3])
    assert read_log(tmp_path) == read_log(run[1].folder)[:-1]


def test_no_log(tmp_path):
    with pytest.raises(RunError, match="has no log"):
        read_log(tmp_path)


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    """Cut short anywhere; and a bit flipped anywhere, unless it changes nothing that is read."""
    content = (run[1].folder / CHECKPOINT).read_bytes()
    path, file = tmp_path / CHECKPOINT, CheckpointFile({})
    path.write_bytes(content)
    whole = repr(file.load_checkpoint(path))
    draw = random.Random(0)
    refused = 0
    for size in (0, 1, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"last\.ckpt is no checkpoint, or is damaged"):
            file.load_checkpoint(path)
    for _ in range(100):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert repr(file.load_checkpoint(path)) == whole
        except CheckpointError:
            refused += 1
    assert refused > 80


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    path = tmp_path / CHECKPOINT
    torch.save({"run": {}, "stream": Malicious(), "loops": {}}, path)
    with pytest.raises(CheckpointError, match="is no checkpoint, or is damaged"):
        CheckpointFile({}).load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="is not one of a run"):
        CheckpointFile({}).load_checkpoint(path)

"""AWD-LSTM proper: sizes, state, sharing, and where each dropout acts."""

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lstmx.text.awd_lstm import (
    AWDLSTM,
    PRESETS,
    AWDLSTMConfig,
    AWDLSTMLanguageModel,
    fastai_lm,
    find_preset,
    merity_ptb,
)
from lstmx.text.classifier import TextClassifier
from lstmx.text.regularisers import (
    activation_regularisation,
    temporal_activation_regularisation,
)

SMALL = AWDLSTMConfig(embedding=6, hidden=10, layers=3)
NO_DROPOUT = SMALL.scaled(0)


def test_sizes():
    model = AWDLSTMLanguageModel(20, SMALL)
    assert [(r.input_size, r.hidden_size) for r in model.encoder.rnns] == [
        (6, 10),
        (10, 10),
        (10, 6),
    ]
    logits, raw, dropped = model.activations(torch.randint(20, (4, 7)))
    assert logits.shape == (4, 7, 20)
    assert raw.shape == dropped.shape == (4, 7, 6)
    assert model.decoder.weight is model.encoder.embedding.weight


def test_presets():
    assert find_preset("merity_ptb") is merity_ptb
    for name, preset in PRESETS.items():
        assert preset.embedding == 400
        assert preset.layers == 3
        assert preset.hidden == (1152 if "fastai" in name else 1150)
    with pytest.raises(ValueError, match=r"preset must be one of fastai_lm, .*, got 'merity'"):
        find_preset("merity")


def test_another_output_size():
    model = AWDLSTMLanguageModel(20, replace(SMALL, output=12), tied=False)
    raw, dropped = model.features(torch.randint(20, (4, 7)))
    assert raw.shape == dropped.shape == (4, 7, 12)
    assert model.decode(dropped).shape == (4, 7, 20)
    with pytest.raises(ValueError, match="tied must be False with an output of 12 and an embed"):
        AWDLSTMLanguageModel(20, replace(SMALL, output=12))


def test_one_layer():
    config = AWDLSTMConfig(embedding=6, hidden=10, layers=1)
    assert AWDLSTM(20, config)(torch.randint(20, (4, 7))).shape == (4, 7, 6)


def test_state_goes_on():
    model = AWDLSTMLanguageModel(20, NO_DROPOUT)
    ids = torch.randint(20, (4, 8))
    whole = model(ids)
    model.reset()
    assert model.h is None
    model(ids[:, :3])
    torch.testing.assert_close(model(ids[:, 3:]), whole[:, 3:])
    assert not any(s.requires_grad for layer in model.h for s in layer)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_state_follows_the_batch(cell):
    model = AWDLSTMLanguageModel(20, replace(NO_DROPOUT, cell=cell))
    ids = torch.randint(20, (4, 9))
    whole = model(ids)
    model.reset()
    model(ids[:, :3])
    # Fewer rows: the first ones go on. More rows: new ones begin.
    torch.testing.assert_close(model(ids[:2, 3:6]), whole[:2, 3:6])
    grown = model(ids[:, 6:])
    torch.testing.assert_close(grown[:2], whole[:2, 6:])
    model.reset()
    torch.testing.assert_close(grown[2:], model(ids[2:, 6:]))


def test_gradients_end_where_the_batch_begins():
    model = AWDLSTMLanguageModel(20, NO_DROPOUT, tied=False)
    first, second = torch.full((2, 4), 3), torch.full((2, 4), 5)
    model(first)
    model(second).sum().backward()
    gradient = model.encoder.embedding.weight.grad
    assert not gradient[3].any()
    assert gradient[5].any()


def test_the_state_is_the_streams():
    model = AWDLSTMLanguageModel(20, SMALL)
    names = model.state_dict().keys()
    model(torch.randint(20, (2, 3)))
    assert model.state_dict().keys() == names
    assert not list(model.buffers())
    assert model.double().h[0][0].dtype == torch.float64
    model(torch.randint(20, (2, 3)))
    assert model.to("meta").h[2][1].device.type == "meta"


def test_the_state_survives_a_change_of_precision():
    model = AWDLSTMLanguageModel(20, NO_DROPOUT)
    ids = torch.randint(20, (2, 8))
    whole = model(ids)
    model.reset()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :4])
    after = model(ids[:, 4:])
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, whole[:, 4:], rtol=0.05, atol=0.05)


def test_drop_mult():
    scaled = fastai_lm.scaled(0.5)
    assert scaled.weight_p == 0.1
    assert scaled.hidden == fastai_lm.hidden
    with pytest.raises(ValueError, match=r"input_p must be a probability in \[0, 1\], got 2.5"):
        fastai_lm.scaled(10)
    assert SMALL.with_dropouts(merity_ptb) == replace(merity_ptb, embedding=6, hidden=10)


@pytest.mark.parametrize("name", ["embedding_p", "input_p", "weight_p", "hidden_p", "output_p"])
def test_each_dropout_acts(name):
    model = AWDLSTMLanguageModel(20, AWDLSTMConfig(6, 10, 2, **{name: 0.5}, **{
        other: 0.0
        for other in ("embedding_p", "input_p", "weight_p", "hidden_p", "output_p")
        if other != name
    }))  # fmt: skip
    ids = torch.randint(20, (4, 7))

    def run():
        model.reset()
        return model(ids)

    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


def test_padding_begins_as_zero_and_gets_no_gradient():
    encoder = AWDLSTM(20, NO_DROPOUT, padding_idx=2)
    assert not encoder.embedding.weight[2].any()
    encoder(torch.full((2, 3), 2)).sum().backward()
    assert not encoder.embedding.weight.grad.any()


def test_ar_is_on_the_dropped_tar_on_the_raw_output_along_time():
    """By the definition, unit by unit, step by step."""
    model = AWDLSTMLanguageModel(20, replace(NO_DROPOUT, output_p=0.5))
    _, raw, dropped = (x.detach() for x in model.activations(torch.randint(20, (4, 7))))
    assert (dropped == 0).any()
    assert not (raw == 0).any()
    ar = sum(float(v) ** 2 for v in dropped.flatten()) / dropped.numel()
    changes = [raw[:, t] - raw[:, t - 1] for t in range(1, 7)]
    tar = sum(float(c.pow(2).sum()) for c in changes) / (raw.numel() - raw[:, 0].numel())
    assert float(activation_regularisation(dropped, 2.0)) == pytest.approx(2 * ar, rel=1e-5)
    assert float(temporal_activation_regularisation(raw, 3.0)) == pytest.approx(3 * tar, rel=1e-5)


# ---- Decoders ------------------------------------------------------------------------------------

WIDE = AWDLSTMConfig(embedding=16, hidden=10, layers=2)  # an adaptive softmax divides it by 4


def test_the_loss_is_torchs():
    ids, targets = torch.randint(20, (2, 4, 7)).unbind()
    plain = AWDLSTMLanguageModel(20, WIDE).eval()
    _, dropped = plain.features(ids)
    expected = F.cross_entropy(plain.decode(dropped).transpose(1, 2), targets)
    torch.testing.assert_close(plain.loss(dropped, targets), expected)
    with pytest.raises(ValueError, match=r"targets must have size \[4, 7\], got \[4\]"):
        plain.loss(dropped, targets[:, 0])


@pytest.mark.parametrize("bias", [True, False])
def test_the_adaptive_softmax_is_torchs(bias):
    model = AWDLSTMLanguageModel(20, WIDE, tied=False, bias=bias, cutoffs=[5, 11])
    theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 11], head_bias=bias)
    theirs.load_state_dict(model.decoder.state_dict())
    ids, targets = torch.randint(20, (2, 4, 7)).unbind()
    _, dropped = model.features(ids)
    loss = model.loss(dropped, targets)
    expected = theirs(dropped.flatten(0, 1), targets.flatten()).loss
    assert torch.equal(loss, expected)
    log_probabilities = model.decode(dropped)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(4, 7))
    torch.testing.assert_close(F.nll_loss(log_probabilities.transpose(1, 2), targets), expected)
    model.reset()
    assert model.eval()(ids).shape == (4, 7, 20)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_adaptive_softmax_under_autocast():
    model = AWDLSTMLanguageModel(20, WIDE.scaled(0), tied=False, cutoffs=[5, 11])
    ids, targets = torch.randint(20, (2, 4, 7)).unbind()
    expected = model.loss(model.features(ids)[1], targets)
    model.reset()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(model.features(ids)[1], targets)
        assert model.decode(model.features(ids)[1]).dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cutoffs": [5]}, "tied must be False with cutoffs"),
        ({"cutoffs": [], "tied": False}, r"cutoffs must rise within 1 to 19, got \[\]"),
        ({"cutoffs": [7, 5], "tied": False}, r"cutoffs must rise .* got \[7, 5\]"),
        ({"cutoffs": [0, 5], "tied": False}, "cutoffs must rise"),
        ({"cutoffs": [5, 20], "tied": False}, "cutoffs must rise"),
        ({"padding_idx": 20}, "padding_idx must be from 0 to 19, got 20"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        AWDLSTMLanguageModel(20, WIDE, **options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"ids must have size \[B, T\], got \[3\]"):
        AWDLSTM(20, SMALL)(torch.randint(20, (3,)))
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        AWDLSTM(0, SMALL)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hidden": 10.0}, TypeError, "hidden must be an int, got 10.0"),
        ({"layers": True}, TypeError, "layers must be an int, got True"),
        ({"output": 0}, ValueError, "output must be at least 1, got 0"),
        ({"output": 3, "bidirectional": True}, ValueError, "output must be even if bidirect"),
        ({"bidirectional": 1}, TypeError, "bidirectional must be a bool, got 1"),
        ({"weight_p": "0.5"}, TypeError, "weight_p must be a number, got '0.5'"),
        ({"weight_p": float("nan")}, ValueError, "weight_p must be a probability .* got nan"),
        ({"input_p": -0.1}, ValueError, "input_p must be a probability .* got -0.1"),
    ],
)
def test_bad_configs(options, error, words):
    with pytest.raises(error, match=words):
        AWDLSTMConfig(**options)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_groups(tied):
    model = AWDLSTMLanguageModel(20, SMALL, tied=tied)
    groups = model.parameter_groups()
    assert [len(group) for group in groups] == [4, 4, 4, 2 if tied else 3]
    assert {p for group in groups for p in group} == set(model.parameters())
    assert any(p is model.encoder.embedding.weight for p in groups[-1])
    assert len(model.encoder.parameter_groups()) == 4


# ---- Copies in every state of training -----------------------------------------------------------

ROWS, STEPS = 4, 6


def forward(model, ids):
    out = model(ids)
    return out.logits if isinstance(model, TextClassifier) else out


def train_step(model, ids):
    forward(model, ids).square().mean().backward()


def infer(model, ids):
    model.eval()
    with torch.inference_mode():
        forward(model, ids)
    model.train()


STATES = {
    "fresh": lambda model, ids: None,
    "after forward": forward,
    "after backward": train_step,
    "carried state": lambda model, ids: (train_step(model, ids), train_step(model, ids[:2])),
    "after inference": infer,
    "eval": lambda model, ids: (train_step(model, ids), model.eval()),
}
MODELS = {
    "tied": lambda: AWDLSTMLanguageModel(20, WIDE),
    "adaptive gru": lambda: AWDLSTMLanguageModel(
        20, replace(WIDE, cell="gru"), tied=False, cutoffs=[5, 11]
    ),
    "classifier": lambda: TextClassifier(AWDLSTM(20, WIDE), 3, bptt=4),
}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copied", COPIES)
def test_copies(copied, name, state):
    """The copy goes on as the model does, from the same state, and without it."""
    model = MODELS[name]()
    ids = torch.randint(20, (ROWS, STEPS))
    alive = STATES[state](model, ids)  # what keeps the graph, if there is one
    twin = COPIES[copied](model)
    assert twin.training is model.training
    results = []
    for m in (model, twin):
        torch.manual_seed(1)
        m.zero_grad()  # torch copies no gradients
        out = forward(m, ids)
        out.sum().backward()
        results.append([out, *(p.grad for p in m.parameters())])
        if m is model and not isinstance(m, TextClassifier):
            h = twin.h if twin.h is None else twin.h[0]
            assert (h is None) == (state == "fresh")
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert all(p is not q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    del alive


def test_compiles_whole():
    model = AWDLSTMLanguageModel(20, SMALL)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (4, 4, 2):
        compiled(torch.randint(20, (rows, 5))).sum().backward()
    assert model.h[0][0].shape == (1, 2, 10)


# The state is an attribute that a call changes; the size of a batch and the mode change too. One
# model goes through the code generator, which takes long.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [("tied", "inductor"), ("adaptive gru", "aot_eager"), ("classifier", "aot_eager")],
)
def test_compiled_is_the_same(name, backend):
    model = MODELS[name]().double()
    for module in model.modules():  # a compiler draws other numbers
        for probability in {"p", "weight_dropout"} & vars(module).keys():
            setattr(module, probability, 0.0)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    ids = torch.randint(20, (ROWS, STEPS))
    for rows, training in ((4, True), (4, True), (2, True), (4, False)):
        results = []
        for called, owner in ((compiled, model), (plain, plain)):
            owner.train(training)
            owner.zero_grad()
            out = called(ids[:rows])
            out = out.logits if isinstance(owner, TextClassifier) else out
            out.square().sum().backward()
            results.append([out, *(p.grad for p in owner.parameters())])
        torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
        copy.deepcopy(model)
        pickle.dumps(model)


DDP = """
import copy, os, pickle, sys
from dataclasses import replace
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.classifier import TextClassifier

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
config = AWDLSTMConfig(16, 10, 2).scaled(0)
ids = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(1))
mine = ids[rank * 2 : rank * 2 + 2]
for options in ({}, {"tied": False}, {"tied": False, "cutoffs": [5, 11]}):
    for cell in ("lstm", "gru"):
        torch.manual_seed(0)  # the same weights in both processes
        whole = AWDLSTMLanguageModel(20, replace(config, cell=cell), **options)
        model = DistributedDataParallel(copy.deepcopy(whole))  # fresh
        for step in range(5):
            if step == 2:  # after backward, with state, wrapped anew
                model = DistributedDataParallel(copy.deepcopy(model.module))
            if step == 3:  # a look at other text in eval mode, and back
                state = model.module.h
                model.eval()
                with torch.inference_mode():
                    model(mine.flip(1))
                model.train()
                model.module.h = state
            if step == 4:
                model.module = pickle.loads(pickle.dumps(model.module))
                model = DistributedDataParallel(model.module)
            for m, x in ((whole, ids), (model, mine)):
                m.zero_grad()
                m(x).square().mean().backward()
            for a, b in zip(model.module.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
            for a, b in zip(model.module.h, whole.h, strict=True):  # each its own rows
                a, b = (a, b) if cell == "gru" else (a[0], b[0])
                torch.testing.assert_close(a, b[:, rank * 2 : rank * 2 + 2])
            with torch.no_grad():
                for p in (*whole.parameters(), *model.module.parameters()):
                    p -= 0.5 * p.grad

# Batch norm has each process's own statistics: the same documents in both, the same gradients.
torch.manual_seed(0)
whole = TextClassifier(AWDLSTM(20, config), 3, bptt=4, drops=(0, 0))
model = DistributedDataParallel(copy.deepcopy(whole))
lengths = torch.tensor([6, 3, 1, 5])
for training in (True, True, False):
    for m in (whole, model):
        m.train(training)
        m.zero_grad()
        m(ids, lengths).logits.square().mean().backward()
    for a, b in zip(model.module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
copy.deepcopy(model.module)
dist.barrier()
sys.stdout.flush()
os._exit(0)  # see test_distributed.py
"""


@pytest.mark.slow
def test_two_processes_are_one_with_both_batches(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr

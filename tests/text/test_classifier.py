"""The text classifier: padding takes no part, and gradients go where they should."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMConfig
from lstmx.text.classifier import TextClassifier

WORDS, CLASSES, BPTT = 20, 3, 4
CONFIG = AWDLSTMConfig(embedding=6, hidden=10, layers=2).scaled(0)
LENGTHS = torch.tensor([15, 1, 7, 12, 4])


def make(config=CONFIG, **options):
    return TextClassifier(AWDLSTM(WORDS, config), CLASSES, bptt=BPTT, **options)


def documents():
    return torch.randint(WORDS, (len(LENGTHS), 15))


VARIANTS = {
    "lstm": CONFIG,
    "gru": replace(CONFIG, cell="gru"),
    "bidirectional": replace(CONFIG, bidirectional=True),
    "three layers": replace(CONFIG, layers=3),
}


def settle(model):
    """Eval mode, with statistics of batch norm that are not the initial ones."""
    model.train()
    model(documents())
    return model.eval()


@pytest.mark.parametrize("max_length", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_padding_takes_no_part(name, max_length):
    model = settle(make(VARIANTS[name], max_length=max_length))
    ids = documents()
    logits = model(ids, LENGTHS).logits
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-5, atol=1e-6)
    # Nor does what the padding is, how much of it there is, or the order of the rows.
    other = torch.randint(WORDS, (len(LENGTHS), 19))
    for row, length in enumerate(LENGTHS):
        other[row, :length] = ids[row, :length]
    order = torch.randperm(len(LENGTHS))
    shuffled = model(other[order], LENGTHS[order]).logits
    torch.testing.assert_close(shuffled, logits[order], rtol=1e-5, atol=1e-6)


def pooled_by_hand(model, ids, max_length=None):
    """[last, max, mean] of one document, [1, T], read in one go."""
    model.encoder.reset()
    outputs = model.encoder(ids)
    model.encoder.reset()
    outputs = outputs if max_length is None else outputs[:, -max_length:]
    return torch.cat([outputs[:, -1], outputs.amax(1), outputs.mean(1)], 1)


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_pooling(cell, max_length):
    model = settle(make(replace(CONFIG, cell=cell), max_length=max_length))
    ids = documents()
    expected = [
        model.head(pooled_by_hand(model, ids[row : row + 1, :length], max_length))
        for row, length in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(model(ids, LENGTHS).logits, torch.cat(expected))


def test_gradients_equal_those_of_single_documents():
    model = settle(make())
    ids, weights = documents(), torch.randn(len(LENGTHS), CLASSES)
    (model(ids, LENGTHS).logits * weights).sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, length in enumerate(LENGTHS):
        (model(ids[row : row + 1, :length]).logits * weights[row]).sum().backward()
    for p, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_against_finite_differences(name):
    """In one chunk, so that truncation takes nothing away."""
    model = settle(make(VARIANTS[name], hidden=(), drops=(0,))).double()
    model.bptt = 15
    ids, weight = documents(), model.encoder.rnns[0].weight_hh_l0

    def loss(w):
        weights = {"encoder.rnns.0.weight_hh_l0": w}
        return torch.func.functional_call(model, weights, (ids, LENGTHS)).logits.tanh().sum()

    direction = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(loss(weight), weight)
    with torch.no_grad():
        slope = (loss(weight + 1e-5 * direction) - loss(weight - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def words_with_a_gradient(model, ids, lengths=None):
    model.zero_grad()
    model(ids, lengths).logits.square().sum().backward()
    return set(model.encoder.embedding.weight.grad.any(1).nonzero().flatten().tolist())


def test_gradients_reach_every_chunk_but_no_padding():
    model = settle(make())
    ids = torch.arange(15).view(1, 15).expand(2, 15)
    assert words_with_a_gradient(model, ids) == set(range(15))
    lengths = torch.tensor([7, 10])
    assert words_with_a_gradient(model, ids, lengths) == set(range(10))


def test_gradients_end_at_the_chunk():
    """Each chunk gets its own: as if the state before it were a constant."""
    model = settle(make(hidden=(), drops=(0,)))
    ids = documents()[:1, :8]
    model.zero_grad()
    model(ids).logits.sum().backward()
    got = model.encoder.rnns[0].weight_ih_l0.grad.clone()

    model.zero_grad()
    first = model.encoder(ids[:, :BPTT])
    model.encoder.h = [tuple(s.clone() for s in layer) for layer in model.encoder.h]
    outputs = torch.cat([first, model.encoder(ids[:, BPTT:])], 1)
    pooled = torch.cat([outputs[:, -1], outputs.amax(1), outputs.mean(1)], 1)
    model.head(pooled).sum().backward()
    torch.testing.assert_close(model.encoder.rnns[0].weight_ih_l0.grad, got)


def test_only_the_end_gets_a_gradient():
    model = settle(make(max_length=6))
    ids = torch.arange(15).view(1, 15)
    # The six last steps are 9 to 14; the chunk of step 9 begins at 8.
    assert words_with_a_gradient(model, ids) == set(range(8, 15))
    # The state still comes from the beginning.
    changed = ids.clone()
    changed[0, 0] = 19
    assert not torch.equal(model(ids).logits, model(changed).logits)


@pytest.mark.parametrize("max_length", [None, 5])
def test_activations_do_not_change_beyond_a_document(max_length):
    model = settle(make(max_length=max_length))
    logits, raw, dropped = model(documents(), LENGTHS)
    assert logits.shape == (5, CLASSES)
    assert raw is dropped
    for row, length in enumerate(LENGTHS.tolist()):
        first = 0 if max_length is None else max(length - max_length, 0)
        change = (raw[row, 1:] - raw[row, :-1]).any(1)
        assert change.tolist() == [first < step < length for step in range(1, 15)]


def test_chunks_that_nobody_pools_are_left_out():
    model = settle(make(max_length=3))
    ids, lengths = documents()[:3], torch.tensor([15, 13, 14])
    logits, raw, _ = model(ids, lengths)
    # The first step that is pooled, 13 - 3, is in the chunk that begins at 8.
    assert raw.shape == (3, 15 - 8, 6)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_dropout_and_batch_norm_are_in_the_head():
    model = make(replace(CONFIG, output_p=0.4), hidden=(7, 5))
    kinds = [nn.BatchNorm1d, nn.Dropout, nn.Linear, nn.ReLU] * 3
    assert [type(layer) for layer in model.head] == kinds[:-1]
    assert [layer.p for layer in model.head if isinstance(layer, nn.Dropout)] == [0.4, 0.1, 0.1]
    sizes = [(i.in_features, i.out_features) for i in model.head if isinstance(i, nn.Linear)]
    assert sizes == [(18, 7), (7, 5), (5, CLASSES)]


def test_dropout_acts_in_training_only():
    model = make(AWDLSTMConfig(6, 10, 2), max_length=6)
    ids = documents()
    assert not torch.equal(model(ids, LENGTHS).logits, model(ids, LENGTHS).logits)
    model.eval()
    assert torch.equal(model(ids, LENGTHS).logits, model(ids, LENGTHS).logits)


def test_no_state_is_kept():
    model = make()
    model(documents(), LENGTHS)
    assert model.encoder.h is None


def test_parameter_groups():
    model = make(hidden=(7,))
    groups = model.parameter_groups()
    assert [len(group) for group in groups] == [1, 4, 4, 8]
    flat = [p for group in groups for p in group]
    assert len(flat) == len(set(flat))
    assert set(flat) == set(model.parameters())


def test_it_learns():
    """Which of two words comes first, many steps before the end."""
    model = TextClassifier(AWDLSTM(WORDS, replace(CONFIG, embedding=16)), 2, bptt=BPTT)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(61):
        labels = torch.randint(2, (32,))
        lengths = torch.randint(6, 13, (32,))
        ids = torch.randint(2, WORDS, (32, 12))
        ids[:, 0], ids[:, 1] = labels, 1 - labels
        if step == 60:
            model.eval()
            assert (model(ids, lengths).logits.argmax(1) == labels).float().mean() > 0.9
            return
        loss = nn.functional.cross_entropy(model(ids, lengths).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drops": (0.1,)}, "drops must have one value more than hidden, 2, got 1"),
        ({"hidden": (0,)}, "hidden must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"drops": (0.1, 1.5)}, "dropout probability"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        TextClassifier(AWDLSTM(WORDS, CONFIG), 0)
    with pytest.raises(ValueError, match="bptt must be at least 1, got 0"):
        TextClassifier(AWDLSTM(WORDS, CONFIG), 2, bptt=0)


@pytest.mark.parametrize(
    ("ids", "lengths", "words"),
    [
        (torch.ones(3).long(), None, r"ids must have size \[B, T\] with T > 0, got \[3\]"),
        (torch.ones(3, 0).long(), None, r"ids must have size \[B, T\] with T > 0, got \[3, 0\]"),
        (torch.ones(2, 3).long(), torch.tensor([3]), r"int64 of size \[B\] = \[2\], got .*\[1\]"),
        (torch.ones(2, 3).long(), torch.tensor([3.0, 1.0]), "int64 of size .* got torch.float32"),
        (torch.ones(2, 3).long(), torch.tensor([3, 0]), r"from 1 to T = 3, got \[3, 0\]"),
        (torch.ones(2, 3).long(), torch.tensor([3, 4]), r"from 1 to T = 3, got \[3, 4\]"),
    ],
)
def test_bad_input(ids, lengths, words):
    with pytest.raises(ValueError, match=words):
        make()(ids, lengths)

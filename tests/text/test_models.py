"""The chapter's models: the same numbers on every backend, and what state means."""

import pytest
import torch
from torch import nn

from lstmx.text import models as m
from lstmx.text.regularisers import (
    activation_regularisation,
    temporal_activation_regularisation,
)

V, H = 30, 8


def ids(*size):
    return torch.randint(V, size)


def test_the_loop_is_the_unrolled_model():
    unrolled, loop = m.LMModel1(V, H), m.LMModel2(V, H)
    loop.load_state_dict(unrolled.state_dict())
    x = ids(5, 3)
    assert torch.equal(unrolled(x), loop(x))


def test_the_third_word_is_not_looked_at():
    model = m.ThirdWordFromTwo(V, H)
    x, other = ids(5, 3), ids(5, 3)
    other[:, :2] = x[:, :2]
    assert torch.equal(model(x), model(other))


@pytest.mark.parametrize(
    "make", [m.LMModel3, m.LMModel4, lambda v, h: m.LMModel6(v, h, 2)], ids=["3", "4", "6"]
)
def test_state_goes_on_without_its_history(make):
    model = make(V, H)
    x = ids(4, 6)
    whole = model(x)
    model.reset()
    model(x[:, :3])
    state = model.h if isinstance(model.h, tuple) else (model.h,)
    assert not any(s.requires_grad for s in state)
    in_parts = model(x[:, 3:])
    expected = whole if whole.dim() == 2 else whole[:, 3:]
    torch.testing.assert_close(in_parts, expected)
    model.reset()
    assert not torch.allclose(model(x[:, 3:]), in_parts)


RECURRENT = [(m.LMModel5, "RNN"), (m.LMModel5, "GRU"), (m.LMModel6, "LSTM"), (m.LMModel7, "LSTM")]


@pytest.mark.parametrize("backend", sorted(set(m.BACKENDS) - {"torch"}))
@pytest.mark.parametrize(("make", "cell"), RECURRENT)
def test_backends_agree_from_the_same_seed(make, cell, backend):
    """Same seed, same initial weights, same outputs and gradients, to rounding."""
    arguments = (V, H, 2, 0.4) if make is m.LMModel7 else (V, H, 2)
    x, results = ids(4, 6), []
    for name in ("torch", backend):
        torch.manual_seed(1)
        model = make(*arguments, cell=cell, backend=name)
        model(x)
        out = model(x)  # with state, and the same dropout
        out = out.logits if isinstance(out, m.Activations) else out
        out.square().sum().backward()
        # Cells have parameters of their own; what flows through them to the embedding counts.
        of = model.i_h if backend in ("cells", "plain") else model
        results.append([out, *(p.grad for p in of.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_tied_weights():
    model = m.LMModel7(V, H, 2, 0.4)
    assert model.h_o.weight is model.i_h.weight
    count = sum(p.numel() for p in model.parameters())
    layers = sum(p.numel() for p in model.rnn.parameters())
    assert count == layers + V * H + V


def test_regularisers():
    activations = torch.arange(24.0).view(2, 3, 4)
    assert activation_regularisation(activations, 2.0) == 2 * activations.pow(2).mean()
    # Along time every unit rises by 4.
    assert temporal_activation_regularisation(activations, 3.0) == 3 * 16
    assert temporal_activation_regularisation(activations[:, :1], 3.0) == 0


def test_activations():
    model = m.LMModel7(V, H, 2, 0.5)
    x = ids(4, 6)
    logits, raw, dropped = model(x)
    assert logits.shape == (4, 6, V)
    assert (dropped == 0).float().mean() > 0.2
    torch.testing.assert_close(dropped[dropped != 0], 2 * raw[dropped != 0])
    model.eval()
    _, raw, dropped = model(x)
    assert torch.equal(raw, dropped)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of lstmx, torch.*got 'cudnn'"):
        m.LMModel6(V, H, 2, backend="cudnn")


def test_all_backends_are_modules():
    for name in m.BACKENDS:
        for cell in ("RNN", "LSTM", "GRU"):
            assert isinstance(getattr(m.find_backend(name), cell)(H, H, 1), nn.Module)

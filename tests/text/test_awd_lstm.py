"""AWD-LSTM proper: sizes, state, sharing, and where each dropout acts."""

import pytest
import torch

from lstmx.text.awd_lstm import (
    AWDLSTM,
    AWDLSTMConfig,
    AWDLSTMLanguageModel,
    fastai_lm,
    merity_ptb,
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
    assert (fastai_lm.hidden, merity_ptb.hidden) == (1152, 1150)


def test_one_layer():
    config = AWDLSTMConfig(embedding=6, hidden=10, layers=1)
    assert AWDLSTM(20, config)(torch.randint(20, (4, 7))).shape == (4, 7, 6)


def test_state_goes_on_and_follows_the_batch():
    model = AWDLSTMLanguageModel(20, NO_DROPOUT)
    ids = torch.randint(20, (4, 8))
    whole = model(ids)
    model.reset()
    assert model.h is None
    model(ids[:, :3])
    torch.testing.assert_close(model(ids[:, 3:]), whole[:, 3:])
    assert not any(s.requires_grad for layer in model.h for s in layer)
    model(ids[:2])  # another batch size begins afresh
    assert model.h[0][0].size(1) == 2


def test_drop_mult():
    scaled = fastai_lm.scaled(0.5)
    assert scaled.weight_p == 0.1
    assert scaled.hidden == fastai_lm.hidden
    with pytest.raises(ValueError, match="probability"):
        AWDLSTM(20, fastai_lm.scaled(10))


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

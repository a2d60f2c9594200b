"""Locked and embedding dropout."""

import pytest
import torch
from torch import nn

from lstmx.dropout import EmbeddingDropout, LockedDropout


@pytest.mark.parametrize("batch_first", [False, True])
def test_locked_dropout_is_the_same_at_every_step(batch_first):
    drop = LockedDropout(0.5, batch_first=batch_first)
    x = torch.randn(20, 30, 40)
    y = drop(x)
    kept = (y != 0) if not batch_first else (y != 0).transpose(0, 1)
    assert (kept == kept[:1]).all()
    assert 0.45 < kept[0].float().mean() < 0.55
    assert not (kept[0] == kept[0, :1]).all()  # rows differ
    torch.testing.assert_close(y[y != 0], 2 * x[y != 0])
    assert drop.eval()(x) is x


def test_embedding_dropout_drops_words():
    embedding = nn.Embedding(50, 8, padding_idx=3)
    drop = EmbeddingDropout(embedding, 0.5)
    ids = torch.randint(50, (10, 40))
    y, plain = drop(ids), embedding(ids)
    for word in range(50):
        vectors, originals = y[ids == word], plain[ids == word]
        whole = torch.allclose(vectors, 2 * originals)
        assert whole or (vectors == 0).all()
    assert 0.2 < (y.abs().sum(-1) == 0).float().mean() < 0.8
    y.sum().backward()
    assert (embedding.weight.grad[3] == 0).all()  # padding learns nothing
    assert torch.equal(drop.eval()(ids), plain)


@pytest.mark.parametrize("make", [LockedDropout, lambda p: EmbeddingDropout(nn.Embedding(2, 2), p)])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_not_a_probability(make, p):
    with pytest.raises(ValueError, match=r"p must be a probability in \[0, 1\], got"):
        make(p)


def test_drop_everything():
    assert (LockedDropout(1.0)(torch.randn(2, 3, 4)) == 0).all()

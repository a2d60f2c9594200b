"""The dropouts of AWD-LSTM, but for weight dropout, which the recurrent modules have themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _check_probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability in [0, 1], got {p!r}")
    return float(p)


class LockedDropout(nn.Module):
    """Drops the same units at every step (Gal & Ghahramani 2016: "variational" dropout).

    Ordinary dropout draws anew at each step, and over a long sequence every unit is lost some time.

    Args:
        p: probability in [0, 1] of dropping a unit of a row.
        batch_first: x is [B, T, H] and not [T, B, H].

    Raises:
        ValueError: ``p`` is not a probability.
    """

    def __init__(self, p: float, *, batch_first: bool = False) -> None:
        super().__init__()
        self.p, self.batch_first = _check_probability(p), batch_first

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, H] (or [B, T, H]), of the same size after."""
        if not self.training or self.p == 0:
            return x
        first_step = x[:, :1] if self.batch_first else x[:1]
        return x * F.dropout(torch.ones_like(first_step), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, batch_first={self.batch_first}"


class EmbeddingDropout(nn.Module):
    """Drops whole words (Gal & Ghahramani 2016): all occurrences of a word in a batch at once.

    Args:
        embedding: the embedding whose rows are dropped; its padding and other options are kept.
        p: probability in [0, 1] of dropping a word of the vocabulary.

    Raises:
        ValueError: ``p`` is not a probability.
    """

    def __init__(self, embedding: nn.Embedding, p: float) -> None:
        super().__init__()
        self.embedding, self.p = embedding, _check_probability(p)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any size [...] to vectors [..., D]."""
        vectors = self.embedding(ids)
        if not self.training or self.p == 0:
            return vectors
        words = self.embedding.num_embeddings
        return vectors * F.dropout(vectors.new_ones(words), self.p)[ids].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"p={self.p}"

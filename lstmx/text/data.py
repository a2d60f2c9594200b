"""From a long list of tokens to batches.

A batch is a pair of tensors: inputs [B, T], and targets [B] (the next token) or [B, T] (the next
token of every step). Batches are made once and kept in order, because it is part of the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lstmx.text import human_numbers

Batch = tuple[Tensor, Tensor]


class Split(NamedTuple):
    """Training and validation batches."""

    train: list[Batch]
    valid: list[Batch]


def group_chunks(samples: Tensor, batch_size: int) -> Tensor:
    """Reorders samples [n, ...] so that row b of batch k+1 continues row b of batch k.

    The samples, in the order of the text, are cut into ``batch_size`` contiguous parts; batch k
    takes the k-th sample of each part. What does not fill a batch is dropped.
    """
    batches = len(samples) // batch_size
    parts = samples[: batches * batch_size].view(batch_size, batches, *samples.shape[1:])
    return parts.transpose(0, 1).reshape(batches * batch_size, *samples.shape[1:])


def _batches(inputs: Tensor, targets: Tensor, batch_size: int, *, drop_last: bool) -> list[Batch]:
    pairs = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    return [(x, y) for x, y in pairs if len(x) == batch_size or not drop_last]


def triples(ids: Sequence[int], batch_size: int, *, stateful: bool) -> Split:
    """Three words to predict the fourth; each triple begins where the last one ended.

    Args:
        ids: token ids.
        batch_size: rows of a batch.
        stateful: order the batches for a model that keeps its state.
    """
    stream = torch.tensor(ids)
    starts = torch.arange(0, len(ids) - 4, 3)
    inputs, targets = stream[starts[:, None] + torch.arange(3)], stream[starts + 3]
    cut = int(len(starts) * 0.8)
    parts = [(inputs[:cut], targets[:cut]), (inputs[cut:], targets[cut:])]
    if stateful:
        parts = [(group_chunks(x, batch_size), group_chunks(y, batch_size)) for x, y in parts]
    (train, valid) = parts
    return Split(
        _batches(*train, batch_size, drop_last=True),
        _batches(*valid, batch_size, drop_last=False),
    )


def sequences(ids: Sequence[int], batch_size: int, length: int = 16) -> Split:
    """Sequences of ``length`` words, each to predict the same sequence one word later."""
    stream = torch.tensor(ids)
    starts = torch.arange(0, len(ids) - length - 1, length)
    windows = stream[starts[:, None] + torch.arange(length + 1)]
    cut = int(len(starts) * 0.8)
    parts = [group_chunks(part, batch_size) for part in (windows[:cut], windows[cut:])]
    train, valid = (
        _batches(part[:, :-1], part[:, 1:], batch_size, drop_last=True) for part in parts
    )
    return Split(train, valid)


def human_number_ids() -> list[int]:
    """The chapter's data set as positions in its vocabulary."""
    index = {word: i for i, word in enumerate(human_numbers.vocabulary())}
    return [index[word] for word in human_numbers.tokens()]

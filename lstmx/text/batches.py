"""Batches of a stream of tokens and of documents, which resume where they stopped.

What an epoch's batches are depends on the seed and the number of the epoch alone, so the state of
a loader is two numbers, and is the same on all processes.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lstmx.text.corpus import LabelledSplit
from lstmx.text.tokenizer import PAD

_Plan = TypeVar("_Plan")
_Batch = TypeVar("_Batch")

# awd-lstm-lm's distribution of the length of a sequence (Merity et al. 2017, section 5).
_FULL_LENGTH = 0.95
_SPREAD = 5.0
_SHORTEST = 5
# Documents are sorted by length within this many batches.
_BUCKET = 50


class _Batches(ABC, Generic[_Plan, _Batch]):
    """A loader whose state can be saved after any batch.

    One iterator at a time: a new one begins the next epoch, or goes on after
    :meth:`load_state_dict`. All epochs have the same number of batches.
    """

    def __init__(
        self, batch_size: int, seed: int, rank: int, world_size: int, settings: dict[str, Any]
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size-1, got {rank} of {world_size}")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._settings = {"batch_size": batch_size, "seed": seed, **settings}
        self._epoch = self._batch = 0
        self._resumed = False

    @abstractmethod
    def _plan(self, epoch: int) -> Sequence[_Plan]:
        """What the batches of an epoch are made from."""

    @abstractmethod
    def _make(self, plan: _Plan) -> _Batch: ...

    @abstractmethod
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[_Batch]:
        # The first step, not the call of iter(), begins an epoch: trainers call iter() to look
        # whether they can.
        if self._batch and not self._resumed:
            self._epoch, self._batch = self._epoch + 1, 0
        self._resumed = False
        epoch, plan = self._epoch, self._plan(self._epoch)
        for index in range(self._batch, len(plan)):
            # Before the batch is handed out: a state that is saved while it is worked on resumes
            # after it.
            done = index + 1 == len(plan)
            self._epoch, self._batch = (epoch + 1, 0) if done else (epoch, index + 1)
            yield self._make(plan[index])

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, and the settings it belongs to."""
        return {"epoch": self._epoch, "batch": self._batch, "settings": dict(self._settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iterator continue from a position, of a loader of any rank.

        Raises:
            ValueError: the state is of a loader with other data or settings.
        """
        try:
            epoch, batch, settings = state["epoch"], state["batch"], state["settings"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"state must have epoch, batch and settings, got {state!r}") from error
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"state must be of a loader with {name}={value}, got {settings.get(name)}"
                )
        if not 0 <= batch < len(self) or epoch < 0:
            raise ValueError(
                f"state's batch must be in 0..{len(self) - 1}, got {batch} of epoch {epoch}"
            )
        self._epoch, self._batch, self._resumed = epoch, batch, True

    def _random(self, epoch: int) -> random.Random:
        return random.Random(f"{self.seed}/{epoch}")


class StreamBatches(_Batches[tuple[int, int], tuple[Tensor, Tensor]]):
    """A text as ``batch_size`` parallel streams, cut along time, for truncated BPTT.

    Yields inputs and targets, int64 [B, T], where the target is the next token. Row b of a batch
    continues row b of the batch before, so a model keeps its state from one to the next. Of the
    text, what does not fill all rows is left out at its end: fewer than ``batch_size`` tokens.

    Args:
        ids: token ids [n], of any integer dtype; memory-mapped ones are read batch by batch.
        batch_size: rows of a batch, over all processes.
        bptt: T, the number of steps of a batch. The last batch of an epoch may be shorter.
        random_length: draw T for each batch anew, with mean near ``bptt`` (0.95 of the time) or
            half of it, deviation 5, and at least 5 (Merity et al. 2017); the draws of an
            epoch are stretched a little to cover it in a fixed number of batches. The learning rate
            is to be multiplied by T / ``bptt``, as in the paper.
        seed: of the random lengths, together with the number of the epoch.
        rank: of this process: it takes the rows ``rank*B/world_size`` and following. All processes
            have the same T, and no row is ever cut between them.
        world_size: the number of processes.

    Raises:
        ValueError: an argument is out of range, or there are too few tokens for the rows.
    """

    def __init__(
        self,
        ids: Tensor,
        batch_size: int,
        bptt: int,
        *,
        random_length: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(f"ids must be integers [n], got {ids.dtype} {list(ids.shape)}")
        if bptt < 1:
            raise ValueError(f"bptt must be at least 1, got {bptt}")
        super().__init__(
            batch_size,
            seed,
            rank,
            world_size,
            {"bptt": bptt, "random_length": random_length, "tokens": len(ids)},
        )
        if batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of world_size {world_size}, got {batch_size}"
            )
        if len(ids) <= batch_size:
            raise ValueError(
                f"ids must have more tokens than batch_size {batch_size}, got {len(ids)}"
            )
        self.bptt, self.random_length = bptt, random_length
        self._steps = (len(ids) - 1) // batch_size
        rows = batch_size // world_size
        begin, tokens = rank * rows * self._steps, rows * self._steps
        # Views, so a memory-mapped text is not read here.
        self._inputs = ids[begin : begin + tokens].view(rows, self._steps)
        self._targets = ids[begin + 1 : begin + 1 + tokens].view(rows, self._steps)

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        if not self.random_length:
            return -(-self._steps // self.bptt)
        mean = self.bptt * (_FULL_LENGTH + (1 - _FULL_LENGTH) / 2)
        return max(1, round(self._steps / mean))

    def _plan(self, epoch: int) -> Sequence[tuple[int, int]]:
        """The first and the last step, exclusive, of each batch."""
        if not self.random_length:
            starts = range(0, self._steps, self.bptt)
            return [(start, min(start + self.bptt, self._steps)) for start in starts]
        draw, count = self._random(epoch), len(self)
        shortest = min(_SHORTEST, self._steps // count)
        above = []
        for _ in range(count):
            mean = self.bptt if draw.random() < _FULL_LENGTH else self.bptt / 2
            above.append(max(0.0, draw.gauss(mean, _SPREAD) - shortest))
        # What is above the shortest length is stretched so that the lengths add up to the text's.
        stretch = (self._steps - shortest * count) / (sum(above) or 1.0)
        sums = accumulate(above, initial=0.0)
        ends = [shortest * i + round(stretch * total) for i, total in enumerate(sums)]
        ends[-1] = self._steps
        return list(pairwise(ends))

    def _make(self, plan: tuple[int, int]) -> tuple[Tensor, Tensor]:
        steps = slice(*plan)
        return _copy(self._inputs[:, steps]), _copy(self._targets[:, steps])


def _copy(ids: Tensor) -> Tensor:
    return ids.to(torch.int64, copy=True, memory_format=torch.contiguous_format)


class DocumentBatches(_Batches[list[int], tuple[Tensor, Tensor, Tensor]]):
    """Labelled documents, those of like length together.

    Yields ids [B, T], padded on the right, int64; lengths [B], int64, longest first; labels [B],
    int64. Shuffled documents are sorted by length within 50 batches and the batches are shuffled,
    except that the one with the longest document comes first, so that memory runs out early if it
    does; else all are sorted by length. A last batch with fewer than two documents for each process
    is joined to the one before, since batch norm takes no single row in training.

    Args:
        documents: the documents and their labels.
        batch_size: documents of a batch, over all processes.
        pad: the id of padding.
        shuffle: use another order in each epoch.
        seed: of the order, together with the number of the epoch.
        rank: of this process: it takes every ``world_size``-th document of each batch.
        world_size: the number of processes.

    Raises:
        ValueError: an argument is out of range, or there are fewer documents than processes.
    """

    def __init__(
        self,
        documents: LabelledSplit,
        batch_size: int,
        *,
        pad: int = PAD,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        lengths = [len(ids) for ids in documents.ids]
        super().__init__(
            batch_size,
            seed,
            rank,
            world_size,
            {"shuffle": shuffle, "documents": len(lengths), "tokens": sum(lengths)},
        )
        if batch_size < world_size:
            raise ValueError(
                f"batch_size must be at least world_size {world_size}, got {batch_size}"
            )
        if len(lengths) < world_size:
            raise ValueError(
                f"documents must be at least world_size {world_size}, got {len(lengths)}"
            )
        self.pad, self.shuffle = pad, shuffle
        self._documents, self._lengths = documents, lengths

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        full, rest = divmod(len(self._lengths), self.batch_size)
        return full + bool(rest and (not full or rest >= 2 * self.world_size))

    def indices(self, epoch: int = 0) -> list[list[int]]:
        """The documents of each batch of an epoch, over all processes, as positions in the list."""
        order = list(range(len(self._lengths)))
        span = len(order)
        draw = self._random(epoch)
        if self.shuffle:
            draw.shuffle(order)
            span = _BUCKET * self.batch_size
        order = [
            index
            for start in range(0, len(order), span)
            for index in sorted(order[start : start + span], key=self._length, reverse=True)
        ]
        count = len(self)
        ends = [self.batch_size * i for i in range(count)] + [len(order)]
        batches = [order[start:end] for start, end in pairwise(ends)]
        # The last one may have been joined from two parts.
        batches[-1].sort(key=self._length, reverse=True)
        if self.shuffle:
            draw.shuffle(batches)
            longest = max(range(count), key=lambda i: self._length(batches[i][0]))
            batches.insert(0, batches.pop(longest))
        return batches

    def _length(self, index: int) -> int:
        return self._lengths[index]

    def _plan(self, epoch: int) -> Sequence[list[int]]:
        return self.indices(epoch)

    def _make(self, plan: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        own = plan[self.rank :: self.world_size]
        ids = [self._documents.ids[index] for index in own]
        lengths = torch.tensor([len(document) for document in ids])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad)
        return padded.to(torch.int64), lengths, self._documents.labels[own]

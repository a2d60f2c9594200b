"""How far back a net can remember: a cue, a distance, an answer.

In "Henry has a dog and he likes his dog very much" the word "he" depends on the name, however many
words stand between. Here a sentence is a name, words that say nothing, and "whose"; the answer is
the name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lstmx

NAMES = ("Henry", "Sophie", "Ada", "Alan", "Grace", "Edsger", "Barbara", "Donald")
FILLERS = ("has", "a", "dog", "and", "very", "much", "likes", "the", "old", "red")
VOCABULARY = (*NAMES, "whose", *FILLERS)
CELLS: dict[str, Any] = {"RNN": nn.RNN, "LSTM": lstmx.LSTM, "GRU": lstmx.GRU}


@dataclass(frozen=True)
class MemoryResult:
    """Accuracy on fresh sentences; guessing gives 1/8."""

    cell: str
    distance: int
    seed: int
    accuracy: float


def sentences(count: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [distance + 2, count] and answers [count].

    Raises:
        ValueError: the distance is negative.
    """
    if distance < 0:
        raise ValueError(f"distance must be at least 0, got {distance}")
    answers = torch.randint(len(NAMES), (count,), generator=generator)
    first = len(NAMES) + 1
    filler = torch.randint(first, len(VOCABULARY), (distance, count), generator=generator)
    question = torch.full((1, count), len(NAMES))
    return torch.cat([answers[None], filler, question]), answers


class Reader(nn.Module):
    """Reads a sentence and answers: embedding, one recurrent layer, its last output."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.i_h = nn.Embedding(len(VOCABULARY), hidden)
        self.rnn = CELLS[cell](hidden, hidden)
        self.h_o = nn.Linear(hidden, len(NAMES))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [T, B] to logits [B, 8]."""
        return self.h_o(self.rnn(self.i_h(ids))[0][-1])


def remember(
    cell: str, distance: int, seed: int, *, steps: int = 600, hidden: int = 32, batch: int = 64
) -> MemoryResult:
    """Trains a reader for one distance, on sentences of all lengths up to it, and tests it there.

    Args:
        cell: "RNN", "LSTM" or "GRU".
        distance: words between the name and the question.
        seed: of everything random.
        steps: of Adam; gates stand a learning rate of 0.01, the vanilla RNN one of 0.003.
        hidden: units.
        batch: sentences of a step.

    Raises:
        ValueError: there is no such cell, or the distance is negative.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Reader(cell, hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3 if cell == "RNN" else 1e-2)
    for step in range(steps):
        # Longer and longer: a net that has learned to wait can learn to wait longer.
        length = min(distance, 1 + 2 * distance * step // steps)
        ids, answers = sentences(batch, length, generator)
        loss = F.cross_entropy(model(ids), answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids, answers = sentences(1000, distance, generator)
    with torch.no_grad():
        accuracy = (model(ids).argmax(-1) == answers).float().mean().item()
    return MemoryResult(cell, distance, seed, accuracy)


def sweep(
    distances: Sequence[int], seeds: int, after: Callable[[MemoryResult], None] = lambda _: None
) -> list[MemoryResult]:
    """All cells at all distances; ``after`` is called with each result."""
    results = []
    for distance in distances:
        for cell in CELLS:
            for seed in range(seeds):
                results.append(remember(cell, distance, seed))
                after(results[-1])
    return results

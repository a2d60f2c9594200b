"""How far back a net can remember: a cue, a distance, an answer.

In "Henry has a dog and he likes his dog very much" the word "he" depends on the name. Here a sentence
is a name, any number of words that say nothing, and a question; the answer is "he" or "she".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lstmx

FILLERS = ("has", "a", "dog", "and", "very", "much", "likes", "the", "old", "red")
VOCABULARY = ("henry", "sophie", "who", *FILLERS)  # "who" asks
ANSWERS = ("he", "she")
CELLS: dict[str, Any] = {"RNN": nn.RNN, "LSTM": lstmx.LSTM, "GRU": lstmx.GRU}


@dataclass(frozen=True)
class MemoryResult:
    """Accuracy on fresh sentences: one half is guessing."""

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
    answers = torch.randint(2, (count,), generator=generator)
    filler = torch.randint(3, len(VOCABULARY), (distance, count), generator=generator)
    question = torch.full((1, count), 2)
    return torch.cat([answers[None], filler, question]), answers


class Reader(nn.Module):
    """Reads a sentence and answers: embedding, one recurrent layer, its last output."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.i_h = nn.Embedding(len(VOCABULARY), hidden)
        self.rnn = CELLS[cell](hidden, hidden)
        self.h_o = nn.Linear(hidden, len(ANSWERS))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [T, B] to logits [B, 2]."""
        return self.h_o(self.rnn(self.i_h(ids))[0][-1])


def remember(
    cell: str, distance: int, seed: int, *, steps: int = 400, hidden: int = 32, batch: int = 64
) -> MemoryResult:
    """Trains a reader for one distance, on sentences of all lengths up to it, and tests it there.

    Args:
        cell: "RNN", "LSTM" or "GRU".
        distance: words between the name and the question.
        seed: of everything random.
        steps: of Adam, at a learning rate of 0.01.
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
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
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

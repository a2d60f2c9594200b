"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lstmx.text import human_numbers
from lstmx.text.awd_lstm import AWDLSTMLanguageModel
from lstmx.text.models import Activations, LMModel3, StatefulModel


@contextmanager
def _reading(model: StatefulModel, state: Any) -> Iterator[None]:
    """The model in eval mode, in that state; afterwards in its own mode and state again."""
    own, training = model.h, [module for module in model.modules() if module.training]
    model.h = state
    model.eval()
    try:
        yield
    finally:
        model.h = own
        for module in training:
            module.training = True


def _next_logits(model: StatefulModel, ids: Tensor) -> Tensor:
    """Ids [1, T] to the logits [V] after the last of them."""
    if isinstance(model, AWDLSTMLanguageModel):  # the others' logits are not needed
        return model.decode(model.features(ids)[1][0, -1])
    output = model(ids)
    return (output.logits if isinstance(output, Activations) else output)[0, -1]


def _draw(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> int:
    """An id, by the logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    logits, ids = logits.float().sort(descending=True, stable=True)
    probabilities = (logits[:top_k] / temperature).softmax(0)
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        # The first stays, whatever rounding says.
        probabilities[1:] *= before[1:] < top_p
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def generate(
    model: nn.Module,
    ids: Sequence[int],
    count: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = None,
    exclude: Collection[int] = (),
) -> Iterator[int]:
    """A continuation, word by word as it is made.

    The prompt is read once; then each word, with the state that is kept. The model itself is left
    in its own state and mode after each word, so that it may be used in between.

    Args:
        model: a stateful model that predicts after every word.
        ids: the prompt, at least one id.
        count: words to add at most.
        temperature: logits are divided by it; 0 takes the most probable word each time.
        top_k: draw among this many most probable words only.
        top_p: draw among the fewest most probable words only whose probabilities, after
            ``temperature`` and ``top_k``, add up to this (Holtzman et al. 2020).
        seed: of the draws; by default they come from torch's generator.
        stop: an id that ends the text, and is not yielded itself.
        exclude: ids that are never drawn.

    Returns:
        An iterator over the new ids.

    Raises:
        ValueError: the prompt is empty or has an id that the model has not, an option is out of
            range, ``exclude`` leaves nothing, or the model is another one.
    """
    if not isinstance(model, StatefulModel) or type(model) is LMModel3:
        raise ValueError(
            "model must keep its state and predict after every word, as LMModel4 to 7 and "
            f"AWDLSTMLanguageModel do, got {type(model).__name__}"
        )
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    words, device = embedding.num_embeddings, embedding.weight.device
    if not ids:
        raise ValueError("prompt must have at least one word, got none")
    wrong = [i for i in (*ids, *exclude) if not 0 <= i < words]
    if wrong:
        raise ValueError(f"ids must be from 0 to {words - 1}, the model's words, got {wrong[0]}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    banned = torch.tensor(sorted(set(exclude)), dtype=torch.int64, device=device)
    if len(banned) == words:
        raise ValueError(f"exclude must leave a word, got all {words}")
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def stream() -> Iterator[int]:
        x, state = torch.tensor([list(ids)], device=device), None
        for _ in range(count):
            with torch.no_grad(), _reading(model, state):
                logits = _next_logits(model, x)
                state = model.h
            logits = logits.index_fill(0, banned, -torch.inf)
            new = _draw(logits, temperature, top_k, top_p, generator)
            if new == stop:
                return
            yield new
            x = torch.tensor([[new]], device=device)

    return stream()


def continue_ids(
    model: nn.Module, prompt: Sequence[int], count: int, *, temperature: float = 0.0
) -> list[int]:
    """The most probable continuation, or a random one, as a list of ``count`` ids.

    Arguments and errors as for :func:`generate`.
    """
    return list(generate(model, prompt, count, temperature=temperature))


def continue_text(model: nn.Module, prompt: str, count: int, *, temperature: float = 0.0) -> str:
    """As :func:`continue_ids`, from and to words of the human numbers."""
    ids = continue_ids(model, human_numbers.encode(prompt), count, temperature=temperature)
    return human_numbers.decode(ids)

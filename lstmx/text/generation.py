"""Text from a trained model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lstmx.text import human_numbers
from lstmx.text.models import Activations, LMModel3, StatefulModel


@torch.no_grad()
def continue_ids(
    model: nn.Module, prompt: list[int], count: int, *, temperature: float = 0.0
) -> list[int]:
    """The most probable continuation, word by word, or a random one.

    Args:
        model: a stateful model that predicts after every word; its state afterwards is as before.
        prompt: token ids, at least one.
        count: words to add.
        temperature: 0 takes the most probable word each time; else logits are divided by it and a
            word is drawn.

    Returns:
        The ``count`` new ids.

    Raises:
        ValueError: the prompt is empty, the temperature negative, or the model another one.
    """
    if not prompt:
        raise ValueError("prompt must have at least one word, got none")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not isinstance(model, StatefulModel) or type(model) is LMModel3:
        raise ValueError(
            "model must keep its state and predict after every word, as LMModel4 to 7 do, "
            f"got {type(model).__name__}"
        )
    state, training = model.h, model.training
    model.reset()
    model.eval()
    try:
        new: list[int] = []
        x = torch.tensor([prompt])
        for _ in range(count):
            output = model(x)
            logits: Tensor = output.logits if isinstance(output, Activations) else output
            last = logits[0, -1]
            if temperature > 0:
                x = torch.multinomial((last / temperature).softmax(-1), 1).view(1, 1)
            else:
                x = last.argmax().view(1, 1)
            new.append(int(x))
        return new
    finally:
        model.h = state
        model.train(training)


def continue_text(model: nn.Module, prompt: str, count: int, *, temperature: float = 0.0) -> str:
    """As :func:`continue_ids`, from and to words of the human numbers."""
    ids = continue_ids(model, human_numbers.encode(prompt), count, temperature=temperature)
    return human_numbers.decode(ids)

"""The text classifier of ULMFiT (Howard & Ruder 2018): an AWD-LSTM encoder, pooled, and a head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lstmx.text.awd_lstm import AWDLSTM
from lstmx.text.models import Activations


class TextClassifier(nn.Module):
    """Reads a document to its end, pools what the encoder says on the way, and decides.

    The encoder reads ``bptt`` steps at a time, with its state carried over but not its history: a
    gradient reaches each step from the pooled outputs of its own chunk (truncated backpropagation
    through time). The outputs at the last step, their maximum and their mean, in this order, are
    the input of the head: for each layer batch norm, dropout, linear and, but for the last, ReLU.
    Padding takes no part: a document has the same logits alone as in a batch, in eval mode.

    Args:
        encoder: the encoder, of a language model or new. Each call resets its state.
        classes: number of classes C.
        hidden: units of the head's layers but the last.
        drops: probability of dropout before each of the head's layers, one more than ``hidden``;
            by default the encoder's ``output_p``, then 0.1.
        bptt: steps that the encoder reads at a time.
        max_length: only this many steps at a document's end are pooled and get a gradient, which
            bounds the memory of training; those before them are read for the state alone. By
            default all. With it the lengths are read back from their device, once a batch.

    Raises:
        ValueError: a size below 1, or ``drops`` of another number than the layers, or no
            probabilities.
    """

    def __init__(
        self,
        encoder: AWDLSTM,
        classes: int,
        *,
        hidden: Sequence[int] = (50,),
        drops: Sequence[float] | None = None,
        bptt: int = 70,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if drops is None:
            drops = (encoder.config.output_p, *[0.1] * len(hidden))
        if len(drops) != len(hidden) + 1:
            raise ValueError(
                f"drops must have one value more than hidden, {len(hidden) + 1}, got {len(drops)}"
            )
        sizes = [3 * encoder.config.output_size, *hidden, classes]
        named = {"classes": classes, "bptt": bptt, "hidden": min(sizes), "max_length": max_length}
        for name, value in named.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.encoder, self.classes = encoder, classes
        self.hidden, self.drops = tuple(hidden), tuple(drops)
        self.bptt, self.max_length = bptt, max_length
        layers: list[nn.Module] = []
        for (inputs, outputs), p in zip(itertools.pairwise(sizes), drops, strict=True):
            layers += [nn.BatchNorm1d(inputs), nn.Dropout(p), nn.Linear(inputs, outputs), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1])

    def _checked_lengths(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        if ids.dim() != 2 or ids.size(1) == 0:
            raise ValueError(f"ids must have size [B, T] with T > 0, got {list(ids.shape)}")
        B, T = ids.shape
        if lengths is None:
            return torch.full((B,), T, device=ids.device)
        if lengths.dtype != torch.int64 or lengths.shape != (B,):
            raise ValueError(
                f"lengths must be int64 of size [B] = [{B}], "
                f"got {lengths.dtype} of size {list(lengths.shape)}"
            )
        on_host = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and not ((lengths >= 1) & (lengths <= T)).all():
            raise ValueError(f"lengths must be from 1 to T = {T}, got {lengths.tolist()}")
        return lengths.to(ids.device)

    def _encode(self, ids: Tensor, lengths: Tensor, start: int) -> Tensor:
        """The encoder's outputs from step ``start`` on, [B, T - start, H]."""
        outputs = []
        self.encoder.reset()
        for first in range(0, ids.size(1), self.bptt):
            chunk = ids[:, first : first + self.bptt]
            # In one direction, what lies before the padding does not depend on it.
            inside = None
            if self.encoder.config.bidirectional:
                inside = (lengths - first).clamp(0, chunk.size(1))
            with torch.set_grad_enabled(torch.is_grad_enabled() and first >= start):
                output = self.encoder(chunk, inside)
            if first >= start:
                outputs.append(output)
        self.encoder.reset()
        return torch.cat(outputs, 1)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Activations:
        """Documents to scores of the classes.

        Args:
            ids: int [B, T], documents padded at their end (with any id).
            lengths: int64 [B], steps of each document, from 1 to T; by default T.

        Returns:
            The logits [B, C]; and, twice, the encoder's outputs that were pooled, [B, T', H], for
            AR and TAR. Beyond a document's ends its first and last output are repeated there, so
            that they do not change along time.

        Raises:
            ValueError: the sizes do not fit, or lengths (looked at on the CPU only) are outside
                [1, T]; in training, a batch of one document, over which batch norm has no variance.
        """
        lengths = self._checked_lengths(ids, lengths)
        start = 0
        if self.max_length is not None:  # the chunk of the first step that any document pools
            start = max(int(lengths.min()) - self.max_length, 0) // self.bptt * self.bptt
        x = self._encode(ids, lengths, start)

        rows = torch.arange(len(x), device=x.device)
        steps = torch.arange(start, ids.size(1), device=x.device)
        inside = steps < lengths.unsqueeze(1)
        last = x[rows, lengths - 1 - start]
        x = torch.where(inside.unsqueeze(2), x, last.unsqueeze(1))
        if self.max_length is not None:
            begin = (lengths - self.max_length).clamp(min=start)
            late = steps >= begin.unsqueeze(1)
            x = torch.where(late.unsqueeze(2), x, x[rows, begin - start].unsqueeze(1))
            inside = inside & late
        mean = (x * inside.unsqueeze(2)).sum(1) / inside.sum(1, keepdim=True)
        # Repeated outputs do not change the maximum.
        pooled = torch.cat([last, x.max(1).values, mean], 1)
        return Activations(self.head(pooled), x, x)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of the embedding, of the first layer, ..., of the last one, of the head.

        In the order in which ULMFiT gives them rising learning rates, and unfreezes them from the
        end.
        """
        return [*self.encoder.parameter_groups(), list(self.head.parameters())]

"""AWD-LSTM proper (Merity, Keskar & Socher 2017): the encoder, and the language model around it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

import lstmx
from lstmx.dropout import EmbeddingDropout, LockedDropout
from lstmx.text.models import Activations, StatefulModel

# Of each layer: (h, c) of an LSTM, h of a GRU.
State = tuple[Tensor, Tensor] | Tensor


def _detached(state: State) -> State:
    if isinstance(state, Tensor):
        return state.detach()
    h, c = state
    return h.detach(), c.detach()


def _batch_of(state: State) -> int:
    return (state[0] if isinstance(state, tuple) else state).size(1)


@dataclass(frozen=True)
class AWDLSTMConfig:
    """Sizes and dropouts.

    Attributes:
        embedding: size of an embedding, and of the last layer's output.
        hidden: units of the other layers.
        layers: recurrent layers.
        cell: "lstm" or "gru".
        bidirectional: read each layer in both directions; each has half of the layer's units.
        embedding_p: probability of dropping a word.
        input_p: of dropping an input of the first layer (locked).
        weight_p: of dropping a recurrent weight.
        hidden_p: of dropping a unit between two layers (locked).
        output_p: of dropping an output of the last layer (locked).
    """

    embedding: int = 400
    hidden: int = 1152
    layers: int = 3
    cell: str = "lstm"
    bidirectional: bool = False
    embedding_p: float = 0.02
    input_p: float = 0.25
    weight_p: float = 0.2
    hidden_p: float = 0.15
    output_p: float = 0.1

    def __post_init__(self) -> None:
        if self.cell not in ("lstm", "gru"):
            raise ValueError(f"cell must be 'lstm' or 'gru', got {self.cell!r}")
        sizes = (self.embedding, self.hidden, self.layers)
        if min(sizes) < 1 or (self.bidirectional and any(size % 2 for size in sizes[:2])):
            raise ValueError(
                "embedding, hidden and layers must be at least 1, and the first two even if "
                f"bidirectional, got {sizes}"
            )

    def scaled(self, drop_mult: float) -> AWDLSTMConfig:
        """All dropouts times ``drop_mult``.

        Raises:
            ValueError: one of them leaves [0, 1] (raised by the module that takes it).
        """
        names = ("embedding_p", "input_p", "weight_p", "hidden_p", "output_p")
        return replace(self, **{name: getattr(self, name) * drop_mult for name in names})


FASTAI = AWDLSTMConfig()  # fast.ai's for language models
MERITY = AWDLSTMConfig(
    hidden=1150, embedding_p=0.1, input_p=0.4, weight_p=0.5, hidden_p=0.25, output_p=0.4
)  # of the paper, for the Penn Treebank


class AWDLSTM(StatefulModel):
    """The encoder: embedding and LSTM layers, with dropout everywhere.

    Keeps its state from batch to batch, detached; ``reset`` forgets it, and so does a batch of
    another size.

    Args:
        vocabulary: number of words V.
        config: sizes and dropouts.
        padding_idx: id whose embedding stays zero, or None.
    """

    def __init__(
        self, vocabulary: int, config: AWDLSTMConfig = FASTAI, *, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.embedding, padding_idx=padding_idx)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.embedding_dropout = EmbeddingDropout(self.embedding, config.embedding_p)
        self.input_dropout = LockedDropout(config.input_p, batch_first=True)
        self.hidden_dropout = LockedDropout(config.hidden_p, batch_first=True)
        sizes = [config.embedding, *[config.hidden] * (config.layers - 1), config.embedding]
        rnn_class: Any = lstmx.LSTM if config.cell == "lstm" else lstmx.GRU
        self.rnns = nn.ModuleList(
            rnn_class(
                inputs,
                units // 2 if config.bidirectional else units,
                batch_first=True,
                bidirectional=config.bidirectional,
                weight_dropout=config.weight_p,
            )
            for inputs, units in itertools.pairwise(sizes)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to the output of the last layer, [B, T, embedding], not dropped."""
        states: list[Any] = [None] * len(self.rnns)
        if self.h is not None and _batch_of(self.h[0]) == ids.size(0):
            states = self.h
        x = self.input_dropout(self.embedding_dropout(ids))
        new: list[Any] = []
        for layer, (rnn, state) in enumerate(zip(self.rnns, states, strict=True)):
            if layer > 0:
                x = self.hidden_dropout(x)
            x, last = rnn(x, state)
            new.append(_detached(last))
        self.h = new
        return x


class AWDLSTMLanguageModel(StatefulModel):
    """The encoder, output dropout, and a decoder that shares the embedding's matrix.

    Args:
        vocabulary: number of words V.
        config: sizes and dropouts.
        tied: the decoder's matrix is the embedding's (Press & Wolf 2017), and else its own.
        bias: the decoder has one.
        padding_idx: id whose embedding stays zero, or None.
    """

    def __init__(
        self,
        vocabulary: int,
        config: AWDLSTMConfig = FASTAI,
        *,
        tied: bool = True,
        bias: bool = True,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = AWDLSTM(vocabulary, config, padding_idx=padding_idx)
        self.output_dropout = LockedDropout(config.output_p, batch_first=True)
        self.decoder = nn.Linear(config.embedding, vocabulary, bias=bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        if tied:
            self.decoder.weight = self.encoder.embedding.weight
        if bias:
            nn.init.zeros_(self.decoder.bias)

    @property
    def tied(self) -> bool:
        """Whether decoder and embedding share one matrix."""
        return self.decoder.weight is self.encoder.embedding.weight

    @property
    def h(self) -> list[State] | None:
        """The state of the encoder."""
        return self.encoder.h

    @h.setter
    def h(self, state: list[State] | None) -> None:
        self.encoder.h = state

    def activations(self, ids: Tensor) -> Activations:
        """Ids [B, T] to logits [B, T, V], and the activations for AR and TAR."""
        raw = self.encoder(ids)
        dropped = self.output_dropout(raw)
        return Activations(self.decoder(dropped), raw, dropped)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to logits [B, T, V]."""
        return self.activations(ids).logits

"""AWD-LSTM proper (Merity, Keskar & Socher 2017): the encoder, and the language model around it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from torch import Tensor, nn

import lstmx
from lstmx.dropout import EmbeddingDropout, LockedDropout
from lstmx.text.models import Activations, StatefulModel

State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AWDLSTMConfig:
    """Sizes and dropouts.

    Attributes:
        embedding: size of an embedding, and of the last layer's output.
        hidden: units of the other layers.
        layers: recurrent layers.
        embedding_p: probability of dropping a word.
        input_p: of dropping an input of the first layer (locked).
        weight_p: of dropping a recurrent weight.
        hidden_p: of dropping a unit between two layers (locked).
        output_p: of dropping an output of the last layer (locked).
    """

    embedding: int = 400
    hidden: int = 1152
    layers: int = 3
    embedding_p: float = 0.02
    input_p: float = 0.25
    weight_p: float = 0.2
    hidden_p: float = 0.15
    output_p: float = 0.1

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
        self.rnns = nn.ModuleList(
            lstmx.LSTM(inputs, units, batch_first=True, weight_dropout=config.weight_p)
            for inputs, units in itertools.pairwise(sizes)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to the output of the last layer, [B, T, embedding], not dropped."""
        states: list[State | None] = [None] * len(self.rnns)
        if self.h is not None and self.h[0][0].size(1) == ids.size(0):
            states = self.h
        x = self.input_dropout(self.embedding_dropout(ids))
        new: list[State] = []
        for layer, (rnn, state) in enumerate(zip(self.rnns, states, strict=True)):
            if layer > 0:
                x = self.hidden_dropout(x)
            x, (h, c) = rnn(x, state)
            new.append((h.detach(), c.detach()))
        self.h = new
        return x


class AWDLSTMLanguageModel(StatefulModel):
    """The encoder, output dropout, and a decoder that shares the embedding's matrix.

    Args:
        vocabulary: number of words V.
        config: sizes and dropouts.
    """

    def __init__(self, vocabulary: int, config: AWDLSTMConfig = FASTAI) -> None:
        super().__init__()
        self.encoder = AWDLSTM(vocabulary, config)
        self.output_dropout = LockedDropout(config.output_p, batch_first=True)
        self.decoder = nn.Linear(config.embedding, vocabulary)
        self.decoder.weight = self.encoder.embedding.weight
        nn.init.zeros_(self.decoder.bias)

    @property
    def h(self) -> list[State] | None:
        """The state of the encoder."""
        return self.encoder.h

    @h.setter
    def h(self, state: list[State] | None) -> None:
        self.encoder.h = state

    def forward(self, ids: Tensor) -> Activations:
        """Ids [B, T] to logits [B, T, V], and the activations for AR and TAR."""
        raw = self.encoder(ids)
        dropped = self.output_dropout(raw)
        return Activations(self.decoder(dropped), raw, dropped)

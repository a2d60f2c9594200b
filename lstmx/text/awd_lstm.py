"""AWD-LSTM proper (Merity, Keskar & Socher 2017): the encoder, and the language model around it.

:data:`PRESETS` has the published configurations by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lstmx
from lstmx.dropout import EmbeddingDropout, LockedDropout
from lstmx.text.models import Activations, StatefulModel

# Of each layer: (h, c) of an LSTM, h of a GRU.
State = tuple[Tensor, ...] | Tensor

_SIZES = ("embedding", "hidden", "layers", "output")
_PROBABILITIES = ("embedding_p", "input_p", "weight_p", "hidden_p", "output_p")


@dataclass(frozen=True)
class AWDLSTMConfig:
    """Sizes and dropouts.

    Attributes:
        embedding: size of an embedding.
        hidden: units of all layers but the last.
        layers: recurrent layers.
        output: units of the last layer; by default ``embedding``, which a tied decoder needs.
        cell: "lstm" or "gru".
        bidirectional: read each layer in both directions; each has half of the layer's units.
        embedding_p: probability of dropping a word.
        input_p: of dropping an input of the first layer (locked).
        weight_p: of dropping a recurrent weight.
        hidden_p: of dropping a unit between two layers (locked).
        output_p: of dropping an output of the last layer (locked); in a classifier, of the head's
            input.

    Raises:
        TypeError: a size is no int, or a probability no number.
        ValueError: a size below 1, or odd if bidirectional; another cell; a probability outside
            [0, 1].
    """

    embedding: int = 400
    hidden: int = 1152
    layers: int = 3
    output: int | None = None
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
        if not isinstance(self.bidirectional, bool):
            raise TypeError(f"bidirectional must be a bool, got {self.bidirectional!r}")
        for name in _SIZES:
            size = self.output_size if name == "output" else getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
            if self.bidirectional and name != "layers" and size % 2:
                raise ValueError(f"{name} must be even if bidirectional, got {size}")
        for name in _PROBABILITIES:
            p = getattr(self, name)
            if isinstance(p, bool) or not isinstance(p, (int, float)):
                raise TypeError(f"{name} must be a number, got {p!r}")
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {p}")

    @property
    def output_size(self) -> int:
        """Units of the last layer."""
        return self.embedding if self.output is None else self.output

    def scaled(self, drop_mult: float) -> AWDLSTMConfig:
        """All dropouts times ``drop_mult``.

        Raises:
            ValueError: one of them leaves [0, 1].
        """
        return replace(self, **{name: getattr(self, name) * drop_mult for name in _PROBABILITIES})

    def with_dropouts(self, other: AWDLSTMConfig) -> AWDLSTMConfig:
        """These sizes, with the probabilities of ``other``."""
        return replace(self, **{name: getattr(other, name) for name in _PROBABILITIES})


# fastai's for language models, and for classifiers, which drop more.
fastai_lm = AWDLSTMConfig()
fastai_classifier = AWDLSTMConfig(
    embedding_p=0.05, input_p=0.4, weight_p=0.5, hidden_p=0.3, output_p=0.4
)
# The paper's, for the Penn Treebank and for WikiText-2, as awd-lstm-lm's commands give them.
merity_ptb = AWDLSTMConfig(
    hidden=1150, embedding_p=0.1, input_p=0.4, weight_p=0.5, hidden_p=0.25, output_p=0.4
)
merity_wt2 = AWDLSTMConfig(
    hidden=1150, embedding_p=0.1, input_p=0.65, weight_p=0.5, hidden_p=0.2, output_p=0.4
)

PRESETS = {
    "fastai_lm": fastai_lm,
    "fastai_classifier": fastai_classifier,
    "merity_ptb": merity_ptb,
    "merity_wt2": merity_wt2,
}


def find_preset(name: str) -> AWDLSTMConfig:
    """The configuration of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _fitted(state: Tensor, batch: int, like: Tensor) -> Tensor:
    """A kept state [1, B, H] for another batch: its first rows, or zeros for the new ones."""
    rows = state.size(1)
    if rows > batch:
        state = state[:, :batch]
    elif rows < batch:
        state = torch.cat([state, state.new_zeros(state.size(0), batch - rows, state.size(2))], 1)
    # Autocast leaves a 16-bit state behind, for which plain float32 has no use.
    state = state.to(device=like.device, dtype=like.dtype)
    # What inference mode left behind may not be saved for a backward pass. (The compiler cannot
    # ask.)
    foreign = not torch.compiler.is_compiling() and state.is_inference()
    return state.clone() if foreign else state


class AWDLSTM(StatefulModel):
    """The encoder: embedding and LSTM (or GRU) layers, with dropout everywhere.

    Keeps its state from batch to batch, detached: backpropagation ends where the batch begins. If
    the next batch has fewer rows, the first states are used; if it has more, the new rows begin
    with zeros. ``reset`` forgets the state.

    Args:
        vocabulary: number of words V.
        config: sizes and dropouts.
        padding_idx: id whose embedding begins as zero and gets no gradient as an input, or None.

    Raises:
        ValueError: ``vocabulary`` is below 1, or ``padding_idx`` no id.
    """

    def __init__(
        self, vocabulary: int, config: AWDLSTMConfig = fastai_lm, *, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        if vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {vocabulary}")
        if padding_idx is not None and not 0 <= padding_idx < vocabulary:
            raise ValueError(f"padding_idx must be from 0 to {vocabulary - 1}, got {padding_idx}")
        self.config = config
        vectors = torch.empty(vocabulary, config.embedding).uniform_(-0.1, 0.1)
        if padding_idx is not None:
            vectors[padding_idx] = 0
        self.embedding = nn.Embedding.from_pretrained(
            vectors, freeze=False, padding_idx=padding_idx
        )
        self.embedding_dropout = EmbeddingDropout(self.embedding, config.embedding_p)
        self.input_dropout = LockedDropout(config.input_p, batch_first=True)
        self.hidden_dropout = LockedDropout(config.hidden_p, batch_first=True)
        sizes = [config.embedding, *[config.hidden] * (config.layers - 1), config.output_size]
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

    @property
    def vocabulary(self) -> int:
        """Number of words V."""
        return self.embedding.num_embeddings

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The output of the last layer, not dropped.

        Args:
            ids: int [B, T].
            lengths: int64 [B], how many steps of each row are real, where the others, at its end,
                must be left out: outputs there are 0, and the kept state is that of the end.

        Returns:
            [B, T, output].

        Raises:
            ValueError: ``ids`` is not two-dimensional; what :class:`lstmx.LSTM` raises.
        """
        if ids.dim() != 2:
            raise ValueError(f"ids must have size [B, T], got {list(ids.shape)}")
        x = self.input_dropout(self.embedding_dropout(ids))
        new: list[State] = []
        for layer, rnn in enumerate(self.rnns):
            if layer > 0:
                x = self.hidden_dropout(x)
            state: Any = None if self.h is None else self.h[layer]
            if isinstance(state, tuple):
                state = tuple(_fitted(s, ids.size(0), x) for s in state)
            elif state is not None:
                state = _fitted(state, ids.size(0), x)
            x, last = rnn(x, state, lengths=lengths)
            new.append(
                tuple(s.detach() for s in last) if isinstance(last, tuple) else last.detach()
            )
        self.h = new
        return x

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of the embedding, of the first layer, ..., of the last one."""
        return [list(part.parameters()) for part in (self.embedding, *self.rnns)]


class AWDLSTMLanguageModel(StatefulModel):
    """The encoder, output dropout, and a decoder that may share the embedding's matrix.

    Args:
        vocabulary: number of words V.
        config: sizes and dropouts.
        tied: the decoder's matrix is the embedding's (Press & Wolf 2017), and else its own.
        bias: the decoder has one.
        padding_idx: id whose embedding begins as zero and gets no gradient as an input, or None.
        cutoffs: the decoder is an adaptive softmax (Grave et al. 2017;
            :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`) with these first ids of its clusters,
            rising, which needs ids in the order of falling frequency. It has no matrix to tie.

    Raises:
        ValueError: ``vocabulary`` or ``padding_idx`` as for :class:`AWDLSTM`; ``cutoffs`` that do
            not rise within the vocabulary; ``tied`` with ``cutoffs``, or with another output size
            than the embedding's.
    """

    def __init__(
        self,
        vocabulary: int,
        config: AWDLSTMConfig = fastai_lm,
        *,
        tied: bool = True,
        bias: bool = True,
        padding_idx: int | None = None,
        cutoffs: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = AWDLSTM(vocabulary, config, padding_idx=padding_idx)
        self.output_dropout = LockedDropout(config.output_p, batch_first=True)
        self.bias, self.cutoffs = bias, None if cutoffs is None else list(cutoffs)
        self.decoder: nn.Linear | nn.AdaptiveLogSoftmaxWithLoss
        if self.cutoffs is not None:
            if tied:
                raise ValueError("tied must be False with cutoffs: there is no matrix to tie")
            bounds = [0, *self.cutoffs, vocabulary]
            if not self.cutoffs or bounds != sorted(set(bounds)):
                raise ValueError(
                    f"cutoffs must rise within 1 to {vocabulary - 1}, got {self.cutoffs}"
                )
            self.decoder = nn.AdaptiveLogSoftmaxWithLoss(
                config.output_size, vocabulary, self.cutoffs, head_bias=bias
            )
            return
        self.decoder = nn.Linear(config.output_size, vocabulary, bias=bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        if tied:
            if config.output_size != config.embedding:
                raise ValueError(
                    f"tied must be False with an output of {config.output_size} and an embedding "
                    f"of {config.embedding}: there is no common size"
                )
            self.decoder.weight = self.encoder.embedding.weight
        if bias:
            nn.init.zeros_(self.decoder.bias)

    @property
    def config(self) -> AWDLSTMConfig:
        """Sizes and dropouts."""
        return self.encoder.config

    @property
    def vocabulary(self) -> int:
        """Number of words V."""
        return self.encoder.vocabulary

    @property
    def tied(self) -> bool:
        """Whether decoder and embedding share one matrix."""
        return (
            isinstance(self.decoder, nn.Linear)
            and self.decoder.weight is self.encoder.embedding.weight
        )

    @property
    def h(self) -> list[State] | None:
        """The state of the encoder."""
        return self.encoder.h

    @h.setter
    def h(self, state: list[State] | None) -> None:
        self.encoder.h = state

    def features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, T] to the encoder's output before and after dropout, [B, T, output] each.

        The first is what TAR, the second what AR, :meth:`loss` and :meth:`decode` are for.
        """
        raw = self.encoder(ids)
        return raw, self.output_dropout(raw)

    def decode(self, dropped: Tensor) -> Tensor:
        """[..., output] to logits [..., V]; with ``cutoffs`` these are log-probabilities."""
        if isinstance(self.decoder, nn.Linear):
            return self.decoder(dropped)
        with torch.autocast(dropped.device.type, enabled=False):
            x = dropped.to(self.decoder.head.weight.dtype)
            return self.decoder.log_prob(x.reshape(-1, x.size(-1))).view(*x.shape[:-1], -1)

    def loss(self, dropped: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, of whichever decoder.

        Args:
            dropped: [..., output], the second of :meth:`features`.
            targets: int64 [...], the words that come next.

        Raises:
            ValueError: the sizes do not fit.
        """
        if targets.shape != dropped.shape[:-1]:
            raise ValueError(
                f"targets must have size {list(dropped.shape[:-1])}, got {list(targets.shape)}"
            )
        if isinstance(self.decoder, nn.Linear):
            return F.cross_entropy(self.decoder(dropped).flatten(0, -2), targets.flatten())
        # Autocast would add up what the clusters give in 16 bits.
        with torch.autocast(dropped.device.type, enabled=False):
            x = dropped.to(self.decoder.head.weight.dtype)
            return self.decoder(x.reshape(-1, x.size(-1)), targets.flatten()).loss

    def activations(self, ids: Tensor) -> Activations:
        """Ids [B, T] to logits [B, T, V], and the activations for AR and TAR."""
        raw, dropped = self.features(ids)
        return Activations(self.decode(dropped), raw, dropped)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to logits [B, T, V]; with ``cutoffs`` these are log-probabilities."""
        return self.activations(ids).logits

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of the first layer, ..., of the last one, and of embedding and decoder.

        In the order in which ULMFiT gives them rising learning rates, and unfreezes them from the
        end: words that are new to the model are in the last group.
        """
        embedding, *layers = self.encoder.parameter_groups()
        own = [p for p in self.decoder.parameters() if p is not self.encoder.embedding.weight]
        return [*layers, embedding + own]

"""The chapter's seven models, under the chapter's names.

All take token ids, int64 [B, T], and return logits over the vocabulary: [B, V] for models 1 to 3,
which predict one word, [B, T, V] for the others, which predict one after every word. Models from 3
on keep their state from one batch to the next, without its history; ``reset`` forgets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import lstmx
from lstmx import reference


def copy_weights(cell: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
    """Gives a readable cell the weights of torch's: [G*H, I], [G*H, H] and [G*H], in torch's order.

    A gate of :class:`lstmx.reference.LSTMCellPlain` has one bias, the sum of torch's two: the same
    function, but the optimiser then moves one number where torch has two.
    """
    with torch.no_grad():
        if isinstance(cell, reference.LSTMCellPlain):
            gates = (cell.input_gate, cell.forget_gate, cell.cell_gate, cell.output_gate)
            joined, bias = torch.cat([w_hh, w_ih], 1), b_ih + b_hh
            for gate, w, b in zip(gates, joined.chunk(4), bias.chunk(4), strict=True):
                gate.weight.copy_(w)
                gate.bias.copy_(b)
        else:
            for linear, w, b in ((cell.ih, w_ih, b_ih), (cell.hh, w_hh, b_hh)):
                linear.weight.copy_(w)
                linear.bias.copy_(b)


class CellLoop(nn.Module):
    """Layers of a readable cell of :mod:`lstmx.reference`, one step after another.

    Called as the torch module that it replaces, with ``batch_first=True``, and begins with the
    weights that this module would draw from the same seed.

    Args:
        cell: class of the cell, taking (inputs, hidden units).
        replaced: ``torch.nn.LSTM`` or ``torch.nn.GRU``.
    """

    def __init__(
        self,
        cell: Callable[[int, int], nn.Module],
        replaced: type[nn.LSTM | nn.GRU],
        inputs: int,
        hidden: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.states, self.hidden = 2 if replaced is nn.LSTM else 1, hidden
        with torch.random.fork_rng(devices=[]):  # what the cells draw is thrown away
            self.cells = nn.ModuleList(
                cell(inputs if k == 0 else hidden, hidden) for k in range(layers)
            )
        start = replaced(inputs, hidden, layers)
        for of_layer, weights in zip(self.cells, start.all_weights, strict=True):
            copy_weights(of_layer, *weights)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x [B, T, I]; the state [layers, B, H], a tuple of two for an LSTM."""
        if state is None:
            zeros = x.new_zeros(len(self.cells), x.size(0), self.hidden)
            states: tuple[Tensor, ...] = (zeros,) * self.states
        else:
            states = tuple(state) if self.states > 1 else (state,)
        last = []
        for k, cell in enumerate(self.cells):
            of_layer, outputs = tuple(s[k] for s in states), []
            for step in x.unbind(1):
                h, of_layer = cell(step, of_layer)
                outputs.append(h)
            # In memory as torch's modules lay it out, and dropout draws in the order of memory.
            x = torch.stack(outputs).transpose(0, 1)
            last.append(of_layer)
        stacked = tuple(torch.stack(s) for s in zip(*last, strict=True))
        return x, stacked if self.states > 1 else stacked[0]


class Backend(NamedTuple):
    """Where the recurrent layers come from: three constructors (inputs, hidden units, layers)."""

    RNN: Callable[[int, int, int], nn.Module]
    LSTM: Callable[[int, int, int], nn.Module]
    GRU: Callable[[int, int, int], nn.Module]


def _modules(rnn: Any, lstm: Any, gru: Any) -> Backend:
    def make(module: Any) -> Callable[[int, int, int], nn.Module]:
        return lambda i, h, layers: module(i, h, layers, batch_first=True)

    return Backend(make(rnn), make(lstm), make(gru))


def _cells(lstm: Any) -> Backend:
    return Backend(
        lambda i, h, layers: reference.RNN(i, h, layers, batch_first=True),
        lambda i, h, layers: CellLoop(lstm, nn.LSTM, i, h, layers),
        lambda i, h, layers: CellLoop(reference.GRUCell, nn.GRU, i, h, layers),
    )


BACKENDS = {
    "lstmx": _modules(nn.RNN, lstmx.LSTM, lstmx.GRU),  # lstmx has no kernels for the vanilla RNN
    "torch": _modules(nn.RNN, nn.LSTM, nn.GRU),
    "reference": _modules(reference.RNN, reference.LSTM, reference.GRU),
    "cells": _cells(reference.LSTMCell),
    "plain": _cells(reference.LSTMCellPlain),
}


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


# ---- One word from three -----------------------------------------------------------------------


class LMModel1(nn.Module):
    """Three words in, one after another, through the same layers; the fourth comes out."""

    def __init__(self, vocab_sz: int, n_hidden: int) -> None:
        super().__init__()
        self.i_h = nn.Embedding(vocab_sz, n_hidden)
        self.h_h = nn.Linear(n_hidden, n_hidden)
        self.h_o = nn.Linear(n_hidden, vocab_sz)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.h_h(self.i_h(x[:, 0])))
        h = h + self.i_h(x[:, 1])
        h = F.relu(self.h_h(h))
        h = h + self.i_h(x[:, 2])
        h = F.relu(self.h_h(h))
        return self.h_o(h)


class LMModel2(LMModel1):
    """The same as a loop, which may begin with h = 0: any number of words would do."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor | float = 0.0
        for i in range(x.size(1)):
            h = h + self.i_h(x[:, i])
            h = F.relu(self.h_h(h))
        return self.h_o(h)


class ThirdWordFromTwo(LMModel2):
    """Predicts each third word from the two before it, without a look at it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :2])


# ---- State that is kept --------------------------------------------------------------------------


class StatefulModel(nn.Module):
    """Keeps a state between calls, which copies, pickles and moves with the model.

    It is no buffer: it belongs to a stream, not to the model, so that it is in no state dict, and
    DDP does not give all processes the first one's.
    """

    h: Any = None

    def reset(self) -> None:
        """Forgets the state: a new stream begins."""
        self.h = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What .to(), .cuda(), .half() and their like do to parameters. A model around another has
        # no state of its own.
        if self.__dict__.get("h") is not None:
            self.h = tree_map_only(Tensor, fn, self.h)
        return super()._apply(fn, recurse)


class LMModel3(StatefulModel):
    """LMModel2 that begins where it ended."""

    def __init__(self, vocab_sz: int, n_hidden: int) -> None:
        super().__init__()
        self.i_h = nn.Embedding(vocab_sz, n_hidden)
        self.h_h = nn.Linear(n_hidden, n_hidden)
        self.h_o = nn.Linear(n_hidden, vocab_sz)

    def forward(self, x: Tensor) -> Tensor:
        h: Any = 0.0 if self.h is None else self.h
        for i in range(x.size(1)):
            h = h + self.i_h(x[:, i])
            h = F.relu(self.h_h(h))
        self.h = h.detach()  # truncated backpropagation through time
        return self.h_o(h)


class LMModel4(LMModel3):
    """LMModel3 that says after every word what the next one will be."""

    def forward(self, x: Tensor) -> Tensor:
        h: Any = 0.0 if self.h is None else self.h
        outs = []
        for i in range(x.size(1)):
            h = h + self.i_h(x[:, i])
            h = F.relu(self.h_h(h))
            outs.append(self.h_o(h))
        self.h = h.detach()
        return torch.stack(outs, dim=1)


# ---- Layers -------------------------------------------------------------------------------------


class LMModel5(StatefulModel):
    """Layers of a recurrent net between embedding and output.

    Args:
        vocab_sz: words V.
        n_hidden: size of the embedding and units of each layer.
        n_layers: layers.
        cell: "RNN", "LSTM" or "GRU".
        backend: a name of :data:`BACKENDS`.
    """

    def __init__(
        self,
        vocab_sz: int,
        n_hidden: int,
        n_layers: int,
        *,
        cell: str = "RNN",
        backend: str = "lstmx",
    ) -> None:
        super().__init__()
        layers = find_backend(backend)
        self.i_h = nn.Embedding(vocab_sz, n_hidden)
        self.rnn = getattr(layers, cell)(n_hidden, n_hidden, n_layers)
        self.h_o = nn.Linear(n_hidden, vocab_sz)

    def run(self, x: Tensor) -> Tensor:
        """The output of the last layer, [B, T, H]."""
        raw, h = self.rnn(self.i_h(x), self.h)
        self.h = tuple(s.detach() for s in h) if isinstance(h, tuple) else h.detach()
        return raw

    def forward(self, x: Tensor) -> Any:
        return self.h_o(self.run(x))


class LMModel6(LMModel5):
    """LMModel5 with an LSTM."""

    def __init__(
        self, vocab_sz: int, n_hidden: int, n_layers: int, *, cell: str = "LSTM", **kw: Any
    ):
        super().__init__(vocab_sz, n_hidden, n_layers, cell=cell, **kw)


class Activations(NamedTuple):
    """What a regularised model returns in training: AR acts on ``dropped``, TAR on ``raw``."""

    logits: Tensor
    raw: Tensor
    dropped: Tensor


class LMModel7(LMModel6):
    """The chapter's AWD-LSTM: dropout on the output, and one matrix for embedding and output.

    Merity, Keskar & Socher 2017; Press & Wolf 2017 for the tied weights. Its forward returns
    :class:`Activations`, whose last two are for :mod:`lstmx.text.regularisers`.

    Args:
        p: probability of dropout on the output of the last layer.
    """

    def __init__(self, vocab_sz: int, n_hidden: int, n_layers: int, p: float, **kw: Any) -> None:
        super().__init__(vocab_sz, n_hidden, n_layers, **kw)
        self.drop = nn.Dropout(p)
        self.h_o.weight = self.i_h.weight

    def forward(self, x: Tensor) -> Activations:
        raw = self.run(x)
        dropped = self.drop(raw)
        return Activations(self.h_o(dropped), raw, dropped)

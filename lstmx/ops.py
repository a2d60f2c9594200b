"""The sequence ops: one layer, one direction, all steps in one call.

Shapes are written T (steps), B (batch), I (inputs), H (hidden units), G (gates per unit: 4 for the
LSTM, 3 for the GRU) and N (rows of a packed sequence, the sum of ``batch_sizes``). Tensors share
one dtype, float32, float64, bfloat16 or float16, and one device. With 16-bit tensors all arithmetic
and the running cell state are float32, and ``y`` is rounded once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstmx import _extension, reference


class _PlainOps:
    """The ops in plain PyTorch, for where the compiled ones could not be loaded."""

    weight_mask = staticmethod(reference.weight_mask)

    @staticmethod
    def lstm_sequence(*tensors: Any, memory: str, cell_states: bool, **options: Any) -> Any:
        return reference.lstm_sequence(*tensors, **options)

    @staticmethod
    def gru_sequence(*tensors: Any, memory: str, **options: Any) -> Any:
        return reference.gru_sequence(*tensors, **options)[:2]


_ops: Any = torch.ops.lstmx if _extension.ERROR is None else _PlainOps


def empty_cache() -> None:
    """Gives the memory that the CPU kernels keep for later calls to the system.

    That is at most 4 GiB, and at most an eighth of the machine's memory.
    """
    if _extension._C is not None:
        _extension._C.empty_cache()


def lstm_sequence(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    seed: Tensor | None = None,
    weight_dropout: float = 0.0,
    memory: str = "high",
    cell_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs an LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000) over a sequence.

    Differentiable any number of times, in reverse and forward mode, and under ``torch.func``.

    Args:
        x: inputs, [T, B, I]; [N, I] with ``batch_sizes``.
        h0, c0: initial states, [B, H].
        w_ih, w_hh: weights, [4*H, I] and [4*H, H], in the order i f g o of ``torch.nn.LSTM``.
        b_ih, b_hh: biases, [4*H].
        batch_sizes: int64 [T] on the CPU: how many rows take part in each step, never growing, as
            in ``torch.nn.utils.rnn.PackedSequence``.
        reverse: walk from the last step to the first. ``y`` stays in the order of ``x``.
        seed: int64 tensor without dimensions, on the device of ``x``; draws the mask of weight
            dropout, see :func:`weight_mask`. None: no mask.
        weight_dropout: probability in [0, 1] of zeroing an entry of ``w_hh``.
        memory: "high" keeps the gates for backward, "low" recomputes them there, all but those of
            the last T // 5 steps (of more if T * B < 1600, none if T * B < 960 or packed).
        cell_states: also return the cell states of all steps.

    Returns:
        y [T, B, H] (or [N, H]), h_n [B, H], c_n [B, H], and c of y's size; c is empty unless
        ``cell_states``.

    Raises:
        ValueError: ``weight_dropout`` is not a probability, ``memory`` is neither word, or
            ``batch_sizes`` does not describe ``x`` and ``h0``.
        TypeError: the dtype of x, ``seed`` or ``batch_sizes`` is none that is supported.
        RuntimeError: an argument has the wrong size or device or another dtype than x, or T is 0.
    """
    return _ops.lstm_sequence(
        x,
        h0,
        c0,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        batch_sizes=batch_sizes,
        reverse=reverse,
        seed=seed,
        weight_dropout=weight_dropout,
        memory=memory,
        cell_states=cell_states,
    )


def gru_sequence(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    seed: Tensor | None = None,
    weight_dropout: float = 0.0,
    memory: str = "high",
) -> tuple[Tensor, Tensor]:
    """Runs a GRU (Cho et al. 2014, as ``torch.nn.GRU`` and cuDNN define it) over a sequence.

    Arguments and errors as for :func:`lstm_sequence`, with 3*H in place of 4*H, in the order r z n;
    the reset gate multiplies ``W_hn h + b_hn``. ``memory="low"`` keeps the gates of the last
    T // 10 steps, of more if T * B < 3200.

    Returns:
        y [T, B, H] (or [N, H]) and h_n [B, H].
    """
    return _ops.gru_sequence(
        x,
        h0,
        w_ih,
        w_hh,
        b_ih,
        b_hh,
        batch_sizes=batch_sizes,
        reverse=reverse,
        seed=seed,
        weight_dropout=weight_dropout,
        memory=memory,
    )


def weight_mask(
    seed: Tensor, size: Sequence[int], p: float, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The mask of weight dropout (DropConnect: Wan et al. 2013) that a seed stands for.

    Element e, counted row by row, takes word e % 4 of the Philox4x32-10 block (Salmon et al. 2011)
    whose counter is e // 4 and whose key is the seed: the same bits on every device.

    Args:
        seed: int64 tensor without dimensions.
        size: size of the weight, [G*H, H].
        p: probability in [0, 1] of a zero.
        dtype: of the mask.

    Returns:
        A tensor of that size, on the seed's device: 0 with probability p, else 1 / (1 - p).

    Raises:
        ValueError: ``p`` is not a probability.
        TypeError: ``seed`` is not int64.
        RuntimeError: ``seed`` has dimensions.
    """
    return _ops.weight_mask(seed, size, p, dtype=dtype)

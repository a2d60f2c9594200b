"""Fused LSTM and GRU sequence kernels for PyTorch, and the modules that stand on them."""

from lstmx._version import __version__
from lstmx.convert import Conversion, convert, restore
from lstmx.modules import GRU, LSTM, GRUCell, LSTMCell
from lstmx.ops import empty_cache, gru_sequence, lstm_sequence, weight_mask

__all__ = [
    "GRU",
    "LSTM",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "__version__",
    "convert",
    "empty_cache",
    "gru_sequence",
    "lstm_sequence",
    "restore",
    "weight_mask",
]

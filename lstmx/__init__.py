"""Fused LSTM and GRU sequence kernels for PyTorch, and the modules that stand on them."""

from lstmx._version import __version__
from lstmx.modules import GRU, LSTM, GRUCell, LSTMCell
from lstmx.ops import gru_sequence, lstm_sequence, weight_mask

__all__ = [
    "GRU",
    "LSTM",
    "GRUCell",
    "LSTMCell",
    "__version__",
    "gru_sequence",
    "lstm_sequence",
    "weight_mask",
]

"""Fused LSTM and GRU sequence kernels for PyTorch, and the modules that stand on them."""

"""Language models on recurrent nets: fast.ai's chapter 12, and the AWD-LSTM.

Needs the packages of the extra ``text``: ``pip install lstmx[text]``.
"""

from lstmx.text.interchange import (
    load_awd_lstm_lm,
    load_fastai,
    load_fastai_encoder,
    match_embeddings,
    read_fastai_vocabulary,
    save_awd_lstm_lm,
    save_fastai,
    save_fastai_encoder,
)

__all__ = [
    "load_awd_lstm_lm",
    "load_fastai",
    "load_fastai_encoder",
    "match_embeddings",
    "read_fastai_vocabulary",
    "save_awd_lstm_lm",
    "save_fastai",
    "save_fastai_encoder",
]

"""Language models on recurrent nets: fast.ai's chapter 12, and the AWD-LSTM.

Needs the packages of the extra ``text``: ``pip install lstmx[text]``.
"""

from lstmx.text.awd_lstm import (
    AWDLSTM,
    PRESETS,
    AWDLSTMConfig,
    AWDLSTMLanguageModel,
    fastai_classifier,
    fastai_lm,
    find_preset,
    merity_ptb,
    merity_wt2,
)
from lstmx.text.classifier import TextClassifier
from lstmx.text.generation import generate
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
from lstmx.text.storage import ModelFileError, SavedModel, load_model, save_model

__all__ = [
    "AWDLSTM",
    "PRESETS",
    "AWDLSTMConfig",
    "AWDLSTMLanguageModel",
    "ModelFileError",
    "SavedModel",
    "TextClassifier",
    "fastai_classifier",
    "fastai_lm",
    "find_preset",
    "generate",
    "load_awd_lstm_lm",
    "load_fastai",
    "load_fastai_encoder",
    "load_model",
    "match_embeddings",
    "merity_ptb",
    "merity_wt2",
    "read_fastai_vocabulary",
    "save_awd_lstm_lm",
    "save_fastai",
    "save_fastai_encoder",
    "save_model",
]

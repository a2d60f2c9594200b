"""AWD-LSTM's weights from and to the programs that they are published for.

fastai 2 and awd-lstm-lm name the same matrices differently. Both wrap each recurrent layer for
weight dropout and keep the weight that is trained under a name that ends in ``_raw``; some files
also have what the wrapper put in its place, under the plain name, which is left unread.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMConfig, AWDLSTMLanguageModel

StateDict = Mapping[str, Tensor]
_LAYER = re.compile(r"rnns\.(\d+)\.(?:module\.)?((?:weight|bias)_(?:ih|hh)_l0(?:_reverse)?)(_raw)?")


def _model_of(state_dict: Mapping[str, Any]) -> StateDict:
    """Of a file of fastai's ``Learner.save`` the model, without the optimiser."""
    inner = state_dict.get("model")
    state = inner if isinstance(inner, Mapping) else state_dict
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"state_dict must map names to tensors, got {wrong[0]!r}")
    return state


def _matrix(state: StateDict, name: str, where: str = "") -> Tensor:
    """A weight from which sizes are read."""
    if name not in state:
        raise ValueError(f"state_dict has no {where + name!r}")
    if state[name].dim() != 2:
        raise ValueError(f"{where + name} must be a matrix, got size {list(state[name].shape)}")
    return state[name]


def _read_layers(state: StateDict) -> list[dict[str, Tensor]]:
    """The recurrent layers' weights, under torch's names."""
    layers: dict[int, dict[str, Tensor]] = {}
    raw: set[tuple[int, str]] = set()
    for name, tensor in state.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            # The embedding, and in fastai's names the same once more.
            if name not in ("encoder.weight", "encoder_dp.emb.weight"):
                raise ValueError(f"state_dict has an unexpected {name}")
            continue
        index, weight = int(found[1]), found[2]
        if found[3]:
            raw.add((index, weight))
        elif (index, weight) in raw:
            continue
        layers.setdefault(index, {})[weight] = tensor
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(f"state_dict must have the layers rnns.0, 1, ..., got {sorted(layers)}")
    return [layers[index] for index in range(len(layers))]


def _read_config(
    state: StateDict, layers: list[dict[str, Tensor]], dropouts: AWDLSTMConfig | None
) -> AWDLSTMConfig:
    """All sizes, from the shapes; the probabilities of ``dropouts``, or else 0."""
    embedding = _matrix(state, "encoder.weight").size(1)
    recurrent = [_matrix(w, "weight_hh_l0", f"rnns.{i}.") for i, w in enumerate(layers)]
    gates, units = recurrent[0].shape
    directions = 2 if "weight_hh_l0_reverse" in layers[0] else 1
    cells = {4 * units: "lstm", 3 * units: "gru"}
    if gates not in cells:
        raise ValueError(f"rnns.0's recurrent weight must be [4*H, H], got {[gates, units]}")
    output = recurrent[-1].size(1) * directions
    sizes = AWDLSTMConfig(
        embedding=embedding,
        hidden=units * directions if len(layers) > 1 else embedding,
        layers=len(layers),
        output=None if output == embedding else output,
        cell=cells[gates],
        bidirectional=directions == 2,
    )
    return sizes.scaled(0) if dropouts is None else sizes.with_dropouts(dropouts)


def _fill(module: nn.Module, tensors: dict[str, Tensor], where: str = "") -> None:
    """Raises ValueError, naming it, for a weight that is absent, left over or of a wrong size."""
    own = module.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in tensors or name not in own:
            word = "lacks" if name not in tensors else "has an unexpected"
            raise ValueError(f"state_dict {word} {where}{name}")
        size, got = list(own[name].shape), list(tensors[name].shape)
        if size != got:
            raise ValueError(f"{where}{name} must have size {size}, got {got}")
    module.load_state_dict(tensors)


def _fill_encoder(encoder: AWDLSTM, state: StateDict, layers: list[dict[str, Tensor]]) -> None:
    # Embedding dropout names the same matrix again.
    names = ("embedding.weight", "embedding_dropout.embedding.weight")
    tensors = dict.fromkeys(names, state["encoder.weight"])
    for index, layer in enumerate(layers):
        tensors |= {f"rnns.{index}.{name}": tensor for name, tensor in layer.items()}
    _fill(encoder, tensors)


def _strip(state: StateDict, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _build(
    state: StateDict, decoder: dict[str, Tensor], dropouts: AWDLSTMConfig | None
) -> AWDLSTMLanguageModel:
    layers = _read_layers(state)
    config = _read_config(state, layers, dropouts)
    embedding = state["encoder.weight"]
    if "weight" not in decoder:
        raise ValueError(
            "state_dict has no decoder weight; for an encoder use the encoder's loader"
        )
    tied = torch.equal(decoder["weight"], embedding)
    model = AWDLSTMLanguageModel(len(embedding), config, tied=tied, bias="bias" in decoder)
    model = model.to(embedding.dtype)
    _fill_encoder(model.encoder, state, layers)
    _fill(model.decoder, decoder, "decoder.")
    return model.eval()


def load_fastai(
    state_dict: Mapping[str, Any], config: AWDLSTMConfig | None = None
) -> AWDLSTMLanguageModel:
    """A language model from the state dict of fastai's (``AWD_LSTM`` and its ``LinearDecoder``).

    Sizes, cell, directions, tying and the decoder's bias are read off the tensors. Files of
    ``Learner.save``, with an optimiser beside the model, and old ones with the dropped weights
    beside the raw ones are understood.

    Args:
        state_dict: names to tensors: ``0.encoder.weight``, ``0.rnns.0.weight_hh_l0_raw``, ...
        config: whose dropouts to use; by default none. Its sizes are ignored.

    Returns:
        The model, in eval mode: ids [B, T] to logits [B, T, V]; it keeps its state over calls.

    Raises:
        ValueError: a tensor is absent, left over or of a size that does not fit.
    """
    state = _model_of(state_dict)
    known = ("0.", "1.decoder.")
    unexpected = [name for name in state if not name.startswith(known)]
    if unexpected:
        raise ValueError(f"state_dict has an unexpected {unexpected[0]}")
    encoder, decoder = (_strip(state, prefix) for prefix in known)
    return _build(encoder, decoder, config)


def load_fastai_encoder(
    state_dict: Mapping[str, Any], config: AWDLSTMConfig | None = None
) -> AWDLSTM:
    """An encoder from a file of fastai's ``Learner.save_encoder``; see :func:`load_fastai`."""
    state = _model_of(state_dict)
    layers = _read_layers(state)
    config = _read_config(state, layers, config)
    embedding = state["encoder.weight"]
    encoder = AWDLSTM(len(embedding), config).to(embedding.dtype)
    _fill_encoder(encoder, state, layers)
    return encoder.eval()


def _encoder_names(encoder: AWDLSTM) -> dict[str, Tensor]:
    state = encoder.state_dict()
    named = dict.fromkeys(("encoder.weight", "encoder_dp.emb.weight"), state["embedding.weight"])
    for index in range(len(encoder.rnns)):
        layer = _strip(state, f"rnns.{index}.")
        # fastai drops, and so renames, the first direction's weight alone.
        named[f"rnns.{index}.weight_hh_l0_raw"] = layer.pop("weight_hh_l0")
        named |= {f"rnns.{index}.module.{name}": tensor for name, tensor in layer.items()}
    return named


def _linear_decoder(model: AWDLSTMLanguageModel) -> nn.Linear:
    """The decoder, or the error for one that has no row for each word."""
    if not isinstance(model.decoder, nn.Linear):
        raise ValueError("model must have a linear decoder, got one with an adaptive softmax")
    return model.decoder


def save_fastai(model: AWDLSTMLanguageModel) -> dict[str, Tensor]:
    """The state dict that fastai's language model of the same sizes loads with ``strict=True``.

    The inverse of :func:`load_fastai`. The tensors are the model's own, detached.

    Raises:
        ValueError: the model has an adaptive softmax, or another output size than its embedding's,
            which fastai has not.
    """
    decoder = _linear_decoder(model).state_dict()
    output, embedding = model.config.output_size, model.config.embedding
    if output != embedding:
        raise ValueError(f"the last layer must have the embedding's size {embedding}, got {output}")
    named = {f"0.{name}": tensor for name, tensor in _encoder_names(model.encoder).items()}
    return named | {f"1.decoder.{name}": tensor for name, tensor in decoder.items()}


def save_fastai_encoder(encoder: AWDLSTM) -> dict[str, Tensor]:
    """The state dict of fastai's encoder alone, for its ``Learner.load_encoder``."""
    return _encoder_names(encoder)


def load_awd_lstm_lm(
    state_dict: Mapping[str, Any], config: AWDLSTMConfig | None = None
) -> AWDLSTMLanguageModel:
    """A language model from the state dict of awd-lstm-lm's ``RNNModel`` (LSTM or GRU).

    Arguments, result and errors as for :func:`load_fastai`; the names are ``encoder.weight``,
    ``rnns.0.module.weight_hh_l0_raw`` (``rnns.0.weight_hh_l0`` without weight dropout), ...
    """
    state = _model_of(state_dict)
    encoder = {name: v for name, v in state.items() if not name.startswith("decoder.")}
    return _build(encoder, _strip(state, "decoder."), config)


def save_awd_lstm_lm(model: AWDLSTMLanguageModel) -> dict[str, Tensor]:
    """The state dict of awd-lstm-lm's ``RNNModel`` of the same sizes, with weight dropout.

    Raises:
        ValueError: the model has an adaptive softmax (awd-lstm-lm's is another one).
    """
    decoder = _linear_decoder(model).state_dict()
    named = {"encoder.weight": model.encoder.embedding.weight.detach()}
    for index in range(len(model.encoder.rnns)):
        for name, tensor in model.encoder.rnns[index].state_dict().items():
            raw = "_raw" if name == "weight_hh_l0" else ""
            named[f"rnns.{index}.module.{name}{raw}"] = tensor
    return named | {f"decoder.{name}": tensor for name, tensor in decoder.items()}


# ---- Vocabularies --------------------------------------------------------------------------------


class _Inert:
    """Stands for every class that a pickle names; remembers what it is given, does nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.args = (*self.args, item)

    def extend(self, items: Any) -> None:
        self.args = (*self.args, *items)


class _InertUnpickler(pickle.Unpickler):
    """Reads plain data. Nothing is imported or called, whatever the file names."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a vocabulary has no tensors")


def read_fastai_vocabulary(path: Path | str) -> list[str]:
    """The words of a vocabulary that fastai pickled, a list or an ``L``, in the order of their ids.

    Nothing in the file is executed.

    Raises:
        ValueError: it is no pickle of a list of words.
    """
    try:
        value = _InertUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except Exception as error:  # a truncated or tampered pickle can fail in any way
        raise ValueError(f"{path} is no pickle of a vocabulary: {error}") from error
    if isinstance(value, _Inert):
        inner = value.state.get("items") if isinstance(value.state, dict) else None
        value = inner if inner is not None else next(iter(value.args), None)
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        raise ValueError(f"{path} must hold a list of words, got {type(value).__name__}")
    return list(value)


def match_embeddings(
    model: AWDLSTM | AWDLSTMLanguageModel, old: Sequence[str], new: Sequence[str]
) -> None:
    """Carries a model to another vocabulary, in place.

    A word of both vocabularies keeps its embedding (and its bias in the decoder); a new one gets
    the mean of all old ones (ULMFiT: Howard & Ruder 2018).

    Args:
        model: an encoder or a language model.
        old: the model's words, by id.
        new: the words that it is to have, by id.

    Raises:
        ValueError: ``old`` has another number of words than the model, or ``new`` has none; the
            model has an adaptive softmax, whose clusters are those of the old words' frequencies.
    """
    encoder = model.encoder if isinstance(model, AWDLSTMLanguageModel) else model
    if len(old) != encoder.embedding.num_embeddings:
        raise ValueError(
            f"old must have the model's {encoder.embedding.num_embeddings} words, got {len(old)}"
        )
    if not new:
        raise ValueError("new must have at least one word, got none")
    ids = {word: i for i, word in enumerate(old)}
    known = torch.tensor([ids.get(word, -1) for word in new])

    def carried(rows: Tensor) -> nn.Parameter:
        picked = rows.detach()[known.clamp(min=0).to(rows.device)]
        picked[known < 0] = rows.detach().mean(0)
        return nn.Parameter(picked, requires_grad=rows.requires_grad)

    if isinstance(model, AWDLSTMLanguageModel):
        decoder, tied = _linear_decoder(model), model.tied
    encoder.embedding.weight = carried(encoder.embedding.weight)
    encoder.embedding.num_embeddings = len(new)
    if encoder.embedding.padding_idx is not None:
        padding = old[encoder.embedding.padding_idx]
        encoder.embedding.padding_idx = new.index(padding) if padding in new else None
    if isinstance(model, AWDLSTMLanguageModel):
        decoder.weight = encoder.embedding.weight if tied else carried(decoder.weight)
        if decoder.bias is not None:
            decoder.bias = carried(decoder.bias)
        decoder.out_features = len(new)

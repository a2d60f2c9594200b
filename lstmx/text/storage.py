"""Models in files: weights, sizes and vocabulary together, in safetensors' format.

Such a file is data and no program: nothing in it is executed. The sizes, the tokenizer and a
digest of everything are JSON in its header, which other readers of the format leave alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.classifier import TextClassifier
from lstmx.text.files import write_atomically
from lstmx.text.tokenizer import Tokenizer

Model = AWDLSTM | AWDLSTMLanguageModel | TextClassifier

_VERSION = "1"


class ModelFileError(ValueError):
    """A file is no saved model, is damaged, or does not fit what it is loaded for."""


@dataclass(frozen=True)
class SavedModel:
    """What a file holds.

    Attributes:
        model: the model, in eval mode, on the CPU.
        tokenizer: its vocabulary, or None if it was saved without one.
        classes: names of a classifier's classes, or None if it was saved without them.
    """

    model: Model
    tokenizer: Tokenizer | None
    classes: list[str] | None


def _tensors(model: Model) -> dict[str, Tensor]:
    """The parameters and buffers; what is shared has one name."""
    return {
        name: tensor.detach()
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }


def _description(model: Model) -> dict[str, Any]:
    """The arguments that make the model, but for its weights."""
    encoder = model if isinstance(model, AWDLSTM) else model.encoder
    described: dict[str, Any] = {
        "vocabulary": encoder.vocabulary,
        "config": asdict(encoder.config),
        "padding_idx": encoder.embedding.padding_idx,
    }
    if isinstance(model, AWDLSTMLanguageModel):
        options = {name: getattr(model, name) for name in ("tied", "bias", "cutoffs")}
        return {"kind": "language-model", **described, "options": options}
    if isinstance(model, TextClassifier):
        names = ("classes", "hidden", "drops", "bptt", "max_length")
        options = {name: getattr(model, name) for name in names}
        return {"kind": "classifier", **described, "options": options}
    return {"kind": "encoder", **described}


def _make(described: Mapping[str, Any]) -> Model:
    """The inverse of _description. Any exception: the description is damaged."""
    config = AWDLSTMConfig(**described["config"])
    vocabulary, padding_idx = described["vocabulary"], described["padding_idx"]
    if described["kind"] == "language-model":
        options = described["options"]
        return AWDLSTMLanguageModel(vocabulary, config, padding_idx=padding_idx, **options)
    encoder = AWDLSTM(vocabulary, config, padding_idx=padding_idx)
    if described["kind"] == "classifier":
        return TextClassifier(encoder, **described["options"])
    if described["kind"] == "encoder":
        return encoder
    raise ValueError(f"kind {described['kind']!r}")


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in a file, but for the digest."""
    total = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def save_model(
    model: Model,
    path: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Writes a model to a file, for :func:`load_model`.

    The kept state is not written. A failure, such as a full disk, leaves what was there.

    Args:
        model: an encoder, language model or classifier, on any device.
        path: of the file; the ending ``.safetensors`` is usual.
        tokenizer: the model's vocabulary.
        classes: names of a classifier's classes, by number.

    Raises:
        OSError: as of writing any file.
        TypeError: the model is another one.
        ValueError: the tokenizer has another number of words than the model, or ``classes``
            another number than it has classes.
    """
    if not isinstance(model, Model):
        raise TypeError(
            "model must be an AWDLSTM, AWDLSTMLanguageModel or TextClassifier, "
            f"got {type(model).__name__}"
        )
    described = _description(model)
    if tokenizer is not None and len(tokenizer) != described["vocabulary"]:
        raise ValueError(
            f"tokenizer must have the model's {described['vocabulary']} words, got {len(tokenizer)}"
        )
    metadata = {"format": "pt", "lstmx": _VERSION, "model": json.dumps(described)}
    if tokenizer is not None:
        metadata["tokenizer"] = tokenizer.to_json()
    if classes is not None:
        count = model.classes if isinstance(model, TextClassifier) else 0
        if len(classes) != count:
            raise ValueError(f"classes must have the model's {count} names, got {len(classes)}")
        metadata["classes"] = json.dumps(list(classes))
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(model).items()}
    metadata["sha256"] = _digest(metadata, tensors)
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def _fill(model: Model, tensors: dict[str, Tensor]) -> None:
    """Puts a file's tensors into a model on the meta device, whose own are mere sizes."""
    own = _tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            raise ValueError(f"{'lacks' if name in own else 'has an unexpected'} tensor {name}")
        expected, got = own[name], tensors[name]
        if expected.shape != got.shape or expected.is_floating_point() != got.is_floating_point():
            raise ValueError(
                f"{name} must be {expected.dtype} of size {list(expected.shape)}, "
                f"got {got.dtype} of size {list(got.shape)}"
            )
    model.load_state_dict(tensors, strict=False, assign=True)


def load_model(path: Path | str, *, tokenizer: Tokenizer | None = None) -> SavedModel:
    """Reads what :func:`save_model` wrote. Nothing in the file is executed.

    Args:
        path: of the file.
        tokenizer: if given, the one that the model must have, such as a corpus's.

    Returns:
        The model, in eval mode, with its tokenizer and classes.

    Raises:
        OSError: as of reading any file.
        ModelFileError: the file is no saved model, is damaged (its digest is wrong, its parts do
            not fit each other), or has another tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a saved model")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copied, because they would change with the file.
            # SIM118: a safetensors file has keys() but cannot be iterated over.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{path} is no saved model, or is damaged: {error}") from error
    if metadata.get("lstmx") != _VERSION:
        raise ModelFileError(
            f"{path} must be a model that lstmx saved, in version {_VERSION} of its format, "
            f"got {metadata.get('lstmx', 'another file')}"
        )
    digest = metadata.pop("sha256", None)
    if digest != _digest(metadata, tensors):
        raise ModelFileError(
            f"{path} is damaged or was changed: its digest does not fit its content"
        )
    try:
        described = json.loads(metadata["model"])
        if described["config"]["layers"] > len(tensors):
            raise ValueError(f"{described['config']['layers']} layers")
        with torch.device("meta"):
            model = _make(described)
        _fill(model, tensors)
        if isinstance(model, AWDLSTMLanguageModel) and described["options"]["tied"]:
            model.decoder.weight = model.encoder.embedding.weight
        own = Tokenizer.from_json(metadata["tokenizer"]) if "tokenizer" in metadata else None
        if own is not None and len(own) != described["vocabulary"]:
            raise ValueError(f"{len(own)} words in a vocabulary of {described['vocabulary']}")
        classes = json.loads(metadata["classes"]) if "classes" in metadata else None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{path} is damaged: its parts do not fit: {error}") from error
    if tokenizer is not None and tokenizer != own:
        raise ModelFileError(f"{path} has another vocabulary: {_difference(own, tokenizer)}")
    return SavedModel(model.eval(), own, classes)


def _difference(own: Tokenizer | None, other: Tokenizer) -> str:
    """What a message says about it."""
    if own is None:
        return "it has none"
    if len(own) != len(other):
        return f"it has {len(own)} words, expected {len(other)}"
    for i, (word, expected) in enumerate(zip(own.words, other.words, strict=True)):
        if word != expected:
            return f"its word {i} is {word!r}, expected {expected!r}"
    return "it splits text in another way"

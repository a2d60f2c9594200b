"""What a run is made from: one file in TOML or YAML, kept beside the run's checkpoint.

A file has the key ``kind`` and the tables ``data``, ``model`` and ``train``; whatever it leaves out
has the default that stands here. :func:`read_config` refuses unknown keys and wrong types, and says
where they stand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lstmx.text.awd_lstm import AWDLSTMConfig, find_preset
from lstmx.text.files import write_atomically

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_STRICT = ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A run's file cannot be read, or says what is not allowed; the message says where."""


@dataclass(frozen=True, config=_STRICT)
class StreamData:
    """The text of a language model.

    Attributes:
        source: folder of a prepared corpus.
        batch_size: rows of a batch, over all processes.
        eval_batch_size: rows of a batch of validation, over all processes.
        bptt: steps that a batch goes on for, and that gradients go back.
        random_length: vary the steps from batch to batch (Merity et al. 2017, section 5).
    """

    source: str
    batch_size: Positive = 64
    eval_batch_size: Positive = 10
    bptt: Positive = 70
    random_length: bool = False


@dataclass(frozen=True, config=_STRICT)
class DocumentData:
    """The labelled documents of a classifier.

    Attributes:
        source: folder or file with labelled documents.
        batch_size: documents of a batch, over all processes.
        valid_fraction: part of the training documents to validate on, where the source has no
            split for it.
        text_column: of a CSV or JSONL file.
        label_column: of a CSV or JSONL file.
    """

    source: str
    batch_size: Positive = 32
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    text_column: str = "text"
    label_column: str = "label"


@dataclass(frozen=True, config=_STRICT)
class LanguageModelSizes:
    """The language model: a preset, and what differs from it.

    Attributes:
        preset: name in :data:`lstmx.text.awd_lstm.PRESETS`.
        pretrained: a saved language model to begin with, in place of the preset; its vocabulary
            is matched to the corpus's.
        drop_mult: factor of all dropouts.
        tied: the decoder's matrix is the embedding's.
        bias: the decoder has one.
        cutoffs: of an adaptive softmax (Grave et al. 2017); without any, a full one.
        embedding, hidden, layers, cell, bidirectional, embedding_p, input_p, weight_p, hidden_p,
        output_p: in place of the preset's, as in :class:`lstmx.text.awd_lstm.AWDLSTMConfig`.
    """

    preset: str = "fastai_lm"
    pretrained: str | None = None
    drop_mult: Factor = 1.0
    tied: bool = True
    bias: bool = True
    cutoffs: tuple[Positive, ...] = ()
    embedding: Positive | None = None
    hidden: Positive | None = None
    layers: Positive | None = None
    cell: Literal["lstm", "gru"] | None = None
    bidirectional: bool | None = None
    embedding_p: Probability | None = None
    input_p: Probability | None = None
    weight_p: Probability | None = None
    hidden_p: Probability | None = None
    output_p: Probability | None = None

    def __post_init__(self) -> None:
        if self.cutoffs and self.tied:
            raise ValueError("tied must be false with cutoffs: there is no matrix to tie")
        _ = self.encoder  # its own checks

    @property
    def encoder(self) -> AWDLSTMConfig:
        """The encoder's sizes and dropouts."""
        names = {f.name for f in fields(AWDLSTMConfig)} & self.__dict__.keys()
        changed = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        preset = find_preset(self.preset)
        return AWDLSTMConfig(**(asdict(preset) | changed)).scaled(self.drop_mult)


@dataclass(frozen=True, config=_STRICT)
class ClassifierSizes:
    """The classifier: a trained language model's encoder, and a head.

    Attributes:
        pretrained: a saved language model; its tokenizer is the classifier's.
        scratch: take only its tokenizer and sizes, and begin with random weights.
        preset: dropouts, by name in :data:`lstmx.text.awd_lstm.PRESETS`.
        drop_mult: factor of all dropouts of the encoder.
        hidden: units of the layers of the head.
        drops: probabilities of dropout in the head, of the pooled state and of each hidden layer.
        bptt: steps that a document is read in at a time.
        max_length: last steps of a document that gradients go back through; 0: all.
    """

    pretrained: str
    scratch: bool = False
    preset: str = "fastai_classifier"
    drop_mult: Factor = 1.0
    hidden: tuple[Positive, ...] = (50,)
    drops: tuple[Probability, ...] = (0.4, 0.1)
    bptt: Positive = 70
    max_length: Annotated[int, Field(ge=0)] = 1400

    def __post_init__(self) -> None:
        _ = self.encoder  # its own checks
        if len(self.drops) != len(self.hidden) + 1:
            raise ValueError(
                f"drops must have one value more than hidden, got {len(self.drops)} and "
                f"{len(self.hidden)}"
            )

    @property
    def encoder(self) -> AWDLSTMConfig:
        """The dropouts of the encoder; its sizes are those of ``pretrained``."""
        return find_preset(self.preset).scaled(self.drop_mult)


@dataclass(frozen=True, config=_STRICT)
class Stage:
    """A part of training with one cycle of the learning rate.

    Attributes:
        epochs: passes over the training batches.
        lr: peak of the learning rate of the last group of layers.
        unfrozen: groups of layers to train, counted from the last one; None: all.
    """

    epochs: Positive
    lr: Rate
    unfrozen: Positive | None = None


# Of ULMFiT (Howard & Ruder 2018), with the rates of fastai's course.
ULMFIT_STAGES = (Stage(1, 2e-2, 1), Stage(1, 1e-2, 2), Stage(1, 5e-3, 3), Stage(2, 1e-3))


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Training:
    """What language models and classifiers are trained with alike.

    Attributes:
        weight_decay: decoupled in AdamW, and not on the biases of Linear layers nor on batch norm;
            None: 0.01, or awd-lstm-lm's 1.2e-6 with NT-ASGD.
        momentum: Adam's beta1 at the peak of the learning rate, and at both ends.
        alpha: factor of activation regularisation.
        beta: factor of temporal activation regularisation.
        clip: largest norm of the gradient; 0: any.
        precision: Lightning's; "bf16-mixed" computes products in bfloat16.
        seed: of all random numbers.
        patience: epochs without a better validation loss before training stops; 0: never.
        checkpoint_every: steps between checkpoints; one is also written after every epoch.
        log_every: steps between lines of the log.
        tensorboard: log for TensorBoard too.
        accelerator: Lightning's: "auto", "cpu" or "gpu".
    """

    weight_decay: Factor | None = None
    momentum: tuple[Probability, Probability] = (0.85, 0.95)
    alpha: Factor = 2.0
    beta: Factor = 1.0
    clip: Factor = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    patience: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Positive = 500
    log_every: Positive = 10
    tensorboard: bool = False
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class LanguageModelTraining(Training):
    """How a language model is trained; also what :class:`Training` has.

    Attributes:
        epochs: passes over the training text.
        lr: of SGD, or the peak of AdamW's one cycle; of a batch of bptt steps, and of a shorter
            or longer one in proportion.
        optimizer: "adamw", under one cycle, or "nt-asgd" (Merity et al. 2017; they train with lr
            30, clip 0.25 and random lengths).
        patience_of_averaging: NT-ASGD begins to average when validation is no better than it was
            more than so many epochs before.
    """

    epochs: Positive = 10
    lr: Rate = 5e-3
    optimizer: Literal["adamw", "nt-asgd"] = "adamw"
    patience_of_averaging: Positive = 5

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One, with all layers."""
        return (Stage(self.epochs, self.lr),)

    factor = 1.0


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class ClassifierTraining(Training):
    """How a classifier is trained; also what :class:`Training` has.

    Attributes:
        stages: gradual unfreezing: one after the other, each with a cycle of its own.
        factor: what the learning rate is divided by from a group of layers to the one below.
    """

    momentum: tuple[Probability, Probability] = (0.7, 0.8)
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = ULMFIT_STAGES
    factor: Annotated[float, Field(ge=1)] = 2.6


@dataclass(frozen=True, config=_STRICT)
class LanguageModelConfig:
    """A run that trains a language model."""

    kind: Literal["language-model"]
    data: StreamData
    model: LanguageModelSizes = field(default_factory=LanguageModelSizes)
    train: LanguageModelTraining = field(default_factory=LanguageModelTraining)


@dataclass(frozen=True, config=_STRICT)
class ClassifierConfig:
    """A run that trains a classifier."""

    kind: Literal["classifier"]
    data: DocumentData
    model: ClassifierSizes
    train: ClassifierTraining = field(default_factory=ClassifierTraining)


RunConfig = LanguageModelConfig | ClassifierConfig
_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(Annotated[RunConfig, Field(discriminator="kind")])


def parse_config(values: Mapping[str, Any], name: str = "config") -> RunConfig:
    """A run from nested dictionaries.

    Args:
        values: ``kind`` and the tables.
        name: of the source, for messages.

    Raises:
        ConfigError: a key is missing, unknown, or of a wrong type or value.
    """
    try:
        # From JSON, because strict dataclasses take no dictionaries, nor lists for tuples.
        return _ADAPTER.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False, include_context=False):
            # pydantic names the member of the union first.
            path = [part for part in one["loc"] if part not in ("language-model", "classifier")]
            reason = one["msg"].removeprefix("Value error, ")
            message = f"{name}: {'.'.join(map(str, path)) or 'kind'}: {reason}"
            if not isinstance(one["input"], (dict, list)):
                message += f", got {one['input']!r}"
            lines.append(message)
        raise ConfigError("\n".join(lines)) from error


def updated(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The run with other values.

    Args:
        config: the run.
        values: by dotted names: ``{"train.lr": 1e-3}``.

    Raises:
        ConfigError: there is no such key, or the value does not fit it.
    """
    tables = asdict(config)
    for path, value in values.items():
        *parents, key = path.split(".")
        table: Any = tables
        for parent in parents:
            table = table.get(parent)
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: there is no table {parent!r}")
        table[key] = value
    return parse_config(tables, "settings")


def _without_none(value: Any) -> Any:
    """TOML has no null: an absent key stands for it."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value


def read_config(path: Path) -> RunConfig:
    """Reads a run from a file that ends in .toml, .yaml or .yml.

    Raises:
        ConfigError: the file cannot be read, is not TOML or YAML, or what :func:`parse_config`
            raises.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text)
        else:
            raise ConfigError(f"{path}: expected a name in .toml, .yaml or .yml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys with values, got {type(values).__name__}")
    return parse_config(values, str(path))


def write_config(config: RunConfig, path: Path) -> None:
    """Writes a run as TOML, or as YAML if the name ends so; the file is whole or not there."""
    values = _without_none(asdict(config))
    if path.suffix in (".yaml", ".yml"):
        text = yaml.safe_dump(values, sort_keys=False)
    else:
        text = tomli_w.dumps(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())

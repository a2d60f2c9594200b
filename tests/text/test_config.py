"""A run's file: round trips, defaults, and what is wrong with it said by name."""

import itertools

import pytest

from lstmx.text.awd_lstm import fastai_classifier, fastai_lm, merity_ptb
from lstmx.text.config import (
    ULMFIT_STAGES,
    ConfigError,
    Stage,
    parse_config,
    read_config,
    updated,
    write_config,
)

LANGUAGE_MODEL = {"kind": "language-model", "data": {"source": "corpus"}}
CLASSIFIER = {
    "kind": "classifier",
    "data": {"source": "books"},
    "model": {"pretrained": "model.safetensors"},
}


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".yml"])
@pytest.mark.parametrize(
    "values",
    [
        LANGUAGE_MODEL,
        CLASSIFIER,
        LANGUAGE_MODEL
        | {
            "model": {"preset": "merity_ptb", "tied": False, "cutoffs": [10, 200], "cell": "gru"},
            "train": {"optimizer": "nt-asgd", "lr": 30, "weight_decay": 1.2e-6, "clip": 0.25},
        },
        CLASSIFIER | {"train": {"stages": [{"epochs": 2, "lr": 0.1, "unfrozen": 3}]}},
    ],
)
def test_a_file_gives_the_run_back(values, suffix, tmp_path):
    config = parse_config(values)
    path = tmp_path / f"run{suffix}"
    write_config(config, path)
    assert read_config(path) == config
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_defaults():
    config = parse_config(LANGUAGE_MODEL)
    assert config.model.encoder == fastai_lm
    assert config.train.stages == (Stage(10, 5e-3),)
    config = parse_config(CLASSIFIER)
    assert config.model.encoder == fastai_classifier
    assert config.train.stages == ULMFIT_STAGES
    assert config.train.factor == 2.6


def test_presets_and_what_differs():
    model = {"preset": "merity_ptb", "hidden": 20, "drop_mult": 0.5, "output_p": 0.2}
    encoder = parse_config(LANGUAGE_MODEL | {"model": model}).model.encoder
    assert (encoder.hidden, encoder.embedding) == (20, merity_ptb.embedding)
    assert (encoder.weight_p, encoder.output_p) == (merity_ptb.weight_p / 2, 0.1)


def test_updated():
    config = parse_config(LANGUAGE_MODEL)
    changed = updated(config, {"train.lr": 1, "model.hidden": 64})
    assert (changed.train.lr, changed.model.encoder.hidden) == (1.0, 64)
    assert updated(changed, {"train.lr": 5e-3, "model.hidden": None}) == config
    with pytest.raises(ConfigError, match=r"trian\.lr: there is no table 'trian'"):
        updated(config, {"trian.lr": 1})
    with pytest.raises(ConfigError, match=r"train\.rate: Unexpected keyword argument, got 1"):
        updated(config, {"train.rate": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "translator"}, "kind: .*'translator'.*'language-model', 'classifier'"),
        ({"kind": None}, "kind: "),
        ({"data": {}}, r"data.source: Field required"),
        ({"data": 3}, "data: .*got 3"),
        ({"data": {"source": "c", "btpt": 3}}, "data.btpt: Unexpected keyword argument, got 3"),
        ({"data": {"source": "c", "bptt": 3.5}}, r"data.bptt: .*valid integer, got 3\.5"),
        ({"data": {"source": "c", "bptt": True}}, r"data.bptt: .*valid integer, got True"),
        ({"data": {"source": "c", "batch_size": 0}}, "data.batch_size: .*equal to 1, got 0"),
        ({"model": {"preset": "bert"}}, "model: .*preset must be one of fastai_lm.*got 'bert'"),
        ({"model": {"hidden": 3, "bidirectional": True}}, "model: .*hidden must be even"),
        ({"model": {"drop_mult": 9.0}}, "model: .*must be a probability"),
        ({"model": {"cutoffs": [5]}}, "model: .*tied must be false with cutoffs"),
        ({"train": {"lr": "fast"}}, "train.lr: .*valid number, got 'fast'"),
        ({"train": {"lr": float("nan")}}, "train.lr: .*finite number"),
        ({"train": {"lr": 0}}, "train.lr: .*greater than 0, got 0"),
        ({"train": {"momentum": [0.9]}}, "train.momentum"),
        ({"train": {"precision": "8"}}, "train.precision: .*'32-true' or 'bf16-mixed', got '8'"),
        ({"train": {"stages": []}}, "train.stages: Unexpected keyword argument"),
    ],
)
def test_errors_say_where(changes, words):
    with pytest.raises(ConfigError, match=f"(?m)^run.toml: {words}"):
        parse_config(LANGUAGE_MODEL | changes, "run.toml")


def test_errors_of_classifiers():
    with pytest.raises(ConfigError, match=r"model: .*drops must have one value more than hidden"):
        parse_config(CLASSIFIER | {"model": {"pretrained": "m", "hidden": [3, 4]}})
    stages = [{"epochs": 1, "lr": 1.0}, {"epochs": 1, "lr": 1.0, "unfrozen": 0}]
    with pytest.raises(ConfigError, match=r"train\.stages\.1\.unfrozen: .*got 0"):
        parse_config(CLASSIFIER | {"train": {"stages": stages}})


def test_all_errors_at_once():
    with pytest.raises(ConfigError) as found:
        parse_config(LANGUAGE_MODEL | {"train": {"lr": -1, "clip": "no", "rate": 3}})
    lines = str(found.value).splitlines()
    assert len(lines) == 3
    for name, line in itertools.product(("lr", "clip", "rate"), lines):
        assert (f"train.{name}:" in line) == (line.split(": ")[1] == f"train.{name}")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.toml", b"kind =", "run.toml: .*Invalid value"),
        ("run.yaml", b"kind: [", "run.yaml: "),
        ("run.yaml", b"- 1\n- 2\n", "run.yaml: expected keys with values, got list"),
        ("run.toml", b"kind = '\xff'", "cannot read the config .*run.toml"),
        ("run.json", b"{}", r"run.json: expected a name in \.toml"),
    ],
)
def test_errors_of_files(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_config(path)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*absent\.toml"):
        read_config(tmp_path / "absent.toml")

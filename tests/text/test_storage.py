"""Saved models: whole, exact, and no way to run anything or to lose one."""

import json
import pickle
import resource
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from lstmx.text import storage
from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.classifier import TextClassifier
from lstmx.text.storage import ModelFileError, load_model, save_model
from lstmx.text.tokenizer import Tokenizer

SMALL = AWDLSTMConfig(embedding=16, hidden=10, layers=2, weight_p=0.25)
TEXT = "the cat sat on the mat and the dog sat on the log"


@pytest.fixture
def tokenizer():
    return Tokenizer.train([TEXT])


def language_model(words, **options):
    return AWDLSTMLanguageModel(words, SMALL, **options)


def classifier(words, **options):
    return TextClassifier(AWDLSTM(words, SMALL), 3, hidden=(7, 5), bptt=4, **options)


MODELS = {
    "encoder": lambda words: AWDLSTM(words, SMALL, padding_idx=2),
    "gru": lambda words: AWDLSTM(words, AWDLSTMConfig(8, 12, 2, cell="gru", bidirectional=True)),
    "tied": language_model,
    "untied": lambda words: language_model(words, tied=False, bias=False),
    "adaptive": lambda words: language_model(words, tied=False, cutoffs=[4, 7]),
    "classifier": classifier,
    "limited": lambda words: classifier(words, max_length=6, drops=(0.3, 0.2, 0.1)),
    "bfloat16": lambda words: language_model(words).bfloat16(),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tokenizer, tmp_path):
    model = MODELS[name](len(tokenizer))
    ids = torch.randint(len(tokenizer), (3, 9))
    model(ids)  # batch norm has seen something, and a state is kept
    path = tmp_path / "model.safetensors"
    classes = ["a", "b", "c"] if isinstance(model, TextClassifier) else None
    save_model(model, path, tokenizer, classes=classes)
    drawn = torch.get_rng_state()
    saved = load_model(path, tokenizer=tokenizer)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert saved.tokenizer == tokenizer
    assert saved.classes == classes
    assert type(saved.model) is type(model)
    assert not saved.model.training
    assert all(p.requires_grad for p in saved.model.parameters())
    state, expected = saved.model.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key
    assert storage._description(saved.model) == storage._description(model)
    if not isinstance(model, TextClassifier):
        assert saved.model.h is None
        model.reset()
    torch.testing.assert_close(saved.model(ids), model.eval()(ids), rtol=0, atol=0)
    if isinstance(model, AWDLSTMLanguageModel):
        assert saved.model.tied is model.tied
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_loaded_model_trains(tmp_path):
    save_model(language_model(20), tmp_path / "m")
    model = load_model(tmp_path / "m").model.train()
    model(torch.randint(20, (2, 5))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_other_readers_of_the_format_see_the_weights(tmp_path):
    model = language_model(20)
    save_model(model, tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m")
    assert torch.equal(tensors["encoder.embedding.weight"], model.decoder.weight)
    assert "decoder.weight" not in tensors


def test_bad_arguments(tokenizer, tmp_path):
    words = len(tokenizer)
    with pytest.raises(ValueError, match=rf"tokenizer must have the model's 5 words, got {words}"):
        save_model(language_model(5), tmp_path / "m", tokenizer)
    with pytest.raises(ValueError, match="classes must have the model's 3 names, got 2"):
        save_model(classifier(5), tmp_path / "m", classes=["a", "b"])
    with pytest.raises(ValueError, match="classes must have the model's 0 names, got 1"):
        save_model(language_model(5), tmp_path / "m", classes=["a"])
    with pytest.raises(TypeError, match=r"model must be an AWDLSTM, .* got Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_another_vocabulary(tokenizer, tmp_path):
    words = len(tokenizer)
    path = tmp_path / "m"
    save_model(language_model(words), path, tokenizer)
    for text, message in [
        (TEXT.replace("dog", "cow"), "its word [0-9]+ is '[a-z]+', expected '[a-z]+'"),
        (TEXT + " again", f"it has {words} words, expected {words + 1}"),
    ]:
        with pytest.raises(ModelFileError, match=f"m has another vocabulary: {message}"):
            load_model(path, tokenizer=Tokenizer.train([text]))
    with pytest.raises(ModelFileError, match="it splits text in another way"):
        load_model(path, tokenizer=Tokenizer.train([TEXT], lowercase=True))
    save_model(language_model(words), path)
    with pytest.raises(ModelFileError, match="another vocabulary: it has none"):
        load_model(path, tokenizer=tokenizer)
    assert load_model(path).tokenizer is None


# ---- Damage --------------------------------------------------------------------------------------


def test_truncated_anywhere(tokenizer, tmp_path):
    path = tmp_path / "m"
    save_model(language_model(len(tokenizer)), path, tokenizer)
    whole = path.read_bytes()
    for size in [0, 5, 8, 100, *torch.randint(len(whole), (20,)).tolist(), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match="m is no saved model, or is damaged"):
            load_model(path)


def test_a_flipped_bit_anywhere(tokenizer, tmp_path):
    path = tmp_path / "m"
    save_model(language_model(len(tokenizer)), path, tokenizer)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    bits = [*torch.randint(8, 8 + header, (40,)), *torch.randint(8 + header, len(whole), (40,))]
    for position in bits:
        changed = bytearray(whole)
        changed[int(position)] ^= 1 << int(position) % 7
        path.write_bytes(changed)
        with pytest.raises(ModelFileError):
            load_model(path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    "content", [pickle.dumps(Bomb()), b"words", safetensors.torch.save({"a": torch.ones(2)})]
)
def test_other_files(content, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"m (is no saved model|must be a model that lstmx)"):
        load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="is a folder, not a saved model"):
        load_model(tmp_path)


def rewritten(path, change):
    """As someone would tamper who also puts the digest right."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    described = json.loads(metadata["model"])
    change(described, tensors, metadata)
    metadata = {k: v for k, v in metadata.items() if k != "sha256"} | {
        "model": json.dumps(described)
    }
    metadata["sha256"] = storage._digest(metadata, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d, t, m: d["config"].update(embedding=17), "decoder.bias|must be"),
        (lambda d, t, m: d["config"].update(embedding=10**14), "must be|overflow"),
        (lambda d, t, m: d["config"].update(layers=10**9), "1000000000 layers"),
        (lambda d, t, m: d["config"].update(hidden="10"), "hidden must be an int"),
        (lambda d, t, m: d["config"].update(weight_p=2), "weight_p must be a probability"),
        (lambda d, t, m: d["config"].update(code="import os"), "unexpected keyword"),
        (lambda d, t, m: d.update(kind="os.system"), "kind 'os.system'"),
        (lambda d, t, m: d.update(vocabulary=3), "must be"),
        (lambda d, t, m: d["options"].update(tied=False), "lacks tensor decoder.weight"),
        (lambda d, t, m: d.pop("config"), "'config'"),
        (lambda d, t, m: t.pop("decoder.bias"), "lacks tensor decoder.bias"),
        (lambda d, t, m: t.update(extra=torch.ones(2)), "has an unexpected tensor extra"),
        (
            lambda d, t, m: t.update({"decoder.bias": torch.ones_like(t["decoder.bias"]).long()}),
            "decoder.bias must be torch.float32",
        ),
        (lambda d, t, m: m.update(tokenizer="{}"), "no tokenizer's JSON"),
        (lambda d, t, m: m.update(tokenizer=Tokenizer.train(["a b"]).to_json()), "5 words in a"),
        (lambda d, t, m: m.update(classes="[1"), "parts do not fit"),
    ],
)
def test_tampering_with_a_right_digest(change, words, tokenizer, tmp_path):
    path = tmp_path / "m"
    save_model(language_model(len(tokenizer)), path, tokenizer)
    rewritten(path, lambda *parts: None)
    assert load_model(path, tokenizer=tokenizer).model.tied
    rewritten(path, change)
    with pytest.raises(ModelFileError, match=words):
        load_model(path)


# ---- Nothing is lost -----------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
import torch
from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.storage import load_model, save_model

path = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow larger
model = AWDLSTMLanguageModel(500, AWDLSTMConfig(8, 12, 2))
try:
    save_model(model, path)
except OSError as error:
    print(error)
else:
    sys.exit("saved")
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    model = language_model(20)
    save_model(model, path)
    before = path.read_bytes()
    assert len(before) > 4096
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    torch.testing.assert_close(load_model(path).model.decoder.bias, model.decoder.bias)

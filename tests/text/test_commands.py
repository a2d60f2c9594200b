"""The commands for text of one's own: what they print and write, and how they refuse."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from lstmx.cli import app
from lstmx.text.awd_lstm import AWDLSTM, AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.classifier import TextClassifier
from lstmx.text.commands import make_config, parse_setting, stream_text
from lstmx.text.config import ConfigError
from lstmx.text.corpus import Corpus, prepare
from lstmx.text.storage import load_model, save_model
from lstmx.text.tokenizer import EOS, Tokenizer
from tests.text.conftest import DATA

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:"),  # Lightning's own call
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

SIZES = AWDLSTMConfig(embedding=12, hidden=16, layers=2)
SMALL = ["model.embedding=12", "model.hidden=16", "model.layers=2"]
SMALL += ["data.batch_size=40", "data.bptt=30", "train.log_every=1"]


def run(*arguments, lines=None):
    """A command in this process."""
    environment = {"COLUMNS": "80", "TERM": "dumb"}
    return CliRunner().invoke(app, list(map(str, arguments)), input=lines, env=environment)


def done(*arguments, lines=None):
    """What a command prints that must succeed."""
    result = run(*arguments, lines=lines)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    return result.stdout


def refused(*arguments, lines=None):
    """What a command says that must refuse: one line, and nothing else."""
    result = run(*arguments, lines=lines)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    return result.stderr


def settings(*values):
    return [part for value in values for part in ("--set", value)]


@contextmanager
def full_disk(size=2000):
    """No file may grow beyond so many bytes: the system's own error, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def language_model(kjv, tmp_path):
    path = tmp_path / "lm.safetensors"
    save_model(AWDLSTMLanguageModel(len(kjv.tokenizer), SIZES), path, kjv.tokenizer)
    return path


@pytest.fixture
def classifier(kjv, tmp_path):
    path = tmp_path / "classifier.safetensors"
    model = TextClassifier(AWDLSTM(len(kjv.tokenizer), SIZES), 3)
    save_model(model, path, kjv.tokenizer, classes=["1Jn", "Est", "SSol"])
    return path


@pytest.fixture
def text(tmp_path):
    """A folder of text that a test may damage."""
    return shutil.copytree(DATA / "kjv", tmp_path / "text")


@pytest.fixture(scope="module")
def trained(kjv, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    chosen = settings(*SMALL, "train.epochs=1")
    output = done("train", "--corpus", kjv.folder, "--out", folder, *chosen)
    assert "perplexity" in output
    assert str(folder / "model.safetensors") in output
    return folder


# ---- prepare


def test_prepare(text, tmp_path):
    options = ["--kind", "raw-word", "--min-count", 3, "--max-size", 500, "--lowercase"]
    output = done("prepare", text, tmp_path / "corpus", *options)
    corpus = Corpus.open(tmp_path / "corpus")
    assert len(corpus.tokenizer) == 500
    assert "500 words" in output
    for split in ("train", "valid", "test"):
        assert f"{len(corpus.split(split)):,}" in output


def test_prepare_for_a_model(text, language_model, kjv, tmp_path):
    done("prepare", text, tmp_path / "a", "--tokenizer", language_model)
    done("prepare", text, tmp_path / "b", "--tokenizer", kjv.folder)
    assert Corpus.open(tmp_path / "a").tokenizer == kjv.tokenizer
    assert Corpus.open(tmp_path / "b").tokenizer == kjv.tokenizer


def test_prepare_refuses(text, tmp_path):
    target = tmp_path / "corpus"
    lines = (text / "valid.txt").read_bytes().split(b"\n")
    lines[4] = b"caf\xe9 " + lines[4]
    (text / "valid.txt").write_bytes(b"\n".join(lines))
    message = refused("prepare", text, target)
    assert "valid.txt, line 5, byte" in message
    assert "0xe9" in message
    (text / "valid.txt").write_text("\n")
    assert "valid.txt has no text" in refused("prepare", text, target)
    (text / "valid.txt").unlink()
    assert "for each of train, valid and test" in refused("prepare", text, target)
    (text / "train.txt").write_text("")
    assert "valid" in refused("prepare", text, target)
    assert "is no folder" in refused("prepare", tmp_path / "nothing", target)
    assert "max_size" in refused("prepare", DATA / "kjv", target, "--max-size", 2)
    message = refused("prepare", DATA / "kjv", target, "--tokenizer", text / "test.txt")
    assert "is no saved model" in message
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_prepare_on_a_full_disk(text, tmp_path):
    with full_disk():
        message = refused("prepare", text, tmp_path / "corpus")
    assert os.strerror(errno.EFBIG) in message
    assert "make room" in message
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# ---- train


def test_a_run_repeats_itself(trained, kjv, tmp_path):
    done("train", trained / "config.toml", "--out", tmp_path / "again")
    first, second = (load_model(f / "model.safetensors") for f in (trained, tmp_path / "again"))
    assert first.tokenizer == kjv.tokenizer
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


def test_a_run_goes_on(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    assert "holds a run already" in refused("train", trained / "config.toml", "--out", folder)
    output = done("train", "--out", folder, "--resume")  # it is complete
    assert "best: epoch 1 of 1" in output


def test_a_run_refuses_a_checkpoint(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    content = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(content[: len(content) // 2])
    assert "is damaged" in refused("train", "--out", folder, "--resume")
    (folder / "last.ckpt").unlink()
    assert "no checkpoint" in refused("train", "--out", folder, "--resume")


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(kjv, tmp_path):
    folder = tmp_path / "run"
    chosen = settings(*SMALL, "data.batch_size=4", "train.checkpoint_every=1", "train.epochs=1")
    start = ["train", "--corpus", kjv.folder, "--out", folder, *chosen]
    command = [sys.executable, "-m", "lstmx.cli", *map(str, start)]
    environment = {**os.environ, "PYTHONPATH": str(DATA.parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True)
    while not (folder / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--out {folder} --resume" in stderr
    assert "Traceback" not in stderr
    assert not list(folder.glob(".*"))
    assert "train.lr" in refused("train", "--out", folder, "--resume", *settings("train.lr=1.0"))
    assert "best: epoch 1 of 1" in done("train", "--out", folder, "--resume")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    torch.save({"state_dict": Touch(tmp_path / "executed")}, folder / "last.ckpt")
    refused("train", "--out", folder, "--resume")
    assert not (tmp_path / "executed").exists()


def test_training_on_a_full_disk(kjv, tmp_path):
    folder = tmp_path / "run"
    chosen = settings(*SMALL, "train.epochs=1")
    with full_disk(30_000):  # enough for the log, not for a model
        result = run("train", "--corpus", kjv.folder, "--out", folder, *chosen)
    assert result.exit_code == 2, result.output
    assert "make room and resume" in result.stderr
    names = {path.name for path in folder.iterdir()}
    assert not names - {"config.toml", "log"}  # nothing that is half written


def test_find_lr(kjv, tmp_path):
    folder = tmp_path / "search"
    chosen = settings(*SMALL, "data.bptt=5")
    output = done("train", "--corpus", kjv.folder, "--out", folder, "--find-lr", *chosen)
    assert "falls fastest at a learning rate of" in output
    assert [path.name for path in folder.iterdir()] == ["learning-rate.png"]
    assert (folder / "learning-rate.png").read_bytes().startswith(b"\x89PNG")


def test_train_refuses(kjv, tmp_path):
    folder = tmp_path / "run"
    start = ["train", "--out", folder]
    assert "give one of" in refused(*start)
    assert "cannot read the config" in refused(*start, tmp_path / "none.toml")
    assert "--corpus" in refused(*start, kjv.folder)
    assert "holds no run" in refused(*start, "--resume")
    assert "is no prepared corpus" in refused(*start, "--corpus", DATA / "kjv")
    assert "--pretrained" in refused(*start, "--documents", DATA / "books")
    corpus = [*start, "--corpus", kjv.folder]
    assert "model.hiden" in refused(*corpus, "--set", "model.hiden=3")
    assert "train.lr" in refused(*corpus, "--set", "train.lr=fast")
    assert "kind cannot be changed" in refused(*corpus, "--set", "kind=classifier")
    assert "key=value" in refused(*corpus, "--set", "train.lr")
    assert "batch_size" in refused(*corpus, "--set", "data.batch_size=100000")
    if not torch.cuda.is_available():
        assert "train.accelerator 'gpu'" in refused(*corpus, "--set", "train.accelerator=gpu")
    assert not (folder / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.lr=1e-3", 1e-3),
        ("train.lr = 3", 3),
        ("train.tensorboard=true", True),
        ("model.cutoffs=[10, 20]", [10, 20]),
        ("data.source=a/b=c", "a/b=c"),
        ('data.source="7"', "7"),
        ("train.stages=[{epochs=1, lr=0.1}]", [{"epochs": 1, "lr": 0.1}]),
    ],
)
def test_settings(text, value):
    name, parsed = parse_setting(text)
    assert (name, parsed) == (text.partition("=")[0].strip(), value)


def test_make_config(language_model, tmp_path):
    made = make_config(None, tmp_path, corpus=tmp_path, settings=["train.lr=0.5"])
    assert (made.kind, made.data.source, made.train.lr) == ("language-model", str(tmp_path), 0.5)
    made = make_config(None, tmp_path, documents=tmp_path, pretrained=language_model)
    assert (made.kind, made.model.pretrained) == ("classifier", str(language_model))
    with pytest.raises(ConfigError, match="give one of"):
        make_config(None, tmp_path, corpus=tmp_path, documents=tmp_path)


# ---- evaluate


def test_evaluate(trained, kjv, tmp_path):
    numbers = tmp_path / "n.json"
    output = done("evaluate", trained, kjv.folder, "--split", "valid", "--json", numbers)
    measured = json.loads(numbers.read_text())
    assert f"{measured['loss']:.4f}" in output
    assert f"{measured['perplexity']:.1f}" in output
    assert measured["tokens"] == len(kjv.split("valid")) - 1
    assert measured["split"] == "valid"
    assert measured["perplexity"] < len(kjv.tokenizer)  # better than guessing


def test_evaluate_refuses(language_model, classifier, text, tmp_path):
    other = prepare(text, tmp_path / "other", kind="raw-word", min_count=2).folder
    assert "--tokenizer" in refused("evaluate", language_model, other)
    assert "give the folder of a run" in refused("evaluate", text, other)
    assert "there is no" in refused("evaluate", tmp_path / "none", other)
    encoder = tmp_path / "encoder.safetensors"
    save_model(AWDLSTM(7, SIZES), encoder)
    assert "has no vocabulary" in refused("evaluate", encoder, other)
    # A class that the classifier has not seen.
    documents = shutil.copytree(DATA / "books", tmp_path / "books")
    with (documents / "test.csv").open("a") as file:
        file.write('"In the beginning God created the heaven and the earth.",Gen\n')
    assert "'Gen'" in refused("evaluate", classifier, documents)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_model_is_refused(language_model, kjv, damage):
    content = bytearray(language_model.read_bytes())
    if damage == "cut":
        del content[-100:]
    else:
        content[-100] ^= 1
    language_model.write_bytes(content)
    for command in (["generate", language_model], ["evaluate", language_model, kjv.folder]):
        assert "damaged" in refused(*command)


# ---- generate


def test_generate(language_model):
    first = done("generate", language_model, "And the king", "--count", 12, "--seed", 1)
    assert first.startswith("And the king")
    assert first == done("generate", language_model, "And the king", "--count", 12, "--seed", 1)
    assert first != done("generate", language_model, "And the king", "--count", 12, "--seed", 2)
    assert "<unk>" not in first
    options = ["--temperature", 0.5, "--top-k", 5, "--top-p", 0.5]
    assert len(done("generate", language_model, *options, "--count", 5).split()) > 1
    assert "top_p" in refused("generate", language_model, "--top-p", 2)


def test_generate_tells_of_unknown_words(language_model):
    result = run("generate", language_model, "the Zzyzx", "--count", 2)
    assert result.exit_code == 0
    assert "1 of the prompt's 2 words" in result.stderr


@pytest.mark.parametrize("kind", ["word", "raw-word", "bpe"])
def test_streamed_text_is_the_text(kind):
    lines = ["And he said: (lo) it is çà et là.", "Ωmega, 中文!"]
    tokenizer = Tokenizer.train(lines, kind=kind)
    ids = tokenizer.encode("\n".join(lines))
    pieces = list(stream_text(tokenizer, ids[:3], iter(ids[3:])))
    assert tokenizer.decode(ids[:3]) + "".join(pieces) == tokenizer.decode(ids)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 5
    assert EOS in ids


# ---- classify


def test_classify(classifier, tmp_path):
    file = tmp_path / "document.txt"
    file.write_text("And the king said\nunto Esther")
    output = done("classify", classifier, "My beloved is mine", file)
    lines = output.splitlines()
    assert len(lines) == 2  # a file is one document
    assert lines[0].endswith("My beloved is mine")
    assert lines[1].endswith("And the king said unto Esther")
    spoken = ["And the king said unto Esther", "My beloved is mine, and I am his"]
    output = done("classify", classifier, "--json", lines="\n\n".join(spoken) + "\n")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["text"] for row in rows] == spoken
    for row in rows:
        assert list(row["probabilities"]) == ["1Jn", "Est", "SSol"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["class"] == max(row["probabilities"], key=row["probabilities"].get)
    # Alone or beside a longer one: the same.
    alone = json.loads(done("classify", classifier, spoken[0], "--json"))
    assert alone["probabilities"] == pytest.approx(rows[0]["probabilities"], rel=1e-4)


def test_classify_refuses(classifier, language_model, tmp_path):
    assert "must hold a classifier" in refused("classify", language_model, "a")
    assert "nothing to classify" in refused("classify", classifier, lines="")
    assert "is empty" in refused("classify", classifier, " ")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "latin, byte 3" in refused("classify", classifier, tmp_path / "latin")
    assert "there is no file" in refused("classify", classifier, "misspelt.txt")
    assert "must hold a language model" in refused("generate", classifier)


def test_train_a_classifier(language_model, tmp_path):
    folder = tmp_path / "run"
    chosen = settings("train.stages=[{epochs=1, lr=0.02, unfrozen=1}]", "data.batch_size=10")
    start = ["train", "--documents", DATA / "books", "--out", folder, *chosen]
    output = done(*start, "--pretrained", language_model)
    assert "accuracy" in output
    output = done("evaluate", folder, DATA / "books")
    assert "accuracy" in output
    assert done("classify", folder, "My beloved is mine").split()[0] in ("1Jn", "Est", "SSol")


# ---- convert


@pytest.mark.parametrize(("form", "words"), [("fastai", "v.pkl"), ("awd-lstm-lm", "v.txt")])
def test_convert_there_and_back(language_model, kjv, tmp_path, form, words):
    file, vocabulary, back = tmp_path / "m.pth", tmp_path / words, tmp_path / "back.safetensors"
    done("convert", language_model, file, "--to", form, "--vocabulary", vocabulary)
    done("convert", file, back, "--vocabulary", vocabulary)
    first, second = load_model(language_model), load_model(back)
    assert second.tokenizer.words == kjv.tokenizer.words
    ids = torch.randint(len(kjv.tokenizer), (2, 9))
    assert torch.equal(first.model(ids), second.model(ids))
    if form == "fastai":
        names = pickle.loads(vocabulary.read_bytes())
        assert names[:3] == ["xxunk", "xxbos", "xxpad"]


def test_convert_refuses(language_model, tmp_path):
    source, target = tmp_path / "m.pth", tmp_path / "back.safetensors"
    assert "there is no" in refused("convert", source, target)
    torch.save(Touch(tmp_path / "executed"), source)
    assert "state_dict()" in refused("convert", source, target)
    assert not (tmp_path / "executed").exists()
    torch.save({"0.encoder.weight": torch.randn(3, 4)}, source)
    assert "is no language model" in refused("convert", source, target)
    done("convert", language_model, source, "--to", "fastai")
    source.write_bytes(source.read_bytes()[:-2000])
    assert "damaged" in refused("convert", source, target)
    done("convert", language_model, source, "--to", "fastai")
    (tmp_path / "v.txt").write_text("one\ntwo\n")
    message = refused("convert", source, target, "--vocabulary", tmp_path / "v.txt")
    assert "v.txt does not fit" in message
    assert not target.exists()


def test_convert_on_a_full_disk(language_model, tmp_path):
    target = tmp_path / "m.pth"
    target.write_text("what was there")
    with full_disk():
        assert "make room" in refused("convert", language_model, target, "--to", "fastai")
    assert target.read_text() == "what was there"
    assert not list(tmp_path.glob(".*"))


# ---- plot


def test_plot(trained, tmp_path):
    done("plot", trained, trained)
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "has no log" in refused("plot", tmp_path)

"""What the commands do between the arguments that they are given and the modules that work."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lstmx.text.awd_lstm import AWDLSTMLanguageModel
from lstmx.text.checkpoints import MODEL
from lstmx.text.classifier import TextClassifier
from lstmx.text.config import ConfigError, RunConfig, parse_config, read_config, tomllib, updated
from lstmx.text.corpus import Corpus, CorpusError, read_labelled
from lstmx.text.files import write_atomically
from lstmx.text.fit import CONFIG, Evaluation, evaluate, evaluate_classifier
from lstmx.text.generation import generate
from lstmx.text.interchange import (
    load_awd_lstm_lm,
    load_fastai,
    match_embeddings,
    read_fastai_vocabulary,
    save_awd_lstm_lm,
    save_fastai,
)
from lstmx.text.storage import Model, ModelFileError, load_model, save_model
from lstmx.text.tokenizer import EOS, PAD, SPECIALS, UNK, Tokenizer

# What fastai calls our special tokens: what a text begins with there, a line ends with here.
_FASTAI_NAMES = {"xxunk": SPECIALS[UNK], "xxbos": SPECIALS[EOS], "xxpad": SPECIALS[PAD]}


def model_path(path: Path) -> Path:
    """The file of a saved model, given it or the folder of its run.

    Raises:
        ModelFileError: there is no such file.
    """
    file = path / MODEL if path.is_dir() else path
    if file.is_file():
        return file
    if path.is_dir():
        raise ModelFileError(f"{path} has no {MODEL}: give the folder of a run, or a saved model")
    raise ModelFileError(f"there is no {path}: give the folder of a run, or a saved model")


def _load(path: Path) -> tuple[Model, Tokenizer, list[str] | None]:
    """A model on the device to use it on, its vocabulary, and its classes if they have names."""
    saved = load_model(model_path(path))
    if saved.tokenizer is None:
        raise ModelFileError(f"{path} has no vocabulary: save or convert the model with one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return saved.model.to(device), saved.tokenizer, saved.classes


def load_language_model(path: Path) -> tuple[AWDLSTMLanguageModel, Tokenizer]:
    """A language model with its vocabulary, from a file or the folder of a run.

    Raises:
        ModelFileError: the file is absent or damaged, or holds something else.
    """
    model, tokenizer, _ = _load(path)
    if not isinstance(model, AWDLSTMLanguageModel):
        raise ModelFileError(f"{path} must hold a language model, got {type(model).__name__}")
    return model, tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a run, a saved model, a prepared corpus or a tokenizer's own file.

    Raises:
        ModelFileError: there is none, or it cannot be read.
    """
    if (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        try:
            return Tokenizer.load(path)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"cannot read the tokenizer {path}: {error}") from error
    tokenizer = load_model(model_path(path)).tokenizer
    if tokenizer is None:
        raise ModelFileError(f"{path} has no vocabulary: choose another one")
    return tokenizer


# ---- Training


def parse_setting(text: str) -> tuple[str, Any]:
    """``"train.lr=1e-3"`` to a name and a value; what is no TOML value is a string.

    Raises:
        ConfigError: there is no ``=``, or no name before it.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"a setting must be key=value, such as train.lr=0.01, got {text!r}")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def make_config(
    file: Path | None,
    folder: Path,
    *,
    corpus: Path | None = None,
    documents: Path | None = None,
    pretrained: Path | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
) -> RunConfig:
    """A run from what its command was given.

    Args:
        file: a config to read.
        folder: of the run; its own config is read if it is resumed and no other is given.
        corpus: text for a language model with all the defaults, if there is no file.
        documents: labelled documents for a classifier with all the defaults, if there is no file.
        pretrained: a language model to begin with, or the folder of its run.
        settings: ``key=value`` that come on top.
        resume: whether the run goes on.

    Raises:
        ConfigError: not one source is given, or what the config's parts raise.
    """
    model = {} if pretrained is None else {"pretrained": str(model_path(pretrained))}
    given = [source for source in (file, corpus, documents) if source is not None]
    if not given and resume:
        file = folder / CONFIG
        if not file.is_file():
            raise ConfigError(f"{folder} holds no run to go on with: begin it without --resume")
    elif len(given) != 1:
        raise ConfigError("give one of a config file, --corpus or --documents")
    if corpus is not None:
        values = {"kind": "language-model", "data": {"source": str(corpus)}, "model": model}
        config = parse_config(values, "the command")
    elif documents is not None:
        if pretrained is None:
            raise ConfigError("a classifier begins with a language model: give it by --pretrained")
        values = {"kind": "classifier", "data": {"source": str(documents)}, "model": model}
        config = parse_config(values, "the command")
    else:
        assert file is not None
        if file.is_dir():
            raise ConfigError(f"{file} is a folder and no config: give a corpus by --corpus")
        config = read_config(file)
        if model:
            config = updated(config, {"model.pretrained": model["pretrained"]})
    changes = dict(map(parse_setting, settings))
    if "kind" in changes:
        raise ConfigError("kind cannot be changed, because the other settings are its own")
    return updated(config, changes) if changes else config


# ---- Use


def evaluate_on(
    path: Path, source: Path, *, split: str, batch_size: int | None, bptt: int
) -> Evaluation:
    """What a saved model reaches on a split of a corpus or of labelled documents.

    Args:
        path: of a language model or a classifier, or the folder of its run.
        source: a prepared corpus, or labelled documents with the classifier's classes.
        split: "train", "valid" or "test".
        batch_size: rows of a batch; by default 1 for a language model, and 32 for a classifier.
        bptt: steps that a language model reads at a time.

    Raises:
        ModelFileError: the model cannot be read, or has another vocabulary than the corpus.
        CorpusError: the corpus or the documents cannot be read, or have another class.
    """
    model, tokenizer, classes = _load(path)
    if isinstance(model, TextClassifier):
        documents = read_labelled(source, tokenizer, classes=classes)
        return evaluate_classifier(model, getattr(documents, split), batch_size=batch_size or 32)
    if not isinstance(model, AWDLSTMLanguageModel):
        raise ModelFileError(f"{path} must hold a language model or a classifier, got an encoder")
    corpus = Corpus.open(source)
    if corpus.tokenizer != tokenizer:
        raise ModelFileError(
            f"{path} has another vocabulary than {source}: prepare the text anew with "
            f"--tokenizer {path}"
        )
    return evaluate(model, corpus.split(split), batch_size=batch_size or 1, bptt=bptt)


class Prompt(NamedTuple):
    """A beginning, as ids; and the number of its words that the model does not know."""

    ids: list[int]
    unknown: int


def read_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """The ids of a prompt; nothing stands for the beginning of a line."""
    ids = tokenizer.encode(text) or [EOS]
    return Prompt(ids, ids.count(UNK))


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """The text that follows a prompt, piece by piece, as its ids come."""
    read = list(prompt)
    shown = tokenizer.decode(read)
    for i in ids:
        read.append(i)
        text = tokenizer.decode(read)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # a part of a character
        yield text[len(shown) :]
        shown = text


def continue_prompt(
    model: AWDLSTMLanguageModel, tokenizer: Tokenizer, prompt: Prompt, count: int, **options: Any
) -> Iterator[str]:
    """What a model writes after a prompt, in pieces; it never writes ``<unk>``.

    Args:
        model: the language model.
        tokenizer: its vocabulary.
        prompt: the beginning.
        count: words.
        options: of :func:`lstmx.text.generation.generate`.

    Raises:
        ValueError: what :func:`lstmx.text.generation.generate` raises.
    """
    ids = generate(model, prompt.ids, count, exclude=(UNK, PAD), **options)
    return stream_text(tokenizer, prompt.ids, ids)


class Classified(NamedTuple):
    """A document and the probability of each class."""

    text: str
    probabilities: dict[str, float]

    @property
    def best(self) -> str:
        """The most probable class."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


def classify(path: Path, texts: Sequence[str], *, batch_size: int = 32) -> Iterator[Classified]:
    """The classes of texts, in their order.

    Args:
        path: of a classifier, or the folder of its run.
        texts: the documents.
        batch_size: how many to read at a time.

    Raises:
        ModelFileError: the file is absent or damaged, or holds something else.
        CorpusError: there is no text, or one is empty.
    """
    model, tokenizer, names = _load(path)
    if not isinstance(model, TextClassifier):
        raise ModelFileError(f"{path} must hold a classifier, got {type(model).__name__}")
    names = names or [str(number) for number in range(model.classes)]
    ids = [torch.tensor(row, dtype=torch.int64) for row in tokenizer.encode_batch(texts)]
    if not ids:
        raise CorpusError("there is nothing to classify: give a text, a file, or lines to -")
    for number, row in enumerate(ids, start=1):
        if not len(row):
            raise CorpusError(f"text {number} of {len(ids)} is empty")
    device = next(model.parameters()).device

    def batches() -> Iterator[Classified]:
        for first in range(0, len(ids), batch_size):
            rows = ids[first : first + batch_size]
            lengths = torch.tensor([len(row) for row in rows], device=device)
            padded = pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)
            with torch.no_grad():
                scores = model(padded, lengths).logits.float().softmax(1).tolist()
            for text, row in zip(texts[first:], scores, strict=False):
                yield Classified(text, dict(zip(names, row, strict=True)))

    return batches()


def read_inputs(inputs: Sequence[str], lines: Iterable[str]) -> list[str]:
    """The documents that a command line means.

    Args:
        inputs: each a file, which is one document; or ``-`` for a document a line; or a text.
        lines: what ``-`` stands for.

    Raises:
        CorpusError: a file is not UTF-8, or what must be meant as one is not there.
    """
    documents = []
    for given in inputs:
        if given == "-":
            documents += [line for line in map(str.strip, lines) if line]
        elif _is_file(given):
            try:
                documents.append(Path(given).read_text(encoding="utf-8").strip())
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{given}, byte {error.start}: the text must be UTF-8, "
                    f"got the byte 0x{error.object[error.start]:02x}"
                ) from error
        elif given.endswith(".txt"):
            raise CorpusError(f"there is no file {given}")
        else:
            documents.append(given.strip())
    return documents


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a text that is too long for a name
        return False


# ---- Conversion


def _read_words(path: Path) -> list[str]:
    """A vocabulary: fastai's pickle, or a text file with a word a line."""
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path} must be UTF-8, with a word a line") from error
    try:
        return read_fastai_vocabulary(path)
    except ValueError as error:
        raise ModelFileError(str(error)) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelFileError(f"there is no {path}") from error
    except pickle.UnpicklingError as error:
        raise ModelFileError(
            f"{path} is damaged, or holds Python objects, which are not loaded because that could "
            "execute anything: save its state_dict() where it was made"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelFileError(f"{path} is no file of torch.save, or is damaged") from error
    if not isinstance(state, dict):
        raise ModelFileError(f"{path} must hold a state dict, got {type(state).__name__}")
    return state


def import_model(source: Path, target: Path, vocabulary: Path | None = None) -> None:
    """Reads a language model of fastai's or awd-lstm-lm's and saves it as ours.

    Args:
        source: a file of ``torch.save`` with a state dict; which of the two, its names tell.
        target: the model file to write.
        vocabulary: its words by id: a pickled list, as fastai keeps it, or a text file with a word
            a line. Without it the model can be measured and trained on, but makes no text.

    Raises:
        ModelFileError: a file cannot be read, or its parts do not fit each other.
        OSError: the file cannot be written.
    """
    state = _read_state(source)
    inner = state.get("model", state)
    fastai = any(name.startswith("0.") for name in inner) if isinstance(inner, dict) else False
    try:
        model = load_fastai(state) if fastai else load_awd_lstm_lm(state)
    except ValueError as error:
        raise ModelFileError(
            f"{source} is no language model of fastai or awd-lstm-lm: {error}"
        ) from error
    tokenizer = None
    if vocabulary is not None:
        renames = _FASTAI_NAMES if fastai else {}
        old = [renames.get(word, word) for word in _read_words(vocabulary)]
        # fastai fills its vocabulary up with equal words.
        new = list(dict.fromkeys([*SPECIALS, *old]))
        try:
            match_embeddings(model, old, new)
        except ValueError as error:
            raise ModelFileError(f"{vocabulary} does not fit {source}: {error}") from error
        kind = "raw-word" if fastai else "word"
        tokenizer = Tokenizer.from_words(new, kind=kind, lowercase=fastai)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, target, tokenizer)


def export_model(source: Path, target: Path, form: str, vocabulary: Path | None = None) -> None:
    """Writes one of our language models as fastai or awd-lstm-lm has them.

    Args:
        source: a saved language model, or the folder of its run.
        target: the file to write, a state dict of ``torch.save``.
        form: "fastai" or "awd-lstm-lm".
        vocabulary: where to write the words: pickled, as fastai reads them; or, if the name ends in
            .txt, a word a line.

    Raises:
        ModelFileError: the source cannot be read, or is no model that the other program has.
        OSError: a file cannot be written.
    """
    model, tokenizer = load_language_model(source)
    try:
        state = save_fastai(model) if form == "fastai" else save_awd_lstm_lm(model)
    except ValueError as error:
        raise ModelFileError(f"{source} does not fit {form}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # torch's own writer says nothing of a full disk
    torch.save({name: tensor.cpu() for name, tensor in state.items()}, content)
    write_atomically(target, content.getvalue())
    if vocabulary is not None:
        names = {ours: theirs for theirs, ours in _FASTAI_NAMES.items()} if form == "fastai" else {}
        words = [names.get(word, word) for word in tokenizer.words]
        text = vocabulary.suffix == ".txt"
        lines = "".join(f"{word}\n" for word in words).encode()
        write_atomically(vocabulary, lines if text else pickle.dumps(words))

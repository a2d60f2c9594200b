"""Texts as token ids: a corpus for a language model, labelled documents for a classifier."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import math
import os
import random
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lstmx.text.tokenizer import Tokenizer

SPLITS = ("train", "valid", "test")
Progress = Callable[[int, int], None]

# The names that files and data sets give to the splits.
_ALIASES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
_TEXT_SUFFIXES = (".txt", ".tokens", ".raw")
_TABLE_SUFFIXES = (".csv", ".jsonl")
_UNLABELLED = "unsup"  # IMDb's folder of documents without a label
_BLOCK = 1 << 20  # bytes of text in memory at a time
_BOM = b"\xef\xbb\xbf"
# What torch maps and what `array` writes; ids that do not fit into 16 bits take 32.
_DTYPES = {"uint16": (torch.uint16, "H"), "int32": (torch.int32, "i")}
_LONGEST_CELL = 2**31 - 1


class CorpusError(ValueError):
    """A text or a prepared corpus cannot be used; the message says where and why."""


# ---- Text, read in blocks ------------------------------------------------------------------------


def _decode(block: bytes, path: Path, offset: int, line: int) -> str:
    """Text from UTF-8; ``offset`` and ``line`` are the block's own, for the error."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        line += block.count(b"\n", 0, error.start)
        raise CorpusError(
            f"{path}, line {line}, byte {offset + error.start}: the text must be UTF-8, "
            f"got the byte 0x{block[error.start]:02x}"
        ) from error


def _end(block: bytes) -> int:
    """Where to cut a block: after its last line, else ahead of the last blank between two words."""
    end = block.rfind(b"\n") + 1
    if end:
        return end
    end = block.rfind(b" ")
    # A run of blanks is one token of byte-pair encoding, so it is not cut.
    while end > 0 and (block[end - 1 : end] == b" " or block[end + 1 : end + 2] in (b"", b" ")):
        end = block.rfind(b" ", 0, end)
    return max(end, 0)


def _blocks(path: Path) -> Iterator[tuple[str, int]]:
    """A file in pieces of about a megabyte, and the bytes of each; every line ends with ``\\n``."""
    offset, line, rest = 0, 1, b""
    with path.open("rb") as file:
        if file.read(len(_BOM)) == _BOM:
            offset = len(_BOM)
        file.seek(offset)
        while data := file.read(_BLOCK):
            end = _end(block := rest + data)
            block, rest = block[:end], block[end:]
            if block:
                yield _decode(block, path, offset, line).replace("\r\n", "\n"), len(block)
            offset, line = offset + len(block), line + block.count(b"\n")
        if rest:  # a last line without an end
            yield _decode(rest, path, offset, line) + "\n", len(rest)


def _read_text(path: Path) -> str:
    text = _decode(path.read_bytes(), path, 0, 1)
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


# ---- Where a corpus comes from -------------------------------------------------------------------


def _split_of(path: Path) -> str | None:
    """The split that a file's name has as one of its parts: ``wiki.valid.tokens``, ``dev.csv``."""
    for part in path.name.lower().split("."):
        for split, names in _ALIASES.items():
            if part in names:
                return split
    return None


def _split_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The file of each split that a folder has.

    Raises:
        CorpusError: two files have the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = _split_of(path)
        if split is None or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if split in found:
            raise CorpusError(
                f"{folder} must have one file for {split}, got {found[split].name} and {path.name}"
            )
        found[split] = path
    return found


@dataclass(frozen=True)
class _Source:
    """Texts by split, each in pieces with a size, and the sum of the sizes."""

    read: Callable[[str], Iterator[tuple[str, int]]]
    sizes: Mapping[str, int]
    names: Mapping[str, str]


def _folder_source(folder: Path) -> _Source:
    files = _split_files(folder, _TEXT_SUFFIXES)
    for split in SPLITS:
        if split not in files:
            raise CorpusError(
                f"{folder} must have a text file for each of train, valid and test, such as "
                f"{split}.txt; got {', '.join(p.name for p in files.values()) or 'none'}"
            )
    return _Source(
        lambda split: _blocks(files[split]),
        {split: path.stat().st_size for split, path in files.items()},
        {split: str(path) for split, path in files.items()},
    )


def _dataset_source(name: str) -> _Source:
    """A data set of the Hugging Face hub, ``name`` or ``name:configuration``."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise CorpusError(
            f"{name} is no folder; to read it as a data set of the Hugging Face hub, "
            "install the package datasets: pip install datasets"
        ) from error
    path, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # whatever a loader, the hub or the network raises
        raise CorpusError(
            f"{name} is no folder, and no data set that datasets can load: {error}"
        ) from error
    parts = {}
    for split, names in _ALIASES.items():
        known = [alias for alias in names if alias in found]
        if not known:
            raise CorpusError(f"the data set {name} must have a {split} split, got {list(found)}")
        parts[split] = found[known[0]]
        if "text" not in parts[split].column_names:
            raise CorpusError(
                f"the data set {name} must have a column text, got {parts[split].column_names}"
            )

    def read(split: str) -> Iterator[tuple[str, int]]:
        lines: list[str] = []
        size = 0
        for number, row in enumerate(parts[split]):
            if not isinstance(row["text"], str):
                raise CorpusError(
                    f"{name}, {split}, row {number}: the text must be a string, got {row['text']!r}"
                )
            line = row["text"].replace("\r\n", "\n")
            lines.append(line if line.endswith("\n") else line + "\n")
            size += len(line)
            if size >= _BLOCK:
                yield "".join(lines), len(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines), len(lines)

    return _Source(
        read,
        {split: len(part) for split, part in parts.items()},
        {split: f"{name}, {split}" for split in parts},
    )


# ---- A corpus ------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(_BLOCK):
            digest.update(data)
    return digest.hexdigest()


class Corpus:
    """A prepared folder: a tokenizer, and a text as token ids in a file for each split.

    Its files: ``tokenizer.json``; ``train.bin``, ``valid.bin`` and ``test.bin``, little-endian
    uint16 or int32 (for more than 65,536 words); ``corpus.json`` with the source, the settings and
    the files' lengths and SHA-256. Made by :func:`prepare`.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        self.folder, self.tokenizer, self.facts = folder, tokenizer, facts

    @classmethod
    def open(cls, folder: Path | str) -> Corpus:
        """Reads what :func:`prepare` wrote, and checks that it is whole.

        Raises:
            CorpusError: a file is absent, cut short, changed or of another make.
        """
        folder = Path(folder)
        path = folder / "corpus.json"
        try:
            facts = json.loads(path.read_bytes())
            item = _DTYPES[facts["dtype"]][0].itemsize
            files = {"tokenizer.json": facts["tokenizer"]["sha256"]}
            sizes = {}
            for split in SPLITS:
                files[f"{split}.bin"] = facts["splits"][split]["sha256"]
                sizes[f"{split}.bin"] = item * int(facts["splits"][split]["tokens"])
        except OSError as error:
            raise CorpusError(
                f"{folder} is no prepared corpus: {error.strerror or error}: {path.name}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{path} is not what prepare wrote: {error!r}") from error
        for name, digest in files.items():
            file = folder / name
            if not file.is_file():
                raise CorpusError(f"{folder} lacks {name}; prepare the corpus again")
            if name in sizes and file.stat().st_size != sizes[name]:
                raise CorpusError(
                    f"{file} must have {sizes[name]} bytes, got {file.stat().st_size}; "
                    "prepare the corpus again"
                )
            if _sha256(file) != digest:
                raise CorpusError(f"{file} was changed; prepare the corpus again")
        try:
            tokenizer = Tokenizer.load(folder / "tokenizer.json")
        except ValueError as error:
            raise CorpusError(str(error)) from error
        return cls(folder, tokenizer, facts)

    def split(self, name: str) -> Tensor:
        """The ids [n] of ``"train"``, ``"valid"`` or ``"test"``, mapped from the file.

        Of dtype uint16 or int32. Memory is taken page by page as the ids are read, and is the
        system's to take back.

        Raises:
            ValueError: there is no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"name must be one of {', '.join(SPLITS)}, got {name!r}")
        dtype = _DTYPES[self.facts["dtype"]][0]
        size = int(self.facts["splits"][name]["tokens"])
        return torch.from_file(
            str(self.folder / f"{name}.bin"), shared=False, size=size, dtype=dtype
        )

    def __repr__(self) -> str:
        tokens = {split: self.facts["splits"][split]["tokens"] for split in SPLITS}
        return f"Corpus({str(self.folder)!r}, words={len(self.tokenizer)}, tokens={tokens})"


def _write_ids(
    texts: Iterator[str], tokenizer: Tokenizer, typecode: str, path: Path
) -> dict[str, Any]:
    """Writes a split and returns its facts."""
    digest, tokens = hashlib.sha256(), 0
    with path.open("xb") as file:
        for text in texts:
            ids = array(typecode, tokenizer.encode(text))
            tokens += len(ids)
            if sys.byteorder == "big":
                ids.byteswap()
            data = ids.tobytes()
            digest.update(data)
            file.write(data)
    return {"tokens": tokens, "sha256": digest.hexdigest()}


def prepare(
    source: Path | str,
    folder: Path | str,
    *,
    kind: str = "word",
    min_count: int = 1,
    max_size: int | None = None,
    lowercase: bool = False,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Makes a :class:`Corpus` from text; memory does not grow with the text.

    Args:
        source: a folder with a text file, UTF-8, for each of train, valid and test:
            ``train.txt``, ``ptb.train.txt``, ``wiki.train.tokens``, ... If it is a string and there
            is no such folder, a data set of the Hugging Face hub with a column ``text``,
            ``"name"`` or ``"name:configuration"``, read by the package ``datasets``.
        folder: to be made. It appears only when it is complete.
        kind: how to split; see :class:`~lstmx.text.tokenizer.Tokenizer`.
        min_count: words that occur less often in the training text are unknown.
        max_size: of the vocabulary.
        lowercase: whether capitals count as small letters.
        tokenizer: use this one, such as a trained model's, instead of the four settings above.
        progress: called with the work done and the whole work, in the same unit.

    Raises:
        CorpusError: a split is absent, empty, not UTF-8; ``folder`` is there already; a setting is
            out of range or leaves no word; ...
        OSError: a file cannot be read or written, such as for want of space.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CorpusError(f"{folder} is there already; delete it or choose another name")
    if Path(source).is_dir():
        texts = _folder_source(Path(source))
    elif isinstance(source, Path) or Path(source).exists():
        raise CorpusError(f"source must be a folder, got {source}")
    else:
        texts = _dataset_source(source)

    total = sum(texts.sizes.values()) + (0 if tokenizer else texts.sizes["train"])
    done = 0

    def read(split: str) -> Iterator[str]:
        nonlocal done
        blank = True
        for text, size in texts.read(split):
            blank = blank and text.isspace()
            yield text
            done += size
            if progress is not None:
                progress(done, total)
        if blank:
            raise CorpusError(f"{texts.names[split]} has no text")

    settings: dict[str, Any] = {"tokenizer": "given"}
    if tokenizer is None:
        settings = {
            "kind": kind,
            "min_count": min_count,
            "max_size": max_size,
            "lowercase": lowercase,
        }
        try:
            tokenizer = Tokenizer.train(read("train"), **settings)
        except CorpusError:
            raise
        except ValueError as error:  # no word is frequent enough, or a setting is out of range
            raise CorpusError(f"{texts.names['train']}: {error}") from error

    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        splits = {}
        for split in SPLITS:
            path = unfinished / f"{split}.bin"
            splits[split] = _write_ids(read(split), tokenizer, _DTYPES[dtype][1], path)
        tokenizer.save(unfinished / "tokenizer.json")
        facts = {
            "source": str(source),
            "settings": settings,
            "dtype": dtype,
            "tokenizer": {
                "words": len(tokenizer),
                "sha256": _sha256(unfinished / "tokenizer.json"),
            },
            "splits": splits,
        }
        (unfinished / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Corpus(folder, tokenizer, facts)


# ---- Labelled documents --------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledSplit:
    """Documents and their classes.

    Attributes:
        ids: a tensor of token ids [n], int64, for each document.
        labels: the classes [documents], int64.
    """

    ids: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class LabelledCorpus:
    """Labelled documents for training, validation and test.

    Attributes:
        classes: the names of the classes; labels are positions in it.
    """

    classes: list[str]
    train: LabelledSplit
    valid: LabelledSplit
    test: LabelledSplit
    tokenizer: Tokenizer


@dataclass(frozen=True)
class _Document:
    text: str
    label: str
    where: str  # the file, and the line if it has several documents


def _class_folders(folder: Path) -> list[Path]:
    """The folders in a folder that have text files, but for IMDb's documents without a label."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name != _UNLABELLED and any(path.glob("*.txt"))
    ]


def _read_folder(folder: Path) -> list[_Document]:
    return [
        _Document(_read_text(path), part.name, str(path))
        for part in _class_folders(folder)
        for path in sorted(part.glob("*.txt"))
    ]


def _rows(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of a CSV or JSONL file, and where each is."""
    text = _read_text(path)
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{where}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise CorpusError(f"{where}: must be an object, got {type(row).__name__}")
            yield row, where
        return
    limit = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield row, f"{path}, line {reader.line_num}"
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.reader.line_num}: no CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_table(path: Path, text_column: str, label_column: str) -> list[_Document]:
    documents = []
    for row, where in _rows(path):
        for column in (text_column, label_column):
            if row.get(column) is None:
                raise CorpusError(f"{where}: there must be a {column!r}, got {list(row)}")
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str):
            raise CorpusError(f"{where}: {text_column!r} must be text, got {text!r}")
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise CorpusError(
                f"{where}: {label_column!r} must be text or an integer, got {label!r}"
            )
        documents.append(_Document(text, str(label).strip(), where))
    return documents


def _read_splits(source: Path, text_column: str, label_column: str) -> dict[str, list[_Document]]:
    """The documents of the splits that a source has."""
    if source.is_file():
        if source.suffix.lower() not in _TABLE_SUFFIXES:
            raise CorpusError(f"source must be a .csv or .jsonl file or a folder, got {source}")
        return {"train": _read_table(source, text_column, label_column)}
    if not source.is_dir():
        raise CorpusError(f"source must be a file or a folder, got {source}")
    files = _split_files(source, _TABLE_SUFFIXES)
    if files:
        return {s: _read_table(path, text_column, label_column) for s, path in files.items()}
    folders = {
        split: path
        for split, names in _ALIASES.items()
        for path in sorted(source.iterdir())
        if path.name in names and path.is_dir() and _class_folders(path)
    }
    return {s: _read_folder(p) for s, p in (folders or {"train": source}).items()}


def _take(
    documents: list[_Document], fraction: float, draw: random.Random
) -> tuple[list[_Document], list[_Document]]:
    """Moves a part of each class to a split of its own; at least one document, never the last."""
    by_class: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        by_class.setdefault(document.label, []).append(index)
    moved = set()
    for indices in by_class.values():
        count = min(math.ceil(len(indices) * fraction), len(indices) - 1)
        moved.update(draw.sample(indices, count))
    return (
        [document for index, document in enumerate(documents) if index not in moved],
        [document for index, document in enumerate(documents) if index in moved],
    )


def _class_order(labels: Iterable[str]) -> list[str]:
    """Numbers by value, else names by letters."""
    names = set(labels)
    return sorted(names, key=int) if all(n.isdecimal() for n in names) else sorted(names)


def read_labelled(
    source: Path | str,
    tokenizer: Tokenizer,
    *,
    valid_fraction: float = 0.1,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    text_column: str = "text",
    label_column: str = "label",
) -> LabelledCorpus:
    """Reads labelled documents into memory.

    Args:
        source: a folder ``train`` and perhaps ``valid`` and ``test`` with a folder for each class
            and in it a text file for each document, as IMDb has them (its ``unsup`` is left out);
            or a folder for each class alone; or a folder with ``train.csv`` or ``train.jsonl`` and
            perhaps those of the other splits; or one such file. All UTF-8.
        tokenizer: the language model's.
        valid_fraction: of the training documents of each class, how many to take away for
            validation, and then for test, where ``source`` has none. Chosen at random.
        seed: of that choice.
        classes: the names of the classes, such as a trained model's; by default those that the
            training documents have, sorted.
        text_column: the column of a table that has the text.
        label_column: the column that has the class.

    Raises:
        CorpusError: a file is not what it must be; a document is empty; a class is not among
            ``classes`` or not in the training documents. It names the file and the line.
        ValueError: ``valid_fraction`` is out of range.
    """
    source = Path(source)
    if not 0 < valid_fraction < 0.5:
        raise ValueError(f"valid_fraction must be between 0 and 0.5, got {valid_fraction}")
    splits = _read_splits(source, text_column, label_column)
    if not splits.get("train"):
        raise CorpusError(
            f"{source} must have training documents, in a folder for each class or in a file such "
            "as train.csv; got none"
        )
    draw = random.Random(seed)
    for split in ("valid", "test"):
        if split not in splits:
            splits["train"], splits[split] = _take(splits["train"], valid_fraction, draw)
        if not splits[split]:
            raise CorpusError(f"{source} must have documents for {split}, got none")
    known = list(classes or _class_order(document.label for document in splits["train"]))
    if len(known) < 2:
        raise CorpusError(f"{source} must have two classes or more, got {', '.join(known)}")
    label_ids = {name: i for i, name in enumerate(known)}

    def encoded(documents: list[_Document]) -> LabelledSplit:
        for document in documents:
            if document.label not in label_ids:
                raise CorpusError(
                    f"{document.where}: the class must be one of {', '.join(known)}, "
                    f"got {document.label!r}"
                )
        rows = tokenizer.encode_batch([document.text.strip() for document in documents])
        for document, ids in zip(documents, rows, strict=True):
            if not ids:
                raise CorpusError(f"{document.where}: the document is empty")
        return LabelledSplit(
            [torch.tensor(ids) for ids in rows],
            torch.tensor([label_ids[document.label] for document in documents]),
        )

    train, valid, test = (encoded(splits[split]) for split in SPLITS)
    return LabelledCorpus(known, train, valid, test, tokenizer)

"""Corpora and labelled documents: what is read, that nothing is lost, and what bad input says."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lstmx.text import corpus as corpus_module
from lstmx.text.corpus import Corpus, CorpusError, prepare, read_labelled
from lstmx.text.tokenizer import EOS, KINDS, Tokenizer

DATA = Path(__file__).parents[1] / "data"
KJV, BOOKS = DATA / "kjv", DATA / "books"
SPLITS = ("train", "valid", "test")


def write_texts(folder, names=("train.txt", "valid.txt", "test.txt"), text="a b c\nd a\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
    return folder


# ---- Corpora -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_is_the_encoded_text(kind, tmp_path):
    made = prepare(KJV, tmp_path / "corpus", kind=kind)
    opened = Corpus.open(tmp_path / "corpus")
    assert opened.tokenizer == made.tokenizer
    assert opened.tokenizer.kind == kind
    for split in SPLITS:
        text = (KJV / f"{split}.txt").read_text()
        expected = opened.tokenizer.encode(text)
        assert opened.split(split).tolist() == made.split(split).tolist() == expected
        assert expected.count(EOS) == text.count("\n")
    files = sorted(path.name for path in (tmp_path / "corpus").iterdir())
    assert files == ["corpus.json", "test.bin", "tokenizer.json", "train.bin", "valid.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ["\n", "\r\n", " "])
def test_pieces_do_not_change_the_ids(kind, ends, tmp_path, monkeypatch):
    """The text is read in blocks, which may cut lines and letters anywhere."""
    lines = (KJV / "test.txt").read_text().split("\n")[:40]
    text = "\ufeff" + ends.join(line.replace("a", "ä  🙂 ") for line in lines)
    folder = tmp_path / "source"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(text.encode())
    whole = prepare(folder, tmp_path / "whole", kind=kind)
    assert whole.split("train")[-1] == EOS
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(corpus_module, "_BLOCK", size)
        pieces = prepare(folder, tmp_path / f"{size}", kind=kind)
        assert pieces.tokenizer == whole.tokenizer
        assert torch.equal(pieces.split("valid").long(), whole.split("valid").long())
    expected = whole.tokenizer.encode(text[1:].replace("\r\n", "\n") + "\n")
    assert whole.split("test").tolist() == expected


@pytest.mark.parametrize(
    "names",
    [
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("train.txt", "dev.txt", "TEST.TXT"),
    ],
)
def test_names_of_files(names, tmp_path):
    folder = write_texts(tmp_path / "source", (*names, "README.txt", "train.csv"))
    corpus = prepare(folder, tmp_path / "corpus")
    assert [len(corpus.split(split)) for split in SPLITS] == [7, 7, 7]


def test_settings_and_a_given_tokenizer(tmp_path):
    first = prepare(KJV, tmp_path / "1", kind="raw-word", min_count=2, max_size=99, lowercase=True)
    assert len(first.tokenizer) == 99
    assert all(word == word.lower() for word in first.tokenizer.words)
    assert first.facts["settings"] == {
        "kind": "raw-word",
        "min_count": 2,
        "max_size": 99,
        "lowercase": True,
    }
    second = prepare(KJV, tmp_path / "2", tokenizer=first.tokenizer)
    assert second.tokenizer == first.tokenizer
    assert second.split("valid").tolist() == first.split("valid").tolist()


def test_large_vocabularies_take_wider_ids(tmp_path):
    text = " ".join(f"w{i}" for i in range(66_000))
    corpus = prepare(write_texts(tmp_path / "source", text=text), tmp_path / "corpus")
    ids = Corpus.open(tmp_path / "corpus").split("train")
    assert ids.dtype == torch.int32
    assert ids.max() == len(corpus.tokenizer) - 1 == 66_002
    assert corpus.tokenizer.decode(ids.tolist()) == text + "\n"
    small = prepare(write_texts(tmp_path / "other"), tmp_path / "small")
    assert small.split("train").dtype == torch.uint16


def test_a_split_is_mapped_and_its_file_is_not_written(tmp_path):
    corpus = prepare(KJV, tmp_path / "corpus")
    before = (tmp_path / "corpus/train.bin").read_bytes()
    corpus.split("train").fill_(1)
    assert (tmp_path / "corpus/train.bin").read_bytes() == before
    with pytest.raises(ValueError, match="name must be one of train, valid, test, got 'dev'"):
        corpus.split("dev")


def test_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", 1000)
    calls = []
    prepare(KJV, tmp_path / "corpus", progress=lambda done, total: calls.append((done, total)))
    sizes = {split: (KJV / f"{split}.txt").stat().st_size for split in SPLITS}
    total = sum(sizes.values()) + sizes["train"]  # the training text is read twice
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)
    assert {whole for _, whole in calls} == {total}
    assert len(calls) > 100


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_that_is_missing_or_empty(split, tmp_path):
    folder = write_texts(tmp_path / "source")
    (folder / f"{split}.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match=f"{split}.txt has no text"):
        prepare(folder, tmp_path / "corpus")
    (folder / f"{split}.txt").write_bytes(b"")
    with pytest.raises(CorpusError, match=f"{split}.txt has no text"):
        prepare(folder, tmp_path / "corpus", kind="bpe")
    (folder / f"{split}.txt").unlink()
    with pytest.raises(CorpusError, match=rf"must have a text file for .* such as {split}.txt"):
        prepare(folder, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_undecodable_bytes(split, block, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", block)
    folder = write_texts(tmp_path / "source")
    good = "ein Wört\n\nnoch eins ".encode()
    (folder / f"{split}.txt").write_bytes(good + b"\xe9t\xe9\nmore\n")
    words = rf"{split}.txt, line 3, byte {len(good)}: the text must be UTF-8, got the byte 0xe9"
    with pytest.raises(CorpusError, match=words):
        prepare(folder, tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_sources_that_are_refused(tmp_path):
    folder = write_texts(tmp_path / "source")
    with pytest.raises(CorpusError, match=r"source must be a folder, got .*train.txt"):
        prepare(folder / "train.txt", tmp_path / "corpus")
    with pytest.raises(CorpusError, match=r"source must be a folder, got .*train.txt"):
        prepare(str(folder / "train.txt"), tmp_path / "corpus")
    with pytest.raises(CorpusError, match=r"source must be a folder, got .*none"):
        prepare(folder / "none", tmp_path / "corpus")
    (folder / "ptb.train.txt").write_text("a\n")
    with pytest.raises(CorpusError, match=r"one file for train, got ptb.train.txt and train.txt"):
        prepare(folder, tmp_path / "corpus")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_count": 10**6}, "train.txt: texts must have a word that occurs 1000000 times"),
        ({"kind": "char"}, "train.txt: kind must be one of word, raw-word, bpe, got 'char'"),
        ({"max_size": 2}, "train.txt: max_size must be at least 4 for 'word', got 2"),
    ],
)
def test_settings_that_are_refused(settings, words, tmp_path):
    with pytest.raises(CorpusError, match=words):
        prepare(KJV, tmp_path / "corpus", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    prepare(KJV, tmp_path / "empty")
    for name in ("empty", "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CorpusError, match=f"{name} is there already; delete it"):
            prepare(KJV, tmp_path / name)
    Corpus.open(tmp_path / "empty")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(KJV, tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    prepare(KJV, folder)
    return folder


def _edit(name, change):
    def edit(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def _facts(**changes):
    return _edit("corpus.json", lambda data: json.dumps({**json.loads(data), **changes}).encode())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "is no prepared corpus: No such file or directory: corpus.json"),
        (lambda folder: (folder / "corpus.json").unlink(), "is no prepared corpus"),
        (lambda folder: (folder / "test.bin").unlink(), "lacks test.bin; prepare the corpus again"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (_edit("train.bin", lambda data: data[:-2]), r"train.bin must have \d+ bytes, got \d+"),
        (_edit("valid.bin", lambda data: data[::-1]), "valid.bin was changed"),
        (_edit("tokenizer.json", lambda data: data + b" "), "tokenizer.json was changed"),
        (_edit("corpus.json", lambda data: data[:-9]), "corpus.json is not what prepare wrote"),
        (_edit("corpus.json", lambda data: b"\xff"), "corpus.json is not what prepare wrote"),
        (_edit("corpus.json", lambda data: b"[]"), "corpus.json is not what prepare wrote"),
        (_facts(dtype="object"), "corpus.json is not what prepare wrote"),
        (_facts(dtype="int32"), r"train.bin must have \d+ bytes, got \d+"),
        (_facts(splits={}), "corpus.json is not what prepare wrote"),
    ],
)
def test_a_damaged_corpus_is_refused(damage, words, prepared, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(prepared, folder)
    damage(folder)
    with pytest.raises(CorpusError, match=words) as caught:
        Corpus.open(folder)
    assert str(folder) in str(caught.value)


# ---- Data sets of the hub ------------------------------------------------------------------------


class Part(list):
    """As much of datasets.Dataset as is used: rows, and the names of the columns."""

    column_names = ("text",)


@pytest.fixture
def hub(monkeypatch):
    """A module ``datasets`` with one data set, which keeps the arguments of its calls."""
    lines = (KJV / "test.txt").read_text().split("\n")
    ends = itertools.cycle(["\n", "", "\r\n"])
    rows = Part({"text": line + end} for line, end in zip(lines, ends, strict=False))
    module = types.ModuleType("datasets")
    module.data = {"train": rows, "validation": Part(rows[:50]), "test": Part(rows[50:90])}
    module.calls = []

    def load_dataset(path, name=None):
        module.calls.append((path, name))
        if path != "owner/set":
            raise FileNotFoundError("no such data set on the hub")
        return module.data

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_data_set_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", 300)
    calls = []
    corpus = prepare(
        "owner/set:part", tmp_path / "corpus", progress=lambda *call: calls.append(call)
    )
    assert hub.calls == [("owner/set", "part")]
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        lines = [row["text"].rstrip("\r\n") for row in hub.data[name]]
        assert corpus.tokenizer.decode(corpus.split(split).tolist()) == "\n".join(lines) + "\n"
    total = 2 * len(hub.data["train"]) + 50 + 40
    assert calls[-1] == (total, total)
    assert Corpus.open(tmp_path / "corpus").facts["source"] == "owner/set:part"
    prepare("owner/set", tmp_path / "other")
    assert hub.calls[-1] == ("owner/set", None)


def test_data_sets_that_are_refused(hub, tmp_path):
    with pytest.raises(
        CorpusError, match=r"owner/none is no folder, .*no such data set on the hub"
    ):
        prepare("owner/none", tmp_path / "corpus")
    hub.data["train"][7] = {"text": None}
    with pytest.raises(CorpusError, match="owner/set, train, row 7: the text must be a string"):
        prepare("owner/set", tmp_path / "corpus")
    hub.data["train"][7] = {"text": "some words"}
    hub.data["test"].column_names = ("sentence",)
    with pytest.raises(CorpusError, match=r"must have a column text, got \('sentence',\)"):
        prepare("owner/set", tmp_path / "corpus")
    hub.data["validation"].clear()
    hub.data["test"].column_names = ("text",)
    with pytest.raises(CorpusError, match="owner/set, valid has no text"):
        prepare("owner/set", tmp_path / "corpus")
    del hub.data["validation"]
    with pytest.raises(CorpusError, match=r"must have a valid split, got \['train', 'test'\]"):
        prepare("owner/set", tmp_path / "corpus")


def test_without_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"owner/set is no folder; .*: pip install datasets"):
        prepare("owner/set", tmp_path / "corpus")


# ---- Labelled documents --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([(KJV / "train.txt").read_text()], kind="bpe", max_size=600)


def rows_of(split):
    with (BOOKS / f"{split}.csv").open(newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def contents(split, corpus):
    """The documents of a split as text and class again."""
    decoded = (corpus.tokenizer.decode(ids.tolist()) for ids in split.ids)
    return list(zip(decoded, (corpus.classes[i] for i in split.labels), strict=True))


def write_folders(root, rows):
    """A folder for each class, a file for each document, in the order of the rows."""
    for number, (text, label) in enumerate(rows):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{number:05}.txt").write_text(text + "\n")


def test_tables(tokenizer):
    corpus = read_labelled(BOOKS, tokenizer)
    assert corpus.classes == ["1Jn", "Est", "SSol"]
    assert corpus.tokenizer == tokenizer
    for split in SPLITS:
        part = getattr(corpus, split)
        assert contents(part, corpus) == rows_of(split)
        assert len(part) == len(part.labels)
        assert {x.dtype for x in (*part.ids, part.labels)} == {torch.int64}


def test_the_small_data_leaks_nothing():
    seen = {text for text, _ in rows_of("train")}
    for split in ("valid", "test"):
        assert not seen & {text for text, _ in rows_of(split)}
    seen = set((KJV / "train.txt").read_text().split("\n"))
    assert not seen & {text for text, _ in rows_of("test")}


def test_json_lines(tokenizer, tmp_path):
    for split in SPLITS:
        lines = [json.dumps({"review": t, "stars": len(c)}) + "\n" for t, c in rows_of(split)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    corpus = read_labelled(tmp_path, tokenizer, text_column="review", label_column="stars")
    assert corpus.classes == ["3", "4"]
    expected = [(text, str(len(label))) for text, label in rows_of("test")]
    assert contents(corpus.test, corpus) == expected


def test_imdbs_layout(tokenizer, tmp_path):
    for split in ("train", "test"):
        write_folders(tmp_path / split, rows_of(split))
    write_folders(tmp_path / "train", [("nobody knows", "unsup")])
    (tmp_path / "imdb.vocab").write_text("the\n")
    corpus = read_labelled(tmp_path, tokenizer)
    assert corpus.classes == ["1Jn", "Est", "SSol"]
    assert sorted(contents(corpus.test, corpus)) == sorted(rows_of("test"))
    both = contents(corpus.train, corpus) + contents(corpus.valid, corpus)
    assert sorted(both) == sorted(rows_of("train"))
    # A tenth of each class, rounded up, by the seed.
    labels = [label for _, label in rows_of("train")]
    assert [int((corpus.valid.labels == i).sum()) for i in range(3)] == [
        -(-labels.count(name) // 10) for name in corpus.classes
    ]
    again, other = (read_labelled(tmp_path, tokenizer, seed=seed) for seed in (0, 1))
    assert contents(again.valid, again) == contents(corpus.valid, corpus)
    assert contents(other.valid, other) != contents(corpus.valid, corpus)


def test_what_is_one_part_is_cut_in_three(tokenizer, tmp_path):
    rows = rows_of("train")
    write_folders(tmp_path / "folders", rows)
    for source in (tmp_path / "folders", BOOKS / "train.csv"):
        corpus = read_labelled(source, tokenizer, valid_fraction=0.2)
        parts = [contents(getattr(corpus, split), corpus) for split in SPLITS]
        assert sorted(itertools.chain(*parts)) == sorted(rows)
        assert len(parts[1]) >= 0.2 * len(rows)
        assert len(parts[2]) >= 0.2 * 0.8 * len(rows)
        for part in parts:
            assert {label for _, label in part} == set(corpus.classes)


def test_classes_can_be_given(tokenizer, tmp_path):
    names = ["SSol", "Est", "Job", "1Jn"]
    corpus = read_labelled(BOOKS, tokenizer, classes=names)
    assert corpus.classes == names
    assert contents(corpus.valid, corpus) == rows_of("valid")
    with pytest.raises(CorpusError, match=r"train.csv, line 2: .* one of SSol, 1Jn, got 'Est'"):
        read_labelled(BOOKS, tokenizer, classes=["SSol", "1Jn"])


def test_numbers_are_sorted_as_numbers(tokenizer, tmp_path):
    path = tmp_path / "stars.csv"
    path.write_text("text,label\n" + "".join(f"some words,{i % 11}\n" for i in range(60)))
    assert read_labelled(path, tokenizer).classes == [str(i) for i in range(11)]


def test_long_cells_and_line_ends(tokenizer, tmp_path):
    limit = csv.field_size_limit()
    long = "word " * 40_000
    path = tmp_path / "long.csv"
    rows = [(long, "a"), ("two\r\nlines", "b")] * 5
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    corpus = read_labelled(path, tokenizer)
    assert {text for text, _ in contents(corpus.train, corpus)} == {long.strip(), "two\nlines"}
    assert csv.field_size_limit() == limit


def tables(folder, train="text,label\none,a\ntwo,b\n", valid="text,label\none,a\n", name="csv"):
    folder.mkdir(exist_ok=True)
    (folder / f"train.{name}").write_bytes(train if isinstance(train, bytes) else train.encode())
    for split in ("valid", "test"):
        text = valid if name == "csv" else '{"text": "one", "label": "a"}\n'
        (folder / f"{split}.{name}").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"valid": "text,label\none,a\nx,c\n"},
            r"valid.csv, line 3: the class must be one of a, b, got 'c'",
        ),
        ({"train": "text,class\none,a\n"}, r"train.csv, line 2: there must be a 'label', got"),
        ({"train": "text,label\none\n"}, r"train.csv, line 2: there must be a 'label'"),
        ({"train": ""}, "must have training documents, .* such as train.csv; got none"),
        ({"train": "text,label\none,a\n"}, "must have two classes or more, got a"),
        ({"train": "text,label\none,a\n  ,b\n"}, "train.csv, line 3: the document is empty"),
        ({"train": 'text,label\n"one"x,a\n'}, "train.csv, line 2: no CSV"),
        ({"train": b"text,label\none,a\n\xfe,b\n"}, r"train.csv, line 3, byte 17: .*0xfe"),
        ({"valid": "text,label\n"}, "must have documents for valid, got none"),
        ({"name": "jsonl", "train": "{}\nx"}, r"train.jsonl, line 1: there must be a 'text'"),
        ({"name": "jsonl", "train": "\nx"}, r"train.jsonl, line 2: no JSON"),
        ({"name": "jsonl", "train": "[1]"}, r"train.jsonl, line 1: must be an object, got list"),
        (
            {"name": "jsonl", "train": '{"text": 3, "label": "a"}'},
            "line 1: 'text' must be text, got 3",
        ),
        (
            {"name": "jsonl", "train": '{"text": "x", "label": 0.5}'},
            "line 1: 'label' must be text or an integer, got 0.5",
        ),
    ],
)
def test_bad_tables(arguments, words, tokenizer, tmp_path):
    folder = tables(tmp_path / "tables", **arguments)
    with pytest.raises(CorpusError, match=words) as caught:
        read_labelled(folder, tokenizer)
    assert str(folder) in str(caught.value)


def test_bad_folders(tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="must have training documents"):
        read_labelled(tmp_path, tokenizer)
    write_folders(tmp_path / "train", [("one", "a"), ("two", "b")] * 20)
    write_folders(tmp_path / "test", [("one", "c")])
    with pytest.raises(CorpusError, match=r"c/00000.txt: .* must be one of a, b, got 'c'"):
        read_labelled(tmp_path, tokenizer)
    (tmp_path / "train/a/00002.txt").write_bytes(b"ok\n\xff")
    with pytest.raises(CorpusError, match=r"a/00002.txt, line 2, byte 3: the text must be UTF-8"):
        read_labelled(tmp_path, tokenizer)
    with pytest.raises(CorpusError, match=r"source must be a file or a folder, got .*none"):
        read_labelled(tmp_path / "none", tokenizer)
    with pytest.raises(CorpusError, match=r"must be a .csv or .jsonl file or a folder, got .*txt"):
        read_labelled(tmp_path / "test/c/00000.txt", tokenizer)
    with pytest.raises(ValueError, match=r"valid_fraction must be between 0 and 0.5, got 0.5"):
        read_labelled(BOOKS, tokenizer, valid_fraction=0.5)


# ---- Memory --------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from lstmx.text.batches import StreamBatches
from lstmx.text.corpus import Corpus, prepare
corpus = prepare(sys.argv[1], sys.argv[2])
prepared = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokens = sum(x.numel() for x, _ in StreamBatches(Corpus.open(sys.argv[2]).split("train"), 20, 70))
print(tokens, prepared)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    text = (KJV / "train.txt").read_text()
    peaks = []
    for copies in (50, 250):
        folder = write_texts(tmp_path / f"{copies}", ("valid.txt", "test.txt"))
        with (folder / "train.txt").open("w") as file:
            for _ in range(copies):
                file.write(text)
        command = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / f"c{copies}")]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        tokens, peak = map(int, run.stdout.split())
        assert tokens > copies * len(text.split())
        peaks.append(peak * 1024 if sys.platform == "linux" else peak)
    # More than three million tokens more; as a list of integers they would take 24 MB.
    assert peaks[1] - peaks[0] < 8e6

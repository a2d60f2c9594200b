"""The benchmarks' own data: chapters, passages and splits of the Bible; random corpora."""

import csv
import json

import pytest
import typer

from benchmarks import corpus, king_james
from lstmx.text.corpus import read_labelled
from lstmx.text.tokenizer import Tokenizer

BOOKS = {"Ge": 21, "1Jn": 5, "Psa": 11, "Rev": 3}


@pytest.fixture
def listing(tmp_path):
    """A file as Debian's program writes it, with made-up verses."""
    path = tmp_path / "bible.txt"
    lines = [
        f'{book}{chapter}:{verse} Verse {verse} of {book}, {chapter}: a, "b" and c.'
        for book, chapters in BOOKS.items()
        for chapter in range(1, chapters + 1)
        for verse in range(1, 3 + chapter % 7)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_chapters(listing):
    chapters = list(king_james.chapters(listing.read_text()))
    assert [(c.book, c.number) for c in chapters] == [
        (book, number) for book, count in BOOKS.items() for number in range(1, count + 1)
    ]
    assert chapters[21].verses[2] == 'Verse 3 of 1Jn, 1: a, "b" and c.'
    with pytest.raises(ValueError, match=r"line 2 must be like 'Ge1:1 In the ...', got 'Genesis'"):
        list(king_james.chapters("Ge1:1 In the\nGenesis\n"))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_passages(count):
    for length in range(1, 30):
        verses = [f"verse {i}." for i in range(length)]
        made = king_james.passages(verses, count)
        assert " ".join(made) == " ".join(verses)
        sizes = [passage.count(".") for passage in made]
        assert set(sizes[:-1]) <= {count}
        assert length < count or count <= 2 * sizes[-1] < 3 * count


def test_whole_chapters_go_to_a_split(listing, tmp_path):
    out = tmp_path / "out"
    king_james.main(out, text=listing, book=None, label=["Ge", "Psa"], every=10, verses=2)
    chapters = list(king_james.chapters(listing.read_text()))
    for split in king_james.SPLITS:
        own = [c for c in chapters if king_james.split_of(c, 10) == split]
        verses = [verse for c in own for verse in c.verses]
        assert (out / "text" / f"{split}.txt").read_text() == "\n".join(verses) + "\n"
        with (out / "books" / f"{split}.csv").open(newline="") as file:
            rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
        for book, title in (("Ge", "Genesis"), ("Psa", "Psalms")):
            text = " ".join(verse for c in own if c.book == book for verse in c.verses)
            assert " ".join(passage for passage, label in rows if label == title) == text
    numbers = {c.number for c in chapters if king_james.split_of(c, 10) != "train"}
    assert numbers == {5, 10, 15, 20}
    tokenizer = Tokenizer.train([listing.read_text()], kind="raw-word")
    assert read_labelled(out / "books", tokenizer).classes == ["Genesis", "Psalms"]


def test_bad_input(listing, tmp_path, monkeypatch):
    with pytest.raises(typer.BadParameter, match="'Job' is no book of the text"):
        king_james.main(tmp_path / "out", text=listing, label=["Job"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="install Debian's packages bible-kjv and"):
        king_james.main(tmp_path / "out")


def test_debians_program_is_asked(listing, tmp_path, monkeypatch):
    program = tmp_path / "bible"
    program.write_text(f'#!/bin/sh\n[ "$*" = "-f Gen1:1-Rev22:21" ] && /bin/cat "{listing}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert king_james.read_text(None) == listing.read_text()


def test_preparing_is_measured(tmp_path):
    corpus.main(tokens=[100_000], words=500, json=tmp_path / "corpus.json")
    [row] = json.loads((tmp_path / "corpus.json").read_text())["corpora"]
    assert row["tokens"] == 5 * 20_000 + 2 * 20_000
    assert row["vocabulary"] == 503
    assert row["tokens_per_second"] > 0
    assert row["peak_mb"] >= row["peak_mb_of_imports"] > 0

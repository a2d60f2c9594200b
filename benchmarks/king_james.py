"""``python -m benchmarks.king_james OUT``: the King James Bible, as a corpus and labelled passages.

The text is in the public domain. It comes from Debian's packages bible-kjv and bible-kjv-text, or
from a file like the output of ``bible -f Gen1:1-Rev22:21``, with a verse in each line:
``Ge1:1 In the beginning ...``.

Whole chapters go to training, validation or test, by their number: with ``--every 10`` the
chapters 10, 20, ... of each book are for test and 5, 15, ... for validation. Both data sets are
cut alike, so a language model of one has not seen the test passages of the other.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from lstmx.text.files import write_atomically

SPLITS = ("train", "valid", "test")
# Long books of different kinds, by the program's names.
TITLES = {
    "Ge": "Genesis",
    "Lev": "Leviticus",
    "Psa": "Psalms",
    "Prv": "Proverbs",
    "Isa": "Isaiah",
    "Eze": "Ezekiel",
    "Luke": "Luke",
    "Acts": "Acts",
}
_VERSE = re.compile(r"(\w+?)(\d+):\d+ (.+)")


class Chapter(NamedTuple):
    """The verses of a chapter."""

    book: str
    number: int
    verses: list[str]


def read_text(path: Path | None) -> str:
    """The whole text, from a file or from Debian's program.

    Raises:
        RuntimeError: there is neither.
    """
    if path is not None:
        return path.read_text(encoding="utf-8")
    program = shutil.which("bible")
    if program is None:
        raise RuntimeError("install Debian's packages bible-kjv and bible-kjv-text, or give --text")
    command = [program, "-f", "Gen1:1-Rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def chapters(text: str) -> Iterator[Chapter]:
    """The chapters in order.

    Raises:
        ValueError: a line is no verse.
    """

    def verses() -> Iterator[tuple[str, int, str]]:
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            found = _VERSE.fullmatch(line.strip())
            if found is None:
                raise ValueError(f"line {number} must be like 'Ge1:1 In the ...', got {line!r}")
            yield found[1], int(found[2]), found[3]

    for (book, number), group in groupby(verses(), key=lambda verse: verse[:2]):
        yield Chapter(book, number, [verse for _, _, verse in group])


def split_of(chapter: Chapter, every: int) -> str:
    """The split that a chapter belongs to."""
    return {0: "test", every // 2: "valid"}.get(chapter.number % every, "train")


def passages(verses: Sequence[str], count: int) -> list[str]:
    """A chapter in passages of ``count`` verses; a rest of less than half joins the last one."""
    starts = list(range(0, len(verses), count))
    if len(starts) > 1 and 2 * (len(verses) - starts[-1]) < count:
        starts.pop()
    ends = [*starts[1:], len(verses)]
    return [" ".join(verses[start:end]) for start, end in zip(starts, ends, strict=True)]


def as_csv(rows: Sequence[tuple[str, str]]) -> bytes:
    """A table of text and label."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("text", "label"), *rows])
    return table.getvalue().encode()


def main(
    out: Annotated[Path, typer.Argument(help="Gets the folders text and books.")],
    text: Annotated[Path | None, typer.Option(help="A verse in each line, instead.")] = None,
    book: Annotated[list[str] | None, typer.Option(help="Of the corpus; none: all.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Books to tell apart.")] = None,
    every: Annotated[int, typer.Option(min=3, help="Chapters for one of test.")] = 10,
    verses: Annotated[int, typer.Option(min=1, help="Verses of a passage.")] = 3,
) -> None:
    """Write train.txt, valid.txt and test.txt, and train.csv, valid.csv and test.csv."""
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    labelled = label or list(TITLES)
    bible = list(chapters(read_text(text)))
    for name in [*labelled, *(book or [])]:
        if all(chapter.book != name for chapter in bible):
            raise typer.BadParameter(f"{name!r} is no book of the text")
    for chapter in bible:
        split = split_of(chapter, every)
        if not book or chapter.book in book:
            lines[split] += chapter.verses
        if chapter.book in labelled:
            title = TITLES.get(chapter.book, chapter.book)
            rows[split] += [(passage, title) for passage in passages(chapter.verses, verses)]
    for folder in ("text", "books"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        write_atomically(out / "text" / f"{split}.txt", ("\n".join(lines[split]) + "\n").encode())
        write_atomically(out / "books" / f"{split}.csv", as_csv(rows[split]))
        words = sum(len(line.split()) for line in lines[split])
        print(f"{split}: {len(lines[split])} verses, {words} words; {len(rows[split])} passages")


if __name__ == "__main__":
    typer.run(main)

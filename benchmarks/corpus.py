"""``python -m benchmarks.corpus``: time and memory of preparing corpora of several sizes.

The text is random: words with Zipf's frequencies, in lines. Each size is prepared by a process of
its own, of which the peak of resident memory is shown.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer

from lstmx.environment import environment, write_json
from lstmx.text.batches import StreamBatches
from lstmx.text.corpus import Corpus, prepare

LINE = 20  # tokens, the end of the line included
PAGE = 1000  # lines
PAGES = 100  # that differ


def write_source(folder: Path, tokens: int, words: int) -> None:
    """Writes train, valid and test with ``tokens`` tokens together, 96 % of them in train."""
    draw = random.Random(0)
    names = [f"w{i:x}" for i in range(words)]
    frequencies = list(accumulate(1 / (i + 2.7) for i in range(words)))
    pages = []
    for _ in range(PAGES):
        lines = (draw.choices(names, cum_weights=frequencies, k=LINE - 1) for _ in range(PAGE))
        pages.append("".join(" ".join(line) + "\n" for line in lines))
    for split, share in (("train", 0.96), ("valid", 0.02), ("test", 0.02)):
        with (folder / f"{split}.txt").open("w") as file:
            for _ in range(max(1, round(tokens * share / LINE / PAGE))):
                file.write(draw.choice(pages))


def _peak() -> float:
    """The most memory, in MB, that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def measure(source: Path, folder: Path) -> dict[str, Any]:
    """Prepares a corpus and reads an epoch of it."""
    before = _peak()
    start = time.perf_counter()
    corpus = prepare(source, folder)
    seconds = time.perf_counter() - start
    peak = _peak()
    start = time.perf_counter()
    opened = Corpus.open(folder)
    opening = time.perf_counter() - start
    start = time.perf_counter()
    read = sum(x.numel() for x, _ in StreamBatches(opened.split("train"), 80, 70))
    tokens = sum(len(corpus.split(split)) for split in ("train", "valid", "test"))
    return {
        "tokens": tokens,
        "vocabulary": len(corpus.tokenizer),
        "bytes_of_text": sum(path.stat().st_size for path in source.iterdir()),
        "prepare_seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "peak_mb_of_imports": before,
        "peak_mb": peak,
        "open_seconds": round(opening, 3),
        "loader_tokens_per_second": round(read / (time.perf_counter() - start)),
    }


def main(
    tokens: Annotated[
        list[int], typer.Option(default_factory=lambda: [10**6, 10**7, 10**8], help="A size.")
    ],
    words: Annotated[int, typer.Option(min=1, help="That the text is drawn from.")] = 100_000,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
) -> None:
    """Prepare corpora of random text and show what it takes; several --tokens, several sizes."""
    rows = []
    for size in tokens:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "source").mkdir()
            write_source(folder / "source", size, words)
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                rows.append(pool.submit(measure, folder / "source", folder / "corpus").result())
        print(rows[-1])
        if json is not None:
            write_json({"environment": environment(), "corpora": rows}, json)


if __name__ == "__main__":
    typer.run(main)

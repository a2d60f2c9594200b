"""The chapter's data set: the numbers from 1 to 9999 in English words."""

from __future__ import annotations

from functools import cache

# fmt: off
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = (
    "zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)
# fmt: on


def number_in_words(n: int) -> str:
    """``1021`` to ``"one thousand twenty one"``: as the data set writes it, without "and".

    Raises:
        ValueError: n is not between 1 and 9999.
    """
    if not 1 <= n <= 9999:
        raise ValueError(f"n must be between 1 and 9999, got {n}")
    words = []
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if n >= unit:
            words += [_SMALL[n // unit], name]
            n %= unit
    if n >= 20:
        words.append(_TENS[n // 10])
        n %= 10
    if n > 0:
        words.append(_SMALL[n])
    return " ".join(words)


@cache
def tokens() -> tuple[str, ...]:
    """All 63,095 words in order, the numbers separated by ".".

    The original files leave out 8000, the last line of the first of two; so does this.
    """
    return tuple(" . ".join(number_in_words(n) for n in range(1, 10000) if n != 8000).split(" "))


@cache
def vocabulary() -> tuple[str, ...]:
    """The 30 different words, in the order in which they first appear."""
    return tuple(dict.fromkeys(tokens()))


def encode(text: str) -> list[int]:
    """Words, separated by spaces, to their positions in the vocabulary.

    Raises:
        ValueError: a word is not in the vocabulary.
    """
    index = {word: i for i, word in enumerate(vocabulary())}
    words = text.split()
    unknown = [word for word in words if word not in index]
    if unknown:
        raise ValueError(f"text must consist of words of the data set, got {unknown[0]!r}")
    return [index[word] for word in words]


def decode(ids: list[int]) -> str:
    """Positions in the vocabulary to text."""
    return " ".join(vocabulary()[i] for i in ids)

"""Text to token ids and back, by the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from lstmx.text.files import write_atomically

SPECIALS = ("<unk>", "<eos>", "<pad>")
UNK, EOS, PAD = range(3)

# A word with its inner apostrophes and hyphens, a number, a marker such as <unk>, or one mark of
# punctuation.
_RAW_WORD = r"<\w+>|\w+(?:['’-]\w+|[.,]\d+)*|[^\w\s]"
# The spaces that decoding leaves out again: after an opening mark, ahead of a closing one.
_NO_SPACE = re.compile(r"(?<=[(\[]) | (?=[.,:;!?)\]](?:\s|$))")
_NO_LIMIT = 2**31 - 1
_BPE_SIZE = 30_000  # the library's own default
_BYTES = 256

# What tells the kinds apart in the library's JSON.
_SPLITTERS = {"WhitespaceSplit": "word", "Split": "raw-word", "ByteLevel": "bpe"}
KINDS = tuple(_SPLITTERS.values())


class Tokenizer:
    """A vocabulary, and how text is split into it.

    The ids 0, 1 and 2 are always ``<unk>``, ``<eos>`` and ``<pad>``. The end of a line is the token
    ``<eos>``, so a text of n lines has n of them, as in awd-lstm-lm.

    Made by :meth:`train`, :meth:`load` or :meth:`from_json`. The kinds:

    - ``"word"``: split at white space. For texts that are split already, such as the Penn Treebank
      and WikiText, whose ``<unk>`` is ours; perplexities compare with the papers'.
    - ``"raw-word"``: words and punctuation apart, for text as people write it. Decoding puts
      spaces where English has them.
    - ``"bpe"``: byte-pair encoding of UTF-8 (Sennrich et al. 2016; Radford et al. 2019). There is
      no unknown word, and decoding gives the text back exactly. A special token that is spelled out
      in a text is encoded as the letters it has.
    """

    unk, eos, pad = UNK, EOS, PAD

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Wraps a tokenizer of the library that has the properties above.

        Raises:
            ValueError: it has not.
        """
        self._inner = inner
        vocabulary = inner.get_vocab()
        self.words = sorted(vocabulary, key=vocabulary.__getitem__)
        """The words, by id."""
        if tuple(self.words[: len(SPECIALS)]) != SPECIALS:
            raise ValueError(
                f"the tokenizer's first words must be {', '.join(SPECIALS)}, "
                f"got {', '.join(self.words[: len(SPECIALS)]) or 'none'}"
            )
        if vocabulary[self.words[-1]] != len(self.words) - 1:
            raise ValueError(
                f"the tokenizer's {len(self.words)} words must have ids without gaps, "
                f"got {vocabulary[self.words[-1]]}"
            )
        splitter = type(inner.pre_tokenizer).__name__
        if splitter not in _SPLITTERS:
            raise ValueError(f"the tokenizer must split by {', '.join(_SPLITTERS)}, got {splitter}")
        self.kind = _SPLITTERS[splitter]
        """``"word"``, ``"raw-word"`` or ``"bpe"``."""

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        kind: str = "word",
        min_count: int = 1,
        max_size: int | None = None,
        lowercase: bool = False,
    ) -> Tokenizer:
        """A vocabulary of what occurs in texts, the most frequent first.

        Args:
            texts: read once, one after the other.
            kind: how to split; see :class:`Tokenizer`.
            min_count: a word (or a pair, for ``"bpe"``) that occurs less often is left out.
            max_size: of the vocabulary, special tokens included; by default any size, for
                ``"bpe"`` 30,000.
            lowercase: whether capitals count as small letters, here and when encoding.

        Raises:
            TypeError: ``texts`` is one string.
            ValueError: an argument is out of range, or no word is left.
        """
        least = len(SPECIALS) + (_BYTES if kind == "bpe" else 1)
        if isinstance(texts, str):
            raise TypeError("texts must be several strings, got one")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        if max_size is not None and max_size < least:
            raise ValueError(f"max_size must be at least {least} for {kind!r}, got {max_size}")

        lines = (line for text in texts for line in text.split("\n"))
        inner = _splitter(kind, lowercase)
        if kind == "bpe":
            byte_pairs = trainers.BpeTrainer(
                vocab_size=max_size or _BPE_SIZE,
                min_frequency=min_count,
                special_tokens=list(SPECIALS),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            inner.train_from_iterator(lines, byte_pairs)
            return cls.from_json(_without_added_tokens(inner))
        counter = trainers.WordLevelTrainer(
            vocab_size=_NO_LIMIT, min_frequency=min_count, special_tokens=[], show_progress=False
        )
        inner.train_from_iterator(lines, counter)
        # Special tokens are put in front here: the trainer lists one twice that is in the text.
        counted = inner.get_vocab()
        frequent = (w for w in sorted(counted, key=counted.__getitem__) if w not in SPECIALS)
        words = [*SPECIALS, *islice(frequent, max_size and max_size - len(SPECIALS))]
        if len(words) == len(SPECIALS):
            raise ValueError(f"texts must have a word that occurs {min_count} times, got none")
        return cls.from_words(words, kind=kind, lowercase=lowercase)

    @classmethod
    def from_words(
        cls, words: Sequence[str], *, kind: str = "word", lowercase: bool = False
    ) -> Tokenizer:
        """A tokenizer of a vocabulary that is there already.

        Args:
            words: by id, the special tokens first.
            kind: ``"word"`` or ``"raw-word"``.
            lowercase: whether capitals count as small letters.

        Raises:
            ValueError: ``kind`` is another; a word is there twice; the special tokens are not the
                first.
        """
        if kind not in ("word", "raw-word"):
            raise ValueError(f"kind must be word or raw-word, got {kind!r}")
        ids = {word: i for i, word in enumerate(words)}
        for i, word in enumerate(words):
            if ids[word] != i:
                raise ValueError(f"words must differ, got {word!r} twice")
        inner = _splitter(kind, lowercase)
        inner.model = models.WordLevel(ids, SPECIALS[UNK])
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; each end of a line in it is ``<eos>``."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed in parallel."""
        lines = [text.split("\n") for text in texts]
        flat = [line for text in lines for line in text]
        encodings = iter(self._inner.encode_batch_fast(flat, add_special_tokens=False))
        result = []
        for text in lines:
            ids = list(next(encodings).ids)
            for encoding in islice(encodings, len(text) - 1):
                ids.append(EOS)
                ids += encoding.ids
            result.append(ids)
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; ``<eos>`` ends a line.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        if any(not 0 <= i < len(self) for i in ids):
            wrong = next(i for i in ids if not 0 <= i < len(self))
            raise ValueError(f"ids must be in 0..{len(self) - 1}, got {wrong}")
        lines = self._inner.decode_batch(list(_cut(ids)), skip_special_tokens=False)
        text = "\n".join(lines)
        return _NO_SPACE.sub("", text) if self.kind == "raw-word" else text

    def to_json(self) -> str:
        """Everything, in the format of the library's own files."""
        return self._inner.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that :meth:`to_json` wrote.

        Raises:
            ValueError: the text is no such tokenizer.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"no tokenizer's JSON: {error}") from error
        return cls(inner)

    def save(self, path: Path | str) -> None:
        """Writes :meth:`to_json` to a file, which a failure leaves as it was."""
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        try:
            return cls.from_json(Path(path).read_bytes().decode())
        except ValueError as error:  # includes undecodable bytes
            raise ValueError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, words={len(self)})"


def _splitter(kind: str, lowercase: bool) -> tokenizers.Tokenizer:
    """The library's tokenizer of a kind, without words."""
    inner = tokenizers.Tokenizer(models.BPE() if kind == "bpe" else models.WordLevel())
    if lowercase:
        inner.normalizer = normalizers.Lowercase()
    if kind == "bpe":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    elif kind == "word":
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(_RAW_WORD), "removed", invert=True)
    return inner


def _without_added_tokens(inner: tokenizers.Tokenizer) -> str:
    """The JSON of a tokenizer that finds no special token in a text.

    They stay in the vocabulary; only the search for them ahead of the splitting goes.
    """
    content: dict[str, Any] = json.loads(inner.to_str())
    return json.dumps({**content, "added_tokens": []}, ensure_ascii=False)


def _cut(ids: Sequence[int]) -> Iterator[list[int]]:
    """The ids between the ends of lines."""
    line: list[int] = []
    for i in ids:
        if i == EOS:
            yield line
            line = []
        else:
            line.append(i)
    yield line

"""Tokenizers: what they keep, what they leave out, and what they refuse."""

import json
import pickle
import random
from pathlib import Path

import pytest
import tokenizers

from lstmx.text.tokenizer import EOS, KINDS, PAD, SPECIALS, UNK, Tokenizer

TEXT = (Path(__file__).parents[1] / "data/kjv/train.txt").read_text()


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return Tokenizer.train([TEXT], kind=request.param)


def test_special_ids(tokenizer):
    assert tuple(tokenizer.words[:3]) == SPECIALS
    assert (tokenizer.unk, tokenizer.eos, tokenizer.pad) == (UNK, EOS, PAD) == (0, 1, 2)
    assert len(tokenizer) == len(set(tokenizer.words))


def test_lines_end_with_eos(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.count(EOS) == TEXT.count("\n")
    assert ids[-1] == EOS
    first, second = TEXT.split("\n")[:2]
    together = tokenizer.encode(f"{first}\n{second}")
    assert together == [*tokenizer.encode(first), EOS, *tokenizer.encode(second)]


def test_decode_gives_the_training_text_back(tokenizer):
    assert UNK not in tokenizer.encode(TEXT)
    # The apostrophe of a plural looks like a quotation mark to the kind "raw-word".
    assert tokenizer.decode(tokenizer.encode(TEXT)).replace(" ' ", "' ") == TEXT


def test_encode_batch_is_encode_of_each(tokenizer):
    texts = [*TEXT.split("\n")[:5], "", "a\n\nb", "\n"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_word_kind_splits_as_the_treebank_is_split():
    tokenizer = Tokenizer.train(["a <unk> b a N\n"])
    assert tokenizer.words == [*SPECIALS, "a", "N", "b"]
    # A word that has <unk> in it is a word of its own, and unknown.
    assert tokenizer.encode(" a <unk>  c a<unk>b \n") == [3, UNK, UNK, UNK, EOS]
    assert tokenizer.decode([3, UNK, EOS, 5]) == "a <unk>\nb"


def test_raw_word_kind_parts_punctuation():
    tokenizer = Tokenizer.train(["x"], kind="raw-word")
    text = "Naomi's well-known (3.14, 1,000) <unk>; ok?"
    pieces = ["Naomi's", "well-known", "(", "3.14", ",", "1,000", ")", "<unk>", ";", "ok", "?"]
    known = Tokenizer.train(pieces, kind="raw-word")
    assert [known.words[i] for i in known.encode(text)] == pieces
    assert known.decode(known.encode(text)) == text
    assert tokenizer.encode("y, x") == [UNK, UNK, 3]


def test_bpe_is_lossless():
    tokenizer = Tokenizer.train([TEXT], kind="bpe", max_size=400)
    assert len(tokenizer) == 400
    draw = random.Random(0)
    letters = "ab  \t\n\r<unk><eos>é漢🙂\u2028\u00a0\x00'."
    for _ in range(300):
        text = "".join(draw.choices(letters, k=draw.randrange(30)))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert UNK not in ids
        assert PAD not in ids
        assert ids.count(EOS) == text.count("\n")
    assert tokenizer.encode("<eos> <pad>").count(EOS) == 0


def test_vocabulary_is_by_count_then_alphabet():
    text = "d d d b b c c a"
    assert Tokenizer.train([text]).words[3:] == ["d", "b", "c", "a"]
    assert Tokenizer.train([text], min_count=2).words[3:] == ["d", "b", "c"]
    assert Tokenizer.train([text], max_size=5).words == [*SPECIALS, "d", "b"]


@pytest.mark.parametrize("kind", ["word", "raw-word"])
def test_a_vocabulary_that_is_there_already(kind):
    trained = Tokenizer.train([TEXT], kind=kind, lowercase=True)
    assert Tokenizer.from_words(trained.words, kind=kind, lowercase=True) == trained
    for words, given, error in (
        ([*SPECIALS, "a", "b", "a"], kind, "words must differ, got 'a' twice"),
        (["a", *SPECIALS], kind, "first words must be <unk>, <eos>, <pad>, got a, <unk>, <eos>"),
        ([], kind, "first words must be .*, got none"),
        (SPECIALS, "bpe", "kind must be word or raw-word, got 'bpe'"),
    ):
        with pytest.raises(ValueError, match=error):
            Tokenizer.from_words(words, kind=given)


def test_lowercase():
    tokenizer = Tokenizer.train(["The the THE cat"], lowercase=True)
    assert tokenizer.words[3:] == ["the", "cat"]
    assert tokenizer.encode("tHe CAT") == [3, 4]


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    # The library reads the file as well.
    assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() == len(tokenizer)
    for copy in (
        Tokenizer.load(path),
        Tokenizer.from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy == tokenizer
        assert hash(copy) == hash(tokenizer)
        assert copy.kind == tokenizer.kind
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
    assert tokenizer != Tokenizer.train(["other words"], kind=tokenizer.kind)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"texts": "one string"}, TypeError, "texts must be several strings, got one"),
        ({"kind": "char"}, ValueError, "kind must be one of word, raw-word, bpe, got 'char'"),
        ({"min_count": 0}, ValueError, "min_count must be at least 1, got 0"),
        ({"max_size": 3}, ValueError, "max_size must be at least 4 for 'word', got 3"),
        ({"kind": "bpe", "max_size": 258}, ValueError, "max_size must be at least 259 for 'bpe'"),
        ({"min_count": 2}, ValueError, "a word that occurs 2 times, got none"),
        ({"texts": []}, ValueError, "a word that occurs 1 times, got none"),
    ],
)
def test_training_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        Tokenizer.train(**{"texts": ["a b c"], **arguments})


def test_decode_refuses_an_unknown_id(tokenizer):
    for wrong in (-1, len(tokenizer)):
        with pytest.raises(ValueError, match=rf"ids must be in 0..\d+, got {wrong}"):
            tokenizer.decode([3, wrong])


def _changed(**changes):
    content = json.loads(Tokenizer.train(["a b"]).to_json())
    content |= changes
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no tokenizer's JSON"),
        (b"\xff", "can't decode"),
        (Tokenizer.train(["a b"]).to_json().encode()[:-40], "no tokenizer's JSON"),
        (b"{}", "no tokenizer's JSON"),
        (_changed(pre_tokenizer=None), "must split by .*, got NoneType"),
        (
            _changed(model={"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}),
            "first words must be <unk>, <eos>, <pad>, got a, b",
        ),
        (
            _changed(
                model={
                    "type": "WordLevel",
                    "vocab": {"<unk>": 0, "<eos>": 1, "<pad>": 2, "a": 9},
                    "unk_token": "<unk>",
                }
            ),
            "4 words must have ids without gaps, got 9",
        ),
    ],
)
def test_load_refuses_other_files(content, words, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_load_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.json")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    old = Tokenizer.train(["a b"])
    old.save(path)

    def write_half(self, content):
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        Tokenizer.train(["c d"]).save(path)
    monkeypatch.undo()
    assert Tokenizer.load(path) == old
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]

"""The data set and the batches, against the numbers that the chapter prints."""

import itertools

import pytest
import torch

from lstmx.text import data, human_numbers


def test_the_data_set():
    tokens = human_numbers.tokens()
    assert len(tokens) == 63_095
    vocabulary = human_numbers.vocabulary()
    assert len(vocabulary) == 30
    assert (vocabulary[0], vocabulary[1], vocabulary[29]) == ("one", ".", "thousand")
    text = " ".join(tokens)
    assert text.startswith("one . two . three . four .")
    assert " . one hundred . one hundred one . " in text
    assert " . seven thousand nine hundred ninety nine . eight thousand one . " in text
    assert text.endswith(" . nine thousand nine hundred ninety nine")
    assert data.human_number_ids()[:10] == [0, 1, 2, 1, 3, 1, 4, 1, 5, 1]


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (7, "seven"),
        (20, "twenty"),
        (110, "one hundred ten"),
        (1021, "one thousand twenty one"),
        (9999, "nine thousand nine hundred ninety nine"),
    ],
)
def test_number_in_words(n, words):
    assert human_numbers.number_in_words(n) == words


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_number_out_of_range(n):
    with pytest.raises(ValueError, match=f"n must be between 1 and 9999, got {n}"):
        human_numbers.number_in_words(n)


def test_encode_and_decode():
    assert human_numbers.decode(human_numbers.encode("one thousand . two")) == "one thousand . two"
    with pytest.raises(ValueError, match="text must consist of words of the data set, got 'and'"):
        human_numbers.encode("one hundred and one")


def test_triples():
    ids = data.human_number_ids()
    train, valid = data.triples(ids, 64, stateful=False)
    assert sum(len(x) for x, _ in valid) == 21_031 - int(21_031 * 0.8)
    assert all(x.shape == (64, 3) for x, _ in train)
    x, y = train[0]
    for row in range(3):
        assert x[row].tolist() == ids[3 * row : 3 * row + 3]
        assert y[row] == ids[3 * row + 3]


def test_sequences():
    ids = data.human_number_ids()
    train, valid = data.sequences(ids, 64)
    assert (len(train), len(valid)) == (49, 12)
    x, y = train[0]
    assert x.shape == y.shape == (64, 16)
    assert x[0].tolist() == ids[:16]
    assert y[0].tolist() == ids[1:17]


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("kind", ["sequences", "triples"])
def test_each_row_goes_on_where_it_ended(kind, split):
    ids = data.human_number_ids()
    if kind == "sequences":
        batches = data.sequences(ids, 64)[split]
        for (_, y), (x, _) in itertools.pairwise(batches):
            assert torch.equal(x[:, 0], y[:, -1])
    else:
        batches = data.triples(ids, 64, stateful=True)[split]
        for (_, y), (x, _) in itertools.pairwise(batches):
            assert torch.equal(x[:, 0], y)


def test_group_chunks():
    grouped = data.group_chunks(torch.arange(11), 3)
    assert grouped.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]

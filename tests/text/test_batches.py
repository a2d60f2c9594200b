"""Loaders: every token once and in order, the same on all processes, resumed exactly."""

import itertools
import random
import statistics

import pytest
import torch

from lstmx.text.batches import DocumentBatches, StreamBatches
from lstmx.text.corpus import LabelledSplit


def stream(tokens, *, dtype=torch.int64):
    return torch.randint(3, 30_000, (tokens,)).to(dtype)


def documents(count, *, longest=60):
    lengths = torch.randint(1, longest, (count,)).tolist()
    return LabelledSplit(
        [torch.randint(3, 100, (n,)) for n in lengths], torch.randint(0, 4, (count,))
    )


def equal(batches, others):
    """Whether two lists of tuples of tensors are the same."""
    return len(batches) == len(others) and all(
        torch.equal(x, y)
        for batch, other in zip(batches, others, strict=True)
        for x, y in zip(batch, other, strict=True)
    )


# ---- Streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_length", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16])
def test_rows_give_the_text_back(random_length, dtype):
    draw = random.Random(0)
    for _ in range(30):
        batch_size, bptt = draw.randint(1, 9), draw.randint(1, 80)
        ids = stream(draw.randint(batch_size + 1, 3000), dtype=dtype)
        loader = StreamBatches(ids, batch_size, bptt, random_length=random_length)
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader)
            assert {x.dtype for pair in batches for x in pair} == {torch.int64}
            assert all(x.shape == y.shape and x.size(1) > 0 for x, y in batches)
            x, y = (torch.cat(parts, dim=1) for parts in zip(*batches, strict=True))
            rows = x.numel()
            # Row b+1 begins where row b ends, and fewer tokens are left out than there are rows.
            assert torch.equal(x.flatten(), ids[:rows].long())
            assert torch.equal(y.flatten(), ids[1 : rows + 1].long())
            assert len(ids) - 1 - rows < batch_size


def test_fixed_length():
    lengths = [x.size(1) for x, _ in StreamBatches(stream(1000), 4, 70)]
    assert lengths == [70, 70, 70, 39]


def test_random_lengths_are_awd_lstm_lms():
    loader = StreamBatches(stream(400_000), 4, 70, random_length=True)
    lengths = [x.size(1) for x, _ in loader]
    full = [n for n in lengths if n > 52]
    half = [n for n in lengths if n <= 52]
    assert min(lengths) >= 5
    assert len(half) / len(lengths) == pytest.approx(0.05, abs=0.02)
    assert statistics.mean(full) == pytest.approx(70, abs=1)
    assert statistics.mean(half) == pytest.approx(35, abs=2.5)
    assert statistics.stdev(full) == pytest.approx(5, abs=0.5)
    # Another epoch and another seed draw anew.
    again = [x.size(1) for x, _ in loader]
    other = StreamBatches(stream(400_000), 4, 70, random_length=True, seed=1)
    assert lengths != again != [x.size(1) for x, _ in other] != lengths


def test_random_lengths_are_at_least_five():
    for tokens in range(200, 1200, 37):
        loader = StreamBatches(stream(tokens), 1, 11, random_length=True, seed=tokens)
        assert all(x.size(1) >= 5 for x, _ in loader)


@pytest.mark.parametrize("random_length", [False, True])
def test_streams_are_sharded_by_rows(random_length):
    ids = stream(5000)

    def loader(**ranks):
        return list(StreamBatches(ids, 12, 9, random_length=random_length, seed=3, **ranks))

    parts = [loader(rank=rank, world_size=3) for rank in range(3)]
    joined = [
        tuple(map(torch.cat, zip(*batches, strict=True))) for batches in zip(*parts, strict=True)
    ]
    assert equal(joined, loader())


def test_batches_do_not_share_memory_with_the_text():
    ids = stream(500)
    kept = ids.clone()
    for x, y in StreamBatches(ids, 1, 50):
        assert x.is_contiguous()
        x.zero_()
        y.zero_()
    assert torch.equal(ids, kept)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": torch.rand(10)}, r"ids must be integers \[n\], got torch.float32 \[10\]"),
        ({"ids": torch.zeros(2, 5).long()}, r"got torch.int64 \[2, 5\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bptt": 0}, "bptt must be at least 1, got 0"),
        ({"batch_size": 10}, "ids must have more tokens than batch_size 10, got 10"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0..world_size-1, got 2 of 2"),
        ({"world_size": 2, "batch_size": 3}, "batch_size must be a multiple of world_size 2"),
    ],
)
def test_stream_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        StreamBatches(**{"ids": torch.arange(10), "batch_size": 2, "bptt": 3, **arguments})


# ---- Documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_document_once(shuffle):
    draw = random.Random(0)
    for _ in range(20):
        split = documents(draw.randint(1, 300))
        loader = DocumentBatches(split, draw.randint(1, 33), pad=2, shuffle=shuffle)
        seen = []
        batches = list(loader)
        assert len(batches) == len(loader)
        for (ids, lengths, labels), indices in zip(batches, loader.indices(), strict=True):
            assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
            assert ids.shape == (len(lengths), int(lengths.max()))
            for row, length, label, index in zip(ids, lengths, labels, indices, strict=True):
                assert torch.equal(row[:length], split.ids[index])
                assert (row[length:] == 2).all()
                assert label == split.labels[index]
            seen += indices
        assert sorted(seen) == list(range(len(split)))


def test_documents_of_like_length_are_together():
    split = documents(2000)
    waste = []
    for shuffle in (False, True):
        batches = list(DocumentBatches(split, 16, shuffle=shuffle))
        cells = sum(ids.numel() for ids, _, _ in batches)
        waste.append(1 - sum(len(ids) for ids in split.ids) / cells)
        assert batches[0][1].max() == max(len(ids) for ids in split.ids)
    assert waste[0] < 0.02
    assert waste[1] < 0.05


def test_order_changes_by_epoch_and_seed():
    split = documents(200)
    loader = DocumentBatches(split, 10, shuffle=True)
    epochs = [list(loader) for _ in range(2)]
    assert not equal(*epochs)
    assert equal(epochs[0], list(DocumentBatches(split, 10, shuffle=True)))
    assert not equal(epochs[0], list(DocumentBatches(split, 10, shuffle=True, seed=1)))
    fixed = DocumentBatches(split, 10)
    assert equal(list(fixed), list(fixed))


@pytest.mark.parametrize("shuffle", [False, True])
def test_documents_are_sharded(shuffle):
    split = documents(101)
    whole = DocumentBatches(split, 10, shuffle=shuffle, world_size=1)
    # 101 documents leave one over, with which no process could do batch norm.
    assert [len(labels) for _, _, labels in whole][-1 if not shuffle else 0] in (10, 11)
    assert len(whole) == 10
    parts = [DocumentBatches(split, 10, shuffle=shuffle, rank=r, world_size=3) for r in range(3)]
    for batch, *own in zip(whole.indices(), *parts, strict=True):
        assert [len(labels) for _, _, labels in own] == [len(batch[r::3]) for r in range(3)]
        for rank, (ids, lengths, _) in enumerate(own):
            for row, length, index in zip(ids, lengths, batch[rank::3], strict=True):
                assert torch.equal(row[:length], split.ids[index])
            assert len(lengths) >= 2


def test_no_batch_has_fewer_than_two_documents_for_a_process():
    for count, batch_size, world in itertools.product(range(8, 40), (4, 5, 8), (1, 2)):
        for shuffle in (False, True):
            loader = DocumentBatches(
                documents(count), batch_size, shuffle=shuffle, world_size=world, rank=world - 1
            )
            sizes = [len(labels) for _, _, labels in loader]
            assert min(sizes) >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1, "world_size": 2}, "batch_size must be at least world_size 2, got 1"),
        ({"batch_size": 9, "world_size": 9}, "documents must be at least world_size 9, got 5"),
        ({"rank": -1}, "rank must be in 0..world_size-1, got -1 of 1"),
    ],
)
def test_document_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        DocumentBatches(**{"documents": documents(5), "batch_size": 2, **arguments})


# ---- Both ----------------------------------------------------------------------------------------

TEXT = torch.randint(3, 100, (700,), generator=torch.Generator().manual_seed(1))
MAKERS = {
    "stream": lambda **ranks: StreamBatches(TEXT, 4, 16, **ranks),
    "random lengths": lambda **ranks: StreamBatches(TEXT, 4, 16, random_length=True, **ranks),
    "documents": lambda **ranks: DocumentBatches(DOCUMENTS, 8, **ranks),
    "shuffled": lambda **ranks: DocumentBatches(DOCUMENTS, 8, shuffle=True, **ranks),
}
_LENGTHS = [1 + (7 * i) % 31 for i in range(83)]
DOCUMENTS = LabelledSplit([TEXT[i : i + n] for i, n in enumerate(_LENGTHS)], TEXT[:83] % 4)


@pytest.mark.parametrize("name", MAKERS)
def test_resumes_after_every_batch(name):
    make = MAKERS[name]
    loader = make()
    size = len(loader)
    epochs = 3
    states, batches = [loader.state_dict()], []
    for _ in range(epochs):
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
    assert len(batches) == epochs * size
    for done, state in enumerate(states[:-1]):
        resumed = make()
        resumed.load_state_dict(state)
        # Trainers call iter() once to see whether they can.
        iter(resumed)
        rest = []
        while len(rest) < len(batches) - done:
            rest += list(resumed)
        assert equal(rest, batches[done:])
        assert resumed.state_dict() == states[-1]


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_is_the_same_on_all_processes(name):
    make = MAKERS[name]
    first, second = (make(rank=rank, world_size=2) for rank in range(2))
    next(iter(first))
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert equal(rest, list(make(rank=1, world_size=2))[1:])


@pytest.mark.parametrize("name", MAKERS)
def test_an_iterator_that_is_given_up_ends_its_epoch(name):
    loader = MAKERS[name]()
    epochs = [list(loader) for _ in range(2)]
    loader = MAKERS[name]()
    assert equal([next(iter(loader))], epochs[0][:1])
    assert equal(list(loader), epochs[1])


def test_a_state_of_another_loader_is_refused():
    state = MAKERS["stream"]().state_dict()
    for other, words in (
        (StreamBatches(TEXT, 5, 16), "batch_size=5, got 4"),
        (StreamBatches(TEXT, 4, 15), "bptt=15, got 16"),
        (StreamBatches(TEXT, 4, 16, seed=1), "seed=1, got 0"),
        (StreamBatches(TEXT[1:], 4, 16), "tokens=699, got 700"),
        (MAKERS["random lengths"](), "random_length=True, got False"),
        (MAKERS["documents"](), "batch_size=8, got 4"),
    ):
        with pytest.raises(ValueError, match=f"state must be of a loader with {words}"):
            other.load_state_dict(state)
    loader = MAKERS["stream"]()
    with pytest.raises(ValueError, match=r"state's batch must be in 0..10, got 11 of epoch 0"):
        loader.load_state_dict({**state, "batch": 11})
    for wrong in ({}, {"epoch": 1}, None):
        with pytest.raises(ValueError, match="state must have epoch, batch and settings"):
            loader.load_state_dict(wrong)
    assert loader.state_dict() == state

"""Generation: the definition of each way to draw, one reading of the prompt, and errors."""

import pytest
import torch
from torch import nn

from lstmx.text import models as m
from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel
from lstmx.text.generation import continue_ids, generate

WORDS = 12
CONFIG = AWDLSTMConfig(embedding=16, hidden=10, layers=2, cell="lstm")


def language_model(**options):
    model = AWDLSTMLanguageModel(WORDS, CONFIG, **options)
    with torch.no_grad():  # logits far enough apart for draws to show them
        for p in model.parameters():
            p *= 4
    return model


MODELS = {
    "tied": language_model,
    "adaptive": lambda: language_model(tied=False, cutoffs=[4, 8]),
    "chapter": lambda: m.LMModel7(WORDS, 8, 2, 0.4),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_most_probable(name):
    """As by reading everything anew for each word."""
    model = MODELS[name]()
    ids = [3, 1, 4]
    got = list(generate(model, ids, 8, temperature=0))
    assert got == continue_ids(model, ids, 8)
    model.eval()
    for new in got:
        model.reset()
        logits = model(torch.tensor([ids]))
        logits = getattr(logits, "logits", logits)
        assert new == int(logits[0, -1].argmax())
        ids = [*ids, new]


def test_the_prompt_is_read_once():
    model, read = language_model(), []
    model.encoder.embedding.register_forward_pre_hook(lambda _, args: read.append(args[0].tolist()))
    new = list(generate(model, [3, 1, 4], 4, seed=0))
    assert read == [[[3, 1, 4]], *([[word]] for word in new[:-1])]


def test_it_streams_and_leaves_the_model_alone():
    model = language_model()
    model.encoder.eval()  # as someone may who trains the decoder alone
    ids = torch.randint(WORDS, (3, 5))
    model(ids)
    state, modes = model.h, [module.training for module in model.modules()]
    expected = list(generate(model, [1, 2], 6, seed=1))
    stream = generate(model, [1, 2], 6, seed=1)
    got = []
    for word in stream:
        got.append(word)
        assert model.h is state
        assert [module.training for module in model.modules()] == modes
        model(ids)  # goes on meanwhile
        state = model.h
    assert got == expected
    assert not list(generate(model, [1], 0))


class Constant(m.StatefulModel):
    """The same distribution after every word, so that one text has as many independent draws."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Embedding(WORDS, WORDS)
        with torch.no_grad():
            self.logits.weight.copy_(torch.randn(WORDS).expand(WORDS, WORDS))

    def forward(self, ids):
        return self.logits(ids)

    def distribution(self, temperature=1.0):
        return (self.logits.weight[0].detach() / temperature).softmax(0)


def shares(model, count=2000, **options):
    words = list(generate(model, [3], count, seed=0, **options))
    return torch.bincount(torch.tensor(words), minlength=WORDS) / count


def assert_shares(got, expected, count=2000):
    """Within six standard deviations each; what is impossible never occurs."""
    assert ((got - expected).abs() <= 6 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    model = Constant()
    assert_shares(shares(model, temperature=temperature), model.distribution(temperature))


def test_draws_of_the_adaptive_softmax_follow_its_distribution():
    model = MODELS["adaptive"]().eval()
    expected = model(torch.tensor([[3, 1]]))[0, -1].detach().exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    words = [next(generate(model, [3, 1], 1)) for _ in range(200)]
    assert_shares(torch.bincount(torch.tensor(words), minlength=WORDS) / 200, expected, 200)


def test_top_k():
    model = Constant()
    best = model.distribution().topk(3)
    expected = torch.zeros(WORDS).index_copy(0, best.indices, best.values / best.values.sum())
    assert_shares(shares(model, top_k=3), expected)
    assert_shares(shares(model, top_k=WORDS + 5), model.distribution())
    model = language_model()
    assert continue_ids(model, [3, 1], 5) == list(generate(model, [3, 1], 5, top_k=1))


def test_top_p():
    model = Constant()
    p, (values, indices) = 0.6, model.distribution().sort(descending=True)
    needed = int((values.cumsum(0) < p).sum()) + 1
    assert 1 < needed < WORDS
    values = values[:needed] / values[:needed].sum()
    expected = torch.zeros(WORDS).index_copy(0, indices[:needed], values)
    assert_shares(shares(model, top_p=p), expected)
    assert_shares(shares(model, top_p=1.0), model.distribution())
    model = language_model()
    assert continue_ids(model, [3, 1], 5) == list(generate(model, [3, 1], 5, top_p=1e-9))


def test_top_p_is_of_what_temperature_and_top_k_leave():
    model = Constant()
    best = model.distribution(0.5).topk(4)
    kept = best.values / best.values.sum()
    needed = int((kept.cumsum(0) < 0.7).sum()) + 1
    got = shares(model, temperature=0.5, top_k=4, top_p=0.7)
    assert set(got.nonzero().flatten().tolist()) == set(best.indices[:needed].tolist())


def test_seeds():
    model = language_model()
    state = torch.get_rng_state()
    first = list(generate(model, [3], 20, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == list(generate(model, [3], 20, seed=5))
    assert first != list(generate(model, [3], 20, seed=6))
    torch.manual_seed(7)
    again = list(generate(model, [3], 20))
    torch.manual_seed(7)
    assert again == list(generate(model, [3], 20))


def test_stop_and_exclude():
    model = language_model()
    free = list(generate(model, [3], 40, seed=5))
    stop = free[7]
    assert list(generate(model, [3], 40, seed=5, stop=stop)) == free[: free.index(stop)]
    greedy = continue_ids(model, [3], 1)[0]
    assert next(generate(model, [3], 1, temperature=0, exclude=[greedy])) != greedy
    assert shares(Constant(), 50, exclude=range(WORDS - 1))[WORDS - 1] == 1


def test_half_precision():
    model = language_model().bfloat16()
    assert len(list(generate(model, [3], 5, top_p=0.9, seed=0))) == 5


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([], 3), {}, "prompt must have at least one word"),
        (([1, WORDS], 3), {}, "ids must be from 0 to 11, the model's words, got 12"),
        (([1, -1], 3), {}, "ids must be from 0 to 11, the model's words, got -1"),
        (([1], -1), {}, "count must be at least 0, got -1"),
        (([1], 3), {"temperature": -1.0}, "temperature must be at least 0 and finite, got -1"),
        (([1], 3), {"temperature": float("nan")}, "temperature must be .* got nan"),
        (([1], 3), {"top_k": 0}, "top_k must be at least 1, got 0"),
        (([1], 3), {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
        (([1], 3), {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        (([1], 3), {"exclude": range(WORDS)}, "exclude must leave a word, got all 12"),
        (([1], 3), {"exclude": [99]}, "ids must be from 0 to 11, the model's words, got 99"),
    ],
)
def test_errors_come_at_once(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        generate(language_model(), *arguments, **options)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), m.LMModel1(8, 8), m.LMModel3(8, 8)])
def test_other_models(model):
    with pytest.raises(ValueError, match=f"model must keep its state.*got {type(model).__name__}"):
        generate(model, [1], 3)

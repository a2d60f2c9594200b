"""AWD-LSTM's weights from and to fastai and awd-lstm-lm, whose nets are written anew here."""

import collections
import pickle

import pytest
import torch
from torch import nn

from lstmx.text import (
    load_awd_lstm_lm,
    load_fastai,
    load_fastai_encoder,
    match_embeddings,
    read_fastai_vocabulary,
    save_awd_lstm_lm,
    save_fastai,
    save_fastai_encoder,
)
from lstmx.text.awd_lstm import AWDLSTMConfig, AWDLSTMLanguageModel

WORDS = 23


class Wrapped(nn.Module):
    """A layer as fastai's WeightDropout leaves it: the raw weight outside, the rest within."""

    def __init__(self, sizes, bidirectional):
        super().__init__()
        self.module = nn.LSTM(*sizes, batch_first=True, bidirectional=bidirectional)
        raw = self.module.weight_hh_l0
        del self.module.weight_hh_l0
        self.weight_hh_l0_raw = nn.Parameter(raw.detach().clone())

    def forward(self, x, state):
        weights = dict(self.module.named_parameters()) | {"weight_hh_l0": self.weight_hh_l0_raw}
        plain = nn.LSTM(
            self.module.input_size,
            self.module.hidden_size,
            batch_first=True,
            bidirectional=self.module.bidirectional,
        )
        return torch.func.functional_call(plain, weights, (x, state))


class EmbeddingHolder(nn.Module):
    """fastai's EmbeddingDropout: the embedding a second time."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb


class Encoder(nn.Module):
    """fastai's AWD_LSTM in eval mode."""

    def __init__(self, embedding, hidden, layers, bidirectional):
        super().__init__()
        self.encoder = nn.Embedding(WORDS, embedding)
        self.encoder_dp = EmbeddingHolder(self.encoder)
        sizes = [embedding, *[hidden] * (layers - 1), embedding]
        directions = 2 if bidirectional else 1
        self.rnns = nn.ModuleList(
            Wrapped((sizes[i], sizes[i + 1] // directions), bidirectional) for i in range(layers)
        )
        self.state = [None] * layers

    def forward(self, ids):
        x = self.encoder(ids)
        for i, rnn in enumerate(self.rnns):
            x, self.state[i] = rnn(x, self.state[i])
        return x


class Decoder(nn.Module):
    """fastai's LinearDecoder in eval mode."""

    def __init__(self, embedding, tied_to, bias):
        super().__init__()
        self.decoder = nn.Linear(embedding, WORDS, bias=bias)
        if tied_to is not None:
            self.decoder.weight = tied_to.weight

    def forward(self, x):
        return self.decoder(x)


def fastai(embedding=6, hidden=10, layers=3, tied=True, bias=True, bidirectional=False):
    encoder = Encoder(embedding, hidden, layers, bidirectional)
    return nn.Sequential(encoder, Decoder(embedding, encoder.encoder if tied else None, bias))


VARIANTS = [
    {},
    {"tied": False},
    {"bias": False},
    {"layers": 1},
    {"layers": 2, "hidden": 7},
    {"bidirectional": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_fastai_there_and_back(options):
    torch.manual_seed(0)
    theirs = fastai(**options)
    ours = load_fastai(theirs.state_dict())
    assert ours.tied is options.get("tied", True)
    assert (ours.decoder.bias is not None) is options.get("bias", True)
    first, second = torch.randint(WORDS, (2, 4, 9)).unbind()
    for ids in (first, second):  # the state goes on
        logits = ours(ids)
        assert logits.shape == (4, 9, WORDS)
        torch.testing.assert_close(logits, theirs(ids))
    ours.reset()
    theirs[0].state = [None] * len(theirs[0].rnns)
    torch.testing.assert_close(ours(first), theirs(first))

    again = fastai(**options)
    again.load_state_dict(save_fastai(ours), strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert save_fastai(ours).keys() == theirs.state_dict().keys()


def test_fastai_files_with_an_optimiser_and_with_dropped_weights():
    theirs = fastai()
    state = theirs.state_dict()
    for index in range(3):  # what an old WeightDropout put in the raw weight's place
        name = f"0.rnns.{index}.module.weight_hh_l0"
        state[name] = torch.full_like(state[f"0.rnns.{index}.weight_hh_l0_raw"], 7.0)
    ids = torch.randint(WORDS, (2, 5))
    for order in (state, dict(reversed(state.items()))):
        ours = load_fastai({"model": order, "opt": {"hypers": []}})
        theirs[0].state = [None] * 3
        torch.testing.assert_close(ours(ids), theirs(ids))


def test_fastai_encoder():
    theirs = fastai()
    ours = load_fastai_encoder(theirs[0].state_dict())
    ids = torch.randint(WORDS, (2, 5))
    torch.testing.assert_close(ours(ids), theirs[0](ids))
    fastai()[0].load_state_dict(save_fastai_encoder(ours), strict=True)


def test_dropouts_are_the_callers():
    config = AWDLSTMConfig(embedding=1, weight_p=0.4, output_p=0.3)
    model = load_fastai(fastai().state_dict(), config)
    assert not model.training
    assert {rnn.weight_dropout for rnn in model.encoder.rnns} == {0.4}
    assert model.output_dropout.p == 0.3
    assert model.encoder.config.embedding == 6
    assert load_fastai(fastai().state_dict()).output_dropout.p == 0


def test_the_widths_of_1150_and_1152_load():
    for hidden in (1150, 1152):
        theirs = fastai(embedding=8, hidden=hidden, layers=2)
        ours = load_fastai(theirs.state_dict())
        ids = torch.randint(WORDS, (2, 3))
        torch.testing.assert_close(ours(ids), theirs(ids))


class TheirModel(nn.Module):
    """awd-lstm-lm's RNNModel in eval mode; time comes first in it."""

    def __init__(self, rnn, wrapped, tied=True):
        super().__init__()
        self.encoder = nn.Embedding(WORDS, 6)
        last = 6 if tied else 10  # as wide as the other layers, unless it has to fit
        layers = [rnn(6, 10), rnn(10, last)]
        self.rnns = nn.ModuleList([Drop(layer) for layer in layers] if wrapped else layers)
        self.decoder = nn.Linear(last, WORDS)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids):
        x = self.encoder(ids)
        for rnn in self.rnns:
            x, _ = rnn(x)
        return self.decoder(x)


class Drop(nn.Module):
    """awd-lstm-lm's WeightDrop: the raw weight is a parameter of the layer within."""

    def __init__(self, module):
        super().__init__()
        self.plain = [type(module)(module.input_size, module.hidden_size)]  # not registered
        self.module = module
        raw = module.weight_hh_l0
        del module.weight_hh_l0
        module.weight_hh_l0_raw = nn.Parameter(raw.detach().clone())

    def forward(self, x):
        weights = {n.removesuffix("_raw"): p for n, p in self.module.named_parameters()}
        return torch.func.functional_call(self.plain[0], weights, (x,))


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_awd_lstm_lm_there_and_back(rnn, wrapped, tied):
    theirs = TheirModel(rnn, wrapped, tied)
    ours = load_awd_lstm_lm(theirs.state_dict())
    ids = torch.randint(WORDS, (9, 4))
    torch.testing.assert_close(ours(ids.t()).transpose(0, 1), theirs(ids))
    again = TheirModel(rnn, True, tied)
    again.load_state_dict(save_awd_lstm_lm(ours), strict=True)
    torch.testing.assert_close(again(ids), theirs(ids))
    assert ours.tied is tied
    if not tied:
        with pytest.raises(ValueError, match="last layer must have the embedding's size 6, got 10"):
            save_fastai(ours)


@pytest.mark.parametrize("save", [save_fastai, save_awd_lstm_lm])
def test_the_adaptive_softmax_has_no_names_there(save):
    model = AWDLSTMLanguageModel(20, AWDLSTMConfig(16, 6, 2), tied=False, cutoffs=[9])
    with pytest.raises(ValueError, match="must have a linear decoder, got one with an adaptive"):
        save(model)
    words = [str(i) for i in range(20)]
    with pytest.raises(ValueError, match="must have a linear decoder"):
        match_embeddings(model, words, words)


def broken(change):
    state = dict(fastai().state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("0.encoder.weight"), "no 'encoder.weight'"),
        (lambda s: s.pop("0.rnns.1.weight_hh_l0_raw"), "no 'rnns.1.weight_hh_l0'"),
        (lambda s: s.pop("1.decoder.weight"), "no decoder weight"),
        (
            lambda s: s.update({"0.rnns.2.module.bias_hh_l0": torch.ones(3)}),
            "rnns.2.bias_hh_l0 must",
        ),
        (lambda s: s.update({"0.rnns.5.module.bias_hh_l0": torch.ones(3)}), r"\[0, 1, 2, 5\]"),
        (
            lambda s: s.update({"1.decoder.weight": torch.ones(3, 6)}),
            r"decoder.weight must have size \[23, 6\], got \[3, 6\]",
        ),
        (
            lambda s: s.update({"1.decoder.bias": torch.ones(3)}),
            r"decoder.bias must have size \[23\], got \[3\]",
        ),
        (lambda s: s.update({"1.decoder.other": torch.ones(3)}), "unexpected decoder.other"),
        (lambda s: s.update({"1.layers.0.weight": torch.ones(3)}), "unexpected 1.layers.0.weight"),
        (lambda s: s.update({"0.module.weight": torch.ones(3)}), "unexpected module.weight"),
        (
            lambda s: s.update({"0.encoder.weight": torch.ones(3)}),
            "must be a matrix, got size",
        ),
        (
            lambda s: s.update({"0.rnns.0.weight_hh_l0_raw": torch.ones(20, 10)}),
            r"rnns.0's recurrent weight must be \[4\*H, H\], got \[20, 10\]",
        ),
        (lambda s: s.update({"1.decoder.weight": 3}), "names to tensors, got '1.decoder.weight'"),
        (lambda s: s.clear(), r"rnns.0, 1, ..., got \[\]"),
    ],
)
def test_errors(change, words):
    with pytest.raises(ValueError, match=words):
        load_fastai(broken(change))


# ---- Vocabularies --------------------------------------------------------------------------------


class Items:
    """As fastcore's L: a class with the words in its state."""

    def __init__(self, items):
        self.items = items


class Bomb:
    """Runs something when it is unpickled the usual way."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_vocabulary(tmp_path):
    path = tmp_path / "vocab.pkl"
    words = ["xxunk", "xxpad", "the", "café"]
    for value in (words, Items(words), collections.UserList(words)):
        path.write_bytes(pickle.dumps(value))
        if isinstance(value, collections.UserList):
            with pytest.raises(ValueError, match="must hold a list of words"):
                read_fastai_vocabulary(path)
        else:
            assert read_fastai_vocabulary(path) == words


@pytest.mark.parametrize(
    "content", [pickle.dumps([1, 2]), pickle.dumps(Bomb()), pickle.dumps(["a"])[:-3], b"", b"words"]
)
def test_what_is_no_vocabulary(content, tmp_path):
    path = tmp_path / "vocab.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vocab.pkl (is no pickle of a vocabulary|must hold)"):
        read_fastai_vocabulary(path)


@pytest.mark.parametrize("tied", [True, False])
def test_match_embeddings(tied):
    model = AWDLSTMLanguageModel(3, AWDLSTMConfig(4, 6, 2), tied=tied)
    nn.init.normal_(model.decoder.bias)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    match_embeddings(model, ["a", "b", "c"], ["c", "new", "a", "other"])
    for name in ("encoder.embedding.weight", "decoder.weight", "decoder.bias"):
        old, new = before[name], model.state_dict()[name]
        assert torch.equal(new[0], old[2])
        assert torch.equal(new[2], old[0])
        torch.testing.assert_close(new[1], old.mean(0))
        assert torch.equal(new[3], new[1])
    assert model.tied is tied
    assert model(torch.tensor([[3, 1]])).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="old must have the model's 4 words, got 3"):
        match_embeddings(model.encoder, ["a", "b", "c"], ["a"])
    with pytest.raises(ValueError, match="new must have at least one word"):
        match_embeddings(model.encoder, ["a", "b", "c", "d"], [])


@pytest.mark.parametrize("options", [{"cell": "gru"}, {"bidirectional": True}], ids=str)
def test_other_encoders_keep_their_state(options):
    none = {f"{n}_p": 0.0 for n in ("embedding", "input", "weight", "hidden", "output")}
    model = AWDLSTMLanguageModel(20, AWDLSTMConfig(6, 10, 2, **options, **none))
    ids = torch.randint(20, (4, 8))
    whole = model(ids)
    model.reset()
    model(ids[:, :3])
    rest = model(ids[:, 3:])
    if "cell" in options:
        torch.testing.assert_close(rest, whole[:, 3:])
    assert rest.shape == (4, 5, 20)


def test_config_errors():
    with pytest.raises(ValueError, match="cell must be 'lstm' or 'gru', got 'rnn'"):
        AWDLSTMConfig(cell="rnn")
    with pytest.raises(ValueError, match="embedding must be even if bidirectional"):
        AWDLSTMConfig(embedding=5, bidirectional=True)
    with pytest.raises(ValueError, match="at least 1"):
        AWDLSTMConfig(layers=0)


def test_the_padding_stays_the_padding():
    model = AWDLSTMLanguageModel(4, AWDLSTMConfig(4, 6, 1), padding_idx=2)
    match_embeddings(model, ["a", "b", "pad", "c"], ["pad", "c"])
    assert model.encoder.embedding.padding_idx == 0
    match_embeddings(model, ["pad", "c"], ["c", "d"])
    assert model.encoder.embedding.padding_idx is None


def test_half_precision_files():
    theirs = fastai().half()
    ours = load_fastai(theirs.state_dict())
    assert ours.decoder.weight.dtype == torch.float16
    ids = torch.randint(WORDS, (2, 5))
    torch.testing.assert_close(ours.float()(ids), theirs.float()(ids))


def test_a_loaded_model_trains_and_is_saved_again():
    ours = load_fastai(fastai().state_dict(), AWDLSTMConfig()).train()
    torch.manual_seed(0)
    ours(torch.randint(WORDS, (2, 5))).square().sum().backward()
    with torch.no_grad():
        for p in ours.parameters():
            p -= 0.1 * p.grad
    theirs = fastai()
    theirs.load_state_dict(save_fastai(ours), strict=True)
    ids = torch.randint(WORDS, (2, 5))
    ours.reset()
    torch.testing.assert_close(ours.eval()(ids), theirs(ids))

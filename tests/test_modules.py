"""The modules against torch.nn: what goes in, what comes out, and what else a module has to do."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from tolerances import FLOAT32, FLOAT64
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstmx

NAMES = ["LSTM", "GRU"]
CELL_NAMES = ["LSTMCell", "GRUCell"]
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True, "bias": False},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "dropout": 0.4, "bidirectional": True},
    {"num_layers": 2, "dropout": 1.0},
]
I, H = 5, 7


def pair(name, *, dtype=torch.float64, **options):
    """Torch's module and ours, with the same weights."""
    expected = getattr(nn, name)(I, H, dtype=dtype, **options)
    ours = getattr(lstmx, name)(I, H, dtype=dtype, **options)
    ours.load_state_dict(expected.state_dict())
    return expected, ours


def inputs_of(module, dtype=torch.float64):
    """Each kind of input that the module takes, with the number of its rows."""
    batched = torch.randn(3, 4, I, dtype=dtype)
    lengths = (2, 4, 1, 4)
    rows = [torch.randn(n, I, dtype=dtype) for n in lengths]
    return [
        (batched, 3 if module.batch_first else 4),
        (torch.randn(6, I, dtype=dtype), None),
        (pack_sequence(rows, enforce_sorted=False), 4),
        (pack_sequence(sorted(rows, key=len, reverse=True)), 4),
    ]


def states_of(module, rows, dtype=torch.float64):
    layers = module.num_layers * (2 if module.bidirectional else 1)
    size = (layers, H) if rows is None else (layers, rows, H)
    if isinstance(module, nn.LSTM):
        return torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype)
    return torch.randn(size, dtype=dtype)


def flat(value):
    """All tensors of a nested result."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [t for t in value if t is not None]
    return [t for part in value for t in flat(part)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_equal_torchs(name, options):
    expected, ours = pair(name, **options)
    for input, rows in inputs_of(expected):
        for hx in (None, states_of(expected, rows)):
            found = []
            for module in (expected, ours):
                torch.manual_seed(1)
                y, last = module(input, hx)
                assert type(y) is type(input)
                tensors = flat((y, last))
                loss = sum(t.square().sum() for t in tensors if t.is_floating_point())
                found.append(tensors + list(torch.autograd.grad(loss, list(module.parameters()))))
            torch.testing.assert_close(found[1], found[0], **FLOAT64)


@pytest.mark.parametrize("name", NAMES)
def test_float32_and_strides_of_the_output(name):
    expected, ours = pair(name, dtype=torch.float32, batch_first=True)
    x = torch.randn(4, 3, I)
    torch.testing.assert_close(ours(x), expected(x), **FLOAT32)
    assert ours(x)[0].stride() == expected(x)[0].stride()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_as_torch(name, dtype):
    expected, ours = pair(name, dtype=torch.float32)
    x = torch.randn(4, 3, I, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = ours(x)
    # Not under autocast, where torch's LSTM raises an error on a processor without AVX-512.
    y_torch, last_torch = expected(x.float())
    for got, of_torch in zip(flat((y, last)), flat((y_torch, last_torch)), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), of_torch, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", NAMES + CELL_NAMES)
def test_same_initialisation_and_state_dict(name):
    torch.manual_seed(3)
    expected = getattr(nn, name)(I, H)
    torch.manual_seed(3)
    ours = getattr(lstmx, name)(I, H)
    assert list(ours.state_dict()) == list(expected.state_dict())
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    expected.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", CELL_NAMES)
def test_cells_equal_torchs(name):
    for bias in (True, False):
        expected, ours = pair(name, bias=bias)
        for size in ((3, I), (I,)):
            x = torch.randn(size, dtype=torch.float64)
            state = torch.randn((*size[:-1], H), dtype=torch.float64)
            for hx in (None, (state, state + 1) if name == "LSTMCell" else state):
                found = []
                for module in (expected, ours):
                    out = flat(module(x, hx))
                    loss = sum(t.square().sum() for t in out)
                    found.append(out + list(torch.autograd.grad(loss, list(module.parameters()))))
                torch.testing.assert_close(found[1], found[0], **FLOAT64)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_projections(options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported")
        expected, ours = pair("LSTM", proj_size=3, **options)
        for input, _ in inputs_of(expected):
            torch.testing.assert_close(flat(ours(input)), flat(expected(input)), **FLOAT64)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        lstmx.GRU(I, H, proj_size=3)


class Named(lstmx.LSTM):
    """A user's subclass."""


@pytest.mark.parametrize("make", [lstmx.LSTM, lstmx.GRU, Named, lstmx.LSTMCell, lstmx.GRUCell])
def test_is_torchs_class_and_its_own(make):
    module = make(I, H, weight_dropout=0.0)
    torch_class = getattr(nn, make.__name__, nn.LSTM)
    assert isinstance(module, torch_class)
    assert isinstance(module, make)
    assert not isinstance(module, nn.Linear)
    assert type(module) is make
    assert module.__class__.__name__ == make.__name__
    assert repr(module) == repr(torch_class(I, H)).replace(torch_class.__name__, make.__name__)


@pytest.mark.parametrize("make", [lstmx.LSTM, lstmx.GRU, Named, lstmx.LSTMCell, lstmx.GRUCell])
def test_copies(make):
    module = make(I, H, weight_dropout=0.25)
    x = torch.randn(2, 3, I) if "Cell" not in make.__name__ else torch.randn(3, I)
    flat(module(x))[0].sum().backward()  # after a training step
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(module.__class__(I, H, weight_dropout=0.25))),
    ]
    for twin in twins:
        assert type(twin) is make
        assert twin.weight_dropout == 0.25
        twin.load_state_dict(module.state_dict())
        torch.testing.assert_close(flat(twin.eval()(x)), flat(module.eval()(x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compile_in_one_graph(name, p):
    module = getattr(lstmx, name)(I, H, num_layers=2, weight_dropout=p)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert isinstance(module, getattr(nn, name))
    for length in (4, 6, 9):  # the second length makes the compiler take it as a symbol
        x = torch.randn(length, 3, I)
        torch.manual_seed(0)
        expected = module(x)
        torch.manual_seed(0)
        got = compiled(x)
        torch.testing.assert_close(flat(got), flat(expected))
        found = [
            torch.autograd.grad(y[0].sum(), list(module.parameters())) for y in (got, expected)
        ]
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile_with_inductor(name):
    module = getattr(lstmx, name)(I, H, weight_dropout=0.5)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 3, I)
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(0)
        got = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(flat(got), flat(module(x)))
    got[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    module = getattr(lstmx, name)(I, H, num_layers=2, bidirectional=True).eval()
    x = torch.randn(4, 3, I)
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(flat(program.module()(x)), flat(module(x)))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_looked_up_at_each_call(name):
    module = getattr(lstmx, name)(I, H)
    x = torch.randn(4, 3, I)
    zero = {key: torch.zeros_like(value) for key, value in module.state_dict().items()}
    y, _ = torch.func.functional_call(module, zero, (x,))
    assert y.abs().max() == 0
    module.weight_ih_l0 = nn.Parameter(torch.zeros_like(module.weight_ih_l0))
    assert torch.equal(module(x)[0], module(torch.randn(4, 3, I))[0])
    del module.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        module(x)


def test_parametrize_keeps_the_kernels_and_leaves_torch_alone():
    expected, ours = pair("LSTM")
    for module in (expected, ours):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        with torch.no_grad():
            module.parametrizations.weight_hh_l0.original0.mul_(2)
    x = torch.randn(4, 3, I, dtype=torch.float64)
    torch.testing.assert_close(ours(x), expected(x), **FLOAT64)
    assert isinstance(ours, lstmx.LSTM)
    assert "_torch_class" in dir(ours)
    assert not hasattr(nn.LSTM, "weight_hh_l0")
    assert not hasattr(lstmx.LSTM, "weight_hh_l0")
    torch.testing.assert_close(copy.deepcopy(ours)(x), expected(x), **FLOAT64)
    nn.utils.parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is lstmx.LSTM
    torch.testing.assert_close(ours(x), expected(x), **FLOAT64)


def test_prune():
    _, ours = pair("GRU")
    prune.l1_unstructured(ours, "weight_ih_l0", amount=0.5)
    zeroed = nn.GRU(I, H, dtype=torch.float64)
    zeroed.load_state_dict({n: getattr(ours, n).detach() for n in zeroed.state_dict()})
    x = torch.randn(4, 3, I, dtype=torch.float64)
    torch.testing.assert_close(ours(x), zeroed(x), **FLOAT64)


@pytest.mark.parametrize("name", NAMES)
def test_flat_weights(name):
    module = getattr(lstmx, name)(I, H, num_layers=2, weight_dropout=0.5)
    assert module.flatten_parameters() is None
    for a, b in zip(module._flat_weights, module.parameters(), strict=True):
        assert a is b
    module.double()
    assert module._flat_weights[0].dtype == torch.float64
    assert [len(layer) for layer in module.all_weights] == [4, 4]
    assert repr(module) == f"{name}({I}, {H}, num_layers=2, weight_dropout=0.5)"


def test_meta_device():
    module = lstmx.LSTM(I, H, device="meta", weight_dropout=0.5)
    y, (h_n, c_n) = module(torch.randn(4, 3, I, device="meta"))
    assert y.shape == (4, 3, H)
    assert h_n.shape == c_n.shape == (1, 3, H)
    module.to_empty(device="cpu").reset_parameters()
    assert module(torch.randn(4, 3, I))[0].shape == (4, 3, H)


def test_training_reduces_the_loss_as_torchs_does():
    losses = []
    for make in (nn.LSTM, lstmx.LSTM):
        torch.manual_seed(0)
        module, head = make(4, 16), nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*module.parameters(), *head.parameters()], lr=1e-2)
        x = torch.randn(10, 8, 4)
        for _ in range(30):
            loss = nn.functional.mse_loss(head(module(x)[0]), x.roll(1, 0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)

"""What only a real device can show. What the emulator can show too is in test_cuda.py."""

import copy
import itertools

import pytest
import torch
from cases import CELLS, Case
from providers import run
from test_cuda import rnn_precision
from test_sequence import assert_same, rms
from tolerances import FLOAT32, FLOAT64, RMS_FLOOR_EPS, RMS_RATIO, RMS_SEEDS
from torch import nn

import lstmx

pytestmark = pytest.mark.gpu


def make(cell, *arguments, **options):
    """A module of ours on the device."""
    return getattr(lstmx, cell.upper())(*arguments, device="cuda", **options)


SIZES = [64, 650, 1150]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("I", "H"), list(itertools.product(SIZES, SIZES)), ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_errors_are_at_most_twice_cudnns(cell, I, H, p, dtype):
    case = Case(cell, T=6, B=5, I=I, H=H, weight_dropout=p)
    errors = {"lstmx": {}, "torch": {}}
    scale = {}
    for seed in range(RMS_SEEDS if I == H == 64 else 2):
        exact = run("torch", case, seed=seed, backward_dtype=dtype, device="cuda")
        for provider, found in errors.items():
            with rnn_precision("ieee"):
                values = run(provider, case, dtype, seed=seed, device="cuda")
            for name, value in values.items():
                if name not in exact:
                    continue
                found.setdefault(name, []).append((value.double() - exact[name]).flatten())
                scale.setdefault(name, []).append(exact[name].flatten())
    for name, of_torch in errors["torch"].items():
        ours, theirs = rms(torch.cat(errors["lstmx"][name])), rms(torch.cat(of_torch))
        floor = RMS_FLOOR_EPS[dtype] * torch.finfo(dtype).eps * rms(torch.cat(scale[name]))
        assert ours <= RMS_RATIO * theirs + floor, (name, ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("I", "H"), [(64, 1150), (650, 64), (1150, 650)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_float64_equals_cudnn(cell, I, H, p):
    case = Case(cell, T=6, B=5, I=I, H=H, weight_dropout=p)
    got, expected = (run(name, case, device="cuda") for name in ("lstmx", "torch"))
    assert_same({name: got[name] for name in expected}, expected, **FLOAT64)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    case = Case(cell, T=3, B=2, I=3, H=4, weight_dropout=0.5)
    inputs = {k: t.detach().cuda().requires_grad_() for k, t in case.inputs(torch.float64).items()}
    op = getattr(lstmx, f"{cell}_sequence")

    def f(*tensors):
        return op(**dict(zip(inputs, tensors, strict=True)), **case.options("cuda"))[0]

    torch.autograd.gradcheck(f, list(inputs.values()))
    torch.autograd.gradgradcheck(f, list(inputs.values()))


@pytest.mark.parametrize("cell", CELLS)
def test_modules_equal_cudnn(cell):
    ours = make(cell, 33, 65, num_layers=2, bidirectional=True, batch_first=True)
    theirs = getattr(nn, cell.upper())(
        33, 65, num_layers=2, bidirectional=True, batch_first=True, device="cuda"
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 7, 33, device="cuda", requires_grad=True)
    with rnn_precision("ieee"):
        results = []
        for module in (ours, theirs):
            y, state = module(x)
            state = state if cell == "lstm" else (state,)
            loss = y.square().sum() + sum(s.sum() for s in state)
            results.append([y, *state, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)


@pytest.mark.parametrize("cell", CELLS)
def test_a_captured_graph_draws_a_new_mask_at_each_replay(cell):
    module = make(cell, 16, 24, weight_dropout=0.5)
    x = torch.randn(5, 3, 16, device="cuda")

    def step():
        module.zero_grad(set_to_none=False)
        y = module(x)[0]
        y.sum().backward()
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    outputs, masks = [], []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        outputs.append(y.clone())
        # Dropped weights have no gradient.
        masks.append(module.weight_hh_l0.grad != 0)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(masks[1], masks[2])
    assert 0.4 < masks[0].double().mean() < 0.6


@pytest.mark.parametrize("cell", CELLS)
def test_two_streams(cell):
    module = make(cell, 64, 128)
    x = torch.randn(50, 32, 64, device="cuda")
    with torch.no_grad():
        expected = module(x)[0]
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for _ in range(5):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(module(x)[0])
        torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_a_device_that_is_not_the_current_one(cell):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a CUDA device beside the first")
    module = make(cell, 8, 16).to("cuda:1")
    y = module(torch.randn(3, 2, 8, device="cuda:1"))[0]
    y.sum().backward()
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(cell, dtype):
    module = make(cell, 16, 24)
    x = torch.randn(5, 3, 16, device="cuda")
    with torch.autocast("cuda", dtype):
        y, _ = module(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(cell, dtype):
    case = Case(cell, T=20, B=33, I=100, H=200, weight_dropout=0.5)
    first, second = (run("lstmx", case, dtype, device="cuda") for _ in range(2))
    assert_same(first, second, rtol=0, atol=0)


def test_out_of_memory_is_told_and_later_calls_work():
    module = make("lstm", 64, 4096)
    x = torch.randn(1, 1, 64, device="cuda").expand(2_000, 4096, 64)
    with pytest.raises(torch.OutOfMemoryError):
        module(x)
    y = module(torch.randn(3, 2, 64, device="cuda"))[0]
    assert y.isfinite().all()


def test_compile_on_the_device():
    module = make("lstm", 16, 24)
    x = torch.randn(5, 3, 16, device="cuda")
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], module(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_backward_in_eval_mode_which_cudnn_refuses(cell):
    module = make(cell, 8, 16).eval()
    theirs = getattr(nn, cell.upper())(8, 16, device="cuda").eval()
    x = torch.randn(3, 2, 8, device="cuda", requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert dx.isfinite().all()
    with pytest.raises(RuntimeError, match="training mode"):
        torch.autograd.grad(theirs(x)[0].sum(), x)


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_which_cudnn_lacks(cell):
    module = make(cell, 8, 16)
    theirs = getattr(nn, cell.upper())(8, 16, device="cuda")
    x = torch.randn(3, 2, 8, device="cuda", requires_grad=True)

    def penalty(m):
        (dx,) = torch.autograd.grad(m(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(m.parameters()))

    assert all(grad.isfinite().all() for grad in penalty(module))
    with pytest.raises(RuntimeError):
        penalty(theirs)

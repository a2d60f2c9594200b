"""Derivatives of every kind, transforms, and the compiler."""

import pytest
import torch
from cases import CELLS, Case
from torch import library
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import lstmx

BASE = [Case(cell, T=3, B=3, I=2, H=3) for cell in CELLS]
VARIANTS = [
    *BASE,
    *[Case(c.cell, 3, 3, 2, 3, weight_dropout=0.5) for c in BASE],
    *[Case(c.cell, 3, 3, 2, 3, bias=False, reverse=True, memory="low") for c in BASE],
    *[Case(c.cell, 3, 3, 2, 3, lengths=(3, 2, 1), weight_dropout=0.5, memory="low") for c in BASE],
    *[Case(c.cell, 3, 3, 2, 3, lengths=(3, 2, 1), reverse=True) for c in BASE],
    *[Case(c.cell, 1, 1, 1, 1) for c in BASE],
]


def function_of(case):
    """The op as a function of its tensors, and float64 tensors."""
    inputs = case.inputs(torch.float64, generator=torch.Generator().manual_seed(0))
    names = list(inputs)

    def f(*tensors):
        given = dict(zip(names, tensors, strict=True))
        if case.cell == "gru":
            return lstmx.gru_sequence(**given, **case.options(), memory=case.memory)
        return lstmx.lstm_sequence(**given, **case.options(), memory=case.memory, cell_states=True)

    return f, list(inputs.values())


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradcheck(case):
    f, inputs = function_of(case)
    torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_forward_mode(case):
    f, inputs = function_of(case)
    torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradgradcheck(case):
    f, inputs = function_of(case)
    torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("case", VARIANTS[:4], ids=str)
def test_third_derivative(case):
    """Through create_graph twice: the graph must not be lost on the way."""
    f, inputs = function_of(case)
    fixed = [t.detach().requires_grad_() for t in inputs[2:]]

    def second(x, h0):
        variables = [x, h0, *fixed]
        first = torch.autograd.grad(f(*variables)[0].pow(3).sum(), variables, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return torch.autograd.grad(loss, [x, h0], create_graph=True)

    torch.autograd.gradcheck(second, inputs[:2])


@pytest.mark.parametrize("case", BASE, ids=str)
def test_double_backward_when_one_input_depends_on_another(case):
    f, inputs = function_of(case)
    x = inputs[0]

    def tied(x):
        return f(x, x[0, :, :1].expand(-1, 3) * inputs[1], *inputs[2:])[0]

    torch.autograd.gradgradcheck(tied, [x])


@pytest.mark.parametrize("case", VARIANTS[:6], ids=str)
def test_functorch(case):
    f, inputs = function_of(case)
    inputs = [t.detach() for t in inputs]

    def of_x(x):
        return f(x, *inputs[1:])[0]

    x = inputs[0]
    tangent = torch.randn_like(x)
    reverse = jacrev(of_x)(x)
    torch.testing.assert_close(jacfwd(of_x)(x), reverse)
    y, dy = jvp(of_x, (x,), (tangent,))
    torch.testing.assert_close(y, of_x(x))
    torch.testing.assert_close(dy, torch.tensordot(reverse, tangent, x.dim()))
    h = hessian(lambda x: of_x(x).square().sum())(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(h, h.T)


@pytest.mark.parametrize("case", [VARIANTS[0], VARIANTS[3]], ids=str)
def test_vmap_over_inputs_and_over_an_ensemble_of_weights(case):
    f, inputs = function_of(case)
    inputs = [t.detach() for t in inputs]
    xs = torch.randn(4, *inputs[0].shape, dtype=torch.float64)
    for got, x in zip(vmap(lambda x: f(x, *inputs[1:])[0])(xs), xs, strict=True):
        torch.testing.assert_close(got, f(x, *inputs[1:])[0])
    weights = [torch.randn(4, *w.shape, dtype=torch.float64) for w in inputs[-4:]]
    ensemble = vmap(lambda *w: f(*inputs[:-4], *w)[0])(*weights)
    for i, got in enumerate(ensemble):
        torch.testing.assert_close(got, f(*inputs[:-4], *[w[i] for w in weights])[0])


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck_public_ops(case):
    inputs = list(case.inputs().values())
    op = getattr(torch.ops.lstmx, f"{case.cell}_sequence").default
    library.opcheck(op, inputs, case.options() | {"memory": case.memory})
    if case.cell == "lstm":
        library.opcheck(op, inputs, case.options() | {"cell_states": True})


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck_internal_ops(case):
    tensors = {name: t.detach() for name, t in case.inputs().items()}
    options = case.options()
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
    args = [case.cell, *(tensors.get(name) for name in names)]
    tail = [options[name] for name in ("batch_sizes", "reverse", "seed", "weight_dropout")]
    forward = torch.ops.lstmx._sequence_forward.default
    x, packed = tensors["x"], options["batch_sizes"] is not None
    rows = x.size(0) if packed else x.size(0) * x.size(1)
    for saved_rows in (rows, 0) if packed else (rows, x.size(1), 0):
        library.opcheck(forward, (*args, *tail, saved_rows, True))
    y, h_n, _, c, saved = forward(*args, *tail, rows, True)
    needed = [tensors.get(name) is not None for name in names]
    grads = [torch.randn_like(y), torch.randn_like(h_n), None, None]
    library.opcheck(
        torch.ops.lstmx._sequence_backward.default, (*grads, *args, *tail, y, c, saved, needed)
    )


def test_opcheck_weight_mask():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        library.opcheck(
            torch.ops.lstmx.weight_mask.default, (torch.tensor(5), [8, 3], 0.5), {"dtype": dtype}
        )


@pytest.mark.parametrize("cell", CELLS)
def test_retain_graph_and_inplace_safety(cell):
    case = Case(cell, T=3, B=2, I=2, H=3)
    f, inputs = function_of(case)
    y = f(*inputs)[0]
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        inputs[-1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), inputs)


def test_no_gates_are_kept_without_a_gradient():
    """Saved tensors are seen by hooks; under no_grad or without requires_grad there are none."""
    f, inputs = function_of(BASE[0])
    seen = []

    def pack(t):
        seen.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.no_grad():
            f(*inputs)
        f(*[t.detach() for t in inputs])
        assert seen == []
        f(*inputs)
        assert (9, 4, 3) in seen  # N rows of four gates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell, dtype):
    f, inputs = function_of(Case(cell, T=3, B=2, I=4, H=5))
    inputs = [t.detach().float().requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype):
        y = f(*inputs)[0]
    assert y.dtype == dtype
    expected = f(*[t.to(dtype) for t in inputs])[0]
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs)

"""The CUDA backend: under the emulator everywhere, and on the device where there is one."""

from contextlib import contextmanager

import cases
import emulated
import pytest
import torch
from cases import Case
from providers import run
from test_sequence import assert_same
from tolerances import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, TF32
from torch import library

import lstmx

ON_A_DEVICE = pytest.param("cuda", marks=pytest.mark.gpu)
BACKENDS = ["emulated", ON_A_DEVICE]
SMALL = [case for case in cases.PARITY if case.T * case.B * case.H * (case.H + case.I) < 300_000]


def run_on(backend, case, dtype=torch.float64, **options):
    """By the emulator, or by the op on the device."""
    if backend == "emulated":
        return run("emulated", case, dtype, **options)
    return run("lstmx", case, dtype, device="cuda", **options)


@contextmanager
def rnn_precision(name):
    """'ieee' or 'tf32', for recurrent nets alone."""
    flags = torch.backends.cudnn.rnn
    before, products = flags.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    flags.fp32_precision = name
    try:
        yield
        assert torch.backends.cuda.matmul.fp32_precision == products
    finally:
        flags.fp32_precision = before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.PARITY + cases.CUDA_PATHS, ids=str)
def test_float64_equals_reference(backend, case):
    assert_same(run_on(backend, case), run("reference", case), **FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL[::3], ids=str)
def test_float32_equals_torch(backend, case):
    with rnn_precision("ieee"):
        got = run_on(backend, case, torch.float32)
    assert_same(got, run("torch", case, torch.float32), **FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL[1::4] + cases.CUDA_PATHS, ids=str)
def test_16_bit_equals_reference(backend, case, dtype):
    expected = run("reference", case, backward_dtype=dtype)
    tolerance = BFLOAT16 if dtype == torch.bfloat16 else FLOAT16
    got = run_on(backend, case, dtype)
    assert_same({k: v.double() for k, v in got.items()}, expected, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_tf32_follows_the_flag_of_recurrent_nets(backend, cell):
    case = Case(cell, T=3, B=5, I=33, H=65, weight_dropout=0.5)
    exact = run("reference", case)
    errors = {}
    for precision in ("ieee", "tf32"):
        with rnn_precision(precision):
            got = run_on(backend, case, torch.float32)
        assert_same({k: v.double() for k, v in got.items()}, exact, **TF32)
        errors[precision] = (got["y"].double() - exact["y"]).abs().max().item()
    assert errors["ieee"] < 1e-6 < 1e-5 < errors["tf32"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [33, 650, 1150])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_products_run_on_aligned_rows(backend, cell, size):
    """Each product asserts it of all of its matrices; these sizes have rows of 4 k + 2 bytes."""
    case = Case(cell, T=2, B=3, I=size, H=size, weight_dropout=0.5)
    dtype = torch.bfloat16
    expected = run("reference", case, torch.float32, backward_dtype=dtype)
    got = run_on(backend, case, dtype)
    assert_same({k: v.float() for k, v in got.items()}, expected, **BFLOAT16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_the_same_mask_bits_as_on_the_cpu(backend, p):
    seed = torch.tensor(-(2**62) + 12345)
    for size in ((7, 3), (260, 65), (1,), (0, 4)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            expected = lstmx.weight_mask(seed, size, p, dtype=dtype)
            if backend == "emulated":
                got = emulated.ops().weight_mask(seed, size, p, dtype=dtype)
            else:
                got = lstmx.weight_mask(seed.cuda(), size, p, dtype=dtype).cpu()
            assert torch.equal(got, expected)


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_every_order_of_threads_gives_the_same_bits(cell, order):
    case = Case(cell, T=4, B=5, I=7, H=40, lengths=(4, 4, 2, 1, 1), weight_dropout=0.5)
    expected = run("emulated", case, torch.float32)
    emulated.ops().set_order(emulated.ORDERS.index(order), 5)
    try:
        got = run("emulated", case, torch.float32)
    finally:
        emulated.ops().set_order(0, 0)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


VARIANTS = [
    variant
    for cell in cases.CELLS
    for variant in (
        Case(cell, 3, 3, 2, 3, weight_dropout=0.5),
        Case(cell, 3, 3, 2, 3, bias=False, reverse=True, memory="low"),
        Case(cell, 3, 3, 2, 3, lengths=(3, 2, 1), reverse=True),
    )
]


def emulated_function(case):
    """The emulated op as a function of its tensors, those tensors, and its options."""
    inputs = case.inputs(torch.float64, generator=torch.Generator().manual_seed(0))
    options = case.options() | {"memory": case.memory}
    if case.cell == "lstm":
        return emulated.ops().lstm_sequence, inputs, options | {"cell_states": True}
    return emulated.ops().gru_sequence, inputs, options


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradcheck(case):
    op, inputs, options = emulated_function(case)

    def f(*tensors):
        return op(**dict(zip(inputs, tensors, strict=True)), **options)

    torch.autograd.gradcheck(f, list(inputs.values()))
    torch.autograd.gradgradcheck(f, list(inputs.values()))


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_opcheck(case):
    op, inputs, options = emulated_function(case)
    library.opcheck(op.default, (), inputs | options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_an_empty_batch(backend, cell):
    result = run_on(backend, Case(cell, T=3, B=0, I=4, H=5), torch.float32)
    assert result["y"].shape == (3, 0, 5)
    assert torch.equal(result["dw_hh"], torch.zeros_like(result["dw_hh"]))


# cudaErrorMemoryAllocation, cudaErrorNoKernelImageForDevice, cudaErrorLaunchOutOfResources
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, "lstmx could not launch a kernel on cpu: out of memory"),
        (209, "lstmx was not built for the device cpu; .* TORCH_CUDA_ARCH_LIST"),
        (701, "lstmx could not launch a kernel on cpu: too many resources requested"),
    ],
)
@pytest.mark.parametrize("cell", cases.CELLS)
def test_a_failed_launch_is_told_and_later_calls_work(cell, code, words):
    case = Case(cell, T=3, B=2, I=4, H=5)
    expected = run("emulated", case)
    emulated.ops().fail_next_launch(code)
    with pytest.raises(RuntimeError, match=words):
        run("emulated", case)
    assert_same(run("emulated", case), expected, rtol=0, atol=0)


def test_a_cuda_tensor_without_cuda():
    """Seen from the dispatcher, as a CPU build of lstmx under a CUDA build of torch sees it."""
    if lstmx._C.cuda:
        pytest.skip("needs a build of lstmx without CUDA")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(NotImplementedError, match=r"lstmx was built without CUDA; .*LSTMX_CUDA=1"):
        torch.ops.lstmx.weight_mask.default.redispatch(cuda, torch.tensor(1), (2, 3), 0.5)


def test_mixed_devices():
    inputs = Case("lstm", T=3, B=2, I=4, H=5).inputs()
    inputs["w_hh"] = inputs["w_hh"].to("meta")
    with pytest.raises(RuntimeError, match="w_hh must be on the device of x, cpu, got meta"):
        lstmx.lstm_sequence(**inputs)

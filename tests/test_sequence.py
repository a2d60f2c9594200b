"""The kernels against the reference and torch.nn: outputs and all gradients."""

import os
import subprocess
import sys

import cases
import pytest
import torch
from cases import Case
from providers import PROVIDERS, run
from tolerances import FLOAT32, FLOAT64, RMS_FLOOR_EPS, RMS_RATIO, RMS_SEEDS

import lstmx


def assert_same(got, expected, names=None, **tolerance):
    for name in names or expected:
        torch.testing.assert_close(
            got[name], expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", cases.PARITY + cases.CPU_PATHS, ids=str)
def test_float64_equals_reference_and_torch(case):
    got = run("lstmx", case)
    assert_same(got, run("reference", case), **FLOAT64)
    assert_same(got, run("torch", case), **FLOAT64)


@pytest.mark.parametrize("case", cases.PARITY + cases.CPU_PATHS, ids=str)
def test_float32_equals_torch(case):
    got, expected = (run(name, case, torch.float32) for name in ("lstmx", "torch"))
    for name, tensor in expected.items():
        # The tolerance is for numbers near 1; gradients of weights are sums over all rows.
        scale = max(1.0, tensor.square().mean().sqrt().item())
        tolerance = FLOAT32 | {"atol": FLOAT32["atol"] * scale}
        assert_same(got, expected, [name], **tolerance)


@pytest.mark.parametrize("memory", ["high", "low"])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_chunks_of_a_backward_hand_over_their_states(cell, memory):
    """With gradients of the last states and none of y, all that moves passes the borders."""
    case = Case(cell, T=7, B=256, I=3, H=300 if memory == "high" else 20, memory=memory)
    inputs = case.inputs(torch.float64, generator=torch.Generator().manual_seed(3))
    pieces = {name: t.detach().requires_grad_() for name, t in inputs.items()}

    def last_state(inputs, step):
        op = lstmx.lstm_sequence if cell == "lstm" else lstmx.gru_sequence
        return (
            op(**inputs | step, memory=memory)[1:-1]
            if cell == "lstm"
            else op(**inputs | step, memory=memory)[1:2]
        )

    whole = sum((s * s).sum() for s in last_state(inputs, {}))
    states = {}
    for x in pieces["x"].split(1):
        last = last_state(pieces, {"x": x, **states})
        states = dict(zip(("h0", "c0"), last, strict=False))
    stepwise = sum((s * s).sum() for s in last)
    got = torch.autograd.grad(whole, list(inputs.values()))
    expected = torch.autograd.grad(stepwise, list(pieces.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def rms(t):
    return t.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(cell, T=T, B=7, I=33, H=H, weight_dropout=p)
        for cell in cases.CELLS
        for T, H, p in ((12, 65, 0.0), (5, 17, 0.5), (33, 3, 0.0))
    ]
    + [
        Case(cell, T=T, B=B, I=32, H=H, weight_dropout=0.5, memory=memory)
        for cell in cases.CELLS
        for T, B, H, memory in (
            (4, 33, 40, "high"),
            (1, 20, 40, "high"),
            (9, 64, 40, "low"),
            (9, 200, 300, "high"),  # in chunks
        )
    ],
    ids=str,
)
def test_rounding_errors_are_at_most_twice_torchs(case, dtype):
    errors = {"lstmx": {}, "torch": {}}
    size = {}
    # The more numbers, the fewer it takes to know their mean square.
    for seed in range(RMS_SEEDS if case.B < 200 else 3):
        exact = run("reference", case, seed=seed, backward_dtype=dtype)
        for provider, found in errors.items():
            for name, value in run(provider, case, dtype, seed=seed).items():
                assert value.dtype == dtype
                found.setdefault(name, []).append((value.double() - exact[name]).flatten())
                size.setdefault(name, []).append(exact[name].flatten())
    for name, of_torch in errors["torch"].items():
        ours, theirs = rms(torch.cat(errors["lstmx"][name])), rms(torch.cat(of_torch))
        floor = RMS_FLOOR_EPS[dtype] * torch.finfo(dtype).eps * rms(torch.cat(size[name]))
        assert ours <= RMS_RATIO * theirs + floor, (name, ours, theirs)


@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("memory", ["high", "low"])
def test_outputs_are_written_in_full(cell, memory):
    """Fresh memory is filled with NaN; none may be left, and none may be read."""
    case = Case(cell, T=5, B=9, I=6, H=70, lengths=(5, 4, 4, 3, 3, 2, 1, 1, 1), memory=memory)
    clean = run("lstmx", case, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        poisoned = run("lstmx", case, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in poisoned.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("cell", cases.CELLS)
def test_strided_inputs_and_gradients(cell):
    case = Case(cell, T=4, B=6, I=5, H=9)
    inputs = case.inputs()

    def forward(inputs):
        op = lstmx.lstm_sequence if cell == "lstm" else lstmx.gru_sequence
        return op(**inputs)

    def strided(t):
        return t.detach().mT.contiguous().mT.requires_grad_() if t.dim() > 1 else t

    views = {name: strided(t) for name, t in inputs.items()}
    assert not views["x"].is_contiguous()
    views["h0"] = views["h0"].detach()[:1].expand(6, -1).requires_grad_()
    inputs["h0"] = views["h0"].detach().contiguous().requires_grad_()
    expected, got = forward(inputs)[0], forward(views)[0]
    assert torch.equal(got, expected)
    # sum() sends back one number, expanded with stride 0.
    expected = torch.autograd.grad(expected.sum(), list(inputs.values()))
    got = torch.autograd.grad(got.sum(), list(views.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", cases.BENCHMARKS["cpu"][-10:], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_are_bitwise_equal(case, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (run("lstmx", case, torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    "case",
    [
        Case("lstm", T=3, B=64, I=64, H=64),
        Case("gru", T=3, B=64, I=64, H=64, weight_dropout=0.5),
        Case("lstm", T=3, B=6, I=100, H=600, weight_dropout=0.5),
        Case("gru", T=4, B=6, I=100, H=600, lengths=(4, 4, 2, 2, 1, 1), reverse=True),
    ],
    ids=str,
)
def test_any_number_of_threads(case):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run("lstmx", case, torch.float32)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert_same(run("lstmx", case, torch.float32), expected, **FLOAT32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate_as_in_torch(cell, bad):
    case = Case(cell, T=4, B=3, I=5, H=20)
    results = []
    for provider in ("lstmx", "torch"):
        inputs = case.inputs(generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            inputs["x"][1, 1, 2] = bad
        outputs = PROVIDERS[provider](case, inputs)
        outputs["y"].sum().backward()
        results.append({"y": outputs["y"].detach(), "h_n": outputs["h_n"].detach()})
        results[-1]["dx"] = inputs["x"].grad
    assert results[0]["y"][1, 1].isnan().any() == results[1]["y"][1, 1].isnan().any()
    assert_same(results[0], results[1], ("y", "h_n", "dx"), equal_nan=True, **FLOAT32)


def test_extreme_pre_activations_saturate():
    x = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30]).view(1, 7, 1)
    weights = {"w_ih": torch.ones(4, 1), "w_hh": torch.zeros(4, 1)}
    zero = torch.zeros(7, 1)
    y, _, c_n, _ = lstmx.lstm_sequence(x, zero, zero + 0.5, **weights)
    sigmoid, tanh = torch.sigmoid(x[0]), torch.tanh(x[0])
    c = sigmoid * 0.5 + sigmoid * tanh
    torch.testing.assert_close(c_n, c, rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(y[0], sigmoid * torch.tanh(c), rtol=1e-6, atol=1e-38)


def test_small_numbers_keep_their_relative_accuracy():
    """tanh(x) is x for small x; a formula by exp alone loses all digits there."""
    x = torch.logspace(-30, -3, 64).view(1, 64, 1)
    w = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    zero = torch.zeros(64, 1)
    _, _, c_n, _ = lstmx.lstm_sequence(x, zero, zero, w, torch.zeros(4, 1))
    torch.testing.assert_close(c_n, 0.5 * torch.tanh(x[0].double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cell", cases.CELLS)
def test_an_empty_batch(cell):
    case = Case(cell, T=3, B=0, I=4, H=5)
    result = run("lstmx", case, torch.float32)
    assert result["y"].shape == (3, 0, 5)
    assert result["h_n"].shape == (0, 5)
    for name in ("dw_ih", "dw_hh", "db_ih", "db_hh"):
        assert torch.equal(result[name], torch.zeros_like(result[name]))


def test_only_what_is_needed_is_returned():
    case = Case("lstm", T=3, B=2, I=4, H=5)
    inputs = case.inputs()
    for wanted in inputs:
        frozen = {k: t.detach().requires_grad_(k == wanted) for k, t in inputs.items()}
        lstmx.lstm_sequence(**frozen)[0].sum().backward()
        assert [k for k, t in frozen.items() if t.grad is not None] == [wanted]


def test_cell_states_only_for_those_who_ask():
    inputs = Case("lstm", T=3, B=2, I=4, H=5).inputs()
    assert lstmx.lstm_sequence(**inputs)[3].numel() == 0
    y, _, c_n, c = lstmx.lstm_sequence(**inputs, cell_states=True)
    assert c.shape == y.shape
    assert torch.equal(c[-1], c_n)


# What torch, too, can run here: told to use more, it would crash.
CAPABILITIES = ["default", "avx2", "avx512"]
BEST = torch.backends.cpu.get_cpu_capability().lower()


def _products_in_a_process(capability=BEST, **environment):
    """Whether bfloat16 is as right as torch's, and how it is multiplied."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import lstmx\n"
        "from test_sequence import test_rounding_errors_are_at_most_twice_torchs as check\n"
        "from cases import CELLS, Case\n"
        "print(lstmx._C.bfloat16_products())\n"
        "for cell in CELLS:\n"
        "    for T, B, I, H in ((12, 7, 33, 65), (4, 40, 32, 130), (1, 20, 16, 40)):\n"
        "        check(Case(cell, T, B, I, H, weight_dropout=0.5), torch.bfloat16)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, os.path.dirname(__file__)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_bfloat16_is_right_however_it_is_multiplied():
    """By AMX, by an instruction, as float32: what a processor lacks falls back to the last."""
    assert _products_in_a_process("default") == "float32"
    best = _products_in_a_process()
    without = _products_in_a_process(LSTMX_MATRIX_UNIT="0")
    assert (best, without) in {
        ("matrix unit", "float32"),  # AMX, which Intel's processors have
        ("pairs", "pairs"),  # AMD's
        ("float32", "float32"),
    }


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability):
    """In a process of its own: the choice is made once."""
    if CAPABILITIES.index(capability) > CAPABILITIES.index(BEST):
        pytest.skip(f"needs a machine with {capability.upper()}")
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import cases, lstmx\n"
        "from providers import run\n"
        "from tolerances import FLOAT32, FLOAT64\n"
        "print(lstmx._C.cpu_capability())\n"
        "for case in cases.PARITY[-20:]:\n"
        "    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):\n"
        "        got, expected = (run(p, case, dtype) for p in ('lstmx', 'reference'))\n"
        "        for name in expected:\n"
        "            torch.testing.assert_close(got[name], expected[name], **tolerance)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, os.path.dirname(__file__)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == capability


@pytest.mark.parametrize(
    ("cell", "T", "B", "kept"),
    [
        *[("lstm", 30, 64, 6), ("gru", 70, 64, 7)],  # as many as ops.py says
        *[("lstm", 16, 64, 5), ("gru", 16, 64, 5)],  # more of a shorter call
        *[("lstm", 17, 56, 0), ("gru", 17, 56, 0)],
    ],
)
def test_low_memory_keeps_the_gates_of_the_last_steps(cell, T, B, kept):
    case = Case(cell, T=T, B=B, I=2, H=3, memory="low")
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        run("lstmx", case)
    assert (kept * B, 4, case.H) in sizes

"""Threads, forks, busy cores, denormals, strange gradients: results stay right and prompt."""

import ctypes
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from cases import CELLS, Case
from providers import PROVIDERS, run
from tolerances import FLOAT32

import lstmx

# Several threads share the rows in the first, the hidden units in the second.
TEAMS = [Case("lstm", T=12, B=64, I=48, H=96), Case("gru", T=6, B=12, I=40, H=384)]


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected():
    """The results of one thread."""
    with threads(1):
        return {case: run("lstmx", case, torch.float32) for case in TEAMS}


def assert_same(got, expected):
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **FLOAT32, msg=lambda m, n=name: f"{n}: {m}")


def in_a_process(program, timeout=120, **environment):
    """Runs a Python program that imports from tests/; it must end well, and in time."""
    start = "import sys; sys.path.insert(0, sys.argv[1])\n"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + program, os.path.dirname(__file__)],
        env=os.environ | environment,
        timeout=timeout,
        check=True,
    )


def test_cases_use_several_threads():
    for case, by_rows in zip(TEAMS, (True, False), strict=True):
        plan = lstmx._C.cpu_plan(case.cell, case.T, case.B, case.H, 2)
        assert (plan["threads"], plan["by_rows"]) == (2, by_rows), case


@pytest.mark.timeout(60)
@pytest.mark.parametrize("count", [2, 8, 32])
def test_any_number_of_threads_on_any_number_of_cores(count, expected):
    with threads(count):
        for case in TEAMS:
            for _ in range(3):
                assert_same(run("lstmx", case, torch.float32), expected[case])


def test_threads_by_the_environment():
    in_a_process(
        "import torch\n"
        "from test_robustness import TEAMS, assert_same, run\n"
        "torch.set_num_threads(8)\n"
        "for case in TEAMS:\n"
        "    many = run('lstmx', case, torch.float32)\n"
        "    torch.set_num_threads(1)\n"
        "    assert_same(many, run('lstmx', case, torch.float32))\n"
        "    torch.set_num_threads(8)\n",
        OMP_NUM_THREADS="8",
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("count", [1, 2])
def test_from_several_python_threads_at_once(count, expected):
    failed = []

    def work():
        torch.set_num_threads(count)
        try:
            for _ in range(10):
                for case in TEAMS:
                    assert_same(run("lstmx", case, torch.float32), expected[case])
        except AssertionError as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    with threads(count):
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failed


# Calls the kernels with several threads, and torch's, before and after a fork.
FORK = """
import os, signal, threading, torch
from test_robustness import TEAMS, assert_same, run
torch.set_num_threads(3)

def use_threads():
    found = [run('lstmx', case, torch.float32) for case in TEAMS]
    assert torch.rand(1 << 20).sigmoid().max() < 1
    return found

expected = use_threads()
{before}
child = os.fork()
if child == 0:
    signal.alarm(60)  # rather than hang
    for got, wanted in zip(use_threads(), expected):
        assert_same(got, wanted)
    os._exit(0)
status = os.waitpid(child, 0)[1]
{after}
for got, wanted in zip(use_threads(), expected):
    assert_same(got, wanted)
assert status == 0, status
"""


def test_after_fork():
    in_a_process(FORK.format(before="", after=""))


def test_fork_while_another_thread_computes():
    in_a_process(
        FORK.format(
            before=(
                "busy = True\n"
                "def keep_busy():\n"
                "    while busy: run('lstmx', TEAMS[0], torch.float32)\n"
                "other = threading.Thread(target=keep_busy)\n"
                "other.start()\n"
            ),
            after="busy = False\nother.join()\n",
        )
    )


def test_inside_another_parallel_region():
    """By OpenMP's own entry, of the runtime that torch has loaded: GCC's.

    There each caller is alone. The work is still cut up for two, so the results are bitwise equal.
    """
    openmp = ctypes.CDLL("libgomp.so.1")
    got = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        found = [run("lstmx", case, torch.float32) for case in TEAMS]
        got.append((openmp.omp_in_parallel(), found))

    with threads(2):
        expected = [run("lstmx", case, torch.float32) for case in TEAMS]
        openmp.GOMP_parallel(body, None, ctypes.c_uint(2), ctypes.c_uint(0))
    assert len(got) == 2
    for in_parallel, found in got:
        assert in_parallel
        for result, wanted in zip(found, expected, strict=True):
            for name, value in wanted.items():
                assert torch.equal(result[name], value), name


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("case", TEAMS, ids=str)
def test_flushing_of_denormals_is_the_callers_choice(case, count):
    """All threads see what set_flush_denormal says in this one, then and later."""
    inputs = case.inputs()
    small = {name: torch.zeros_like(t) for name, t in inputs.items()}
    # Gates of zeros: half of the state is forgotten, and nothing comes in.
    state = "c0" if case.cell == "lstm" else "h0"
    small[state] = torch.full_like(inputs[state], torch.finfo(torch.float32).tiny)
    op = lstmx.lstm_sequence if case.cell == "lstm" else lstmx.gru_sequence
    last = 2 if case.cell == "lstm" else 1
    expected = torch.full((case.B, case.H), torch.finfo(torch.float32).tiny * 0.5**case.T)
    assert (expected > 0).all()
    with threads(count):
        for flush in (False, True, False):
            assert torch.set_flush_denormal(flush)
            try:
                got = op(**small)[last]
            finally:
                torch.set_flush_denormal(False)
            assert torch.equal(got, torch.zeros_like(got) if flush else expected)


@pytest.mark.parametrize("cell", CELLS)
def test_time_with_denormals(cell):
    case = Case(cell, T=16, B=32, I=64, H=128)
    normal = case.inputs(torch.float32)
    tiny = {name: (t.detach() * 1e-39).requires_grad_() for name, t in normal.items()}
    op = lstmx.lstm_sequence if cell == "lstm" else lstmx.gru_sequence

    def seconds(inputs, scale):
        start = time.perf_counter()
        y = op(**inputs)[0]
        torch.autograd.grad(y, list(inputs.values()), torch.full_like(y, scale))
        return time.perf_counter() - start

    with threads(1):
        pairs = [(seconds(normal, 1.0), seconds(tiny, 1e-39)) for _ in range(10)]
    ordinary, denormal = (min(times) for times in zip(*pairs, strict=True))
    # An operation on a denormal can take a hundred cycles and more, where a vector of 16 takes one.
    assert denormal < 200 * ordinary


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["x", "h0", "w_hh", "b_ih"])
@pytest.mark.parametrize("case", TEAMS, ids=str)
def test_not_a_number_and_infinity_as_in_torch(case, name, value):
    results = {}
    for provider in ("lstmx", "torch"):
        inputs = case.inputs(torch.float32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            inputs[name].view(-1)[inputs[name].numel() // 3] = value
        out = PROVIDERS[provider](case, inputs)
        dx = torch.autograd.grad(out["y"].sum() + out["h_n"].sum(), inputs["x"])[0]
        results[provider] = {"y": out["y"].detach(), "h_n": out["h_n"].detach(), "dx": dx}
    for key, expected in results["torch"].items():
        torch.testing.assert_close(results["lstmx"][key], expected, equal_nan=True, **FLOAT32)


@pytest.mark.parametrize("case", TEAMS, ids=str)
def test_expanded_gradients(case):
    """Stride 0 in some or all dimensions, as sum() and mean() send them."""
    inputs = case.inputs(torch.float32)
    op = lstmx.lstm_sequence if case.cell == "lstm" else lstmx.gru_sequence
    outputs = [out for out in op(**inputs) if out.requires_grad]
    for rows in (False, True):
        sent = [torch.randn(o.shape[-1] if rows else 1).expand(o.shape) for o in outputs]
        assert all(0 in grad.stride() for grad in sent)
        dense = [grad.contiguous() for grad in sent]
        got, expected = (
            torch.autograd.grad(outputs, list(inputs.values()), grads, retain_graph=True)
            for grads in (sent, dense)
        )
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@contextmanager
def a_busy_core(core):
    """Another process that does nothing, as fast as it can, on that core."""
    program = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as busy:
        busy.stdout.readline()
        try:
            yield
        finally:
            busy.send_signal(signal.SIGKILL)


BUSY = [
    Case("lstm", T=70, B=80, I=400, H=512),
    Case("gru", T=128, B=32, I=256, H=256),
    Case("lstm", T=512, B=8, I=128, H=128),
    Case("gru", T=16, B=64, I=64, H=64),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", BUSY, ids=str)
def test_two_threads_where_another_process_holds_a_core(case):
    """They may not gain, but stay within twice the time of one thread."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    inputs = case.inputs(torch.float32)
    op = lstmx.lstm_sequence if case.cell == "lstm" else lstmx.gru_sequence

    dy = torch.randn(case.T, case.B, case.H)  # here: torch's own threads lose time as well

    def seconds(count):
        """A call forward and backward, the mean over some tenths of a second."""
        with threads(count):
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < 0.4:
                torch.autograd.grad(op(**inputs)[0], list(inputs.values()), dy)
                calls += 1
            return (time.perf_counter() - start) / calls

    with a_busy_core(cores[-1]):
        seconds(2)
        ratios = [seconds(2) / seconds(1) for _ in range(7)]
    assert statistics.median(ratios) < 2, ratios

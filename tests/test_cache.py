"""The store of large CPU buffers: reuse, bounds, lifetimes, threads, fork and exit."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import Case
from providers import run

import lstmx
from lstmx import _C

LARGE = Case("lstm", T=64, B=32, I=32, H=96)  # 3 MiB of saved gates
HUGE = Case("lstm", T=64, B=128, I=16, H=256)  # 32 MiB of them


@pytest.fixture(autouse=True)
def _fresh():
    lstmx.empty_cache()
    yield
    lstmx.empty_cache()


def forward(case=LARGE):
    inputs = case.inputs(generator=torch.Generator().manual_seed(0))
    return inputs, lstmx.lstm_sequence(**inputs)[0]


def test_buffers_come_back_when_their_last_reference_dies():
    assert _C.cached_bytes() == 0
    inputs, y = forward()
    during = _C.cached_bytes()
    grads = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    again = torch.autograd.grad(y.sum(), list(inputs.values()), retain_graph=True)
    for a, b in zip(grads, again, strict=True):
        assert torch.equal(a, b)  # nothing saved was handed out meanwhile
    kept = _C.cached_bytes()
    del y, grads, again, a, b
    assert _C.cached_bytes() >= kept + 64 * 32 * 4 * 96 * 4  # the saved gates
    assert during < _C.cached_bytes()
    lstmx.empty_cache()
    assert _C.cached_bytes() == 0


def test_a_second_call_uses_what_the_first_one_left():
    forward()
    held = _C.cached_bytes()
    for _ in range(5):
        forward()
    assert _C.cached_bytes() == held


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gradients_take_the_place_of_gates_computed_again(cell):
    """A packed sequence goes back in one chunk, which has room for either."""
    T, B, I, H = 64, 32, 32, 96
    held = {}  # at most, as nothing goes back to the system meanwhile
    for memory in ("high", "low"):
        case = Case(cell, T, B, I, H, lengths=(T,) * B, memory=memory)
        lstmx.empty_cache()
        run("lstmx", case, torch.float32)
        held[memory] = _C.cached_bytes()
    gates = T * B * 4 * H * 4
    assert gates < held["low"] < held["high"] - gates / 4


def test_two_forwards_before_one_backward():
    (first, y1), (second, y2) = forward(), forward()
    expected = torch.autograd.grad(y1.sum(), list(first.values()))
    got = torch.autograd.grad(y2.sum(), list(second.values()))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_saved_tensor_hooks():
    inputs, y = forward()
    expected = torch.autograd.grad(y.sum(), list(inputs.values()))
    with torch.autograd.graph.save_on_cpu():
        inputs, y = forward()
    for a, b in zip(torch.autograd.grad(y.sum(), list(inputs.values())), expected, strict=True):
        assert torch.equal(a, b)


def test_results_are_tensors_like_others():
    _, y = forward(Case("lstm", T=64, B=64, I=8, H=128))
    y = y.detach()
    copy = y.clone()
    y.resize_(1024, 1024)  # twice as large
    assert torch.equal(y.flatten()[: copy.numel()], copy.flatten())
    shared = copy.share_memory_()
    assert shared.is_shared()


def test_the_store_is_bounded():
    most = min(2**32, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    outputs = [forward(HUGE)[1] for _ in range(40)]
    assert len(outputs) == 40
    del outputs
    assert 0 < _C.cached_bytes() <= most


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_given_up_goes_back_to_the_system():
    outputs = [forward()[1] for _ in range(20)]
    del outputs
    held, before = _C.cached_bytes(), resident_bytes()
    assert held > 20 * 64 * 32 * 4 * 96 * 4
    lstmx.empty_cache()
    assert before - resident_bytes() > 0.8 * held


def test_old_shapes_make_room_for_new_ones():
    """A store full of blocks that nobody asks for any more must not stay so for ever."""
    outputs = [forward(HUGE)[1] for _ in range(40)]
    del outputs
    full = _C.cached_bytes()
    forward()  # its buffers come back to the full store ...
    kept = _C.cached_bytes()
    assert full - 2**26 < kept < full + 2**26
    inputs, y = forward()
    assert _C.cached_bytes() < kept  # ... and were found there
    del inputs, y
    assert _C.cached_bytes() == kept


def test_several_threads_at_once():
    expected = forward()[1]
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(forward()[1], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("room", ["none", "little"])
def test_without_room_for_the_store_memory_comes_from_elsewhere(room):
    printed = printed_by(
        "import resource, torch, lstmx\n"
        "from lstmx import _C\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"most = used + used // {2 if room == 'little' else 10}\n"  # a quarter of it is asked for
        "_, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, hard))\n"
        "_C.cached_bytes()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (hard, hard))\n"
        "net = lstmx.LSTM(16, 128)\n"
        "x = torch.randn(64, 128, 16)\n"
        "size = 64 * 128 * 128 * 4 * 6\n"
        "held = [net(x) for _ in range(most // 4 // size + 5)]\n"
        "assert all(torch.equal(y, held[0][0]) for y, _ in held)\n"
        "del held\n"
        "print(_C.cached_bytes() // size)\n"
    )
    blocks = int(printed)
    assert blocks == 0 if room == "none" else blocks > 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fork():
    expected = forward()[1].sum().item()
    child = os.fork()
    if child == 0:
        os._exit(0 if forward()[1].sum().item() == pytest.approx(expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def printed_by(program):
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fork_with_buffers_in_use():
    """Each process has its own copy of a graph's buffers, and of the store."""
    program = (
        "import os, signal, torch, lstmx\n"
        "m = lstmx.LSTM(32, 96)\n"
        "y = m(torch.randn(64, 32, 32))[0].sum()\n"
        "held = lstmx._C.cached_bytes()\n"
        "child = os.fork()\n"
        "if child == 0: signal.alarm(60)\n"
        "y.backward()\n"
        "kept = m.weight_hh_l0.grad.clone()\n"
        "m(torch.randn(64, 32, 32))[0].sum().backward()\n"
        "lstmx.empty_cache()\n"
        "assert lstmx._C.cached_bytes() == 0\n"
        "assert kept.isfinite().all()\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "print('done')\n"
    )
    assert printed_by(program) == "done\n"


def test_exit_with_tensors_alive():
    program = (
        "import torch, lstmx\n"
        "m = lstmx.LSTM(64, 256)\n"
        "y = m(torch.randn(64, 64, 64))[0]\n"
        "class Late:\n"
        "    def __del__(self): self.y.sum()\n"
        "late = Late(); late.y = y\n"
        "print('done')\n"
    )
    assert printed_by(program) == "done\n"

"""Measures: one process, all providers by turns, so that what slows one slows all.

The time of a block of calls is taken, the blocks of the providers alternate, and each provider's
median, quartiles and its ratio to the first provider are reported. Before anything is timed, the
outputs of all providers are compared.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.providers import make
from tests.cases import GATES, Case

MODES = ("forward", "training")


@dataclass(frozen=True)
class Measurement:
    """One provider on one case. Times in seconds for one call.

    Attributes:
        ratio: median of the pairwise ratios torch / this provider; above 1 this one is faster.
        gflops: 10^9 multiply-adds, counted twice, of the matrix products, for each second.
        provider: a name of ``benchmarks.providers``; with "+graph", replayed as a CUDA graph.
        peak_bytes: most memory that one call had allocated beside its arguments; on a GPU only.
    """

    cell: str
    T: int
    B: int
    I: int
    H: int
    mode: str
    dtype: str
    threads: int
    weight_dropout: float
    provider: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    gflops: float
    blocks: int
    calls: int
    device: str
    peak_bytes: int | None


def products_flop(case: Case, mode: str) -> float:
    """Floating point operations of the matrix products of one call."""
    forward = 2 * case.T * case.B * GATES[case.cell] * case.H * (case.I + case.H)
    return forward * (3 if mode == "training" else 1)


def _call(module: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return forward

    inputs = [x, *module.parameters()]

    def training() -> object:
        return torch.autograd.grad(module(x)[0], inputs, dy)

    return training


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is done only once must not be captured
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _seconds(call: Callable[[], object], calls: int, device: str) -> float:
    """Of one call, of so many in a row; on a GPU until the last one is finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - start) / calls


def _peak_bytes(call: Callable[[], object], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    del result
    return torch.cuda.max_memory_allocated() - before


def _check(modules: dict[str, nn.Module], x: Tensor, names: Sequence[str]) -> None:
    """That all providers compute the same, without dropout."""
    first, *others = names
    state = modules[first].state_dict()
    expected = modules[first].eval()(x)[0]
    for name in others:
        module = modules[name]
        module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
        got = module.eval()(x)[0]
        eps = torch.finfo(x.dtype).eps
        if x.is_cuda and x.dtype == torch.float32:
            eps = 2.0**-10  # recurrent nets run in TF32 there, unless a flag forbids it
        tolerance = 30 * eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def measure(
    case: Case,
    *,
    mode: str,
    dtype: torch.dtype = torch.float32,
    providers: Sequence[str] = ("torch", "lstmx"),
    seconds: float = 1.0,
    blocks: int = 9,
    device: str = "cpu",
) -> list[Measurement]:
    """Times one case on each provider; the first one is what the ratios refer to.

    Args:
        case: sizes, cell and weight dropout.
        mode: "forward" (without gradients) or "training" (forward and backward).
        dtype: of all tensors.
        providers: names; ``benchmarks.providers.make`` knows them.
        seconds: about how long to measure each provider.
        blocks: number of timed blocks of each.
        device: "cpu" or "cuda".

    Raises:
        ValueError: unknown mode or provider.
        AssertionError: the providers do not agree on the output.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.T, case.B, case.I, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(case.T, case.B, case.H, generator=generator).to(device, dtype)

    def module(provider: str, p: float) -> nn.Module:
        name = provider.removesuffix("+graph")
        return make(name, case.cell, case.I, case.H, p, dtype).to(device)

    _check({name: module(name, 0.0) for name in providers}, x, providers)
    calls, counts, peaks = {}, {}, {}
    for name in providers:
        call = _call(module(name, case.weight_dropout).train(), x, dy, mode)
        peaks[name] = _peak_bytes(call, device)
        calls[name] = call = _captured(call) if name.endswith("+graph") else call
        _seconds(call, 2, device)
        counts[name] = max(1, round(seconds / blocks / _seconds(call, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _, name in itertools.product(range(blocks), providers):
        times[name].append(_seconds(calls[name], counts[name], device))

    found = []
    for name in providers:
        low, median, high = statistics.quantiles(times[name], n=4, method="inclusive")
        pairs = zip(times[providers[0]], times[name], strict=True)
        found.append(
            Measurement(
                cell=case.cell,
                T=case.T,
                B=case.B,
                I=case.I,
                H=case.H,
                mode=mode,
                dtype=str(dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                weight_dropout=case.weight_dropout,
                provider=name,
                median=median,
                quartiles=(low, high),
                ratio=statistics.median(theirs / ours for theirs, ours in pairs),
                gflops=products_flop(case, mode) / median / 1e9,
                blocks=blocks,
                calls=counts[name],
                device=device,
                peak_bytes=peaks[name],
            )
        )
    return found


def as_json(measurements: Sequence[Measurement]) -> list[dict[str, object]]:
    """For a file."""
    return [asdict(measurement) for measurement in measurements]

"""Measures: one process, all providers by turns, so that what slows one slows all.

Blocks of calls are timed, as torch.utils.benchmark's blocked autorange does, each long enough for
the clock; the providers' blocks alternate, and each provider's median, quartiles and its ratio to
the first provider are reported. Before anything is timed, all providers' outputs and gradients are
compared with torch.nn's in float32 or better.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.calls import Call, call, tensors
from benchmarks.memory import Meter
from benchmarks.providers import DroppedWeight, make
from lstmx import reference
from tests import tolerances
from tests.cases import GATES, Case

SHORTEST_BLOCK = 0.005  # seconds
PEAK_SIZES = {"cpu": (1024, 2048), "cuda": (4096,)}
SLOW_PRODUCT = 0.1  # seconds; neither threads nor caches are what it waits for
FEWEST_BLOCKS, MOST_BLOCKS = 3, 25


@dataclass(frozen=True)
class Measurement:
    """One provider on one case. Times in seconds for one call.

    Attributes:
        provider: a name of ``benchmarks.providers``; with "+graph", replayed as a CUDA graph.
        quartiles: first and third, of the times of the blocks.
        p20, p80: percentiles of the same.
        ratio: median of the pairwise ratios first provider / this one; above 1 this one is faster.
        ratio_quartiles: first and third of those ratios.
        gflops: 10^9 multiply-adds, counted twice, of the matrix products, for each second.
        peak: GFLOP/s of large square products, measured just before and after; see gemm_peak.
        peak_bytes: most memory that a call held beside its arguments and weights, None if unknown.
        agrees: whether outputs and gradients are those of torch.nn in float32 or better. torch.nn
            in another dtype may not: oneDNN 3.12's bfloat16 LSTM on AMX, for one.
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
    p20: float
    p80: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    gflops: float
    peak: float
    blocks: int
    calls: int
    device: str
    peak_bytes: int | None
    agrees: bool


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """On a GPU, of recurrent nets and of others: "ieee" or "tf32"."""
    flags = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = precision
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def products_flop(case: Case, mode: str) -> float:
    """Floating point operations of the matrix products of one call."""
    forward = 2 * case.T * case.B * GATES[case.cell] * case.H * (case.I + case.H)
    return forward * (1 if mode == "forward" else 3)


def captured(run: Call) -> Call:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is done only once must not be captured
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [result.detach() for result in run()]

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def _seconds(run: Callable[[], object], calls: int, device: str) -> float:
    """Of one call, of so many in a row; on a GPU until the last one is finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def _estimate(run: Callable[[], object], device: str, first: float, enough: float) -> float:
    """Seconds of one call, from a block that is long enough for the clock.

    ``first`` is what the first call took; if that is more than enough, no other is spent on it.
    """
    if first > enough:
        return first
    calls = 1
    while True:
        seconds = _seconds(run, calls, device)
        if seconds * calls >= SHORTEST_BLOCK:
            return seconds
        calls *= 2


def gemm_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """GFLOP/s of a product of two large squares at torch's number of threads: the best found.

    On a CPU both of torch's libraries are asked: its ``mm`` in float32 is MKL's, which leaves
    AVX-512 unused on some processors, and oneDNN's can be twice as fast there. Two sizes are, as
    the smaller does not always fill two threads, and the larger leaves the caches. The second
    matrix is turned: where oneDNN cannot multiply 16-bit numbers, ``mm`` is ten times slower if it
    is not.
    """
    products: list[Callable[[Tensor, Tensor], Tensor]] = [lambda a, b: torch.mm(a, b.t())]
    onednn = {
        torch.float32: torch.backends.mkldnn.is_available,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    }
    if device == "cpu" and dtype in onednn and onednn[dtype]():
        linear = torch.ops.mkldnn._linear_pointwise
        products.append(lambda a, b: linear(a, b, None, "none", [], ""))

    best = 0.0
    for n in PEAK_SIZES[device]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        runs = [partial(product, a, b) for product in products]
        seconds = min(_seconds(run, 1, device) for run in runs for _ in range(4))
        best = max(best, 2 * n**3 / seconds / 1e9)
        if seconds > SLOW_PRODUCT:
            break
    return best


def _device_peak_bytes(run: Call) -> int:
    """Most memory of the GPU that a call has allocated."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _results(module: nn.Module, run: Call, case: Case, device: torch.device) -> list[Tensor]:
    """Of one call, under the mask that all modules draw here.

    Detached: what keeps a graph of autograd alive also keeps its streams, for other calls' graphs.
    """
    torch.manual_seed(1)
    if not isinstance(module, DroppedWeight):
        return [result.detach() for result in run()]
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)[0]
    size = (GATES[case.cell] * case.H, case.H)
    dtype = next(module.parameters()).dtype
    module.mask = reference.weight_mask(seed, size, case.weight_dropout, dtype=dtype)
    results = [result.detach() for result in run()]
    module.mask = None
    return results


def _expected(
    case: Case, mode: str, x: Tensor, dy: Tensor, states: tuple[Tensor, ...]
) -> list[Tensor]:
    """Outputs and gradients by torch.nn in float32 or better, of the same numbers.

    On a GPU float32 is judged in float64, as the judge's own rounding counts there.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda and x.dtype == torch.float32:
        dtype = torch.float64
    module = make("torch", case.cell, case.I, case.H, case.weight_dropout, x.dtype)
    module = module.to(x.device, dtype).train()
    wide = x.detach().to(dtype).requires_grad_()
    run = call(module, wide, dy.to(dtype), tuple(s.to(dtype) for s in states), mode)
    return _results(module, run, case, x.device)


def _agree(got: list[Tensor], expected: list[Tensor], case: Case) -> None:
    """Raises AssertionError unless they do."""
    dtype = got[0].dtype
    tolerance = getattr(tolerances, str(dtype).removeprefix("torch.").upper())
    in_tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    if got[0].is_cuda and dtype == torch.float32 and in_tf32:
        tolerance = tolerances.TF32
    for a, b in zip(got, expected, strict=True):
        # The table's tolerances are for numbers near 1 and up to 33 steps; over more of them,
        # rounding errors add up like a random walk. Weights' gradients are sums over rows, too.
        terms = case.T * (case.B if b.dim() < 3 else 1)
        scale = b.square().mean().sqrt().item() * max(1, terms / 33) ** 0.5
        atol = tolerance["atol"] * scale
        torch.testing.assert_close(a.to(b.dtype), b, rtol=tolerance["rtol"], atol=atol)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def measure(
    case: Case,
    *,
    mode: str,
    dtype: torch.dtype = torch.float32,
    providers: Sequence[str] = ("torch", "lstmx"),
    seconds: float = 0.5,
    device: str = "cpu",
    meter: Meter | None = None,
) -> list[Measurement]:
    """Times one case on each provider; the first one is what the ratios refer to.

    Args:
        case: sizes, cell and weight dropout.
        mode: "forward" (without gradients), "training" (forward and backward) or "carried"
            (training from states that are given).
        dtype: of all tensors.
        providers: names; ``benchmarks.providers.make`` knows them.
        seconds: about how long to time each provider on average; slow calls take longer, for
            there are at least three blocks.
        device: "cpu" or "cuda".
        meter: measures peak memory on the CPU; None leaves that out.

    Raises:
        ValueError: unknown mode or provider.
        AssertionError: lstmx or the reference is wrong, in an output or a gradient.
    """
    x, dy, states = tensors(case, dtype, device)
    modules, calls = {}, {}
    for name in providers:
        base = name.removesuffix("+graph")
        module = make(base, case.cell, case.I, case.H, case.weight_dropout, dtype)
        modules[name] = module.to(device).train()
        calls[name] = call(modules[name], x, dy, states, mode)
    expected = _expected(case, mode, x, dy, states)
    first, agrees = {}, {}
    for name, module in modules.items():
        start = time.perf_counter()
        got = _results(module, calls[name], case, x.device)
        first[name] = time.perf_counter() - start
        try:
            _agree(got, expected, case)
            agrees[name] = True
        except AssertionError as error:
            if not name.startswith("torch"):
                raise AssertionError(f"{name}: {error}") from error
            agrees[name] = False
    del expected, got

    peak_bytes: dict[str, int | None] = dict.fromkeys(providers)
    for name in providers:
        if device == "cuda":
            peak_bytes[name] = _device_peak_bytes(calls[name])
        elif meter is not None:
            peak_bytes[name] = meter.peak_bytes(case, mode, name, dtype)
        if name.endswith("+graph"):
            calls[name] = captured(calls[name])

    peak = gemm_peak(dtype, device)
    estimates = {
        name: _estimate(calls[name], device, first[name], max(2 * seconds, 1.0))
        for name in providers
    }
    one_round = sum(max(estimate, SHORTEST_BLOCK) for estimate in estimates.values())
    blocks = int(seconds * len(providers) / one_round)
    blocks = min(max(blocks, FEWEST_BLOCKS), MOST_BLOCKS)
    length = max(seconds / blocks, SHORTEST_BLOCK)
    counts = {name: max(1, round(length / estimates[name])) for name in providers}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for block in range(blocks):
        # There and back again, so that a drift of the clock favours none.
        for name in providers if block % 2 == 0 else reversed(providers):
            times[name].append(_seconds(calls[name], counts[name], device))
    peak = max(peak, gemm_peak(dtype, device))

    found = []
    for name in providers:
        low, median, high = _quartiles(times[name])
        p20, *_, p80 = statistics.quantiles(times[name], n=5, method="inclusive")
        pairs = zip(times[providers[0]], times[name], strict=True)
        ratio_low, ratio, ratio_high = _quartiles([theirs / ours for theirs, ours in pairs])
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
                p20=p20,
                p80=p80,
                ratio=ratio,
                ratio_quartiles=(ratio_low, ratio_high),
                gflops=products_flop(case, mode) / median / 1e9,
                peak=peak,
                blocks=blocks,
                calls=counts[name],
                device=device,
                peak_bytes=peak_bytes[name],
                agrees=agrees[name],
            )
        )
    return found


def as_json(measurements: Sequence[Measurement]) -> list[dict[str, object]]:
    """For a file."""
    return [asdict(measurement) for measurement in measurements]

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


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _check(modules: dict[str, nn.Module], x: Tensor, names: Sequence[str]) -> None:
    """That all providers compute the same, without dropout."""
    first, *others = names
    state = modules[first].state_dict()
    expected = modules[first].eval()(x)[0]
    for name in others:
        module = modules[name]
        module.load_state_dict({k.removeprefix("module."): v for k, v in state.items()})
        got = module.eval()(x)[0]
        tolerance = 30 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def measure(
    case: Case,
    *,
    mode: str,
    dtype: torch.dtype = torch.float32,
    providers: Sequence[str] = ("torch", "lstmx"),
    seconds: float = 1.0,
    blocks: int = 9,
) -> list[Measurement]:
    """Times one case on each provider; the first one is what the ratios refer to.

    Args:
        case: sizes, cell and weight dropout.
        mode: "forward" (without gradients) or "training" (forward and backward).
        dtype: of all tensors.
        providers: names; ``benchmarks.providers.make`` knows them.
        seconds: about how long to measure each provider.
        blocks: number of timed blocks of each.

    Raises:
        ValueError: unknown mode or provider.
        AssertionError: the providers do not agree on the output.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.T, case.B, case.I, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(case.T, case.B, case.H, generator=generator).to(dtype)
    plain = {name: make(name, case.cell, case.I, case.H, 0.0, dtype) for name in providers}
    _check(plain, x, providers)
    modules = {
        name: make(name, case.cell, case.I, case.H, case.weight_dropout, dtype).train()
        for name in providers
    }
    calls = {name: _call(module, x, dy, mode) for name, module in modules.items()}
    counts = {}
    for name, call in calls.items():
        _seconds(call, 2)
        counts[name] = max(1, round(seconds / blocks / _seconds(call, 1)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _, name in itertools.product(range(blocks), providers):
        times[name].append(_seconds(calls[name], counts[name]))

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
            )
        )
    return found


def as_json(measurements: Sequence[Measurement]) -> list[dict[str, object]]:
    """For a file."""
    return [asdict(measurement) for measurement in measurements]

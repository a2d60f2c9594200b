"""The harness measures what it says; a small regression benchmark of the kernels themselves."""

import pytest
import torch
from cases import CELLS, Case

import lstmx
from benchmarks.harness import measure, products_flop


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_measure(mode):
    case = Case("lstm", T=3, B=4, I=5, H=6, weight_dropout=0.5)
    providers = ("torch", "lstmx", "reference")
    rows = measure(case, mode=mode, providers=providers, seconds=0.01, blocks=3)
    assert [row.provider for row in rows] == list(providers)
    for row in rows:
        low, high = row.quartiles
        assert 0 < low <= row.median <= high
        assert row.ratio > 0
        assert row.gflops == pytest.approx(products_flop(case, mode) / row.median / 1e9)
    assert rows[0].ratio == 1


def test_flop_counts_the_products():
    case = Case("gru", T=2, B=3, I=5, H=7)
    assert products_flop(case, "forward") == 2 * (2 * 3) * (3 * 7) * (5 + 7)
    assert products_flop(case, "training") == 3 * products_flop(case, "forward")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "sleep"}, "mode must be one of forward, training, got 'sleep'"),
        ({"mode": "forward", "providers": ["jax"]}, "provider must be one of .*got 'jax'"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        measure(Case("lstm", 1, 1, 1, 1), **arguments)


def test_a_wrong_provider_is_not_timed(monkeypatch):
    case = Case("lstm", T=3, B=4, I=5, H=6)
    original = lstmx.LSTM.forward

    def wrong(self, *args):
        y, states = original(self, *args)
        return y + 1e-3, states

    monkeypatch.setattr(lstmx.LSTM, "forward", wrong)
    with pytest.raises(AssertionError):
        measure(case, mode="forward")


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_speed(benchmark, cell):
    """For pytest-benchmark's comparison of runs."""
    inputs = Case(cell, T=16, B=64, I=64, H=64).inputs()
    op = lstmx.lstm_sequence if cell == "lstm" else lstmx.gru_sequence
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark(lambda: torch.autograd.grad(op(**inputs)[0].sum(), list(inputs.values())))
    finally:
        torch.set_num_threads(threads)

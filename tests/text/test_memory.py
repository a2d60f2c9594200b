"""The long memory task."""

import json
from pathlib import Path

import pytest
import torch

from lstmx.text import memory

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json"


def test_sentences():
    generator = torch.Generator().manual_seed(0)
    ids, answers = memory.sentences(100, 5, generator)
    assert ids.shape == (7, 100)
    assert torch.equal(ids[0], answers)
    assert [memory.VOCABULARY[i] for i in ids[-1].unique()] == ["whose"]
    assert {memory.VOCABULARY[i] for i in ids[1:-1].unique()} == set(memory.FILLERS)
    assert answers.unique().numel() == len(memory.NAMES)
    with pytest.raises(ValueError, match="distance must be at least 0, got -1"):
        memory.sentences(3, -1, generator)


def test_an_untrained_net_guesses():
    assert memory.remember("LSTM", 20, seed=0, steps=1).accuracy < 0.3


def test_a_short_distance_is_learned():
    assert memory.remember("GRU", 3, seed=0, steps=150).accuracy > 0.95


def test_unknown_cell():
    with pytest.raises(ValueError, match="cell must be one of RNN, LSTM, GRU, got 'QRNN'"):
        memory.remember("QRNN", 3, seed=0)


def test_the_committed_results_show_why_gates_exist():
    results = json.loads(RESULTS.read_text())["results"]
    longest = max(r["distance"] for r in results)
    mean = {}
    for cell in memory.CELLS:
        found = [r for r in results if (r["cell"], r["distance"]) == (cell, longest)]
        mean[cell] = sum(r["accuracy"] for r in found) / len(found)
    assert mean["LSTM"] > 0.95
    assert mean["GRU"] > 0.95
    assert mean["RNN"] < 0.6

"""The readable reference against torch.nn, and Philox against published numbers."""

import pytest
import torch
from tolerances import FLOAT64
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lstmx import reference


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "bias": False},
        {"num_layers": 3, "dropout": 0.3},
    ],
    ids=str,
)
def test_modules_equal_torchs(name, options):
    torch_module = getattr(nn, name)(5, 7, dtype=torch.float64, **options)
    ours = getattr(reference, name)(5, 7, dtype=torch.float64, **options)
    ours.load_state_dict(torch_module.state_dict())
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    state = torch.randn(rows, 4, 7, dtype=torch.float64)
    hx = (state, state + 1) if name == "LSTM" else state
    padded = torch.randn(4, 4, 5, dtype=torch.float64)
    packed = pack_sequence(
        [torch.randn(n, 5, dtype=torch.float64) for n in (2, 4, 1, 3)], enforce_sorted=False
    )
    for input in (padded, packed):
        for states in (None, hx):
            torch.manual_seed(1)
            expected, expected_last = torch_module(input, states)
            torch.manual_seed(1)
            got, last = ours(input, states)
            torch.testing.assert_close(last, expected_last, **FLOAT64)
            if input is packed:
                got, expected = got.data, expected.data
            torch.testing.assert_close(got, expected, **FLOAT64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = reference.philox4x32([torch.tensor(v) for v in counter], [torch.tensor(v) for v in key])
    assert [int(word) for word in words] == expected


def test_both_lstm_cells_of_the_chapter_are_the_same_cell():
    ni, nh = 3, 4
    plain, refactored = reference.LSTMCellPlain(ni, nh), reference.LSTMCell(ni, nh)
    gates = (plain.input_gate, plain.forget_gate, plain.cell_gate, plain.output_gate)
    with torch.no_grad():
        refactored.hh.weight.copy_(torch.cat([gate.weight[:, :nh] for gate in gates]))
        refactored.ih.weight.copy_(torch.cat([gate.weight[:, nh:] for gate in gates]))
        refactored.ih.bias.copy_(torch.cat([gate.bias for gate in gates]))
        refactored.hh.bias.zero_()
    x, h, c = torch.randn(5, ni), torch.randn(5, nh), torch.randn(5, nh)
    torch.testing.assert_close(plain(x, (h, c)), refactored(x, (h, c)))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells_equal_torchs(name):
    ours, torch_cell = getattr(reference, name)(3, 4), getattr(nn, name)(3, 4)
    with torch.no_grad():
        ours.ih.weight.copy_(torch_cell.weight_ih)
        ours.hh.weight.copy_(torch_cell.weight_hh)
        ours.ih.bias.copy_(torch_cell.bias_ih)
        ours.hh.bias.copy_(torch_cell.bias_hh)
    x, h, c = torch.randn(5, 3), torch.randn(5, 4), torch.randn(5, 4)
    if name == "LSTMCell":
        assert_states = torch_cell(x, (h, c))
        torch.testing.assert_close(ours(x, (h, c))[1], assert_states)
    else:
        torch.testing.assert_close(ours(x, (h,))[0], torch_cell(x, h))

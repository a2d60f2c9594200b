"""Bad input: torch's own error where torch has one, else one that names the argument."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lstmx

T, B, I, H = 3, 2, 4, 5


def arguments(cell="lstm", **changes):
    G = 4 if cell == "lstm" else 3
    given = {
        "x": torch.randn(T, B, I),
        "h0": torch.randn(B, H),
        "c0": torch.randn(B, H),
        "w_ih": torch.randn(G * H, I),
        "w_hh": torch.randn(G * H, H),
        "b_ih": torch.randn(G * H),
        "b_hh": torch.randn(G * H),
    }
    if cell == "gru":
        del given["c0"]
    return given | changes


PACKED = {"x": torch.randn(5, I)}
OP_ERRORS = [
    ({"x": torch.randn(B, I)}, RuntimeError, r"x must have 3 dimensions.*\[2, 4\]"),
    ({"x": torch.randn(0, B, I)}, RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
    ({"x": torch.zeros(T, B, I, dtype=torch.int64)}, TypeError, "x must have dtype.*got long"),
    ({"h0": torch.randn(B, H + 1)}, RuntimeError, r"h0 must have size \[B, H\] = \[2, 5\], got \[2, 6\]"),
    ({"h0": torch.randn(B + 1, H)}, RuntimeError, r"h0 must have size .*got \[3, 5\]"),
    ({"h0": torch.randn(H)}, RuntimeError, r"h0 must have 2 dimensions, got size \[5\]"),
    ({"w_ih": torch.randn(7, I)}, RuntimeError, r"w_ih must have size \[G\*H, I\] = .*got \[7, 4\]"),
    ({"w_hh": torch.randn(7, H)}, RuntimeError, r"w_hh must have size \[G\*H, H\] = .*got \[7, 5\]"),
    ({"w_hh": torch.randn(7)}, RuntimeError, r"w_hh must have 2 dimensions, got size \[7\]"),
    ({"b_ih": torch.randn(7)}, RuntimeError, r"b_ih must have size \[G\*H\] = .*got \[7\]"),
    ({"b_hh": torch.randn(7)}, RuntimeError, r"b_hh must have size \[G\*H\] = .*got \[7\]"),
    ({"h0": torch.randn(B, H).double()}, RuntimeError, "h0 must have the dtype of x, float, got double"),
    ({"b_hh": torch.randn(20).half()}, RuntimeError, "b_hh must have"),
    ({"h0": torch.randn(B, H, device="meta")}, RuntimeError, "h0 must be on the device of x, cpu, got meta"),
    ({"memory": "medium"}, ValueError, "memory must be 'high' or 'low', got 'medium'"),
    ({"weight_dropout": 1.5}, ValueError, r"weight_dropout must be a probability in \[0, 1\], got 1.5"),
    ({"weight_dropout": -1.0}, ValueError, r"weight_dropout must be a probability in \[0, 1\], got -1"),
    ({"weight_dropout": float("nan")}, ValueError, r"weight_dropout must be a probability .*nan"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must have dtype int64, got float"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed must have dtype int64, got int"),
    ({"seed": torch.tensor([1])}, RuntimeError, r"seed must be a tensor without dimensions, got size \[1\]"),
    ({"seed": torch.tensor(1, device="meta")}, RuntimeError, "seed must be on the device of x, cpu, got meta"),
    ({**PACKED, "batch_sizes": torch.tensor([2, 3])}, ValueError, "batch_sizes must be positive and never grow"),
    ({**PACKED, "batch_sizes": torch.tensor([2, 2, 0])}, ValueError, "batch_sizes must be positive"),
    ({**PACKED, "batch_sizes": torch.tensor([2, -1])}, ValueError, "batch_sizes must be positive"),
    ({**PACKED, "batch_sizes": torch.tensor([2, 2])}, ValueError, "batch_sizes must add up to the rows of x, 5, got 4"),
    ({**PACKED, "batch_sizes": torch.tensor([1, 1])}, ValueError, "batch_sizes must begin with the rows of h0, 2, got 1"),
    ({**PACKED, "batch_sizes": torch.tensor([2.0])}, TypeError, "batch_sizes must have dtype int64"),
    ({**PACKED, "batch_sizes": torch.tensor([[2]])}, RuntimeError, "batch_sizes must have 1 dimension"),
    ({**PACKED, "batch_sizes": torch.zeros(0, dtype=torch.int64)}, RuntimeError, "Expected sequence length to be larger than 0"),
]  # fmt: skip


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(("changes", "error", "words"), OP_ERRORS, ids=lambda v: str(v)[:40])
def test_ops(cell, changes, error, words):
    op = lstmx.lstm_sequence if cell == "lstm" else lstmx.gru_sequence
    given = arguments(cell, **changes)
    with pytest.raises(error, match=words):
        op(**given)
    for tensor in given.values():  # and where a graph is recorded
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.requires_grad_()
    with pytest.raises(error, match=words):
        op(**given)


def test_c0():
    with pytest.raises(RuntimeError, match=r"c0 must have size \[B, H\] = \[2, 5\], got \[2, 6\]"):
        lstmx.lstm_sequence(**arguments(c0=torch.randn(B, H + 1)))


@pytest.mark.parametrize(
    ("seed", "p", "error", "words"),
    [
        (torch.tensor(1), 2.0, ValueError, r"p must be a probability in \[0, 1\], got 2"),
        (torch.tensor(1), float("nan"), ValueError, "p must be a probability"),
        (torch.tensor(1.0), 0.5, TypeError, "seed must have dtype int64"),
        (torch.tensor([1, 2]), 0.5, RuntimeError, "seed must be a tensor without dimensions"),
    ],
)
def test_weight_mask(seed, p, error, words):
    with pytest.raises(error, match=words):
        lstmx.weight_mask(seed, (3, 4), p)


def test_the_process_goes_on():
    """A failed call leaves nothing behind."""
    for _ in range(3):
        with pytest.raises(RuntimeError):
            lstmx.lstm_sequence(**arguments(w_hh=torch.randn(7, H)))
        assert lstmx.lstm_sequence(**arguments())[0].isfinite().all()


def raised(call):
    with pytest.raises(Exception) as info:
        call()
    return type(info.value), str(info.value)


MODULE_CALLS = {
    "1-D input": lambda m: m(torch.randn(I)),
    "4-D input": lambda m: m(torch.randn(1, T, B, I)),
    "input size": lambda m: m(torch.randn(T, B, I + 1)),
    "T = 0": lambda m: m(torch.randn(0, B, I)),
    "dtype": lambda m: m(torch.randn(T, B, I).double()),
    "rank of hx": lambda m: m(torch.randn(T, B, I), states(m, 1, H)),
    "rank of hx, unbatched": lambda m: m(torch.randn(T, I), states(m, 1, 1, H)),
    "rows of hx": lambda m: m(torch.randn(T, B, I), states(m, 1, B + 1, H)),
    "layers of hx": lambda m: m(torch.randn(T, B, I), states(m, 2, B, H)),
    "units of hx": lambda m: m(torch.randn(T, B, I), states(m, 1, B, H + 1)),
    "units of hx, unbatched": lambda m: m(torch.randn(T, I), states(m, 1, H + 1)),
}


def states(module, *size):
    return (torch.randn(size),) * 2 if isinstance(module, nn.LSTM) else torch.randn(size)


@pytest.mark.parametrize("call", MODULE_CALLS.values(), ids=MODULE_CALLS)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_modules_raise_what_torchs_raise(name, call):
    ours, expected = getattr(lstmx, name)(I, H), getattr(nn, name)(I, H)
    assert raised(lambda: call(ours)) == raised(lambda: call(expected))


CONSTRUCTIONS = [
    ((I, 0), {}),
    ((0, H), {}),
    ((I, H, 0), {}),
    ((2.5, H), {}),
    ((I, "7"), {}),
    ((I, H), {"dropout": 1.5}),
    ((I, H), {"dropout": True}),
    ((I, H), {"bias": 1}),
    ((I, H), {"batch_first": "yes"}),
    ((I, H), {"proj_size": H}),
    ((I, H), {"colour": "red"}),
    ((), {}),
]


@pytest.mark.parametrize(("args", "options"), CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_constructors_raise_what_torchs_raise(name, args, options):
    ours, expected = getattr(lstmx, name), getattr(nn, name)
    assert raised(lambda: ours(*args, **options)) == raised(lambda: expected(*args, **options))


def test_dropout_without_a_second_layer_warns_as_torch():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        lstmx.LSTM(I, H, dropout=0.5)


CELL_CALLS = {
    "3-D input": lambda m: m(torch.randn(1, B, I)),
    "3-D state": lambda m: m(torch.randn(B, I), cell_states(m, 1, B, H)),
}


def cell_states(module, *size):
    return (torch.randn(size),) * 2 if isinstance(module, nn.LSTMCell) else torch.randn(size)


@pytest.mark.parametrize("call", CELL_CALLS.values(), ids=CELL_CALLS)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells_raise_what_torchs_raise(name, call):
    ours, expected = getattr(lstmx, name)(I, H), getattr(nn, name)(I, H)
    assert raised(lambda: call(ours)) == raised(lambda: call(expected))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_cells_name_the_wrong_size(name):
    cell = getattr(lstmx, name)(I, H)
    with pytest.raises(
        RuntimeError, match=r"w_ih must have size|input has inconsistent input_size"
    ):
        cell(torch.randn(B, I + 1))
    with pytest.raises(RuntimeError, match="h0 must have size"):
        cell(torch.randn(B, I), cell_states(cell, B, H + 1))


def test_packed_states_of_the_wrong_size():
    module = lstmx.LSTM(I, H)
    packed = pack_sequence([torch.randn(2, I), torch.randn(1, I)])
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 5\), got \[1, 3, 5\]"
    ):
        module(packed, states(module, 1, 3, H))

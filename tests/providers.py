"""Ways to compute a case: our kernels, the readable reference, and torch.nn."""

from __future__ import annotations

from collections.abc import Callable

import emulated
import torch
from cases import Case
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstmx
from lstmx import reference

Outputs = dict[str, Tensor]


def run_op(lstm: Callable, gru: Callable, case: Case, inputs: dict[str, Tensor]) -> Outputs:
    """By a pair of sequence ops."""
    options = case.options(inputs["x"].device) | {"memory": case.memory}
    if case.cell == "lstm":
        out = lstm(**inputs, **options, cell_states=True)
        return dict(zip(("y", "h_n", "c_n", "c"), out, strict=True))
    return dict(zip(("y", "h_n"), gru(**inputs, **options), strict=True))


def run_lstmx(case: Case, inputs: dict[str, Tensor]) -> Outputs:
    """By the ops, on the inputs' device."""
    return run_op(lstmx.lstm_sequence, lstmx.gru_sequence, case, inputs)


def run_emulated(case: Case, inputs: dict[str, Tensor]) -> Outputs:
    """By the CUDA backend's ops under the emulator."""
    ops = emulated.ops()
    return run_op(ops.lstm_sequence, ops.gru_sequence, case, inputs)


def run_reference(case: Case, inputs: dict[str, Tensor]) -> Outputs:
    """By plain PyTorch."""
    op = reference.lstm_sequence if case.cell == "lstm" else reference.gru_sequence
    out = op(*inputs.values(), **case.options(inputs["x"].device))
    return dict(zip(("y", "h_n", "c_n", "c"), out, strict=False))


def run_torch(case: Case, inputs: dict[str, Tensor]) -> Outputs:
    """By torch.nn, the masked weight put in by functional_call. No cell states of all steps."""
    w_hh = inputs["w_hh"]
    if case.weight_dropout > 0:
        seed = case.options(inputs["x"].device)["seed"]
        w_hh = w_hh * reference.weight_mask(seed, w_hh.shape, case.weight_dropout, dtype=w_hh.dtype)
    module_class = nn.LSTM if case.cell == "lstm" else nn.GRU
    module = module_class(
        case.I,
        case.H,
        bias=case.bias,
        bidirectional=case.reverse,
        dtype=w_hh.dtype,
        device=w_hh.device,
    )
    weights = {"weight_ih_l0": inputs["w_ih"], "weight_hh_l0": w_hh}
    if case.bias:
        weights |= {"bias_ih_l0": inputs["b_ih"], "bias_hh_l0": inputs["b_hh"]}
    if case.reverse:  # both directions take the weights; the second one is looked at
        weights |= {name + "_reverse": weight for name, weight in weights.items()}
    states = [inputs[name] for name in ("h0", "c0") if name in inputs]
    hx = [torch.stack([s, s]) if case.reverse else s.unsqueeze(0) for s in states]
    x = inputs["x"]
    packed = case.lengths is not None
    argument = PackedSequence(x, case.batch_sizes()) if packed else x
    arguments = (argument, tuple(hx) if case.cell == "lstm" else hx[0])
    y, last = torch.func.functional_call(module, weights, arguments)
    last = last if case.cell == "lstm" else (last,)
    y = y.data if packed else y
    return {
        "y": y[..., -case.H :],
        **dict(zip(("h_n", "c_n"), [s[-1] for s in last], strict=False)),
    }


PROVIDERS: dict[str, Callable[[Case, dict[str, Tensor]], Outputs]] = {
    "lstmx": run_lstmx,
    "emulated": run_emulated,
    "reference": run_reference,
    "torch": run_torch,
}


def run(
    provider: str,
    case: Case,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    backward_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs for random gradients of y, h_n and c_n.

    Results come back to the CPU. The random numbers depend on ``seed`` alone; they are rounded to
    ``backward_dtype`` first if that is given, so that a float64 run can be compared with one in
    that dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = case.inputs(backward_dtype or dtype, generator=generator)
    inputs = {name: t.detach().to(device, dtype).requires_grad_() for name, t in inputs.items()}
    outputs = PROVIDERS[provider](case, inputs)
    names = [name for name in ("y", "h_n", "c_n") if name in outputs]
    grads = [
        torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        .to(backward_dtype or dtype)
        .to(device, dtype)
        for name in names
    ]
    found = torch.autograd.grad([outputs[name] for name in names], list(inputs.values()), grads)
    named = {f"d{name}": grad for name, grad in zip(inputs, found, strict=True)}
    return {name: t.detach().cpu() for name, t in (outputs | named).items()}

"""Random calls of our modules and torch's, which must agree: in outputs, gradients and errors.

    make fuzz                        # 10,000 calls
    python tests/fuzz.py --seed 123  # one of them, with its description

A call is drawn from its seed alone, over the whole of what constructor and forward accept, and some
of what they do not.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmx

CELLS = ("LSTMCell", "GRUCell")
# What can be wrong with a call.
FAULTS = (
    "x_features",
    "x_rank",
    "state_features",
    "state_batch",
    "state_rank",
    "state_dtype",
    "no_steps",
    "bad_hidden_size",
    "bad_num_layers",
    "bad_dropout",
    "bad_proj_size",
)


@dataclass(frozen=True)
class Call:
    """Everything about one call but the random numbers in its tensors."""

    seed: int
    module: str
    arguments: dict[str, Any]
    dtype: torch.dtype
    T: int
    B: int
    form: str  # batched, unbatched, packed, packed-unsorted
    lengths: tuple[int, ...]
    layout: str  # of x: contiguous, transposed, sliced, expanded
    states: str  # none, given, expanded, sliced
    frozen: float  # probability of each tensor to need no gradient
    fault: str | None

    @property
    def reproducer(self) -> str:
        """A command that runs this call alone."""
        return f"python tests/fuzz.py --seed {self.seed}"


def draw(seed: int) -> Call:
    """The call of that seed."""
    r = Random(seed)
    module = r.choice(("LSTM", "GRU", "LSTM", "GRU", *CELLS))
    large = r.random() < 0.1
    arguments: dict[str, Any] = {
        "input_size": r.randint(1, 40 if large else 7),
        "hidden_size": r.randint(1, 90 if large else 12),
        "bias": r.random() < 0.7,
    }
    if module not in CELLS:
        arguments["num_layers"] = r.choice((1, 1, 1, 2, 3))
        arguments["batch_first"] = r.random() < 0.4
        arguments["bidirectional"] = r.random() < 0.4
        if module == "LSTM" and arguments["hidden_size"] > 1 and r.random() < 0.2:
            arguments["proj_size"] = r.randint(1, arguments["hidden_size"] - 1)
    T, B = r.randint(1, 7), r.choice((1, 1, 2, 3, 5, 9))
    forms = ("batched", "batched", "unbatched", "packed", "packed-unsorted")
    form = r.choice(forms[:3] if module in CELLS else forms)
    return Call(
        seed=seed,
        module=module,
        arguments=arguments,
        dtype=r.choice((torch.float64, torch.float64, torch.float32)),
        T=T,
        B=B,
        form=form,
        lengths=tuple(r.randint(1, T) for _ in range(B)),
        layout=r.choice(("contiguous", "contiguous", "transposed", "sliced", "expanded")),
        states=r.choice(("none", "given", "given", "expanded", "sliced")),
        frozen=r.choice((0.0, 0.0, 0.3, 0.8)),
        fault=r.choice(FAULTS) if r.random() < 0.15 else None,
    )


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values, or the first row's for expanded, in memory of another shape."""
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def _inputs(call: Call) -> tuple[Tensor | PackedSequence, Any, list[Tensor]]:
    """The arguments of forward, and the tensors among them that could have gradients."""
    g = torch.Generator().manual_seed(call.seed)
    a, fault = call.arguments, call.fault
    cell, batched = call.module in CELLS, call.form != "unbatched"

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=call.dtype, generator=g)

    steps = 0 if fault == "no_steps" else call.T
    size = [a["input_size"] + (fault == "x_features")]
    if cell:
        size = [call.B, *size] if batched else size
    elif not batched:
        size = [steps, *size]
    else:
        size = [call.B, steps, *size] if a["batch_first"] else [steps, call.B, *size]
    if fault == "x_rank":
        size = [1, 1, *size]
    x = _laid_out(normal(*size), call.layout)
    leaf: Tensor = x.requires_grad_()
    argument: Tensor | PackedSequence = leaf
    if call.form.startswith("packed") and fault not in ("x_rank", "no_steps"):
        ordered = call.form == "packed"
        lengths = sorted(call.lengths, reverse=True) if ordered else list(call.lengths)
        argument = pack_padded_sequence(
            leaf, torch.tensor(lengths), batch_first=a["batch_first"], enforce_sorted=ordered
        )
    if call.states == "none":
        return argument, None, [leaf]

    lead = [] if cell else [a["num_layers"] * (2 if a["bidirectional"] else 1)]
    rows = [call.B + (fault == "state_batch")] if batched else []
    widths = [a.get("proj_size") or a["hidden_size"], a["hidden_size"]]
    states = []
    for width in widths[: 2 if call.module.startswith("LSTM") else 1]:
        state = normal(*lead, *rows, width + (fault == "state_features"))
        if fault == "state_rank":
            state = state.unsqueeze(0)
        if fault == "state_dtype":
            state = state.to(torch.float16)
        states.append(_laid_out(state, call.states).requires_grad_())
    hx = tuple(states) if call.module.startswith("LSTM") else states[0]
    return argument, hx, [leaf, *states]


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _flat(part)]


def run(call: Call, package: Any) -> dict[str, Tensor] | type[Exception]:
    """Outputs and gradients of the call with that package's module; or the error's type."""
    arguments = dict(call.arguments)
    if call.fault == "bad_hidden_size":
        arguments["hidden_size"] = 0
    elif call.fault == "bad_num_layers":
        arguments["num_layers"] = 0
    elif call.fault == "bad_dropout":
        arguments["dropout"] = 1.5
    elif call.fault == "bad_proj_size":
        arguments["proj_size"] = call.arguments["hidden_size"] + 1
    torch.manual_seed(call.seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = getattr(package, call.module)(**arguments, dtype=call.dtype)
        x, hx, leaves = _inputs(call)
        r = Random(call.seed)
        tensors = {f"input {i}": t for i, t in enumerate(leaves)} | dict(module.named_parameters())
        for t in tensors.values():
            if r.random() < call.frozen and t.is_leaf:
                t.requires_grad_(False)
        outputs = _flat(module(x) if hx is None else module(x, hx))
        result = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        wanted = {name: t for name, t in tensors.items() if t.requires_grad}
        if wanted:
            g = torch.Generator().manual_seed(call.seed + 1)
            loss = sum(
                (t * torch.randn(t.shape, dtype=t.dtype, generator=g)).sum() for t in outputs
            )
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            result |= {
                f"gradient of {name}": torch.zeros_like(t) if grad is None else grad
                for (name, t), grad in zip(wanted.items(), found, strict=True)
            }
        return result
    except Exception as error:  # every kind is a result to be compared
        return type(error)


def _torch_may_crash(call: Call) -> bool:
    """Whether torch 2.13 does not look at a size and may read or write past its end."""
    if call.module in CELLS:
        return call.fault == "state_rank"
    if call.form == "packed-unsorted" and call.fault == "state_batch":
        return False  # the sorting picks the rows that there are
    unchecked = ("x_features", "state_features", "state_batch", "state_rank")
    return call.form.startswith("packed") and call.fault in unchecked


def mismatch(call: Call) -> str | None:
    """How ours differs from torch's, or None."""
    ours = run(call, lstmx)
    if _torch_may_crash(call):
        harmless = call.states == "none" and call.fault != "x_features"
        return None if isinstance(ours, type) or harmless else "ours takes a wrong size"
    theirs = run(call, nn)
    if isinstance(theirs, type) or isinstance(ours, type):
        if ours is theirs:
            return None
        shown = [r.__name__ if isinstance(r, type) else "a result" for r in (ours, theirs)]
        return f"ours gives {shown[0]}, torch's {shown[1]}"
    if ours.keys() != theirs.keys():
        return f"ours gives {sorted(ours)}, torch's {sorted(theirs)}"
    tolerance = (1e-9, 1e-11) if call.dtype == torch.float64 else (1e-3, 1e-4)
    for name, expected in theirs.items():
        got = ours[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{name}: ours is {got.dtype} {list(got.shape)}"
        if not torch.allclose(got, expected, *tolerance):
            return f"{name}: differs by up to {(got - expected).abs().max().item():.3g}"
    return None


def fuzz(seeds: range) -> list[str]:
    """Runs the calls of these seeds. Returns a report, with a reproducer, on each mismatch."""
    found = []
    for seed in seeds:
        call = draw(seed)
        difference = mismatch(call)
        if difference is not None:
            found.append(f"{difference}\n  {call}\n  {call.reproducer}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    options = parser.parse_args()
    if options.seed is not None:
        call = draw(options.seed)
        print(call)
        seeds = range(options.seed, options.seed + 1)
    else:
        seeds = range(options.first, options.first + options.cases)
    found = fuzz(seeds)
    print(*found, sep="\n\n")
    print(f"{len(found)} mismatches in {len(seeds)} calls")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

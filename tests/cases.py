"""The one table of shapes: what is tested here is what is timed in benchmarks/.

T steps, B rows, I inputs, H hidden units, of one layer in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CELLS = ("lstm", "gru")
GATES = {"lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Case:
    """One call of a sequence op.

    ``lengths`` makes it a packed sequence, of B = len(lengths) rows and T = max(lengths) steps.
    """

    cell: str
    T: int
    B: int
    I: int
    H: int
    bias: bool = True
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    weight_dropout: float = 0.0
    memory: str = "high"
    from_zero: bool = False  # h0

    def __str__(self) -> str:
        words = [self.cell, f"T{self.T}", f"B{self.B}", f"I{self.I}", f"H{self.H}"]
        words += ["nobias"] * (not self.bias) + ["reverse"] * self.reverse
        words += ["packed"] * (self.lengths is not None) + ["low"] * (self.memory == "low")
        words += [f"p{self.weight_dropout}"] * (self.weight_dropout > 0)
        words += ["zero"] * self.from_zero
        return "-".join(words)

    def batch_sizes(self) -> Tensor | None:
        """int64 [T], or None."""
        if self.lengths is None:
            return None
        lengths = torch.tensor(self.lengths)
        return torch.stack([(lengths > t).sum() for t in range(self.T)])

    def options(self, device: torch.device | str = "cpu") -> dict[str, object]:
        """The op's keyword arguments, for tensors on that device."""
        seed = torch.tensor(0x1234_5678_9ABC, device=device)
        return {
            "batch_sizes": self.batch_sizes(),
            "reverse": self.reverse,
            "seed": seed if self.weight_dropout > 0 else None,
            "weight_dropout": self.weight_dropout,
        }

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """x, h0, c0 (LSTM only), w_ih, w_hh, b_ih, b_hh as leaves; weights as torch draws them."""
        G, bound = GATES[self.cell], self.H**-0.5
        rows = (self.T, self.B) if self.lengths is None else (sum(self.lengths),)
        sizes = {"x": (*rows, self.I), "h0": (self.B, self.H), "c0": (self.B, self.H)}
        weights = {"w_ih": (G * self.H, self.I), "w_hh": (G * self.H, self.H)}
        if self.bias:
            weights |= {"b_ih": (G * self.H,), "b_hh": (G * self.H,)}
        if self.cell == "gru":
            del sizes["c0"]

        def draw(size: tuple[int, ...]) -> Tensor:
            return torch.randn(size, dtype=torch.float64, generator=generator)

        tensors = {name: draw(size) for name, size in sizes.items()}
        if self.from_zero:
            tensors["h0"].zero_()
        for name, size in weights.items():
            uniform = torch.rand(size, dtype=torch.float64, generator=generator)
            tensors[name] = (2 * uniform - 1) * bound
        return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def _both_cells(**fields: object) -> list[Case]:
    return [Case(cell=cell, **fields) for cell in CELLS]


# Odd sizes, and each option on one of them.
_sizes = [(T, B, H) for T in (1, 2, 33) for B in (1, 7) for H in (1, 3, 17, 65)]
_plain = [case for T, B, H in _sizes for case in _both_cells(T=T, B=B, I=5, H=H)]
_base = _both_cells(T=6, B=7, I=5, H=17)
_packed = {"lengths": (6, 4, 4, 1, 1, 1, 1)}
PARITY = [
    *_plain,
    *[replace(case, weight_dropout=0.5) for case in _plain],
    *[replace(case, bias=False) for case in _base],
    *[replace(case, reverse=True) for case in _base],
    *[replace(case, memory="low", weight_dropout=0.3) for case in _base],
    *[replace(case, memory="low", reverse=True, **_packed) for case in _base],
    *[replace(case, weight_dropout=0.3, **_packed) for case in _base],
    *[replace(case, reverse=True, bias=False, **_packed) for case in _base],
    *[replace(case, weight_dropout=1.0) for case in _base],
    # Wide enough for several panels, blocks and threads.
    *_both_cells(T=3, B=20, I=130, H=150),
    *_both_cells(T=2, B=5, I=700, H=400),
    *[
        replace(case, weight_dropout=0.5, reverse=True)
        for case in _both_cells(T=4, B=9, I=40, H=333)
    ],
]

# What the CPU does otherwise there: the input multiplied within each step, backward in chunks of
# steps, tiles cut between threads, few rows that meet weights where they lie, large weights that
# are packed in parts.
CPU_PATHS = [
    *_both_cells(T=5, B=40, I=24, H=70, weight_dropout=0.5),
    *_both_cells(T=3, B=36, I=7, H=130, reverse=True),
    *_both_cells(T=9, B=200, I=8, H=300, weight_dropout=0.5),
    *_both_cells(T=9, B=64, I=7, H=33, memory="low", weight_dropout=0.5),
    *_both_cells(T=9, B=64, I=8, H=33, memory="low", reverse=True),
    # Of so many rows forward keeps some gates.
    *_both_cells(T=16, B=70, I=7, H=33, memory="low", weight_dropout=0.5),
    *_both_cells(T=16, B=70, I=8, H=33, memory="low", reverse=True),
    # Gates are computed again for a part of the units at a time.
    *_both_cells(T=3, B=40, I=330, H=330, memory="low"),
    # The last chunk of backward is one step.
    *_both_cells(T=4, B=256, I=7, H=20, memory="low", weight_dropout=0.5),
    *_both_cells(T=1, B=64, I=70, H=90, weight_dropout=0.5),
    *_both_cells(T=1, B=5, I=300, H=19),
    *_both_cells(T=1, B=20, I=700, H=800),
]
# A first step that finds zeros leaves W_hh out: by each of the ways above, and packed.
CPU_PATHS += [
    replace(case, from_zero=True)
    for case in [
        *CPU_PATHS,
        *_both_cells(T=1, B=1, I=3, H=20),
        *_both_cells(T=6, B=7, I=5, H=17, lengths=(6, 4, 4, 1, 1, 1, 1)),
        *_both_cells(T=6, B=7, I=5, H=17, lengths=(6, 4, 4, 1, 1, 1, 1), reverse=True),
    ]
]

# What CUDA does otherwise there: gates computed again in parts, or kept in part.
CUDA_PATHS = [
    *_both_cells(T=3, B=700, I=2, H=3, memory="low", weight_dropout=0.5),
    *_both_cells(T=9, B=130, I=2, H=3, memory="low"),
    *_both_cells(T=9, B=130, I=2, H=3, memory="low", reverse=True),
]


# The shapes of the field: AWD-LSTM's layers, the chapter's, cuDNN's favourites, and odd ones.
def _benchmark(*shapes: tuple[int, int, int, int]) -> list[Case]:
    return [case for T, B, I, H in shapes for case in _both_cells(T=T, B=B, I=I, H=H)]


BENCHMARKS = {
    "cpu": _benchmark(
        (70, 80, 400, 1150),
        (70, 64, 1152, 1152),
        (70, 80, 1150, 400),
        (35, 20, 650, 650),
        (128, 64, 512, 512),
        (128, 32, 256, 256),
        (512, 8, 128, 128),
        (16, 64, 64, 64),
        (100, 1, 128, 128),
        (1, 64, 512, 512),
        (1, 1, 256, 256),
        (33, 7, 77, 131),
    ),
    "cuda": _benchmark(
        (70, 80, 1150, 1150),
        (70, 80, 400, 1150),
        (70, 80, 1150, 400),
        (70, 80, 1152, 1152),
        (35, 20, 650, 650),
        (128, 64, 512, 512),
        (512, 16, 1024, 1024),
        (1024, 16, 768, 768),
        (16, 64, 64, 64),
        (1, 64, 512, 512),
        (33, 7, 77, 131),
    ),
}

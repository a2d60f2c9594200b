"""What is installed, whether it works, and which kernel a shape would take."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lstmx import _extension
from lstmx._version import __version__


@dataclass(frozen=True)
class Shape:
    """T steps, B rows, I inputs, H hidden units."""

    T: int
    B: int
    I: int
    H: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Of "T,B,I,H".

        Raises:
            argparse.ArgumentTypeError: it is not four positive numbers.
        """
        try:
            numbers = [int(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 4 or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"shape must be T,B,I,H, got {text!r}")
        return cls(*numbers)


def _kernels() -> list[tuple[str, str]]:
    built = _extension._C
    if built is None:
        return [
            ("kernels", f"not loaded: {_extension.ERROR}"),
            ("", "plain PyTorch stands in; build with: pip install --no-build-isolation ."),
        ]
    info = built.build_info()
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    capability = built.cpu_capability() + (f" (ATEN_CPU_CAPABILITY={limit})" if limit else "")
    openmp = "with" if info["openmp"] else "without"
    bfloat16 = {"matrix unit": "by the matrix unit", "pairs": "in pairs"}
    products = bfloat16.get(built.bfloat16_products(), "as float32")
    return [
        ("kernels", str(built.__file__)),
        ("built by", f"compiler {info['compiler']}, {openmp} OpenMP"),
        ("CPU kernels", f"{capability}, {torch.get_num_threads()} threads"),
        ("", f"bfloat16 multiplied {products}"),
        ("CUDA kernels", info["cuda_architectures"] or "not built (LSTMX_CUDA)"),
    ]


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    names = [
        "{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    ]
    flags: Any = torch.backends.cudnn
    tf32 = flags.rnn.fp32_precision
    return f"{torch.version.cuda}, {', '.join(names)}; recurrent nets' float32 is {tf32}"


def _plan(cell: str, shape: Shape) -> str:
    if _extension._C is None:
        return "plain PyTorch, because the kernels are not loaded"
    threads = torch.get_num_threads()
    plan = _extension._C.cpu_plan(cell, shape.T, shape.B, shape.H, threads)
    kib = plan["weight_bytes"] // 1024
    if plan["threads"] == 1:
        few = "too little work in a step for more" if threads > 1 else "that is all there are"
        return f"CPU: 1 thread ({few}), recurrent weights {kib} KiB"
    how = (
        "each with rows of the batch, for the weights fit each core's cache"
        if plan["by_rows"]
        else "each with units of every row, for its share of the weights to stay in its cache"
    )
    return f"CPU: {plan['threads']} threads, {how} ({kib} KiB)"


def describe(shapes: Sequence[Shape] = ()) -> str:
    """Versions, build, instruction set and devices, and how shapes would be computed."""
    rows = [
        ("lstmx", __version__),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *_kernels(),
        ("CUDA", _cuda()),
    ]
    for shape in shapes:
        for cell in ("lstm", "gru"):
            rows.append((f"{cell} {shape.T},{shape.B},{shape.I},{shape.H}", _plan(cell, shape)))
            if _extension._C is not None and _extension._C.cuda:
                step = "CUDA: stepwise, one product and one kernel a step, rows padded to 16"
                rows.append(("", step))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

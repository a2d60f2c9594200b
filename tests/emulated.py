"""The CUDA backend without a GPU: builds and loads ``torch.ops.lstmx_emulated.*``.

All of csrc/torch is compiled a second time, with the CUDA backend where the CPU's was, for the
emulator of tests/emulator. The build is kept in build/emulated.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import load

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
ORDERS = ("forward", "reverse", "random", "skew")


@cache
def ops() -> Any:
    """``torch.ops.lstmx_emulated``."""
    sources = [EMULATOR / f"{name}.cpp" for name in ("emulator", "kernels", "ops")]
    directory = ROOT / "build" / "emulated"
    directory.mkdir(parents=True, exist_ok=True)
    load(
        "lstmx_emulated",
        [str(source) for source in sources],
        extra_cflags=[
            "-std=c++20",
            "-O1",
            "-DLSTMX_EMULATED",
            "-DLSTMX_WITH_CUDA",
            "-DLSTMX_LIBRARY=lstmx_emulated",
        ],
        extra_include_paths=[str(EMULATOR / "include"), str(EMULATOR), str(ROOT / "csrc")],
        build_directory=str(directory),
        is_python_module=False,
    )
    return torch.ops.lstmx_emulated

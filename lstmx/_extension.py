"""Loads the compiled kernels. Where that fails, plain PyTorch stands in for them."""

from __future__ import annotations

import warnings
from types import ModuleType

_C: ModuleType | None
ERROR: ImportError | None
try:
    import lstmx._C as _C  # registers the ops

    ERROR = None
except ImportError as error:
    _C, ERROR = None, error
    warnings.warn(
        f"lstmx's compiled kernels could not be loaded ({error}); plain PyTorch stands in for "
        "them, and is slow. Build them with: pip install --no-build-isolation . in the source "
        "tree, against the torch that is installed. `python -m lstmx` tells more.",
        RuntimeWarning,
        stacklevel=2,
    )

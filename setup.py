"""Builds the extension lstmx._C; everything else about the package is in pyproject.toml."""

import os
import sys
from glob import glob

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "lstmx compiles against the torch you have, and found none.\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )

flags = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
flags.append("-Wno-unused-parameter")  # torch's headers
if os.environ.get("LSTMX_WERROR") == "1":
    flags.append("-Werror")
if sys.platform != "darwin":
    flags.append("-fopenmp")

setup(
    ext_modules=[
        CppExtension(
            "lstmx._C",
            sorted(glob("csrc/cpu/*.cpp") + glob("csrc/torch/*.cpp")),
            extra_compile_args=flags,
            extra_link_args=[flag for flag in flags if flag == "-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

"""Builds the extension lstmx._C; everything else about the package is in pyproject.toml.

Environment: LSTMX_CUDA=auto|0|1 (auto: if torch and the machine have the CUDA toolkit; no GPU is
needed), LSTMX_WERROR=1 (warnings are errors), LSTMX_OBJECTS=path (a build that has the CPU kernels'
objects), TORCH_CUDA_ARCH_LIST (as for any extension).
"""

import os
import re
import subprocess
import sys
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "lstmx is compiled against the torch that you have, and there is none here.\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )


def with_cuda() -> bool:
    """Whether to build the CUDA kernels. Exits if they were asked for and cannot be built."""
    choice = os.environ.get("LSTMX_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"LSTMX_CUDA must be auto, 0 or 1, got {choice!r}")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "0" or (choice == "auto" and not possible):
        return False
    if not possible:
        sys.exit(
            f"LSTMX_CUDA=1 needs a CUDA build of torch (found CUDA {torch.version.cuda}) and the "
            f"CUDA toolkit (CUDA_HOME is {CUDA_HOME})"
        )
    text = subprocess.check_output([f"{CUDA_HOME}/bin/nvcc", "--version"], text=True)
    nvcc = re.search(r"release (\d+)", text)[1]
    if nvcc != torch.version.cuda.split(".")[0]:
        sys.exit(
            f"torch was built with CUDA {torch.version.cuda} but nvcc in {CUDA_HOME} is of CUDA "
            f"{nvcc}; install a matching pair, or set LSTMX_CUDA=0 to build for the CPU only"
        )
    return True


# A multiply-add may be fused, but the compiler may not reorder sums: results stay reproducible.
cxx = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
# For torch's headers; and against Python's own -g, which takes half as much time again, and 52 MB.
cxx += ["-Wno-unused-parameter", "-g0"]
cxx += ["-Werror"] if os.environ.get("LSTMX_WERROR") == "1" else []
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
objects = glob(os.path.join(os.environ.get("LSTMX_OBJECTS", "none"), "csrc/cpu/*.o"))
sources = glob("csrc/torch/*.cpp") + ([] if objects else glob("csrc/cpu/*.cpp"))
extension, flags = CppExtension, {"cxx": cxx + openmp}
if with_cuda() and glob("csrc/cuda/*.cu"):
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0;12.0+PTX")
    sources += glob("csrc/cuda/*.cu")
    # The toolkit may lack cuBLAS's headers; the wheels that torch depends on have them.
    cxx += [f"-idirafter{path}" for path in glob(f"{torch.__path__[0]}/../nvidia/*/include")]
    extension = CUDAExtension
    flags = {"cxx": [*cxx, *openmp, "-DLSTMX_WITH_CUDA"], "nvcc": ["-std=c++20", "-O3"]}
else:
    sources = [source for source in sources if not source.endswith("_cuda.cpp")]


class Build(BuildExtension):
    """Keeps what an editable build makes: the next one, and the C++ tests, use it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = "build/editable"


more = {"extra_compile_args": flags, "extra_link_args": openmp, "extra_objects": objects}
setup(ext_modules=[extension("lstmx._C", sorted(sources), **more)], cmdclass={"build_ext": Build})

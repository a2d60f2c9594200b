#!/usr/bin/env bash
# A real CUDA build on a machine without a GPU: cuda_build.sh DIR. Makes an environment in DIR with a
# CUDA build of torch (several gigabytes), compiles lstmx with CUDA there, imports it and runs the
# tests that need no GPU. Needs python3, a C++ compiler and nvcc 13 on the path, or CUDA_HOME.
set -eu
if [ $# -ne 1 ]; then echo "usage: cuda_build.sh DIR" >&2; exit 64; fi
torch=${TORCH:-torch==2.14.1}
mkdir -p "$1"
dir=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

# The nvcc on the path may be a wrapper; its dry run tells where the toolkit is.
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
CUDA_HOME=$("$nvcc" --dryrun -x cu /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
CUDA_HOME=$(realpath "$CUDA_HOME")
export CUDA_HOME

[ -x "$dir/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip -q "$@"; }
pip install "$torch" wheel ninja pybind11 'setuptools>=77' numpy pytest pytest-benchmark pytest-timeout

LSTMX_CUDA=1 LSTMX_WERROR=1 pip install --no-build-isolation --no-deps .
cp -r tests "$dir"  # from there the installed package is imported, not this tree's
cp -r benchmarks pyproject.toml "$dir"
cd "$dir"
venv/bin/python - <<'CHECK'
import torch, lstmx
print(f"torch {torch.__version__} for CUDA {torch.version.cuda}; lstmx with CUDA: {lstmx._C.cuda}")
assert lstmx._C.cuda and lstmx.__file__.startswith(torch.__file__.split("/torch/")[0])
CHECK
# A torch newer than the project's own warns of other things, from inside itself.
venv/bin/python -m pytest -q -p no:cacheprovider -o pythonpath=tests -o filterwarnings=default -m "not gpu and not slow" \
  tests/test_sequence.py tests/test_autograd.py tests/test_weight_dropout.py tests/test_reference.py

"""The device code as nvcc sees it, for every architecture that is shipped; no GPU is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
ARCHITECTURES = ("80", "90", "100", "120")
BUDGET = json.loads(Path(__file__).with_name("cuda_budget.json").read_text())


def run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.fixture(scope="session")
def nvcc():
    """Path of the compiler."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME')}/bin")
    if found is None:
        pytest.skip("needs nvcc")
    return found


@pytest.fixture(scope="session")
def toolkit(nvcc):
    """Root of the toolkit. The nvcc on the path may be a wrapper; its dry run tells."""
    told = run(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)[1].strip()).resolve()


@pytest.fixture(scope="session", params=SOURCES, ids=lambda path: path.name)
def compiled(request, nvcc, tmp_path_factory):
    """One source, for all architectures: the object file, and what ptxas reports on each kernel."""
    target = tmp_path_factory.mktemp("cuda") / f"{request.param.stem}.o"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", *targets)
    done = run(nvcc, *flags, "-c", request.param, "-o", target)
    assert done.returncode == 0, done.stderr
    kernels = []
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernels.append({"symbol": found[1], "architecture": found[2]})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+)", line):
            kernels[-1]["stack"] = int(found[1]) + int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1]["registers"] = int(found[1])
    return target, kernels


def name_of(symbol):
    """The kernel of that mangled name; every kernel has a budget."""
    names = [name for name in BUDGET if f"{len(name)}{name}I" in symbol]
    assert names, f"no budget for {symbol}"
    return names[0]


@pytest.mark.slow
def test_kernels_keep_to_their_budget(compiled):
    _, kernels = compiled
    assert {kernel["architecture"] for kernel in kernels} == set(ARCHITECTURES)
    for kernel in kernels:
        budget = BUDGET[name_of(kernel["symbol"])]
        assert kernel["registers"] <= budget["registers"], kernel
        assert kernel["stack"] == 0, kernel  # neither a stack frame nor a spill


@pytest.mark.slow
def test_instructions(compiled):
    target, _ = compiled
    # Beside the interpreter, or where the wheels of NVIDIA's tools put it.
    places = [str(Path(sys.executable).parent)]
    places += [f"{path}/nvidia/cu13/bin" for path in sys.path]
    tools = os.pathsep.join(places)
    cuobjdump, nvdisasm = (shutil.which(tool, path=tools) for tool in ("cuobjdump", "nvdisasm"))
    assert cuobjdump, "nvidia-cuda-cuobjdump is not installed"
    assert nvdisasm, "nvidia-cuda-nvdisasm is not installed"
    env = os.environ | {"PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"Function : (\w+)", done.stdout)[1:]
    functions = list(zip(parts[::2], parts[1::2], strict=True))
    assert len(functions) >= len(ARCHITECTURES)
    for symbol, code in functions:
        name = name_of(symbol)
        # Local memory: an array that did not fit, or is indexed by a variable.
        assert not re.search(r"\b(LDL|STL)\b", code), name
        for instruction in BUDGET[name].get("instructions", []):
            assert re.search(instruction, code), (name, instruction)


@pytest.mark.slow
def test_the_binding_compiles_against_cuda(toolkit, tmp_path):
    """The CPU wheel of torch ships c10/cuda's headers, but for one that its own build writes."""
    stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    includes = [f"-I{path}" for path in (*include_paths(), tmp_path, toolkit / "include")]
    flags = ("-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
    source = ROOT / "csrc" / "torch" / "sequence_cuda.cpp"
    done = run("c++", *flags, *includes, "-DLSTMX_WITH_CUDA", "-fsyntax-only", source)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", sorted(CUDA.iterdir()), ids=lambda path: path.name)
def test_only_one_file_knows_the_device(source):
    if source.name == "device.cuh":
        return
    text = re.sub(r"//.*", "", source.read_text())
    words = r"asm\b|<<<|__shared__|__threadfence|__sync\w*|__shfl|__global__|\w+Idx\.|EMULATED"
    found = re.findall(words, text)
    assert not found

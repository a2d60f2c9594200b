"""What a user installs: sdist and wheel, from nothing but the sources and torch."""

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lstmx

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_setup_py_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 80


def test_one_place_for_the_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", lstmx.__version__)
    files = run("git", "ls-files", "*.py", "*.toml", "*.txt", "*.cpp", "*.h", cwd=ROOT).split()
    holders = [name for name in files if f'"{lstmx.__version__}"' in (ROOT / name).read_text()]
    assert holders == ["lstmx/_version.py"]


def test_without_torch_there_is_a_clear_message(tmp_path):
    """-I -S: an interpreter with setuptools, and without torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Install torch first, then: pip install --no-build-isolation ." in done.stderr


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("yes", "LSTMX_CUDA must be auto, 0 or 1, got 'yes'"),
        ("1", "LSTMX_CUDA=1 needs a CUDA build"),
    ],
)
def test_what_cannot_be_built_is_said(choice, words):
    import torch

    if choice == "1" and torch.version.cuda is not None:
        words = ""  # a CUDA torch: then there is nothing to refuse
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"LSTMX_CUDA": choice},
        capture_output=True,
        text=True,
    )
    assert words in done.stderr


def test_torch_and_nvcc_of_different_cuda_versions(tmp_path):
    """With a torch and a toolkit that only say which versions they are."""
    package = tmp_path / "torch" / "utils"
    package.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("class version: cuda = '12.6'\n")
    (package / "__init__.py").write_text("")
    (package / "cpp_extension.py").write_text(
        f"CUDA_HOME = {str(tmp_path)!r}\nBuildExtension = CppExtension = CUDAExtension = None\n"
    )
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    nvcc.chmod(0o755)
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "torch was built with CUDA 12.6 but nvcc" in done.stderr
    assert "is of CUDA 13" in done.stderr


def test_the_core_imports_only_torch():
    """Without the extras: nothing of theirs is imported by lstmx itself."""
    program = (
        "import sys; before = set(sys.modules); import torch; known = set(sys.modules)\n"
        "import lstmx\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - known}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    assert run(sys.executable, "-c", program).strip() == "['lstmx']"


# What only machines with these extensions understand, in the assembler's AT&T syntax.
VECTOR_CODE = {
    "avx2": re.compile(r"\tv[a-z0-9]+ .*%[xy]mm"),
    "avx512": re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])"),
}


@pytest.fixture(scope="module")
def vector_functions():
    """The names of all functions of the extension, and of those with instructions of each set."""
    functions, users = set(), {name: set() for name in VECTOR_CODE}
    code = run("objdump", "-d", "-C", "--no-show-raw-insn", lstmx._C.__file__)
    for line in code.splitlines():
        if heading := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            functions.add(function := heading[1])
        else:
            for name, pattern in VECTOR_CODE.items():
                if pattern.search(line):
                    users[name].add(function)
    return functions, users


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs a machine with AVX")
def test_instruction_sets_stay_in_their_namespaces(vector_functions):
    """Of inline functions the linker keeps one copy, whichever set it was compiled for.

    So nothing outside a set's namespace may hold its instructions: not even a template of the
    standard library. Else a machine without them crashes in code meant for every machine.
    """
    functions, users = vector_functions
    for allowed, found in ((("avx2", "avx512"), users["avx2"]), (("avx512",), users["avx512"])):
        homes = tuple(f"lstmx::{name}::" for name in allowed)
        assert not sorted(f for f in found if not any(home in f for home in homes))
    # ... and each set has its kernels, which use it.
    for name in ("baseline", "avx2", "avx512"):
        kernels = {f for f in functions if f"lstmx::{name}::" in f}
        assert kernels
        if name != "baseline":
            assert kernels & users[name]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdist_and_wheel(tmp_path):
    """The wheel is built from the unpacked sdist, installed elsewhere, and used."""
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)),
        cwd=ROOT,
        env=os.environ | {"LSTMX_CUDA": "0"},
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = run("git", "ls-files", "csrc", "lstmx", cwd=ROOT).split()
    assert set(sources) <= names
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    assert {"lstmx/py.typed", "lstmx/_C.pyi", "lstmx/modules.py"} <= installed
    assert not any(name.startswith(("csrc", "tests", "benchmarks")) for name in installed)

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", str(environment))
    python = environment / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # This environment's torch; lstmx itself must come from the wheel.
    (Path(site) / "torch.pth").write_text(sysconfig.get_path("purelib"))
    run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", "-q", str(wheel))
    program = (
        "import torch, lstmx; print(lstmx.__file__); m = lstmx.LSTM(2, 3, weight_dropout=0.5)\n"
        "m(torch.randn(4, 1, 2))[0].sum().backward(); print(m.weight_hh_l0.grad.shape)"
    )
    printed = run(str(python), "-c", program, cwd=tmp_path).splitlines()
    assert printed[0].startswith(site)
    assert printed[1] == "torch.Size([12, 3])"

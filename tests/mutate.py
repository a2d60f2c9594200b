"""Breaks each gradient term and the mask, one at a time; each break must fail a test.

    make mutate

A mutation of the torch-free part is compiled with the C++ tests, for one instruction set. One of
the binding is compiled in a copy of the tree, linked with the kernels of the last editable build,
and meets the Python tests. A mutation that no test notices, or whose text is no longer in the
source, fails the run.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD, OBJECTS = ROOT / "build" / "mutate", ROOT / "build" / "editable"


@dataclass(frozen=True)
class Mutation:
    """In csrc/``file``, the one occurrence of ``old`` becomes ``new``."""

    file: str
    old: str
    new: str

    def apply(self, csrc: Path) -> str:
        """Changes the file below ``csrc``; returns its text from before."""
        path = csrc / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            sys.exit(f"{self.file} has {text.count(self.old)} places like {self.old!r}, not one")
        path.write_text(text.replace(self.old, self.new))
        return text


LSTM, GRU, PHILOX = "cells/lstm.h", "cells/gru.h", "philox.h"
KERNELS, PACK, PRODUCT = "cpu/sequence_kernels.h", "cpu/pack.h", "cpu/product.h"
VECTOR, MASK = "cpu/vector.h", "cpu/mask.h"
TORCH = "torch/sequence_cpu.cpp"
STEP, INPUTS, CUDA = "cuda/stepwise.cuh", "torch/inputs.cpp", "torch/sequence_cuda.cpp"

# fmt: off
CPP = [
    Mutation(LSTM, "dc * g * i * (1 - i)", "dc * g * i"),
    Mutation(LSTM, "dc * prev[1] * f * (1 - f)", "dc * next[1] * f * (1 - f)"),
    Mutation(LSTM, "dc * i * (1 - g * g)", "dc * i * (1 - g)"),
    Mutation(LSTM, "dnext[0] * tanh_c * o * (1 - o)", "dnext[0] * tanh_c * (1 - o)"),
    Mutation(LSTM, "dnext[1] + dnext[0] * o", "dnext[0] * o"),
    Mutation(LSTM, "o * (1 - tanh_c * tanh_c)", "o"),
    Mutation(LSTM, "dprev[1] = dc * f", "dprev[1] = dc"),
    Mutation(LSTM, "next[1] = f * prev[1] + i * g", "next[1] = f * prev[1] + i"),
    Mutation(GRU, "dnext[0] * (1 - z) * (1 - n * n)", "dnext[0] * (1 - n * n)"),
    Mutation(GRU, "dn * hn * r * (1 - r)", "dn * r * (1 - r)"),
    Mutation(GRU, "dnext[0] * (prev[0] - n) * z * (1 - z)", "dnext[0] * (prev[0] - n) * z"),
    Mutation(GRU, "dgates[3] = dn * r", "dgates[3] = dn"),
    Mutation(GRU, "dprev[0] = dnext[0] * z", "dprev[0] = dnext[0]"),
    Mutation(PHILOX, "round < 10", "round < 9"),
    Mutation(PHILOX, "key1 += 0xBB67AE85u", "key1 += 0xBB67AE84u"),
    Mutation(PHILOX, "p < 1 ? 1 / (1 - p) : 0", "1"),
    Mutation(PHILOX, "word >= threshold", "word < threshold"),
    Mutation(VECTOR, " - n * V(kLn2Rest)", ""),
    Mutation(VECTOR, "4.166666666666651e-2", "4.16666666667e-2"),
    Mutation(VECTOR, "kSigmoidLeast = -710", "kSigmoidLeast = -1e3"),
    Mutation(VECTOR, "kTanhMost = 20", "kTanhMost = 18"),
    Mutation(VECTOR, "e.fraction * e.scale - (1 - e.scale)", "0 - (1 - (e.scale + e.fraction * e.scale))"),
    Mutation(MASK, "bits >>= element % 8;", ""),
    Mutation(MASK, "of_word << (w * kLanes)", "of_word << w"),
    Mutation(MASK, "if (rule.threshold >> 32) bits = 0;", ""),
    Mutation(MASK, "kept + draws.begin * (kDraw / 8)", "kept"),
    Mutation(PACK, "load<T>(from + i, lanes) * kept_lanes<T>(mask.kept, element + i)", "load<T>(from + i, lanes)"),
    Mutation(PACK, "exists ? rotated(k, rotation, depth) * ld : 0", "exists ? k * ld : 0"),
    Mutation(KERNELS, "load<T>(h_gates + g * V::kLanes) * scale", "load<T>(h_gates + g * V::kLanes)"),
    Mutation(KERNELS, "load<T>(c + i * c_stride) * scale", "load<T>(c + i * c_stride)"),
    Mutation(KERNELS, "carried + load<T>(c + i * c_stride) * scale", "carried"),
    Mutation(KERNELS, "dnext[k].row[i] + load<T>(at<Storage>(p_.dstates[k]", "load<T>(at<Storage>(p_.dstates[k]"),
    Mutation(KERNELS, "at<Storage>(p_.dlast[k], row * H_)", "at<Storage>(static_cast<void*>(nullptr), row * H_)"),
    Mutation(KERNELS, "sum[g] = sum[g] + dgates[g]", "sum[g] = dgates[g]"),
    Mutation(KERNELS, "part < parts; ++part", "part < 1; ++part"),
    Mutation(KERNELS, "dprev[k].row[i]", "dnext[k].row[i]"),
    Mutation(KERNELS, "row < walk.next_rows ?", "row <= walk.next_rows ?"),
    Mutation(KERNELS, "* scale + bias_hh[g]", "* scale"),
    Mutation(KERNELS, "walk.advance(); zeros = false", "walk.advance();"),
    Mutation(KERNELS, "walk.offset < p_.saved_end", "true"),
    Mutation(KERNELS, "(row - p_.saved_begin) * p_.saved_row", "row * p_.saved_row"),
    Mutation(KERNELS, "(walk.offset + row) * p_.saved_row", "(walk.offset + row) * Cell::kSaved * H_"),
    Mutation(KERNELS, "units_.begin + tile * V::kLanes", "tile * V::kLanes"),
    Mutation(PRODUCT, "(kept_lanes<T>(mask_.kept, to * p_.n + column + n) * scale)", "scale"),
    Mutation(PRODUCT, "accumulate ? load<T>(to) + total : total", "total"),
    Mutation(PRODUCT, "if (p_.accumulate) value = value + load<T>(sum, lanes);", ""),
    Mutation(PRODUCT, "const int64_t to = rotated(row, p_.c_rotation, p_.m);", "const int64_t to = row;"),
    Mutation(PRODUCT, "rotated(k, p_.b_rotation, p_.k) * p_.b_row", "k * p_.b_row"),
    Mutation(PRODUCT, "t.c_turned = true;", "t.c_turned = false;"),
    Mutation(PRODUCT, "(p_.m + parts_ - 1) / parts_", "p_.m"),
    Mutation(PRODUCT, "at<O>(p_.a, first), p_.a_column", "at<O>(p_.a, 0), p_.a_column"),
    Mutation(STEP, "dnext[0] += product[g];", "dnext[0] += 0 * product[g];"),
    Mutation(STEP, "ref<V>(p.carry[0], inner) = dnext[0];", ";"),
    Mutation(STEP, "ref<V>(p.carry[k], inner) = dprev[k]", "ref<V>(p.carry[k], inner) = dnext[k]"),
    Mutation(STEP, "row < p.previous_rows ?", "row <= p.previous_rows ?"),
    Mutation(STEP, "rule_.keeps(block.word[i]) ? scale_ : V(0)", "scale_"),
    Mutation(STEP, "philox_counter(begin / kQuad + quad)", "philox_counter(quad)"),
    Mutation(STEP, "rotated(from.gate, p.rotation, p.gates)", "from.gate"),
    Mutation(STEP, "rotated(to.gate, p.gates - p.rotation, p.gates)", "to.gate"),
    Mutation(STEP, "narrow(V(0), ref<Storage>(p.to, wide * Kp + k));", ""),
    Mutation(STEP, "sync_block();\n  if (warp > 0", "if (warp > 0"),
]
BINDING = [
    Mutation(TORCH, "if (i + 1 == chunks_ && (i > 0 ||", "if (i == 0 && (i > 0 ||"),
    Mutation(TORCH, "(i > 0 || h_prev.numel() > 0)", "h_prev.numel() > 0"),
    Mutation(TORCH, "more.c_rotation = 0;", "more.b_rotation = more.c_rotation = 0;"),
    Mutation(TORCH, "more.b_rotation = 0, more.accumulate = i > 0;", "more.b_rotation = more.c_rotation = 0, more.accumulate = i > 0;"),
    Mutation(TORCH, "if (i > 0) dbias_.add_(dbias);", ""),
    Mutation(TORCH, "std::min(H, unit + units), p.packed = false;", "std::min(H, unit + units);"),
    Mutation(TORCH, "i == 0 ? data_or_null(dlast_[k]) : carry_[k].const_data_ptr()", "data_or_null(dlast_[k])"),
    Mutation(TORCH, "in_.shape.reverse ? steps.first + steps.rows : steps.first - in_.B", "steps.first - in_.B"),
    Mutation(TORCH, "row_of(found[k], row)", "row_of(found[k], 0)"),
    Mutation(TORCH, "less && !in_.shape.reverse ? B : 0", "0"),
    Mutation(INPUTS, "grad(input_grads, input_rotation)", "grad(input_grads, 0)"),
    Mutation(INPUTS, "grad(hidden_grads, 0)", "grad(input_grads, 0)"),
    Mutation(TORCH, "some_columns(in_.hidden_grads * H", "some_columns(in_.input_grads * H"),
    Mutation(TORCH, "some_rows(steps.first - begin, steps.rows)", "some_rows(0, steps.rows)"),
    Mutation("torch/sequence.h", "shape.reverse ? SavedRows{0, count} : ", ""),
    Mutation(CUDA, "saved.narrow(0, known.begin, kept.size(0)).copy_(kept);", ""),
    Mutation(INPUTS, "at::cat_out(joined, {inner, first})", "at::cat_out(joined, {first, inner})"),
    Mutation(TORCH, "if (!dropout.seed) return gates(initial[0], w_hh);", "if (true) return gates(initial[0], w_hh);"),
    Mutation(TORCH, "dlast_[0] = contiguous(grads[1])", "dlast_[0] = std::nullopt"),
    Mutation(TORCH, "dstates_[1] = contiguous(grads[3])", "dstates_[1] = std::nullopt"),
    Mutation("torch/autograd.cpp", "/*create_graph=*/true", "/*create_graph=*/false"),
    Mutation(CUDA, "in.finish(grad, in.H, 0, in.dropout)", "in.finish(grad, in.H, 0)"),
    Mutation(CUDA, "in.prepare(in.w_ih, in.input_rotation)", "in.prepare(in.w_ih, 0)"),
    Mutation(CUDA, "in.finish(grad, in.I, in.input_rotation)", "in.finish(grad, in.I, 0)"),
    Mutation(CUDA, "in.previous(1, c)", "in.previous(1, y)"),
    Mutation(CUDA, "row_of(saved, row, in.saved * in.H)", "row_of(saved, 0, in.saved * in.H)"),
    Mutation(CUDA, "step.b_next = in.Hp * in.Hp", "step.b_next = 0"),
    Mutation(CUDA, "step.add = in.cell.summed;", "step.add = false;"),
    Mutation(CUDA, "to.narrow(0, 0, rows), in.cell.summed);", "to.narrow(0, 0, rows));"),
    Mutation("cuda/kernels.h", "kPad = 16", "kPad = 1"),
    Mutation("torch/composite.cpp", "kept.to(dtype).mul(p < 1 ? 1 / (1 - p) : 0.0)", "kept.to(dtype)"),
]
# fmt: on

PYTHON_TESTS = [
    "tests/test_sequence.py::test_float64_equals_reference_and_torch",
    "tests/test_autograd.py::test_gradcheck",
    "tests/test_autograd.py::test_gradgradcheck",
    "tests/test_weight_dropout.py::test_the_composite_draws_the_same_mask",
]
PYTHON_TESTS_OF_CUDA = [
    "tests/test_cuda.py::test_products_run_on_aligned_rows",
    "tests/test_cuda.py::test_float64_equals_reference",
    "tests/test_cuda.py::test_16_bit_equals_reference",
]

CPP_TESTS, EMULATOR = ROOT / "tests" / "cpp", ROOT / "tests" / "emulator"
# What each C++ test is made of; relative paths are in the tree that is mutated.
CPP_TEST_SOURCES = {
    "test_philox": [CPP_TESTS / "test_philox.cpp"],
    "test_cells": [CPP_TESTS / "test_cells.cpp"],
    "test_sequence": [
        CPP_TESTS / "test_sequence.cpp",
        "csrc/cpu/dispatch.cpp",
        "csrc/cpu/team.cpp",
        "csrc/cpu/sequence_baseline.cpp",
        "stub.cpp",
    ],
    "test_stepwise": [EMULATOR / f"{n}.cpp" for n in ("test_stepwise", "kernels", "emulator")],
}
EMULATED = {"test_stepwise"}

# Stands in for the instruction sets that are not compiled here; never called.
STUB = """
#include "cpu/kernels.h"
namespace lstmx::cpu {
extern const KernelTable kAvx2Kernels{}, kAvx512Kernels{};
}
"""


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


class CppTests:
    """The C++ tests of csrc as it is: a mutation compiles only what includes the file it is in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tree = self._copy("as_it_is")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            pairs = [(test, str(s)) for test, all_of in CPP_TEST_SOURCES.items() for s in all_of]
            self.depends = dict(zip(pairs, pool.map(self._compile_as_it_is, pairs), strict=True))
        for test in CPP_TEST_SOURCES:
            if (failed := self._failed(test, self.tree)) is not None:
                sys.exit(f"fails without any mutation: {failed}")

    def failed(self, mutation: Mutation) -> str | None:
        """The first test that fails with the mutation, or None."""
        with tempfile.TemporaryDirectory(dir=self.directory) as name:
            tree = self._copy(name)
            mutation.apply(tree / "csrc")
            for test, sources in CPP_TEST_SOURCES.items():
                changed = [s for s in sources if mutation.file in self.depends[test, str(s)]]
                for source in changed:
                    self._compile(test, source, tree, mutation)
                if changed and (failed := self._failed(test, tree)) is not None:
                    return failed
        return None

    def _copy(self, name: str) -> Path:
        tree = self.directory / name
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        (tree / "stub.cpp").write_text(STUB)
        return tree

    def _compile_as_it_is(self, pair: tuple[str, str]) -> set[str]:
        return self._compile(*pair, self.tree, None)

    @staticmethod
    def _object(test: str, source: str | Path, tree: Path) -> Path:
        return tree / f"{test}-{Path(source).stem}.o"

    def _compile(
        self, test: str, source: str | Path, tree: Path, mutation: Mutation | None
    ) -> set[str]:
        """The files of csrc that the source includes."""
        target = self._object(test, source, tree)
        # The compiler takes most of the time, and least without optimisation.
        flags = ["-std=c++20", "-O0", "-pthread", "-DLSTMX_CALLS", "-MD"]
        includes = [tree / "csrc", CPP_TESTS, EMULATOR / "include", EMULATOR]
        flags += [f"-I{path}" for path in includes]
        flags += ["-DLSTMX_EMULATED"] if test in EMULATED else []
        command = [os.environ.get("CXX", "c++"), *flags, "-c", str(tree / source), "-o", target]
        if (built := run(command)).returncode != 0:
            sys.exit(f"{mutation} does not compile:\n{built.stderr[:2000]}")
        csrc = (tree / "csrc").resolve()
        paths = [Path(p).resolve() for p in target.with_suffix(".d").read_text().split()[1:]]
        return {str(p.relative_to(csrc)) for p in paths if p.is_relative_to(csrc)}

    def _failed(self, test: str, tree: Path) -> str | None:
        """Of a test made of the tree's objects, and where there are none of those as they are."""
        objects = [self._object(test, source, tree) for source in CPP_TEST_SOURCES[test]]
        objects = [o if o.exists() else self.tree / o.name for o in objects]
        target = tree / test
        command = [os.environ.get("CXX", "c++"), "-pthread", *objects, "-o", target]
        if (built := run(command)).returncode != 0:
            sys.exit(f"{test} cannot be linked:\n{built.stderr[:2000]}")
        environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
        done = run([target, "--fail-fast"], env=environment)
        if done.returncode == 0:
            return None
        failed = re.search(r"^FAILED (\w+)", done.stdout, re.MULTILINE)
        return f"{test}: {failed[1] if failed else 'crashed'}"


class PythonTests:
    """The Python tests of a copy of the tree; mutations come to it one after the other."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        shutil.rmtree(tree, ignore_errors=True)
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        for name in ("csrc", "lstmx", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree / name)
        if (failed := self.failed(None)) is not None:
            sys.exit(f"fails without any mutation: {failed}")

    def failed(self, mutation: Mutation | None) -> str | None:
        """The first Python test that fails with the mutation, or None."""
        tests = PYTHON_TESTS + PYTHON_TESTS_OF_CUDA
        if mutation is not None:
            before = mutation.apply(self.tree / "csrc")
            if "cuda" in mutation.file:
                tests = PYTHON_TESTS_OF_CUDA  # whose emulated extension compiles itself
            elif mutation.file == TORCH:
                tests = PYTHON_TESTS
        if tests is not PYTHON_TESTS_OF_CUDA:
            self._build()
        # -P: the tests must meet the copy, which is first on the path, and nothing beside it.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-m", "not gpu", *tests]
        # Each copy has one of the two cores.
        options = {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        done = run(command, cwd=self.tree, env=os.environ | options)
        if mutation is not None:
            (self.tree / "csrc" / mutation.file).write_text(before)
        if done.returncode == 0:
            return None
        failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
        if failed is None:
            sys.exit(f"the tests could not run:\n{done.stdout}\n{done.stderr}")
        return failed[1]

    def _build(self) -> None:
        """Builds the extension, as far as files have changed."""
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        options = {
            "LSTMX_CUDA": "0",
            "LSTMX_WERROR": "0",
            "LSTMX_OBJECTS": str(OBJECTS),
            "MAX_JOBS": "1",
        }
        built = run(command, cwd=self.tree, env=os.environ | options)
        if built.returncode != 0:
            sys.exit(f"the binding does not compile:\n{built.stdout}\n{built.stderr}")


def report(mutation: Mutation, failed: str | None) -> bool:
    change = f"{mutation.old.strip()} -> {mutation.new.strip() or '(nothing)'}".replace("\n", " ")
    print(f"{'killed' if failed else 'SURVIVED':8}  {mutation.file:24}  {change}")
    print(f"{'':8}  by {failed}" if failed else f"{'':8}  NO TEST FAILED", flush=True)
    return failed is not None


def main() -> None:
    start = time.monotonic()
    survivors: list[Mutation] = []

    def kill(mutations: list[Mutation], failures: Iterable[str | None]) -> None:
        pairs = zip(mutations, failures, strict=True)
        survivors.extend(mutation for mutation, failed in pairs if not report(mutation, failed))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with tempfile.TemporaryDirectory() as name:
            kill(CPP, pool.map(CppTests(Path(name)).failed, CPP))

        trees: queue.SimpleQueue[PythonTests] = queue.SimpleQueue()
        for tests in pool.map(PythonTests, (BUILD / "first", BUILD / "second")):
            trees.put(tests)

        def failed(mutation: Mutation) -> str | None:
            tests = trees.get()
            try:
                return tests.failed(mutation)
            finally:
                trees.put(tests)

        kill(BINDING, pool.map(failed, BINDING))

    for mutation in survivors:  # again, where the end of a long log shows them
        report(mutation, None)
    count = len(CPP) + len(BINDING)
    print(
        f"{count - len(survivors)} of {count} mutations killed in {time.monotonic() - start:.0f} s"
    )
    if survivors:
        sys.exit(1)


if __name__ == "__main__":
    main()

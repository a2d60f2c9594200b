"""Peak memory of a call on the CPU, as the operating system counts it.

torch's own counters see neither what oneDNN takes nor what lstmx keeps for later calls; resident
memory has it all. So that nothing but the call moves it, each measurement is a process of its own,
forked from a server that has only imported torch; malloc is told to give everything back at once;
the libraries are set up by a call of the same kind on a small case; and pages of files, such as
code that runs for the first time, do not count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch

import lstmx
from benchmarks.calls import call, tensors
from benchmarks.providers import make
from tests.cases import Case

ROOT = Path(__file__).parents[1]
# What is freed goes to the system at once, large blocks by munmap, the heap by a trim, up to some
# tens of KB. Setting the first also ends glibc's habit of raising it.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    "MALLOC_ARENA_MAX": "1",
}
SMALL = {"T": 2, "B": 16, "I": 64, "H": 64}


def _resident(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, RssFile, or VmHWM for the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _peak(case: Case, mode: str, provider: str, dtype: torch.dtype) -> int:
    """Most bytes that two calls in a row held at once above what was there before them.

    Two, because the second one finds what the first one left in caches.
    """

    def prepared(case: Case):
        module = make(provider, case.cell, case.I, case.H, case.weight_dropout, dtype).train()
        return call(module, *tensors(case, dtype), mode)

    # Large enough for the kernels that large cases take, small enough to leave nothing behind.
    small = {name: min(most, getattr(case, name)) for name, most in SMALL.items()}
    for _ in range(2):
        prepared(replace(case, **small))()
    run = prepared(case)
    lstmx.empty_cache()
    gc.collect()
    # Else the call would find free memory within malloc's, which nobody would count.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, files = _resident("VmRSS"), _resident("RssFile")
    for _ in range(2):
        run()
    # What is read of a file stays: it is all there when the second call holds the most.
    return _resident("VmHWM") - before - (_resident("RssFile") - files)


class Meter:
    """Measures peak memory in processes of its own; a context manager.

    ``supported`` says whether the system can: it takes Linux's /proc.
    """

    supported = os.access("/proc/self/clear_refs", os.W_OK)

    def __enter__(self) -> Meter:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory"],
            cwd=ROOT,
            env=os.environ | MALLOC,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # the end of its input ends it

    def peak_bytes(self, case: Case, mode: str, provider: str, dtype: torch.dtype) -> int:
        """Most bytes held at once during a call, beside its arguments and weights.

        Results, gradients and lstmx's cached buffers are counted. At torch's number of threads.

        Raises:
            RuntimeError: the measuring process died; its error went to stderr.
        """
        job = {
            "case": asdict(case),
            "mode": mode,
            "provider": provider,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        found = json.loads(answer) if answer else None
        if found is None:
            raise RuntimeError(f"the process that measures memory died on {job}")
        return found


def _serve() -> None:
    """For each line of input, a job, one line of output: its bytes, or null if it failed."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(job["threads"])
                case = Case(**job["case"])
                found = _peak(case, job["mode"], job["provider"], getattr(torch, job["dtype"]))
                print(found, flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            print("null", flush=True)


if __name__ == "__main__":
    _serve()

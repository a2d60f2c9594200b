"""Rules for all tests: seeded, and no skip that nobody expects."""

import os

import pytest
import torch
import torch._functorch.config

# What torch.compile made of the ops is kept on disk under their names and arguments, from one run
# to the next; what an earlier build made must not be taken for this one's.
torch._functorch.config.enable_autograd_cache = False

# The only reasons for which a test may be skipped, by their first words.
EXPECTED_SKIPS = (
    "needs a CUDA device",
    "needs a machine with AVX",
    "needs two cores",
    "needs a build of lstmx without CUDA",
)

# ... and one that a developer's machine may have, but not continuous integration.
if os.environ.get("LSTMX_CI") != "1":
    EXPECTED_SKIPS = (*EXPECTED_SKIPS, "needs nvcc", "needs Linux")

_unexpected: list[str] = []


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not reason.startswith(EXPECTED_SKIPS):
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and os.environ.get("LSTMX_STRICT_SKIPS") == "1":
        print("\nskipped for an unexpected reason:", *_unexpected, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

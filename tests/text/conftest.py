"""What the tests of text share: one thread, and the small corpus that the tests ship."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lstmx.text.corpus import Corpus, prepare

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def kjv(tmp_path_factory) -> Corpus:
    """Some chapters of the King James Bible."""
    folder = tmp_path_factory.mktemp("corpus") / "kjv"
    return prepare(DATA / "kjv", folder, kind="raw-word", min_count=3)


@pytest.fixture
def data() -> Path:
    """The folder of its texts."""
    return DATA / "kjv"

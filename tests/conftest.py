"""Fixtures of the whole suite."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The models of the tests are tiny: one thread each, so that two workers do not fight for two cores. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with clones of the evaluation data: ``DEFTX_TEST_DATA``, or ``../shared/data`` beside the checkout."""
    given = os.environ.get("DEFTX_TEST_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder} (set DEFTX_TEST_DATA)")
    return folder


@pytest.fixture(autouse=True)
def root_logging() -> Iterator[None]:
    """Take away what a command run in this process left on the root logger: it writes to a captured stream."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)

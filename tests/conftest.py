"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with clones of the evaluation data: ``DEFTX_TEST_DATA``, or ``../shared/data`` beside the checkout."""
    given = os.environ.get("DEFTX_TEST_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no evaluation data at {folder} (set DEFTX_TEST_DATA)")
    return folder

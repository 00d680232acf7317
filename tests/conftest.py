"""What every test may use."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("MPLBACKEND", "Agg")

# Timing differs between machines, and a test suite must say the same thing twice.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository, for tests that run scripts or configs."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real recordings (FAIRSEQ_EXT_DATA); skips where it is absent."""
    folder = Path(os.environ.get("FAIRSEQ_EXT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: set FAIRSEQ_EXT_DATA to its folder")
    return folder.resolve()

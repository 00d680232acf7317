"""What every test may use."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.pairs import all_pairs

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("MPLBACKEND", "Agg")
# In the background of a shell Ctrl-C is ignored, and what a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Some wheel installs a package called `tests`, too, which a process of a test must not find before ours.
os.environ["PYTHONPATH"] = os.pathsep.join(
    dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
)

# Timing differs between machines, and a test suite must say the same thing twice.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _loaders_that_failed_end_soon():
    """Garbage collection waits so many seconds for each of their workers, in whatever test it happens."""
    if "torch.utils.data" in sys.modules:
        sys.modules["torch.utils.data"]._utils.MP_STATUS_CHECK_INTERVAL = 0.5


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


def pytest_collection_modifyitems(config, items):
    """Of a test marked `pairs`, leave the cases that show every two values of its parameters together; slow
    ones come first, so that no process is left alone with one at the end.
    """
    cases = {}
    for item in items:
        if item.get_closest_marker("pairs") and hasattr(item, "callspec"):
            cases.setdefault((item.path, item.cls, item.function), []).append(item)
    left_out = set()
    for group in cases.values():
        kept = set(all_pairs([item.callspec.params for item in group]))
        left_out |= {item for i, item in enumerate(group) if i not in kept}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

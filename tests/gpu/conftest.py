"""What is run on a CPU, and on a GPU where there is one (`-m gpu`)."""

import runpy
from pathlib import Path

import pytest
import torch

_diffusion = runpy.run_path(str(Path(__file__).parents[1] / "diffusion" / "conftest.py"))
small_images, build = _diffusion["small_images"], _diffusion["build"]

DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    """Skipped by name, so that a run without a GPU says what it has not shown."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))

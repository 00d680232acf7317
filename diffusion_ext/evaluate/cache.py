"""What was computed on real images, kept under a hash of everything that it depends on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ext_common.cli import UserError
from ext_common.manifest import atomic_write, user_cache

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """diffusion_ext/statistics in $XDG_CACHE_HOME or ~/.cache."""
    return user_cache("diffusion_ext", "statistics")


def cache_key(kind: str, **parts: Any) -> str:
    """Hex SHA-256 of `kind` and of everything the value depends on, as JSON."""
    text = json.dumps([kind, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(
    folder: Path | None, kind: str, parts: Mapping[str, Any], compute: Callable[[], Arrays]
) -> tuple[Arrays, bool]:
    """(the arrays that `compute` gives, whether they were there already).

    folder: where arrays are kept under `cache_key(kind, **parts)`; None: nowhere. A damaged file is
    computed anew, and a folder that cannot be written costs the time but not the result.
    """
    if folder is None:
        return compute(), False
    path = folder / f"{kind}-{cache_key(kind, **parts)[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored), True
    except (OSError, ValueError, EOFError, BadZipFile):
        pass
    arrays = compute()
    try:
        with atomic_write(path, "wb") as file:
            named: dict[str, Any] = {**arrays}
            np.savez(file, **named)
    except (OSError, UserError):
        pass
    return arrays, False

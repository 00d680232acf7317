"""Lines of output that are kept while a long file is written, so that a killed command goes on.

`.OUTPUT.partial` beside an output holds the lines that are done, how many, and of which plan.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ext_common.folders import exclusive, partial_folder
from ext_common.manifest import atomic_json

_TEXT, _STATE = "text", "state.json"


class Unfinished:
    """A file of which the first `done` lines of input are written; `counts` is what was told of them."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]):
        self.path = folder / _TEXT
        self._state = folder / _STATE
        self._plan = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
        state: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self._state.read_text(encoding="utf-8"))
        fits = state.get("plan") == self._plan and self.path.is_file()
        fits = fits and self.path.stat().st_size >= state["bytes"]
        self.done: int = state["done"] if fits else 0
        self.counts: dict[str, int] = state["counts"] if fits else {}
        # not "ab": what was written after the last state is written again
        self._file = open(self.path, "r+b" if fits else "wb")
        self._file.truncate(state["bytes"] if fits else 0)
        self._file.seek(0, os.SEEK_END)

    def write(self, text: bytes, done: int, counts: Mapping[str, int]) -> None:
        """Add what became of the lines up to `done`; from then on it is not lost."""
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())
        state = {
            "plan": self._plan,
            "done": done,
            "bytes": self._file.tell(),
            "counts": dict(counts),
        }
        atomic_json(self._state, state)
        self.done = done

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def unfinished(output: str | os.PathLike[str], plan: Mapping[str, Any]) -> Iterator[Unfinished]:
    """What an earlier run of the same plan has left beside `output`, or nothing yet.

    It is removed when the block ends well, and stays where it does not and lines are done. UserError where
    another process is writing `output`.
    """
    folder = partial_folder(output)
    with exclusive(folder.with_name(folder.name.replace(".partial", ".lock")), output):
        folder.mkdir(parents=True, exist_ok=True)
        found = Unfinished(folder, plan)
        try:
            yield found
        except BaseException:
            found.close()
            if not found.done:
                shutil.rmtree(folder)
            raise
        found.close()
        shutil.rmtree(folder)

"""Where a training is kept that names no place, and what a checkpoint there says of its training."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ext_common.cli import UserError

ROOT = Path("checkpoints")
LAST = "checkpoint_last.pt"


def default_save_dir(data: str, task: str, root: Path = ROOT) -> tuple[Path, bool]:
    """The folder of a training of `task` on DATA, and whether a training of it is continued there.

    root/NAME-TASK; root itself where it holds a checkpoint of this training, as before. UserError where the
    folder is that of a training on other data with the same name.
    """
    own = absolute(data)
    folder = root / f"{Path(own.partition(':')[0]).name or 'data'}-{task}"
    state = peek(folder / LAST)
    if state is not None:
        theirs = described(state)
        if theirs != (own, task):
            raise UserError(
                f"{folder} holds a training of {theirs[1]} on {theirs[0]}, not on {own}: give --save-dir"
                f" with another folder, or --save-dir {folder} to go on with that model"
            )
        return folder, True
    if (state := peek(root / LAST)) is not None and described(state) == (own, task):
        return root, True
    return folder, False


def absolute(data: str) -> str:
    """DATA, several of them separated by colons, without a working folder."""
    return ":".join(str(Path(part).resolve()) for part in data.split(":"))


def described(state: Mapping[str, Any]) -> tuple[str, str]:
    """(absolute DATA, task) of a checkpoint's training.

    One made before DATA was noted says it as it was typed; it is taken from the present folder.
    """
    task = options_of(state["cfg"].get("task"))
    noted = json.loads(task.get("chosen") or "{}").get("data")
    return noted or absolute(str(task.get("data"))), str(task.get("_name"))


def peek(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds, its tensors left in the file; None where it is absent or not whole."""
    if not path.is_file():
        return None
    import torch

    from ext_common.compat.files import allow_namespace

    allow_namespace()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whoever loads it says what is wrong with it, or takes another
        return None
    return state if isinstance(state, dict) and isinstance(state.get("cfg"), Mapping) else None


def updates_of(state: Mapping[str, Any]) -> int:
    """Updates that a checkpoint has behind it."""
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def options_of(group: Any) -> dict[str, Any]:
    """A group of a checkpoint's configuration; an architecture without dataclass has a Namespace."""
    if isinstance(group, argparse.Namespace):
        return vars(group)
    return dict(group) if isinstance(group, Mapping) else {}

"""Checkpoints outside of training, for every wing: from a file to its state and its model."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ext_common.cli import UserError

OUR_PLUGINS = ("fairseq_ext", "diffusion_ext")


def read_state(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote, as plain dicts and tensors on the CPU.

    Nothing the file holds is run (weights_only). UserError where it is missing or damaged.
    """
    import torch

    from ext_common.compat.files import allow_namespace, why_unreadable

    allow_namespace()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = why_unreadable(os.fspath(path), error)
        if reason is None:
            raise
        raise UserError(reason) from error


def why_unfit(state: Any, saved: Callable[[Mapping[str, Any]], bool], what: str) -> str | None:
    """The second half of a sentence about the content of a file; None for a checkpoint of the task.

    saved: whether a `task_state` is what the task saves; what: the job it is for.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("model"), Mapping):
        return "is not a checkpoint of fairseq-train"
    task_state = state.get("task_state")
    if not isinstance(task_state, Mapping) or not saved(task_state):
        kind = name_of(state, "task")
        return f"is of another task{f' ({kind})' if kind else ''}, not of {what}"
    cfg = state.get("cfg")
    if not isinstance(cfg, Mapping) or not {"task", "model"} <= set(cfg):
        return "does not say how its model was built (it has no cfg)"
    return None


def build_network(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    parts: Sequence[str],
    user_dir: str | None = None,
) -> Any:
    """The fairseq model of a checkpoint's state, with its weights.

    parts: modules of this project that register what the checkpoint's wing consists of.
    """
    from ext_common.compat.messages import leave_out_harmless_warnings

    leave_out_harmless_warnings()
    with untouched_logging():
        # Without fairseq loaded first, importing fairseq_ext registers nothing.
        import fairseq  # noqa: F401
        from fairseq import checkpoint_utils
        from omegaconf import OmegaConf

        from ext_common import compat

        compat.apply()
        for part in parts:
            importlib.import_module(part)

    missing = import_plugin(state, user_dir)
    hint = f" (it was trained with --user-dir {missing}, which is not here)" if missing else ""
    check_registered(state, path, hint)
    state = dict(state)
    state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
    try:
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task([os.fspath(path)], state=state)
    except UserError as error:
        text = str(error)
        place = "" if text.startswith(os.fspath(path)) else f"{path}: "
        raise UserError(f"{place}{text}{hint}") from error
    return models[0]


def check_registered(state: Mapping[str, Any], path: str | os.PathLike[str], hint: str) -> None:
    """UserError where fairseq does not know the task or model; it would fail with a KeyError."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.tasks import TASK_REGISTRY

    for part, known in (
        ("task", TASK_REGISTRY),
        ("model", {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}),
    ):
        name = name_of(state, part)
        if name not in known:
            raise UserError(
                f"{path} was trained with the {part} {name!r}, which is not known here{hint}:"
                " give --user-dir, the folder of the plugin that has it"
            )


def import_plugin(state: Mapping[str, Any], user_dir: str | None) -> str | None:
    """Import `user_dir`, or the plugin a checkpoint was trained with where that is not this one.

    Returns the latter's name where it was not found; the checkpoint may do without.
    """
    from fairseq.utils import import_user_module

    recorded = state["cfg"].get("common") or {}
    recorded = recorded.get("user_dir") if isinstance(recorded, Mapping) else None
    folder = user_dir or recorded
    if not folder or Path(folder).name in OUR_PLUGINS:
        return None
    if not os.path.isdir(folder):
        if user_dir:
            raise UserError(f"--user-dir {user_dir} is not a folder: give the folder of the plugin")
        return folder
    name = Path(folder).resolve().name
    there = getattr(sys.modules.get(name), "__path__", None)
    if name in sys.modules and str(Path(folder).resolve()) not in map(
        os.path.realpath, there or []
    ):
        raise UserError(
            f"--user-dir {folder}: another module is called {name!r}: give the folder another name"
        )
    from argparse import Namespace

    import_user_module(Namespace(user_dir=str(Path(folder).resolve())))
    return None


def name_of(state: Mapping[str, Any], part: str) -> str | None:
    """The name of the task or model that a checkpoint was trained with, where it says so."""
    for source in (state.get("cfg"), state.get("args")):
        entry = source.get(part) if isinstance(source, Mapping) else getattr(source, part, None)
        for key in ("_name", part):
            name = entry.get(key) if isinstance(entry, Mapping) else getattr(entry, key, None)
            if isinstance(name, str):
                return name
        if isinstance(entry, str):
            return entry
    return None


@contextlib.contextmanager
def untouched_logging() -> Iterator[None]:
    """Leave the root logger as it is: importing fairseq sets it to print every DEBUG line."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def usable_device(device: str) -> str:
    """`device`, with "auto" as CUDA where there is one; UserError for one that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}): try cpu") from error
    return device


def last_checkpoint(save_dir: str | os.PathLike[str]) -> str:
    """What is left of a training that stops, in words."""
    path = Path(save_dir) / "checkpoint_last.pt"
    return (
        f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
    )

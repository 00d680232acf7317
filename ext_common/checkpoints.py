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
from ext_common.packed import Pack, is_pack

OUR_PLUGINS = ("fairseq_ext", "diffusion_ext")


def read_state(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote, or `ext_common.pack` of it, as plain dicts and tensors on the CPU.

    Nothing the file holds is run (weights_only). Tensors are mapped from the file: those that nobody looks
    at, such as the optimizer's, are not read. UserError where it is missing or damaged.
    """
    if is_pack(path):
        return Pack(path).state()
    import torch

    from ext_common.compat.files import allow_namespace, is_archive, why_unreadable

    allow_namespace()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
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
    own: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Any:
    """The network of a checkpoint's state, with its weights.

    parts: modules of this project that register what the checkpoint's wing consists of. own: state → the
    network as a plain module, or None where another than this project's is described; then, and with a
    plugin, fairseq builds it, which takes seconds to import.
    """
    from ext_common.compat.messages import leave_out_harmless_warnings

    leave_out_harmless_warnings()
    if own is not None and plugin_of(state, user_dir) is None:
        network = own_network(state, path, own)
        if network is not None:
            return network
    # Without fairseq loaded first, importing fairseq_ext registers nothing.
    import_fairseq()
    with untouched_logging():
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


def own_network(
    state: Mapping[str, Any], path: str | os.PathLike[str], own: Callable[[Mapping[str, Any]], Any]
) -> Any:
    """What `own` makes of a state, with the weights; UserError where its options or weights do not fit."""
    from ext_common.compat.files import why_misfit

    try:
        network = own(state)
        if network is not None:
            network.load_state_dict(state["model"])
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    except RuntimeError as error:
        reason = why_misfit(os.fspath(path), error)
        if reason is None:
            raise
        raise UserError(reason) from error
    return network


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


def refuse_other_wing(
    state: Mapping[str, Any], path: str | os.PathLike[str], task: str, remedy: str
) -> None:
    """UserError for a training's checkpoint whose task is another wing's, or is not known here.

    task: of the training that is to go on from it; remedy: what to do instead.
    """
    from fairseq.tasks import TASK_REGISTRY

    theirs = name_of(state, "task")
    wings = [
        getattr(TASK_REGISTRY.get(name or ""), "__module__", "").split(".")[:2]
        for name in (theirs, task)
    ]
    foreign = wings[0] == [""] or all(w[0] in OUR_PLUGINS for w in wings) and wings[0] != wings[1]
    if theirs and theirs != task and foreign:
        raise UserError(f"{path} is of a training with --task {theirs}, not {task}: {remedy}")


def refuse_foreign(
    cfg: Any,
    registry: Mapping[str, type],
    flag: str,
    own: Sequence[str],
    usual: str,
    kind: type = object,
) -> None:
    """UserError for a part of fairseq or of another wing, which does not fit the task.

    cfg: options of the part; registry: classes by name; own: modules whose parts of `kind` do fit, and so
    may those of somebody's plugin.
    """
    name = getattr(cfg, "_name", None) or getattr(cfg, flag.lstrip("-"), None)
    part = registry.get(name) if isinstance(name, str) else None
    module = getattr(part, "__module__", "")
    fits = part is not None and module.startswith(tuple(own)) and issubclass(part, kind)
    if module.startswith(("fairseq.", *OUR_PLUGINS)) and not fits:
        raise UserError(f"{flag} {name} does not belong to this --task: give {usual}")


def import_plugin(state: Mapping[str, Any], user_dir: str | None) -> str | None:
    """Import `user_dir`, or the plugin a checkpoint was trained with where that is not this one.

    Returns the latter's name where it was not found; the checkpoint may do without.
    """
    folder = plugin_of(state, user_dir)
    if folder is None:
        return None
    if not user_dir and not os.path.isdir(folder):
        return folder
    load_plugin(folder)
    return None


def load_plugin(folder: str | None) -> None:
    """Import a --user-dir (None: nothing); by fairseq only where it is of the kind that fairseq looks into.

    UserError where it is no folder, or has the name of another module.
    """
    if folder is None:
        return
    path = Path(folder).resolve()
    if not path.is_dir():
        raise UserError(f"--user-dir {folder} is not a folder: give the folder of the plugin")
    loaded = sys.modules.get(path.name)
    if loaded is None and any((path / sub).exists() for sub in ("tasks", "models")):
        from argparse import Namespace

        from fairseq.utils import import_user_module

        import_user_module(Namespace(user_dir=str(path)))
        return
    if loaded is None:
        sys.path.insert(0, str(path.parent))
        loaded = importlib.import_module(path.name)
    if str(path) not in map(os.path.realpath, getattr(loaded, "__path__", None) or []):
        raise UserError(
            f"--user-dir {folder}: another module is called {path.name!r}: give the folder another name"
        )


def plugin_of(state: Mapping[str, Any], user_dir: str | None) -> str | None:
    """`user_dir`, or the plugin a checkpoint was trained with; None where that is this project's or none."""
    recorded = state["cfg"].get("common") or {}
    recorded = recorded.get("user_dir") if isinstance(recorded, Mapping) else None
    folder = user_dir or recorded
    return folder if folder and Path(folder).name not in OUR_PLUGINS else None


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


def import_fairseq() -> None:
    """`import fairseq` without what it loads for other tasks, and with logging as it was."""
    from ext_common.compat.imports import heavy_modules_later

    with untouched_logging(), heavy_modules_later():
        import fairseq  # noqa: F401


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

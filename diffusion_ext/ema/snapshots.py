"""The tracks of a training as they were at an update, in files beside its checkpoints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_ext.ema import WeightAverages
from diffusion_ext.ema.posthoc import TRACKS, Profile, gamma_of
from ext_common.checkpoints import read_state
from ext_common.cli import UserError
from ext_common.manifest import atomic_write

FOLDER = "ema"


class Track(NamedTuple):
    """A track at an update: `weights` float32 (parameters,), in the order of the module."""

    profile: Profile
    weights: Tensor


def write_snapshot(save_dir: str | os.PathLike[str], averages: WeightAverages, update: int) -> None:
    """Write the tracks of the power function into SAVE_DIR/ema, by the first process."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    tracks = averages.weights[len(averages.half_lives) :].cpu().clone()
    path = Path(save_dir) / FOLDER / f"snapshot_{update:07}.pt"
    with atomic_write(path, "wb") as file:
        torch.save({"update": update, "sigma_rel": averages.powers, "weights": tracks}, file)


def tracks_of(paths: Sequence[str | os.PathLike[str]], state: Mapping[str, Any]) -> list[Track]:
    """All tracks up to the checkpoint `state`: of the snapshots beside `paths`, and of these themselves.

    UserError for a checkpoint that was trained without them, and a snapshot of another network.
    """
    last, size = updates_of(state), state["model"]["ema.weights"].shape[1]
    found: dict[tuple[float, float], Track] = {}
    for path in paths:
        for snapshot in sorted(Path(path).parent.glob(f"{FOLDER}/snapshot_*.pt")):
            saved = read_state(snapshot)
            if saved["weights"].shape[1] != size:
                raise UserError(f"{snapshot} is of another network: remove it from the folder")
            _add(found, saved["update"], saved["sigma_rel"], saved["weights"])
    for path in paths:
        saved = read_state(path)
        lengths = sigma_rels_of(saved["cfg"]["model"])
        if not lengths:
            raise UserError(
                f"{path} was trained without snapshots: train with --ema-snapshots UPDATES"
            )
        if saved["model"]["ema.weights"].shape[1] != size:
            raise UserError(f"{path} is of another network: give checkpoints of one training")
        rows = saved["model"]["ema.weights"][-len(lengths) :]
        _add(found, updates_of(saved), lengths, rows)
    return [track for (update, _), track in sorted(found.items()) if update <= last]


def _add(
    found: dict[tuple[float, float], Track], update: float, lengths: Sequence[float], rows: Tensor
) -> None:
    for length, weights in zip(lengths, rows, strict=True):
        found[update, length] = Track(Profile(update, gamma_of(length)), weights)


def sigma_rels_of(model: Mapping[str, Any]) -> tuple[float, ...]:
    """The lengths of the tracks that a network with these options keeps."""
    return TRACKS if model.get("ema_snapshots") else ()


def updates_of(state: Mapping[str, Any]) -> int:
    """Updates that a checkpoint has behind it."""
    return int(state["optimizer_history"][-1]["num_updates"])

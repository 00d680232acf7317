"""What a page can show in files and folders: nothing in them is run."""

import datetime
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ext_common.checkpoints import name_of, read_state
from ext_common.cli import UserError
from ext_common.manifest import known_sha256
from ext_common.packed import is_pack
from ext_common.page import Model

# Of a training's folder the first of these is shown.
FIRST = ("average.pt", "checkpoint_best.pt", "checkpoint_last.pt")
DEEPEST = 4  # folders below the one that is given


def find(places: Iterable[str | os.PathLike[str]]) -> tuple[list[Model], list[str]]:
    """(models, sentences about what could not be used); UserError for a place that is not there.

    A file is taken as it is; of a folder, and of each below it, one checkpoint of a training, and packs.
    """
    models, left_out = [], []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place} does not exist: give a checkpoint or a folder with some")
        for path in [place] if place.is_file() else models_below(place):
            try:
                models.append(model_of(path))
            except UserError as error:
                if place.is_file():
                    raise
                left_out.append(str(error))
    unique = {model.path.resolve(): model for model in models}
    return list(unique.values()), left_out


def models_below(folder: Path) -> list[Path]:
    """One checkpoint of each folder in which a training saved, and every pack."""
    found = []
    for where, folders, files in os.walk(folder):
        depth = len(Path(where).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if depth < DEEPEST and not f.startswith("."))
        names = sorted(name for name in files if name.endswith(".pt"))
        if chosen := next((name for name in FIRST if name in names), None):
            found.append(Path(where, chosen))
        packs = (Path(where, name) for name in sorted(files) if name.endswith(".zip"))
        found += [path for path in packs if is_pack(path)]
    return found


def model_of(path: Path) -> Model:
    """The kind of a checkpoint and what is known of it; UserError where it is none."""
    state = read_state(path)
    kind = name_of(state, "task") if isinstance(state, Mapping) else None
    if kind is None:
        raise UserError(f"{path} is no checkpoint of fairseq-train: give one")
    return Model(kind, path, about(state, path))


def about(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Data, date, best measured figure on valid, updates and the beginning of the SHA-256."""
    cfg = state["cfg"]
    day = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    found = {"data": Path(str(cfg["task"].get("data") or "?")).name, "saved": day}
    best = (state.get("extra_state") or {}).get("best")
    if isinstance(best, int | float):
        metric = cfg["checkpoint"].get("best_checkpoint_metric", "metric")
        found[f"best {metric} on valid"] = f"{best:.4g}"
    if history := state.get("optimizer_history"):
        found["updates"] = f"{history[-1]['num_updates']:,}"
    return {**found, "SHA-256": known_sha256(path)[:12]}

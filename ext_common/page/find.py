"""What a page can show in files and folders: nothing in them is run."""

import datetime
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

from ext_common.checkpoints import name_of, read_state
from ext_common.cli import UserError
from ext_common.manifest import known_sha256
from ext_common.packed import CARD, Pack, is_pack
from ext_common.page import READERS, Model

# Of a training's folder the first of these is shown.
FIRST = ("average.pt", "checkpoint_best.pt", "checkpoint_last.pt")
LOG = "train.log"
TRAINING = "training"  # the kind of a log
DEEPEST = 4  # folders below the one that is given


def find(places: Iterable[str | os.PathLike[str]]) -> tuple[list[Model], list[str]]:
    """(models, sentences about what could not be used); UserError for a place that is not there.

    A file is taken as it is, with the log of its training where there is one; of a folder, and of each below
    it, one checkpoint of a training, its log, and what `READERS` know.
    """
    models, left_out = [], []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"{place} does not exist: give a checkpoint or a folder with some")
        if place.is_file():
            if (given := model_of(place)) is None:
                raise UserError(f"{place} is nothing that a tab can use: give a checkpoint")
            logs = (folder / LOG for folder in (place.parent, place.parent.parent))
            models += [given, *(Model(TRAINING, log) for log in logs if log.is_file())]
            continue
        for path in usable_below(place):
            try:
                found = model_of(path)
            except UserError as error:
                left_out.append(str(error))
            else:
                models += [found] if found else []
    unique = {model.path.resolve(): model for model in models}
    return list(unique.values()), left_out


def usable_below(folder: Path) -> list[Path]:
    """One checkpoint of each folder in which a training saved, logs, packs, and what `READERS` may know."""
    found = []
    for where, folders, files in os.walk(folder):
        depth = len(Path(where).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if depth < DEEPEST and not f.startswith("."))
        names = sorted(name for name in files if name.endswith(".pt"))
        if chosen := next((name for name in FIRST if name in names), None):
            found.append(Path(where, chosen))
        packs = (Path(where, name) for name in sorted(files) if name.endswith(".zip"))
        found += [path for path in packs if is_pack(path)]
        found += [Path(where, n) for n in sorted(files) if n == LOG or Path(n).suffix in READERS]
    return found


def model_of(path: Path) -> Optional[Model]:
    """The kind of a file and what is known of it; None for one that a reader leaves, UserError for others."""
    if path.name == LOG:
        return Model(TRAINING, path)
    if path.suffix in READERS:
        return READERS[path.suffix](path)
    state = read_state(path)
    kind = name_of(state, "task") if isinstance(state, Mapping) else None
    if kind is None:
        raise UserError(f"{path} is no checkpoint of fairseq-train: give one")
    return Model(kind, path, about(state, path), card_of(path))


def card_of(path: Path) -> str:
    """The model card in a pack, Markdown; nothing for other files."""
    pack = Pack(path) if is_pack(path) else None
    return pack.read(CARD).decode(errors="replace") if pack and CARD in pack.files else ""


def about(state: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Data, date, best measured figure on valid, updates and the beginning of the SHA-256."""
    cfg = state["cfg"]
    found = {"data": Path(str(cfg["task"].get("data") or "?")).name, "saved": saved(path)}
    best = (state.get("extra_state") or {}).get("best")
    if isinstance(best, int | float):
        metric = cfg["checkpoint"].get("best_checkpoint_metric", "metric")
        found[f"best {metric} on valid"] = f"{best:.4g}"
    if history := state.get("optimizer_history"):
        found["updates"] = f"{history[-1]['num_updates']:,}"
    return {**found, "SHA-256": known_sha256(path)[:12]}


def saved(path: Path) -> str:
    """The day a file was written."""
    return datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()

"""What DEST is when a process comes to it, and how it becomes a folder with work to share."""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.folders import difference, refuse_file
from ext_common.manifest import MANIFEST_NAME, sync_folder
from fairseq_ext.backtranslation.generate import mono as monolingual
from fairseq_ext.backtranslation.generate.chunks import MERGE, WORK, Chunks, Offsets, name_of, sweep
from fairseq_ext.backtranslation.generate.claims import (
    PATIENCE,
    Claims,
    Heart,
    Owner,
    Watch,
    if_there,
    pauses,
)

KIND = "synthetic"
WORDS = {
    "mono": "other content of MONO",
    "guard": "other held-out lines to guard (--guard)",
    "sha256": "another model",
    "name": "--mode {before}, not {now}",
}
_SETUP, _OLD = f"{WORK}-setup@", f"{WORK}-old@"


def enter(
    dest: Path,
    source: str,
    plan: dict[str, Any],
    owner: Owner,
    heart: Heart,
    patience: float = PATIENCE,
) -> Chunks | None:
    """The work in `dest`, set up where there is none; None where all is done.

    plan: what decides the bytes of `dest` beside those of `source`. Raises UserError where `dest` was
    made, or is being made, by another plan, and where it holds other files. What was begun before streams had
    a name goes on with its own.
    """
    digest, work, waits = None, dest / WORK, pauses()
    while True:
        before, chunks = made_by(dest), None
        if before is None and work.is_dir():
            # whoever finishes the run may remove it meanwhile
            with if_there():
                chunks = Chunks(work)
                before = chunks.plan
        if before is not None:
            digest = digest or monolingual.content_hash(source)
            now = {key: plan[key] for key in plan if key != "stream" or key in before}
            check_same(dest, before, {"mono": digest, **now})
            if chunks is None:
                clean(dest, owner, patience)
            return chunks
        check_free(dest)
        copied = None
        # another process may take this one for dead and remove what it has set up
        with if_there():
            copied = set_up(dest, source, plan, owner, heart, patience)
        digest = digest or copied
        if copied is None:
            time.sleep(next(waits))


def manifest_of(dest: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder of synthetic lines; None where there is none."""
    try:
        manifest = json.loads((dest / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = isinstance(manifest, dict) and manifest.get("kind") == KIND
    return manifest if fits and isinstance(manifest.get("plan"), dict) else None


def finished_without(dest: Path, patience: float = PATIENCE) -> bool:
    """Whether others finished `dest`, now that its work is gone; UserError where all of it is gone."""
    waits, until = pauses(), time.monotonic() + patience
    while not (dest / WORK).exists():
        if manifest_of(dest):
            return True
        # a shared directory may for a while remember that there was no manifest
        if not dest.exists() or time.monotonic() > until:
            raise UserError(
                f"{dest} or {dest / WORK} was removed while this command worked in it: run it again"
            )
        time.sleep(next(waits))
    return manifest_of(dest) is not None


def made_by(dest: Path) -> dict[str, Any] | None:
    """The plan of a finished folder; UserError where files of it are gone."""
    manifest = manifest_of(dest)
    if manifest is None:
        return None
    names = output_names(manifest["real_lang"], manifest["synthetic_lang"], manifest["nbest"])
    for name in names:
        if not (dest / name).is_file():
            raise UserError(f"{dest / name} is missing: restore it, or delete {dest} and run again")
    plan: dict[str, Any] = manifest["plan"]
    return plan


def output_names(real: str, synthetic: str, nbest: int) -> list[str]:
    """Names of the files in DEST but the manifest: real, synthetic by rank, provenance, rejects."""
    ranks = [f"synthetic.{rank}.{synthetic}" for rank in range(2, nbest + 1)]
    return [
        f"real.{real}",
        f"synthetic.{synthetic}",
        *ranks,
        "provenance.jsonl",
        "rejects.jsonl",
    ]


def check_free(dest: Path) -> None:
    """UserError where `dest` holds what no earlier run of this command can have left."""
    refuse_file(dest)
    names = sorted(os.listdir(dest)) if dest.exists() else []
    for name in names:
        if name.startswith((_SETUP, _OLD, ".nfs")):
            continue
        # another process may have come further since
        if not (dest / WORK / "plan.json").exists() and not made_by(dest):
            raise UserError(
                f"{dest} holds other files ({name}) and is not from this command: give a new folder"
            )


def check_same(dest: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    if before != now:
        raise UserError(
            f"{dest} was begun with {difference(before, now, WORDS)}: give another folder, or delete it"
        )


def set_up(
    dest: Path,
    source: str,
    plan: dict[str, Any],
    owner: Owner,
    heart: Heart,
    patience: float = PATIENCE,
) -> str | None:
    """Copy `source` and cut it into chunks, unless another process does: None then.

    SHA-256 of what was copied, whether or not another process was faster. UserError for a source that
    cannot be used.
    """
    mine = dest / f"{_SETUP}{owner}@{secrets.token_hex(4)}"
    mine.mkdir(parents=True)
    heart.hold(mine)
    try:
        # Each sees those that came before it, so that not all who start at once copy the text.
        others = living(dest, Watch(mine, owner, patience))
        if any(other.name < mine.name for other in others):
            return None
        offsets = Offsets(mine / "offsets", plan["chunk_lines"])
        digest = monolingual.copy(source, mine / "real", offsets.add)
        Claims.set_up(mine, map(name_of, range(offsets.close())))
        Claims.set_up(mine / MERGE, [MERGE])
        (mine / "done").mkdir()
        with open(mine / "plan.json", "w", encoding="utf-8") as file:
            whole = {"plan": {"mono": digest, **plan}, "lines": offsets.lines}
            json.dump(whole, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(mine)
        try:
            os.rename(mine, dest / WORK)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(dest)
        return digest
    finally:
        heart.let_go(mine)
        shutil.rmtree(mine, ignore_errors=True)


def living(dest: Path, watch: Watch) -> Iterator[Path]:
    """Folders that other processes are setting up; those of dead ones are removed."""
    for path in sorted(dest.glob(f"{_SETUP}*")):
        owner = Owner.parse(path.name.removeprefix(_SETUP).rpartition("@")[0])
        if watch.dead(owner, path):
            shutil.rmtree(path, ignore_errors=True)
        elif owner != watch.owner:
            yield path


def clean(dest: Path, owner: Owner, patience: float = PATIENCE) -> None:
    """Remove what a finished run, or those who came late to it, left."""
    sweep(dest / WORK)
    scratch = dest / f"{_OLD}{secrets.token_hex(4)}"
    if any(dest.glob(f"{_SETUP}*")):
        scratch.mkdir()
        for _ in living(dest, Watch(scratch, owner, patience)):
            pass
    for path in dest.glob(f"{_OLD}*"):
        shutil.rmtree(path, ignore_errors=True)

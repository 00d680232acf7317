"""Chunks that are done become the files of DEST; what the command says at its end."""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ext_common.cli import UserError, progress
from ext_common.manifest import MANIFEST_NAME, sha256_file, sync_folder, write_manifest
from fairseq_ext.backtranslation.generate.chunks import MERGE, Chunks
from fairseq_ext.backtranslation.generate.claims import Claim
from fairseq_ext.backtranslation.generate.setup import KIND, output_names
from fairseq_ext.backtranslation.models.backends import Line
from fairseq_ext.translation.prepare.report import count_reason

_UNPRINTABLE = re.compile("[\n\r\ud800-\udfff]")


def merge(dest: Path, chunks: Chunks, claim: Claim, source: str, options: Any) -> None:
    """Write the files of DEST, whole or not at all, the manifest last.

    Whoever is killed here leaves all to the next who claims it. Raises UserError where a copy or a chunk
    is not what it was.
    """
    plan = chunks.plan
    real, synthetic = plan["real_lang"], plan["synthetic_lang"]
    names = output_names(real, synthetic, plan["nbest"])
    scratch = chunks.folder / MERGE / "scratch" / f"{claim.path.name}.part"
    scratch.mkdir()
    counts = write_lines(chunks, scratch, names)
    copy = scratch / names[0]
    try:
        os.link(chunks.real, copy)
    except OSError:  # a file system without links
        shutil.copyfile(chunks.real, copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())
    if sha256_file(copy) != plan["mono"]:
        raise UserError(
            f"{chunks.real} is no longer what {source} was: delete {chunks.folder}, and run the "
            "command again"
        )
    write_manifest(
        scratch,
        inputs={source: plan["mono"]},
        counts=counts,
        options=asdict(options),
        seed=plan["seed"],
        kind=KIND,
        real_lang=real,
        synthetic_lang=synthetic,
        lines=chunks.lines,
        real_sha256=plan["mono"],
        model={"path": options.model, **plan["model"]},
        mode=plan["mode"],
        round=plan["round"],
        nbest=plan["nbest"],
        plan=plan,
    )
    for name in names:
        os.rename(scratch / name, dest / name)
    sync_folder(dest)
    os.rename(scratch / MANIFEST_NAME, dest / MANIFEST_NAME)
    sync_folder(dest)


def write_lines(chunks: Chunks, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The files but `real` in `folder`; counts of lines in, usable, and unusable by reason.

    A line of which any of nbest texts is usable is usable.
    """
    plan = chunks.plan
    unusable: Counter[str] = Counter()
    usable = 0
    origin = {"model": plan["model"]["sha256"][:16], "mode": plan["mode"]["name"]}
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open(folder / name, "w", encoding="utf-8", newline=""))
            for name in names[1:]
        ]
        *texts, provenance, rejects = files
        bar = stack.enter_context(progress(range(0), "merge", "lines", total=chunks.lines))
        for number, several in chunks.results():
            for file, line in zip(texts, several, strict=True):
                file.write(line.text + "\n")
            scores = [line.score for line in several]
            row = {"line": number, **origin, "round": plan["round"]}
            row["score"] = scores[0] if len(scores) == 1 else scores
            provenance.write(as_json(row))
            for rank, line in enumerate(several, 1):
                if line.reason is not None:
                    which = {} if len(several) == 1 else {"rank": rank}
                    rejects.write(as_json({"line": number, **which, "reason": line.reason}))
            reasons = [line.reason for line in several if line.reason is not None]
            if len(reasons) < len(several):
                usable += 1
            else:
                count_reason(unusable, reasons[0])
            bar.update(1)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    return {"in": chunks.lines, "out": usable, "unusable": dict(sorted(unusable.items()))}


def as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def checked(line: Line) -> Line:
    """A line that can stand in a file of lines, whatever model wrote it; the score to six places."""
    text, score, reason = line
    if reason is None and not text.strip():
        reason = "the output is empty"
    if reason is None and _UNPRINTABLE.search(text):
        reason = "the output has a line break or a lone surrogate"
    if reason is not None:
        return Line("", None, reason)
    if score is None or not math.isfinite(score):
        return Line(text, None, None)
    return Line(text, round(float(score), 6), None)


def table(manifest: dict[str, Any]) -> str:
    """Lines in, usable, and unusable by reason, as text."""
    counts = manifest["counts"]
    total = counts["in"]
    lines = [f"lines        {total:>12,}"]
    lines += [f"  usable     {counts['out']:>12,}  {100 * counts['out'] / total:.2f} %"]
    for reason, number in sorted(counts["unusable"].items(), key=lambda item: -item[1]):
        lines.append(f"  unusable   {number:>12,}  {100 * number / total:.2f} %  {reason}")
    return "\n".join(lines)


def next_command(dest: Path, guard: str | None) -> str:
    """The command that makes training data of DEST."""
    data = shlex.quote(guard) if guard else "DATA"
    return (
        f"python -m fairseq_ext.backtranslation.assemble {data} {shlex.quote(str(dest))} DATA_BT "
        "--tag '<BT>'"
    )

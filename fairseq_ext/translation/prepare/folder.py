"""Whether a folder of bitext is the one that a plan makes."""

import json
from pathlib import Path
from typing import Any

from ext_common.folders import is_made
from ext_common.manifest import MANIFEST_NAME
from fairseq_ext.translation.corpus import Corpus

_FILES = "other files or other content of files"
WORDS = {"inputs": _FILES, "given": _FILES, "vocabulary": "other models"}


def already_made(dest: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Whether `dest` is what `plan` would make; UserError where it is anything else, or damaged.

    With `overwrite` an earlier preparation may be there.
    """
    made = is_made(dest, plan, plan_of, overwrite=overwrite, words=WORDS)
    if made:
        Corpus.open(dest)
    return made


def plan_of(dest: Path) -> dict[str, Any] | None:
    """The plan that a prepared or assembled bitext was made by; None where it is none."""
    try:
        plan = json.loads((dest / MANIFEST_NAME).read_text(encoding="utf-8")).get("plan")
        kind = json.loads((dest / "corpus.json").read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    return plan if kind == "translation" and isinstance(plan, dict) else None

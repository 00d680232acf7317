"""What a pack of a translation model holds beside its weights: the SentencePiece models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.pack import PackOptions, Part
from fairseq_ext.translation.decode.checkpoint import why_no_translation_model


def part(checkpoint: str, state: Mapping[str, Any], folder: Path, options: PackOptions) -> Part:
    """See `ext_common.pack.Wing`."""
    why = why_no_translation_model(state)
    if why:
        raise UserError(f"{checkpoint} {why}: give a checkpoint of --task translation_spm")
    saved = state["task_state"]["translation"]
    for lang, model in saved["spm"].items():
        (folder / f"spm.{lang}.model").write_bytes(model.numpy().tobytes())
    return Part(
        about=[
            f"translates {saved['source_lang']} to {saved['target_lang']}, a sentence at a time"
        ],
        not_for=[
            "text whose mistranslation does harm, unless somebody who knows both languages reads it"
        ],
    )

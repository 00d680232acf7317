"""What a pack of a speaker model holds beside its weights: an ONNX file, labels and feature specification."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ext_common.cli import UserError
from ext_common.manifest import atomic_json
from ext_common.pack import PackOptions, Part
from fairseq_ext.speaker.export.exported import PACKED


def part(checkpoint: str, state: Mapping[str, Any], folder: Path, options: PackOptions) -> Part:
    """See `ext_common.pack.Wing`."""
    from fairseq_ext.speaker.export.__main__ import ExportOptions, checked
    from fairseq_ext.speaker.inference import SpeakerModel

    saved, left_out = state["task_state"], {}
    model = SpeakerModel.from_checkpoint(checkpoint, user_dir=options.user_dir)
    try:
        # of features, not of samples: it then takes prepared data too
        export = ExportOptions(features="outside", user_dir=options.user_dir)
        data, _ = checked(model, os.fspath(checkpoint), export)
        (folder / PACKED).write_bytes(data)
    except UserError as error:
        left_out[PACKED] = str(error)
    atomic_json(folder / "speakers.json", list(saved["speakers"]))
    atomic_json(folder / "features.json", saved["spec"])
    return Part(
        about=[
            f"identifies {len(saved['speakers'])} speakers by a recording; its scores are"
            f" {'cosines' if model.score_kind == 'cosine' else 'log-probabilities'}",
            f"SHA-256 of weights and feature specification, by which galleries know it: {model.sha256}",
        ],
        not_for=[
            "recognising people who have not agreed to it",
            "deciding about people by a score alone: other microphones, rooms and languages than those of"
            " the data were not measured unless a figure above says so",
        ],
        left_out=left_out,
    )

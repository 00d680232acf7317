"""What a pack of a diffusion model says beside its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_ext.inference import why_no_diffusion_model
from ext_common.cli import UserError
from ext_common.manifest import atomic_json
from ext_common.pack import PackOptions, Part


def part(checkpoint: str, state: Mapping[str, Any], folder: Path, options: PackOptions) -> Part:
    """See `ext_common.pack.Wing`."""
    why = why_no_diffusion_model(state)
    if why:
        raise UserError(f"{checkpoint} {why}: give a checkpoint of diffusion_ext.train")
    spec = state["task_state"]["spec"]
    atomic_json(folder / "images.json", spec)
    size = f"{spec['width']} × {spec['height']} pixels, {spec['channels']} channels"
    classes = len(spec["classes"])
    return Part(
        about=[f"draws images of {size}" + (f", of {classes} classes" if classes else "")],
        not_for=[
            "passing its images off as photographs",
            "images of people who have not agreed to it: a model of few images may repeat them",
        ],
    )

"""A network of ours as two files that need neither fairseq nor the checkpoint: weights and a description.

    net = load_exported("digits")        # the network: net(x, t), see `UNet`
    config = read_config("digits")       # schedule (betas), objective, size, classes, …

model.safetensors holds the weights under the names of `UNet`, config.json all that is needed to
build it again and to sample from it. Networks of flow and edm want x and t as `objectives.shown` makes them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from diffusion_ext.schedules import NoiseSchedule
from diffusion_ext.unet import UNet, UNetOptions
from ext_common.cli import UserError
from ext_common.manifest import atomic_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "diffusion_ext.unet"
VERSION = 1


def write_exported(
    folder: Path,
    net: UNet,
    spec: Mapping[str, Any],
    schedule: NoiseSchedule,
    objective: str,
) -> None:
    """Write both files; spec: height, width, channels (of the images) and classes (names)."""
    safetensors = import_safetensors()
    atomic_json(folder / CONFIG, config_of(net, spec, schedule, objective))
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def config_of(
    net: UNet, spec: Mapping[str, Any], schedule: NoiseSchedule, objective: str
) -> dict[str, Any]:
    """What config.json says."""
    channels = spec["channels"]
    return {
        "format": FORMAT,
        "version": VERSION,
        "height": spec["height"],
        "width": spec["width"],
        "channels": channels,
        # white is 1 and black −1
        "pixel_range": [-1.0, 1.0],
        "classes": list(spec["classes"]),
        "objective": objective,
        "self_condition": net.conv_in.in_channels != channels,
        "learned_variance": net.conv_out.out_channels != channels,
        "network": {
            **asdict(net.options),
            "in_channels": net.conv_in.in_channels,
            "out_channels": net.conv_out.out_channels,
            "n_classes": net.n_classes,
            "condition_size": net.condition_size,
        },
        "timesteps": schedule.timesteps,
        "betas": schedule.betas.tolist(),
    }


def load_exported(folder: str | os.PathLike[str]) -> UNet:
    """The network in a folder written by `--format safetensors`, ready to use, on the CPU.

    UserError where a file is missing, damaged or of another program.
    """
    safetensors = import_safetensors()
    config, path = read_config(folder), Path(folder) / WEIGHTS
    sizes = dict(config["network"])
    options = UNetOptions(**{field.name: sizes.pop(field.name) for field in fields(UNetOptions)})
    net = UNet(options, height=config["height"], **sizes)
    try:
        weights = safetensors.torch.load_file(path)
        net.load_state_dict(weights)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {_REMEDY}") from None
    except (safetensors.SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise UserError(f"{path} does not hold the weights ({reason}): {_REMEDY}") from None
    return net.eval().requires_grad_(False)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json of such a folder says: see `config_of`."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {_REMEDY}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: {_REMEDY}") from None
    said = (config.get("format"), config.get("version")) if isinstance(config, dict) else None
    if said != (FORMAT, VERSION):
        raise UserError(
            f"{path} was not written by this version of diffusion_ext.export: {_REMEDY}"
        )
    found: dict[str, Any] = config
    return found


def import_safetensors() -> Any:
    """The package, or a sentence on how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "--format safetensors needs the package safetensors: pip install 'fairseq-ext[diffusers]'"
        ) from None
    return safetensors


_REMEDY = "give a folder that `diffusion_ext.export --format safetensors` wrote"

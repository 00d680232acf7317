"""A training that begins with the weights of another: `--init-from CKPT`, on other images or classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_ext.network import AveragedUNet, NetworkOptions, options_of
from ext_common.cli import UserError

# The averages and their snapshots are the new training's own.
NOT_TAKEN = ("ema_half_life", "ema_ramp_up", "ema_snapshots", "dropout")
NOISE = ("objective", "beta_schedule", "timesteps", "zero_terminal_snr")


def initialise(
    model: AveragedUNet, spec: Mapping[str, Any], state: Mapping[str, Any], path: str
) -> None:
    """Give `model`, for images as in `spec`, the averaged weights of a checkpoint; averages begin there.

    A class keeps its embedding by its name, a new one begins as an image without a class does, and a
    network that has classes no more draws what the old one drew without any. UserError where the networks
    differ.
    """
    old = averaged(state)
    new = dict(model.net.named_parameters())
    _match_classes(old, new, state["task_state"]["spec"]["classes"], spec["classes"])
    different = [
        name
        for name, value in new.items()
        if name != "condition.weight" and (name not in old or old[name].shape != value.shape)
    ]
    if different:
        raise UserError(
            f"--init-from {path} has another network ({different[0]} differs): leave its flags out, then they"
            " are those of the checkpoint"
        )
    with torch.no_grad():
        for name, value in new.items():
            if name in old and old[name].shape == value.shape:
                value.copy_(old[name])
        flat = torch.cat([value.flatten().float() for value in new.values()])
        model.ema.weights.copy_(flat.expand_as(model.ema.weights))


def averaged(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name → averaged weights of the network in a checkpoint's state, float32."""
    model = state["model"]
    names = [name for name in model if name.startswith("net.")]
    parts = model["ema.weights"][0].split([model[name].numel() for name in names])
    return {
        name.removeprefix("net."): part.view(model[name].shape)
        for name, part in zip(names, parts, strict=True)
    }


def _match_classes(
    old: dict[str, Tensor], new: Mapping[str, Tensor], before: Sequence[str], now: Sequence[str]
) -> None:
    """Make the embeddings of the classes in `old` those of the classes `now`; the last row is no class."""
    table = old.pop("label.weight", None)
    none = table[-1] if table is not None else torch.zeros_like(old["time_2.bias"])
    if "label.weight" in new:
        rows = [
            none if table is None or name not in before else table[before.index(name)]
            for name in now
        ]
        old["label.weight"] = torch.stack([*rows, none])
    else:
        old["time_2.bias"] = old["time_2.bias"] + none


def flags_of(state: Mapping[str, Any]) -> dict[str, str | None]:
    """Flags of fairseq-train for the network and the noise of a checkpoint's state."""
    options = vars(options_of(NetworkOptions, state["cfg"]["model"]))
    task = state["cfg"]["task"]
    taken = {key: value for key, value in options.items() if key not in NOT_TAKEN}
    taken |= {key: task[key] for key in NOISE}
    flags: dict[str, str | None] = {}
    for key, value in taken.items():
        if value is not False:
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags[f"--{key.replace('_', '-')}"] = None if value is True else shown
    return flags


def size_flags(state: Mapping[str, Any]) -> dict[str, str | None]:
    """Flags for images of the size and colours of a checkpoint's."""
    spec = state["task_state"]["spec"]
    return {
        "--image-size": f"{spec['height']},{spec['width']}",
        "--channels": str(spec["channels"]),
    }

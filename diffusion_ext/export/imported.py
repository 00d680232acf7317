"""A pipeline of diffusers as a checkpoint: to sample from, and to fine-tune with --finetune-from-model.

Only what has a counterpart: a `UNet2DModel` that computes what our `UNet` does, and a schedule of ours.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusion_ext.export.counterpart import (
    CLASSES,
    PREDICTIONS,
    check_table,
    read_pipeline,
    unet2d_name,
    unet2d_options,
)
from diffusion_ext.network import ARCH, AveragedUNet, NetworkOptions
from diffusion_ext.schedules import NoiseSchedule, build_schedule
from diffusion_ext.unet import UNet
from ext_common.cli import UserError
from ext_common.random import STREAM

# What a `UNet2DModel` has where its config.json says nothing.
_DEFAULTS = {"resnet_time_scale_shift": "default", "dropout": 0.0, "attn_norm_num_groups": None}
# Of options that the counterpart of ours gives, those that say the same in another way.
_FREE = {"sample_size", "attn_norm_num_groups"}


def checkpoint_of(folder: Path) -> tuple[dict[str, Any], UNet, Any]:
    """(what `torch.save` is to write, our network, the pipeline's); UserError for what none is like."""
    pipeline = read_pipeline(folder)
    config = {**_DEFAULTS, **pipeline.unet.config}
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size or (0, 0)
    classes = classes_of(folder, config)
    options = options_of_unet2d(config, height, folder)
    spec = {
        "height": height,
        "width": width,
        "channels": config["in_channels"],
        "classes": classes,
        "condition_size": 0,
        "content_hash": "",
    }
    model = AveragedUNet(options, spec)
    wanted = unet2d_options(model.net, height, width)
    differ = [
        f"{key} is {config.get(key)}, here {value}"
        for key, value in wanted.items()
        if key not in _FREE and _plain(config.get(key, value)) != _plain(value)
    ]
    for key, value in (("downsample_padding", 1), ("add_attention", True), ("act_fn", "silu")):
        if config.get(key, value) != value:
            differ.append(f"{key} is {config[key]}, here {value}")
    if differ:
        raise UserError(f"{folder} has no counterpart here: {'; '.join(differ)}")
    theirs = pipeline.unet.state_dict()
    own = {name: theirs[unet2d_name(name)] for name in model.net.state_dict()}
    model.net.load_state_dict(own)
    model.ema.update(model.net, 0, 1)
    state = {
        "args": None,
        "cfg": {
            "task": {
                **schedule_options(pipeline.scheduler, folder),
                "_name": "diffusion",
                "data": "",
            },
            "model": {**asdict(options), "_name": ARCH},
            "criterion": {"_name": "ddpm", "loss_weighting": "none", "label_dropout": 0.1},
            "common": {},
        },
        "model": model.state_dict(),
        "optimizer_history": [
            {
                "criterion_name": "DdpmCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": {"spec": spec, "stream": STREAM},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None},
        "last_optimizer_state": {},
    }
    return state, model.net.eval(), pipeline.unet


def options_of_unet2d(config: Mapping[str, Any], height: int, folder: Path) -> NetworkOptions:
    """Options of the network that may compute the same; `checkpoint_of` compares what comes of them."""
    widths = list(config["block_out_channels"])
    base = widths[0]
    kinds = list(config["down_block_types"])
    if not height or any(w % base for w in widths) or base % 4:
        raise UserError(
            f"{folder} has no counterpart here: sample_size {config['sample_size']} and block_out_channels"
            f" {widths} must be a size and multiples of the first, which is one of 4"
        )
    heights = [math.ceil(height / 2**level) for level in range(len(kinds))]
    return NetworkOptions(
        base_channels=base,
        channel_mults=[w // base for w in widths],
        blocks=config["layers_per_block"],
        attention_resolutions=[
            h for h, kind in zip(heights, kinds, strict=True) if kind.startswith("Attn")
        ]
        or [0],
        # none: one head, however wide
        head_channels=config["attention_head_dim"] or 10 * max(widths),
        dropout=config["dropout"],
        scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
    )


def classes_of(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The names of the classes, of which the last embedding is none; UserError where nobody says them."""
    count = config.get("num_class_embeds")
    path = folder / CLASSES
    if not count:
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["classes"]
        if len(names) == count - 1:
            return [str(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f'{path} does not name the {count - 1} classes before the last embedding, none: write {{"classes":'
        ' ["…", …]} into it'
    )


def schedule_options(scheduler: Any, folder: Path) -> dict[str, Any]:
    """Options of the task for a scheduler's noise levels and prediction; UserError where none is like it."""
    table = scheduler.alphas_cumprod
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    objective = kinds.get(scheduler.config.prediction_type)
    for name in ("linear", "cosine", "sigmoid"):
        for zero in (False, True):
            if objective is not None and _fits(build_schedule(name, len(table), zero), table):
                return {
                    "timesteps": len(table),
                    "beta_schedule": name,
                    "zero_terminal_snr": zero,
                    "objective": objective,
                }
    raise UserError(
        f"{folder} has no counterpart here: its schedule ({scheduler.config.beta_schedule},"
        f" {scheduler.config.prediction_type}) is none of linear, cosine and sigmoid without options"
    )


def _fits(schedule: NoiseSchedule, table: torch.Tensor) -> bool:
    try:
        check_table(schedule, table)
    except UserError:
        return False
    return True


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value

"""The counterpart in diffusers of a network and a schedule of ours: options, names of weights, files.

`UNet2DModel` computes what `UNet` does where heads of attention are equally wide everywhere. Of ours only
the layer of the augmentation condition is left out: the condition of a sampled image is 0, and the layer has
no bias. `DDPMScheduler` takes β as they are, and with them any schedule; it counts in float32.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_ext.schedules import NoiseSchedule
from diffusion_ext.unet import Attention, UNet, padded
from ext_common.cli import UserError

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# Of the noise at any timestep; float32 is off by 3e-4 of it in a cosine schedule of 1,000 timesteps.
SIGMA_TOLERANCE = 0.05
DROPPED = "condition."
# Beside a pipeline: the names of its classes, {"classes": [...]}, of which diffusers keeps none.
CLASSES = "classes.json"
# Beginnings of names, then the rest of them, ours → theirs.
_PLACES = (
    (r"time_([12])\.", r"time_embedding.linear_\1."),
    (r"label\.", "class_embedding."),
    (r"down\.(\d+)\.(\d+)\.0\.", r"down_blocks.\1.resnets.\2."),
    (r"down\.(\d+)\.(\d+)\.1\.", r"down_blocks.\1.attentions.\2."),
    (r"shrink\.(\d+)\.", r"down_blocks.\1.downsamplers.0.conv."),
    (r"middle_1\.", "mid_block.resnets.0."),
    (r"middle_attention\.", "mid_block.attentions.0."),
    (r"middle_2\.", "mid_block.resnets.1."),
    (r"up\.(\d+)\.(\d+)\.0\.", r"up_blocks.\1.resnets.\2."),
    (r"up\.(\d+)\.(\d+)\.1\.", r"up_blocks.\1.attentions.\2."),
    (r"grow\.(\d+)\.", r"up_blocks.\1.upsamplers.0.conv."),
    (r"norm_out\.", "conv_norm_out."),
    (r"(conv_(?:in|out))\.", r"\1."),
)
_LAYERS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}


def unsupported(
    net: UNet, channels: int, objective: str, size: tuple[int, int] | None = None
) -> list[str]:
    """All of the reasons why a network for images of `channels` has no counterpart; none if it has.

    size: (height, width) of the images in pixels, where they are known.
    """
    fitting = [padded(side, net.options) for side in size or ()]
    nearest = " × ".join(map(str, fitting))
    checks = {
        f"it pads its images of {' × '.join(map(str, size or ()))} pixels, and there nothing does"
        f" (the nearest --image-size that fits is {nearest})": fitting != [*(size or ())],
        "it is given its own guess at the image (--self-condition)": (
            net.conv_in.in_channels != channels
        ),
        "it predicts the variance of a step too (--learned-variance)": (
            net.conv_out.out_channels != channels
        ),
        f"its objective {objective!r} is none of {', '.join(PREDICTIONS)} (train with --objective v)": (
            objective not in PREDICTIONS
        ),
        f"its heads of attention are {' and '.join(map(str, head_widths(net)))} channels wide"
        " (--head-channels), and there all are equal": (
            len(head_widths(net)) > 1 and any(layer.heads > 1 for layer in _attentions(net))
        ),
    }
    return [reason for reason, found in checks.items() if found]


def head_widths(net: UNet) -> list[int]:
    """The different widths of its heads of attention, channels, sorted."""
    return sorted({layer.norm.num_channels // layer.heads for layer in _attentions(net)})


def unet2d_options(net: UNet, height: int, width: int) -> dict[str, Any]:
    """Arguments of `UNet2DModel` for images of height × width pixels."""
    options, heads = net.options, head_widths(net)
    stages: Any = net.down  # a ModuleList of ModuleLists, which torch types as modules
    attends = [len(stage[0]) > 1 for stage in stages]
    return dict(
        sample_size=height if height == width else (height, width),
        in_channels=net.conv_in.in_channels,
        out_channels=net.conv_out.out_channels,
        freq_shift=0,
        flip_sin_to_cos=True,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        block_out_channels=tuple(options.base_channels * m for m in options.channel_mults),
        layers_per_block=options.blocks,
        dropout=options.dropout,
        # None: every attention is one head, as wide as it has channels
        attention_head_dim=heads[0] if len(heads) == 1 else None,
        norm_num_groups=net.norm_out.num_groups,
        # without it, the middle attention has no norm where the time embedding scales and shifts
        attn_norm_num_groups=net.norm_out.num_groups,
        norm_eps=net.norm_out.eps,
        resnet_time_scale_shift="scale_shift" if options.scale_shift else "default",
        # the label after the last class is none
        num_class_embeds=net.n_classes + 1 if net.n_classes else None,
    )


def unet2d_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `UNet` under the names of `UNet2DModel`, without the augmentation condition."""
    return {unet2d_name(k): v for k, v in weights.items() if not k.startswith(DROPPED)}


def unet2d_name(name: str) -> str:
    """ "down.0.1.0.conv_1.weight" → "down_blocks.0.resnets.1.conv1.weight"."""
    for pattern, place in _PLACES:
        match = re.match(pattern, name)
        if match:
            layer, dot, rest = name[match.end() :].rpartition(".")
            return match.expand(place) + _LAYERS.get(layer, layer) + dot + rest
    raise KeyError(f"{name} has no counterpart")


def scheduler_options(schedule: NoiseSchedule, objective: str) -> dict[str, Any]:
    """Arguments of `DDPMScheduler`, for ancestral sampling as the sampler ddpm does it."""
    return dict(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type=PREDICTIONS[objective],
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def check_table(schedule: NoiseSchedule, alphas_cumprod: Tensor) -> None:
    """UserError where a table ᾱ (T,) that was computed in float32 is not that of the schedule."""
    alphas_cumprod = alphas_cumprod.double()
    sigma = (1 - alphas_cumprod).clamp(min=0).sqrt()
    error = (sigma / schedule.sigma - 1).abs().nan_to_num(torch.inf)
    # the image's share at the last timesteps, of which samplers divide
    alpha_error = (alphas_cumprod.sqrt() - schedule.alpha).abs() / schedule.alpha.clamp(min=1e-12)
    error = torch.maximum(error, alpha_error.nan_to_num(torch.inf))
    t = int(error.argmax())
    if error[t] > SIGMA_TOLERANCE:
        raise UserError(
            f"diffusers keeps the schedule in float32, where noise and image at timestep {t} are off by"
            f" {float(error[t]):.0%}: use --format safetensors, or train with fewer --timesteps"
        )


def write_pipeline(
    folder: Path, net: UNet, size: tuple[int, int], schedule: NoiseSchedule, objective: str
) -> None:
    """Write `net` and its schedule as a `DDPMPipeline`; size: (height, width) in pixels."""
    diffusers = import_diffusers()
    unet = diffusers.unet(**unet2d_options(net, *size))
    unet.load_state_dict(unet2d_weights(net.state_dict()))
    scheduler = diffusers.scheduler(**scheduler_options(schedule, objective))
    diffusers.pipeline(unet, scheduler).save_pretrained(folder)


def read_pipeline(folder: Path) -> Any:
    """The `DDPMPipeline` in a folder, on the CPU, in float32."""
    diffusers = import_diffusers()
    bars = diffusers.logging.is_progress_bar_enabled()
    diffusers.logging.disable_progress_bar()
    try:
        # the way with little memory needs accelerate, and warns where that is absent
        return diffusers.pipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    finally:
        if bars:
            diffusers.logging.enable_progress_bar()


def import_diffusers() -> SimpleNamespace:
    """What is needed of the package, or a sentence on how to get it."""
    try:
        import diffusers
        import safetensors  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format diffusers needs the package {error.name or 'diffusers'}:"
            " pip install 'fairseq-ext[diffusers]'"
        ) from None
    try:
        # its parts are imported when they are asked for
        return SimpleNamespace(
            pipeline=diffusers.DDPMPipeline,
            unet=diffusers.UNet2DModel,
            scheduler=diffusers.DDPMScheduler,
            logging=diffusers.utils.logging,
        )
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(". :")
        raise UserError(
            f"diffusers {diffusers.__version__} cannot be used ({reason}): pip install --upgrade diffusers"
        ) from None


def _attentions(net: UNet) -> Iterable[Attention]:
    return [module for module in net.modules() if isinstance(module, Attention)]

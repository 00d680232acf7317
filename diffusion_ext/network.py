"""The network as a plain module: a U-Net and the averages of its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, List, Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_ext.ema import WeightAverages
from diffusion_ext.ema.posthoc import TRACKS
from diffusion_ext.unet import UNet, UNetOptions, divisor
from ext_common.checkpoints import name_of
from ext_common.cli import UserError

ARCH = "ddpm_unet"


@dataclass
class NetworkOptions(UNetOptions):
    self_condition: bool = field(
        default=False,
        metadata={"help": "the network also gets its own guess at the image (arXiv 2208.04202)"},
    )
    learned_variance: bool = field(
        default=False,
        metadata={"help": "the network also predicts the variance of a step (arXiv 2102.09672)"},
    )
    ema_half_life: List[float] = field(
        default_factory=lambda: [500_000.0],
        metadata={"help": "half-lives of the averages of the weights, images, e.g. 100000,500000"},
    )
    ema_ramp_up: float = field(
        default=0.05,
        metadata={"help": "no half-life is longer than this share of the images seen so far"},
    )
    ema_snapshots: int = field(
        default=0,
        metadata={
            "help": "updates between two snapshots in SAVE_DIR/ema, of which diffusion_ext.ema makes averages"
            " of any length afterwards (8 bytes a parameter each, about 20 in a training); 0: none"
        },
    )


class AveragedUNet(nn.Module):
    """A `UNet` and the averages of its weights (`ema`), which validation and samples use.

    spec: height, width, channels, classes (names) and condition_size of the images. UserError for options
    that cannot be built, or that the images do not fit.
    """

    def __init__(self, options: NetworkOptions, spec: Mapping[str, Any]):
        super().__init__()
        check_options(options, options, spec["height"], spec["width"])
        self.self_condition, self.channels = options.self_condition, spec["channels"]
        self.net = UNet(
            options_of(UNetOptions, vars(options)),
            self.channels * (2 if options.self_condition else 1),
            self.channels * (2 if options.learned_variance else 1),
            spec["height"],
            len(spec["classes"]),
            spec["condition_size"],
        )
        self.snapshots = options.ema_snapshots
        tracks = TRACKS if options.ema_snapshots else ()
        self.ema = WeightAverages(self.net, options.ema_half_life, options.ema_ramp_up, tracks)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Optional[Tensor] = None,
        x0: Optional[Tensor] = None,
        condition: Optional[Tensor] = None,
        average: Optional[int] = None,
    ) -> Tensor:
        """Output (B, C or 2C, H, W) for noisy images x (B, C, H, W) at timesteps t (B,).

        x0: an earlier guess, for self-conditioning; average: use this one of the averaged weights.
        """
        if self.self_condition:
            x = torch.cat([x, torch.zeros_like(x) if x0 is None else x0], 1)
        if average is None:
            out: Tensor = self.net(x, t, label, condition)
        else:
            out = functional_call(self.net, self.ema.of(average), (x, t, label, condition))
        return out


def network_of(state: Mapping[str, Any]) -> Optional[AveragedUNet]:
    """The network that a checkpoint's state describes, without its weights; None for one of another arch.

    UserError for options that cannot be.
    """
    model = state["cfg"]["model"]
    ours = (name_of(state, "task"), name_of(state, "model")) == ("diffusion", ARCH)
    if not ours or not isinstance(model, Mapping):
        return None
    return AveragedUNet(options_of(NetworkOptions, model), state["task_state"]["spec"])


def check_options(options: UNetOptions, cfg: Any, height: int, width: int) -> None:
    """UserError for sizes that cannot be built, or that the images do not fit."""
    if options.base_channels < 4 or options.base_channels % 4 or options.blocks < 1:
        raise UserError(
            "--base-channels is a multiple of 4, and --blocks is at least 1:"
            f" got {options.base_channels} and {options.blocks}"
        )
    if not options.channel_mults or min(options.channel_mults) < 1:
        raise UserError(
            f"--channel-mults {options.channel_mults} must be numbers from 1, like 1,2,2"
        )
    if options.head_channels < 1:
        raise UserError(f"--head-channels {options.head_channels} must be at least 1")
    for mult in options.channel_mults:
        heads = max(1, options.base_channels * mult // options.head_channels)
        if options.base_channels * mult % heads:
            raise UserError(
                f"--head-channels {options.head_channels} does not divide the"
                f" {options.base_channels * mult} channels of a resolution"
            )
    if not 0 <= options.dropout < 1:
        raise UserError(f"--dropout {options.dropout} is not in [0, 1)")
    if not cfg.ema_half_life or min(cfg.ema_half_life) < 0 or cfg.ema_ramp_up <= 0:
        raise UserError("--ema-half-life is at least 0 images, and --ema-ramp-up is above 0")
    if cfg.ema_snapshots < 0:
        raise UserError(f"--ema-snapshots {cfg.ema_snapshots} must be at least 0 updates")
    n = divisor(options)
    if min(height, width) <= n // 2:
        raise UserError(
            f"images of {height} × {width} are too small for --channel-mults with"
            f" {len(options.channel_mults)} resolutions: give fewer"
        )


def options_of(cls: type, cfg: Mapping[str, Any]) -> Any:
    """The instance of an options dataclass that a part of fairseq's configuration describes."""
    given = {f.name: cfg[f.name] for f in fields(cls) if f.name in cfg}
    lists = {k for k, v in given.items() if isinstance(v, Sequence) and not isinstance(v, str)}
    return cls(**{k: list(v) if k in lists else v for k, v in given.items()})


# --- a training that begins with the weights of another (--init-from) ---------------------------------

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

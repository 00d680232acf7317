"""Write a trained model for other programs: as a pipeline of diffusers, or as safetensors with a description.

    python -m diffusion_ext.export CKPT/checkpoint_last.pt digits --format diffusers
    python -m diffusion_ext.export CKPT/checkpoint_last.pt digits --format safetensors
    python -m diffusion_ext.export PIPELINE digits.pt --format checkpoint

The last reads a pipeline of diffusers, of this command or any other whose UNet2DModel has a counterpart, as a
checkpoint to sample from, or to go on from with --finetune-from-model. What was written is read back and must
compute what the model does.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from diffusion_ext.export import counterpart
from diffusion_ext.export.exported import import_safetensors, load_exported, write_exported
from diffusion_ext.unet import UNet
from ext_common.cli import Parser, UserError, add_dataclass, from_args, run
from ext_common.folders import making, refuse_file, refuse_strangers
from ext_common.manifest import (
    MANIFEST_NAME,
    atomic_json,
    atomic_write,
    check_writable,
    write_manifest,
)

__all__ = ["ExportOptions", "export", "load_exported"]

EPILOG = """
diffusers     DDPMPipeline.from_pretrained(OUTPUT): a UNet2DModel, and a DDPMScheduler that samples as
              `diffusion_ext.sample --sampler ddpm`, at the same timesteps where their number divides T.
              Calling the pipeline draws images, but it knows no classes: of a model with classes call
              pipeline.unet with class_labels, of which the last means none; classes.json has their names.
              Not for models with --self-condition or --learned-variance.
safetensors   model.safetensors and config.json: the network of any model, with its schedule;
              diffusion_ext.export.__main__.load_exported(OUTPUT) builds it.

Both need the packages of pip install 'fairseq-ext[diffusers]'. Exit codes: 0 done, 1 failed, 2 bad usage.
"""
TOLERANCE = 1e-4
OWN_FILES = {
    "model_index.json",
    "unet",
    "scheduler",
    "model.safetensors",
    "config.json",
    counterpart.CLASSES,
    MANIFEST_NAME,
}


@dataclass
class ExportOptions:
    """What to write."""

    format: str = field(
        metadata={"help": "see below", "choices": ["diffusers", "safetensors", "checkpoint"]}
    )
    ema: int = field(
        default=0,
        metadata={"help": "which average of the weights, counted from 0; -1: none of them"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier export"})
    user_dir: Optional[str] = field(
        default=None, metadata={"help": "folder of the plugin that has further parts"}
    )

    def __post_init__(self):
        if self.ema < -1:
            raise ValueError(f"--ema {self.ema} is no average: they count from 0, and -1 is none")


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m diffusion_ext.export", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="checkpoint of diffusion_ext.train; or a pipeline's folder",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; or the checkpoint")
    add_dataclass(parser, ExportOptions)
    args = parser.parse_args(argv)
    options = from_args(ExportOptions, args)
    if options.format == "checkpoint":
        import_pipeline(args.checkpoint, args.output, options.overwrite)
        return
    export(args.checkpoint, args.output, options)


def import_pipeline(source: str | os.PathLike, output: str | os.PathLike, overwrite: bool) -> None:
    """Write the checkpoint `output` from the pipeline in the folder `source`; raises UserError."""
    from diffusion_ext.export.imported import checkpoint_of

    counterpart.import_diffusers()
    folder, dest = Path(source), Path(output)
    check_writable(dest)
    if dest.exists() and not overwrite:
        raise UserError(f"{output} exists: use --overwrite to replace it, or another file")
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{source} is no pipeline of diffusers: give a folder with model_index.json"
        )
    state, net, theirs = checkpoint_of(folder)
    spec = state["task_state"]["spec"]
    probe = Probe(
        torch.randn(3, spec["channels"], spec["height"], spec["width"]),
        torch.tensor([0, 300, 999]) % state["cfg"]["task"]["timesteps"],
        torch.tensor([0, 1, net.n_classes]) % (net.n_classes + 1) if net.n_classes else None,
    )
    difference = largest_difference(
        net, lambda x, t, label: theirs(x, t, class_labels=label).sample, probe
    )
    if not difference <= TOLERANCE:
        raise UserError(
            f"{source} has no counterpart here: its outputs differ by up to {difference:.1e} of the largest,"
            f" {TOLERANCE:.0e} is accepted"
        )
    with atomic_write(dest, "wb") as file:
        torch.save(state, file)
    print(
        f"{output}: its outputs differ from the pipeline's by at most {difference:.1e} of the largest"
    )


def export(
    checkpoint: str | os.PathLike, output: str | os.PathLike, options: ExportOptions
) -> float:
    """Write the folder `output`; raises UserError, and then leaves nothing behind.

    Returns the largest difference between the outputs of the model and of what was written, over random
    images at several timesteps, in float32, as a share of the largest output.
    """
    from diffusion_ext.inference import DiffusionModel

    require, check, write = FORMATS[options.format]
    require()
    dest = Path(os.path.realpath(output))
    check_place(dest, output, options.overwrite)
    model = DiffusionModel.from_checkpoint(
        checkpoint, "cpu", None if options.ema < 0 else options.ema, options.user_dir
    )
    net = network_of(model, checkpoint)
    check(checkpoint, model, net)
    with making(dest) as folder:
        written = write(model, net, folder)
        difference = largest_difference(net, written, probe_of(net, model))
        if not difference <= TOLERANCE:
            raise UserError(
                f"{checkpoint} cannot be written with --format {options.format}: read back, its outputs"
                f" differ from the model's by up to {difference:.1e} of the largest,"
                f" {TOLERANCE:.0e} is accepted"
            )
        dropped = ["condition.weight"] if net.condition and options.format == "diffusers" else []
        weights = {name: value.numel() for name, value in net.state_dict().items()}
        write_manifest(
            folder,
            inputs=[checkpoint],
            counts={
                "weights": sum(weights.values()),
                "written": sum(n for name, n in weights.items() if name not in dropped),
                "left out": {name: weights[name] for name in dropped},
            },
            options=options,
            seed=None,
            parity={"difference": difference, "tolerance": TOLERANCE},
            packages=_packages(),
        )
    print(
        f"{output}: read back, its outputs differ from the model's by at most {difference:.1e} of the largest"
        f" ({TOLERANCE:.0e} is accepted)"
    )
    if model.classes and options.format == "diffusers":
        print(
            f"DDPMPipeline knows no classes: call pipeline.unet(x, t, class_labels) with 0 to"
            f" {net.n_classes - 1} for a class, {net.n_classes} for none; {counterpart.CLASSES} names them"
        )
    return difference


def network_of(model, checkpoint: str | os.PathLike) -> UNet:
    """The model's network in float32, holding the average of the weights that was chosen."""
    net = getattr(model.model, "net", None)
    if type(net) is not UNet:
        raise UserError(
            f"{checkpoint} holds a network of another plugin ({type(net or model.model).__name__}), which"
            " diffusion_ext.export does not know"
        )
    net = net.float().requires_grad_(False)
    if model.average is not None:
        net.load_state_dict(model.model.ema.of(model.average))
    return net


def check_counterpart(checkpoint: str | os.PathLike, model, net: UNet) -> None:
    """UserError with all of the reasons why diffusers cannot represent a model."""
    reasons = counterpart.unsupported(net, model.shape[0], model.objective, model.shape[1:])
    if reasons:
        raise UserError(
            f"{checkpoint} has no counterpart in diffusers: {'; '.join(reasons)}: use --format safetensors"
        )


def write_diffusers(model, net: UNet, folder: Path) -> Callable:
    """Fill the folder; returns the network that is read back, as a function of x, t and label."""
    counterpart.write_pipeline(folder, net, model.shape[1:], model.schedule, model.objective)
    if model.classes:
        atomic_json(folder / counterpart.CLASSES, {"classes": model.classes})
    pipeline = counterpart.read_pipeline(folder)
    counterpart.check_table(model.schedule, pipeline.scheduler.alphas_cumprod)
    return lambda x, t, label: pipeline.unet(x, t, label).sample


def write_safetensors(model, net: UNet, folder: Path) -> Callable:
    """The same for the other format."""
    write_exported(folder, net, model.spec, model.schedule, model.objective)
    return load_exported(folder)


# What to import, what to refuse, and how to write.
FORMATS = {
    "diffusers": (counterpart.import_diffusers, check_counterpart, write_diffusers),
    "safetensors": (import_safetensors, lambda *_: None, write_safetensors),
}


class Probe(NamedTuple):
    """Input to compare networks with: x (N, C, H, W), t (N,), label (N,) or None."""

    x: Tensor
    t: Tensor
    label: Optional[Tensor]


def probe_of(net: UNet, model) -> Probe:
    """Noise at the first, the last and two other timesteps, of no class and of some."""
    _, height, width = model.shape
    last = model.schedule.timesteps - 1
    t = torch.tensor([0, last // 3, 2 * last // 3, last])
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(len(t), net.conv_in.in_channels, height, width, generator=draw)
    label = None
    if net.n_classes:
        label = (net.n_classes + torch.arange(len(t))) % (net.n_classes + 1)
    return Probe(x, t, label)


@torch.no_grad()
def largest_difference(ours: Callable, theirs: Callable, probe: Probe) -> float:
    """max |theirs − ours| / max |ours|; 0 where both are 0, NaN where one is not finite."""
    a, b = ours(*probe), theirs(*probe)
    error, scale = float((a - b).abs().max()), float(a.abs().max())
    if error == 0:
        return 0.0
    return error / scale if scale else float("inf")


def check_place(dest: Path, output: str | os.PathLike, overwrite: bool) -> None:
    """UserError where `dest` cannot be made, or holds something that is not to be replaced."""
    parent = next(p for p in dest.parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"{output} cannot be made: {parent} is a file")
    refuse_file(dest)
    if dest.exists() and not overwrite:
        raise UserError(f"{output} exists: use --overwrite to replace it, or another folder")
    refuse_strangers(dest, OWN_FILES)


def _packages() -> dict[str, str]:
    found = {}
    for name in ("diffusers", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


if __name__ == "__main__":
    run(main)

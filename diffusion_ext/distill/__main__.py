"""Make a trained diffusion model one of 1 or 2 steps.

    python -m diffusion_ext.distill CKPT/checkpoint_last.pt --save-dir FAST
    python -m diffusion_ext.sample fast --path FAST/checkpoint_last.pt

`fairseq-train` on the same images, with the network and the noise of CKPT, from its weights on
(--init-from), by --criterion consistency (consistency tuning, Geng et al. 2024). Every flag of
fairseq-train can be given.
"""

import shlex
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

from ext_common.cli import Parser, UserError, add_dataclass, from_args, run

# Share of the rate that the model was trained with.
RATE = 0.3
SHARE = 0.5
# Updates for each halving of the distance between the two looks, which are as many as by default at most:
# what is far from the image learns from what is near, and that takes its time (docs/results/diffusion.md).
HALVING = 100


@dataclass
class DistillOptions:
    """How; further flags are those of fairseq-train."""

    save_dir: str = field(metadata={"help": "folder for the checkpoints of the distilled model"})
    data: Optional[str] = field(
        default=None, metadata={"help": "images; none: those that CKPT was trained on"}
    )
    max_update: int = field(
        default=0, metadata={"help": "updates; 0: half of those of the training"}
    )
    print_command: bool = field(
        default=False, metadata={"help": "print the equal fairseq-train line and stop"}
    )


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m diffusion_ext.distill", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="of diffusion_ext.train")
    add_dataclass(parser, DistillOptions)
    args, rest = parser.parse_known_args(argv)
    command = command_of(args.checkpoint, from_args(DistillOptions, args), rest)
    if args.print_command:
        print(shlex.join(command))
        return
    from diffusion_ext.train import train

    train(command)


def command_of(checkpoint: str, options: DistillOptions, rest: list[str]) -> list[str]:
    """The line of fairseq-train; UserError for a checkpoint that cannot be distilled."""
    from diffusion_ext.distill.criterion import ConsistencyConfig
    from diffusion_ext.inference import read_checkpoint
    from diffusion_ext.network import flags_of, size_flags
    from diffusion_ext.presets import PRESETS
    from diffusion_ext.train import PLUGIN

    state = read_checkpoint(checkpoint)
    cfg, updates = state["cfg"], state["optimizer_history"][-1]["num_updates"]
    task: Mapping[str, Any] = cfg["task"]
    for option, flag in (
        ("self_condition", "--self-condition"),
        ("learned_variance", "--learned-variance"),
    ):
        if cfg["model"].get(option):
            raise UserError(f"{checkpoint} was trained with {flag}: distil a model without it")
    flags = {**flags_of(state), **size_flags(state), "--save-dir": options.save_dir}
    flags |= {"--init-from": checkpoint, "--criterion": "consistency", "--arch": "ddpm_unet"}
    flags |= {
        f"--{key.replace('_', '-')}": str(task[key]) for key in ("valid_fraction", "max_valid")
    }
    flags |= {"--class-labels": None} if state["task_state"]["spec"]["classes"] else {}
    flags |= {"--image-store": task["image_store"]} if task["image_store"] else {}
    length = options.max_update or max(1, round(SHARE * updates))
    flags |= {"--halvings": str(min(max(1, length // HALVING), ConsistencyConfig.halvings))}
    flags |= {"--max-update": str(length), "--lr": f"{RATE * cfg['optimization']['lr'][0]:g}"}
    flags |= {"--optimizer": PRESETS.names["optimizer"], "--adam-betas": "(0.9, 0.99)"}
    flags |= {
        "--lr-scheduler": "fixed",
        "--warmup-updates": str(min(50, length)),
        "--clip-norm": "1.0",
    }
    flags |= {"--batch-size": str(cfg["dataset"]["batch_size"]), "--num-workers": "0"}
    flags |= {"--epoch-updates": str(min(length, task["epoch_updates"]))}
    flags |= {"--sample-interval": str(task["sample_interval"]), "--no-epoch-checkpoints": None}
    given = {word.partition("=")[0] for word in rest}
    command = ["fairseq-train", options.data or task["data"], "--user-dir", str(PLUGIN)]
    command += ["--task", "diffusion", "--presets", "off"]
    for flag, value in flags.items():
        if flag not in given:
            command += [flag] if value is None else [flag, value]
    return [*command, *rest]


if __name__ == "__main__":
    run(main)

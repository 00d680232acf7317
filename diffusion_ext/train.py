"""Train a diffusion model on a folder of images: fairseq-train with everything preset.

    python -m diffusion_ext.train IMAGES
    python -m diffusion_ext.train IMAGES --save-dir CKPT --image-size 64 --hflip 0.5
    python -m diffusion_ext.train DATA --image-dataset digits --config configs/diffusion/digits.yaml

Every flag of fairseq-train, of the task, the model and the criterion can be given and overrides the preset
(`diffusion_ext.presets`). Called again it continues.
"""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ext_common.cli import Parser, UsageError, UserError, run

PLUGIN = Path(__file__).resolve().parent
EPILOG = """\
the flags asked for most (--all-help explains them, and lists those of fairseq-train):
  images     --image-size --channels --class-labels --valid-fraction
  augment    --hflip --color-jitter --augment --leaky-augment
  noise      --beta-schedule --timesteps --zero-terminal-snr --objective --loss-weighting
  network    --base-channels --channel-mults --blocks --attention-resolutions --dropout --self-condition
             --learned-variance --ema-half-life
  training   --save-dir --max-update --batch-size --update-freq --lr --warmup-updates --autocast --seed
             --sample-interval --label-dropout --tensorboard-logdir
"""
# The part of a recipe's group that is a name, as a flag.
NAMES = {"model": "--arch", "lr_scheduler": "--lr-scheduler"}
IGNORED = ("hydra", "defaults")


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m diffusion_ext.train",
        usage="%(prog)s IMAGES [--save-dir DIR] [--image-size N] [FLAG OF fairseq-train …]",
        description=__doc__,
        epilog=EPILOG,
    )
    parser.add_argument(
        "images", metavar="IMAGES", nargs="?", help="folder of images, or a prepared one"
    )
    parser.add_argument("--config", help="recipe, as in configs/diffusion/; flags override it")
    parser.add_argument(
        "--image-dataset", help="write this known set into IMAGES first: digits, cifar10, …"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch --image-dataset where it is not here"
    )
    parser.add_argument(
        "--print-command", action="store_true", help="print the equal fairseq-train line and stop"
    )
    parser.add_argument(
        "--all-help", action="store_true", help="list every flag of fairseq-train too"
    )
    own, rest = parser.parse_known_args(argv)
    if own.all_help:
        names = ["--arch", "ddpm_unet", "--criterion", "ddpm", "--optimizer", "adam"]
        return train(["fairseq-train", *typed([], []), *names, "--help"])
    if own.images is None:
        parser.error("IMAGES, the folder of images, is missing")
    # the values of fairseq's flags are not told from it here
    if not argv[0] or argv[0].startswith("-"):
        raise UsageError(f"IMAGES, the folder of images, comes before all flags, got {argv[0]!r}")
    recipe = read_recipe(own.config) if own.config else []
    images, lines = own.images, []
    if own.image_dataset:
        size = value_of([*recipe, *rest], "--image-size")
        preparation = [own.images, "--image-dataset", own.image_dataset]
        preparation += ["--image-size", size] if size else []
        preparation += ["--download"] if own.download else []
        lines.append(["python", "-m", "diffusion_ext.prepare", *preparation])
        from diffusion_ext.prepare.__main__ import main as prepare

        if not own.print_command:
            prepare(preparation)
    check_size(value_of([*recipe, *rest], "--image-size"))
    if own.print_command:
        lines.append(["fairseq-train", images, *arguments(images, recipe, rest)])
        print("\n".join(shlex.join(line) for line in lines))
        return None
    return train(["fairseq-train", images, *typed(recipe, rest)])


def arguments(images: str, recipe: Sequence[str], rest: Sequence[str]) -> list[str]:
    """Flags of fairseq-train beside IMAGES: presets, the recipe, what was typed; the last counts."""
    from ext_common.checkpoints import untouched_logging
    from ext_common.compat.messages import leave_out_harmless_warnings

    leave_out_harmless_warnings()
    with untouched_logging():
        register()
        from fairseq import options

        from ext_common.presets import complete
    words, chosen = complete(options.get_training_parser(), [images, *typed(recipe, rest)])
    words = chosen.command if chosen else words
    at = words.index(images)
    return last_of_each([*words[:at], *words[at + 1 :]])


def typed(recipe: Sequence[str], rest: Sequence[str]) -> list[str]:
    """What was given, with what this command stands for."""
    return ["--user-dir", str(PLUGIN), "--task", "diffusion", "--presets", "on", *recipe, *rest]


def last_of_each(arguments: Sequence[str]) -> list[str]:
    """Flags with their values, of a flag given several times only the last."""
    groups: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0]
            groups.pop(name, None)
            groups[name] = []
        groups.setdefault(name, []).append(argument)
    return [argument for group in groups.values() for argument in group]


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value given for a flag, as `--flag value` or `--flag=value`."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def check_size(given: str | None) -> None:
    """UsageError where --image-size is no size."""
    try:
        [int(part) for part in (given or "0").split(",")]
    except ValueError:
        raise UsageError(
            f"--image-size {given!r} is no size: give pixels, as 64 or 48,64 (height,width)"
        ) from None


def read_recipe(path: str) -> list[str]:
    """A recipe for fairseq-hydra-train as flags of fairseq-train."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        groups = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: configs/diffusion/ has recipes") from None
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is no readable recipe ({str(error).splitlines()[0]})") from None
    if not isinstance(groups, dict) or not all(
        isinstance(g, dict) for n, g in groups.items() if n not in IGNORED
    ):
        raise UserError(
            f"{path} is no recipe: it has no groups task, model, … with options below them"
        )
    flags = []
    for group, options in groups.items():
        for key, value in options.items() if group not in IGNORED else []:
            if (group, key) in (("task", "data"), ("common", "user_dir")):
                continue
            flag = (
                NAMES.get(group, f"--{group}") if key == "_name" else f"--{key.replace('_', '-')}"
            )
            flags += flag_with(flag, value)
    return flags


def flag_with(flag: str, value: Any) -> list[str]:
    """A recipe's value as fairseq's parser takes it; nothing for false and null."""
    if value is None or value is False or value == "???":
        return []
    if value is True:
        return [flag]
    if isinstance(value, list):
        return [flag, ",".join(map(str, value))] if value else []
    return [flag, str(value)]


def train(command: list[str]) -> None:
    """fairseq-train in this process; its mistakes in one sentence."""
    sys.argv = command
    with contextlib.suppress(BrokenPipeError):
        from ext_common.compat.messages import leave_out_harmless_warnings

        leave_out_harmless_warnings()
        register()
        from fairseq_cli.train import cli_main

        from ext_common.checkpoints import last_checkpoint

        try:
            cli_main()
        except FloatingPointError as error:
            left = last_checkpoint(save_dir_of(command))
            raise UserError(
                f"training stops: {str(error).rstrip('.')}; {left}; lower --lr or --clip-norm, or train"
                " with --autocast fp32"
            ) from None


def save_dir_of(command: list[str]) -> str:
    """The folder that a training has just failed in."""
    from ext_common.presets.save_dirs import default_save_dir

    given = value_of(command, "--save-dir")
    return given or str(default_save_dir(command[1], "diffusion")[0])


def register() -> None:
    """Enter this plugin into fairseq, which imports no --user-dir a second time: it was imported before."""
    from ext_common.checkpoints import import_fairseq

    import_fairseq()
    import diffusion_ext

    diffusion_ext.register()


if __name__ == "__main__":
    run(main)
elif __name__ == "__mp_main__":
    # a process that fairseq spawned, one a GPU, begins with the main module
    register()

"""From images to new images: draw what was not there.

bash scripts/quickstart.sh diffusion                              digits of sklearn: no download
bash scripts/quickstart.sh diffusion --data IMAGES                your own, any folder of images
bash scripts/quickstart.sh diffusion --data IMAGES --image-size 64 --updates 50000

Shows each command as it runs it, so that you can run it yourself with other options. Called again
it continues where it was stopped, skips what is done, and trains on where --updates is higher.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from steps import ROOT, Steps, relative, show_command
from training import train_shown

from diffusion_ext.prepare.build import read_meta
from ext_common.cli import Parser, UserError, add_dataclass, from_args, run

OUT = "quickstart-diffusion"
SAMPLES = 500
LEAST = 8  # images: diffusion_ext.evaluate compares two sets of four
OWNED = (
    "data checkpoints train.log learning_curve.png samples samples.grid.png samples.strip.png samples.gif "
    "samples.csv metrics.json"
).split()


@dataclass
class QuickstartOptions:
    """What to run it on."""

    data: Optional[str] = field(
        default=None, metadata={"help": "folder of images; none: sklearn's digits at 16 × 16"}
    )
    image_size: int = field(
        default=32, metadata={"help": "pixels that images of --data are brought to"}
    )
    out: Optional[str] = field(
        default=None,
        metadata={"help": f"folder to write; none: {OUT}, and {OUT}-NAME with --data NAME"},
    )
    updates: Optional[int] = field(
        default=None, metadata={"help": "updates to train for; none: 1200, 3000 with --data"}
    )
    fresh: bool = field(default=False, metadata={"help": "start over"})

    def __post_init__(self):
        if self.updates is not None and self.updates < 1:
            raise ValueError(f"--updates must be at least 1, got {self.updates}")
        if self.image_size < 8:
            raise ValueError(f"--image-size must be at least 8, got {self.image_size}")


def main(argv):
    """The command."""
    parser = Parser(prog="bash scripts/quickstart.sh diffusion", description=__doc__)
    add_dataclass(parser, QuickstartOptions)
    options = from_args(QuickstartOptions, parser.parse_args(argv))
    options.updates = options.updates or (3000 if options.data else 1200)
    try:
        quickstart(options)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 130


def quickstart(options):
    """All steps. Raises UserError."""
    if options.data is not None and not Path(options.data).is_dir():
        raise UserError(f"{options.data} is not a folder: give the folder with the images")
    source = options.data and os.path.abspath(options.data)
    out = Path(options.out or (f"{OUT}-{Path(source).name}" if source else OUT))
    size = options.image_size if source else 16
    job = {"quickstart": "diffusion", "data": source, "image_size": size}
    with Steps(relative(out), job, OWNED, options.fresh) as steps:
        print("To run the commands below yourself: source .venv/bin/activate")
        data = prepare(steps, source, size)
        checkpoint = train(steps, data, source, options.updates)
        samples = draw(steps, checkpoint)
        judge(steps, data, samples, "pca" if source else "classifier")
        closing(steps, options, data, checkpoint, samples)


def prepare(steps, source, size):
    """The folder of decoded images."""
    data = steps.folder / "data"
    command = ["python", "-m", "diffusion_ext.prepare"]
    command += [relative(Path(source)), data] if source else [data, "--image-dataset", "digits"]
    command += ["--image-size", size]
    # Of the user's own files only the command itself knows whether they are still the same.
    try:
        steps.do("prepare images", command, outputs=[data / "images.json"], always=bool(source))
    except UserError as error:
        again = "; if the images have changed, start over with --fresh" if source else ""
        raise UserError(f"{error}{again}") from None
    count = read_meta(data)["images"]
    if count < LEAST:
        raise UserError(
            f"{source} holds {count} usable images: at least {LEAST} are needed to judge samples"
        )
    return data


def train(steps, data, source, updates):
    """The last checkpoint."""
    folder, log = steps.folder / "checkpoints", steps.folder / "train.log"
    last = folder / "checkpoint_last.pt"
    recipe = ROOT / "configs" / "diffusion" / "digits.yaml"
    command = ["python", "-m", "diffusion_ext.train", data, "--save-dir", folder]
    if source:
        command += ["--lr", "5e-4", "--warmup-updates", 200, "--epoch-updates", 250]
        command += ["--sample-interval", 250, "--batch-size", 32, "--hflip", 0.5]
    else:
        command += ["--config", relative(recipe), "--epoch-updates", 200, "--sample-interval", 200]
    command += ["--max-update", updates, "--log-interval", 10]
    shown = dict(prepared="images.json", metric="loss", unit="", digits=4)
    train_shown(steps, data, command, updates, last, **shown)
    curve = steps.folder / "learning_curve.png"
    command = ["python", "-m", "ext_common.plots", log, curve]
    steps.do("draw the learning curve", command, inputs=[log], outputs=[curve])
    return last


def draw(steps, checkpoint):
    """The folder of samples."""
    samples = steps.folder / "samples"
    command = ["python", "-m", "diffusion_ext.sample", samples, "--path", checkpoint]
    command += ["--num", SAMPLES, "--trajectory", "--overwrite"]
    outputs = [samples / "manifest.json", grid_of(samples)]
    steps.do(f"draw {SAMPLES} images", command, inputs=[checkpoint], outputs=outputs)
    return samples


def grid_of(samples):
    return samples.with_name(f"{samples.name}.grid.png")


def judge(steps, data, samples, extractor):
    """metrics.json."""
    output = steps.folder / "metrics.json"
    command = ["python", "-m", "diffusion_ext.evaluate", "--real", data, "--fake", samples]
    command += ["--train", data, "--extractor", extractor, "--output", output]
    inputs = [samples / "manifest.json", data / "images.json"]
    steps.do("judge them", command, inputs=inputs, outputs=[output])


def closing(steps, options, data, checkpoint, samples):
    """The figure with what it means, where everything is, and what to do next."""
    found = json.loads((steps.folder / "metrics.json").read_text(encoding="utf-8"))
    frechet, folder = found["metrics"]["frechet"], steps.folder
    print(
        f"\n== result\n{frechet['label']} {frechet['value']:.3g}, {frechet['ratio']:.2f} times that between "
        f"real images (1: as good as real ones)"
    )
    if options.data is None:
        missing = found["classes"]["missing"]
        print(
            f"digits among the samples: {10 - len(missing)} of 10, in equal numbers; random real images have"
            " them in unequal ones, so the ratio can be below 1"
        )
    print(
        "A few minutes of training show that all parts work; the number gets better with --updates."
    )
    files = {
        "look at these samples": grid_of(samples),
        "how they came about": f"{folder / 'samples.strip.png'}  {folder / 'samples.gif'}",
        "samples while training": folder / "checkpoints" / "samples",
        "all numbers": folder / "metrics.json",
        "model": checkpoint,
    }
    print()
    for name, place in files.items():
        print(f"{name:25} {place}")
    print("\n== next")
    for text, command in next_commands(options, checkpoint, folder):
        print(f"# {text}\n{show_command(command)}")


def next_commands(options, checkpoint, folder):
    """(what it is for, command) to go on with."""
    quickstart = ["bash", relative(ROOT / "scripts" / "quickstart.sh"), "diffusion"]
    own = []
    for flag in ("data", "out"):
        if getattr(options, flag):
            own += [f"--{flag}", getattr(options, flag)]
    if options.data:
        own += ["--image-size", options.image_size]
    sample = ["python", "-m", "diffusion_ext.sample"]
    more = [*sample, folder / "more", "--path", checkpoint, "--num", 1000]
    ancestral = [*sample, folder / "ancestral", "--path", checkpoint]
    sevens = [*sample, folder / "sevens", "--path", checkpoint, "--label", 7]
    export = ["python", "-m", "diffusion_ext.export", checkpoint, folder / "diffusers"]
    return [
        *([] if options.data else [("sevens only", sevens)]),
        ("train on", [*quickstart, *own, "--updates", 4 * options.updates]),
        ("a thousand images, other noise", [*more, "--seed", 2]),
        ("with the original sampler", [*ancestral, "--sampler", "ddpm", "--steps", 1000]),
        ("for diffusers", [*export, "--format", "diffusers"]),
        ("your own images", [*quickstart, "--data", "IMAGES"]),
    ]


if __name__ == "__main__":
    run(main)

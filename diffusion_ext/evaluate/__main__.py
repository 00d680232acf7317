"""How good samples are: distances to real images, memorisation, classes, augmentation leaks, faces.

python -m diffusion_ext.evaluate --real faces --fake samples --extractor pca
python -m diffusion_ext.evaluate --real digits --fake samples --extractor classifier --train digits
"""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Optional

from diffusion_ext.evaluate.detectors import DETECTORS
from diffusion_ext.evaluate.evaluation import EvaluationOptions, evaluate
from diffusion_ext.evaluate.extractors import EXTRACTORS
from diffusion_ext.evaluate.texture import LIMIT
from ext_common.cli import Parser, UsageError, add_dataclass, from_args, run
from ext_common.manifest import atomic_json, check_writable

__all__ = ["EvaluationOptions", "evaluate"]

EPILOG = f"""
IMAGES is a folder of images, a folder made by diffusion_ext.prepare, or an .npy or .npz file of uint8
(N, channels, height, width), in the .npz under "images" and with its classes under "labels". Samples decide
the size: real images are read at it from their files, and never augmented.

Each distance stands beside its floor, the mean of the same distance between disjoint random sets of real
images, of the same N where there are enough of them, and the ratio of the two: about 1 is as good as real
images. KID's floor is 0 in expectation, so it has no ratio. The verdict asks whether samples can be told from
real images: by the distance, by the power of waves of each length, by the steps from pixel to pixel, by the
tones. All of them must be within what real images score among themselves; copies of real images pass, which
--train finds. Samples in a sub-folder for each class get numbers a class.

feature extractors (--extractor NAME or NAME:key=value,key=value):
{EXTRACTORS.describe()}

face detectors (--detector):
{DETECTORS.describe()}

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass(kw_only=True)
class EvaluateOptions(EvaluationOptions):
    """Options of `evaluate`."""

    real: str = field(metadata={"help": "IMAGES that are real"})
    fake: str = field(metadata={"help": "IMAGES to judge"})
    train: Optional[str] = field(
        default=None,
        metadata={
            "help": "IMAGES that the model was trained on, for the memorisation check; those that "
            "--valid-fraction holds out of them serve as held-out images"
        },
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "JSON file to write all numbers to; -: the screen"}
    )


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m diffusion_ext.evaluate", description=__doc__, epilog=EPILOG)
    add_dataclass(parser, EvaluateOptions)
    options = from_args(EvaluateOptions, parser.parse_args(argv))
    if options.output and options.output in (options.real, options.fake, options.train):
        raise UsageError(f"--output {options.output} is one of the inputs: give another file")
    if options.output not in (None, "-"):
        check_writable(options.output)
    # With --output - the screen is for the JSON alone.
    with redirect_stdout(sys.stderr if options.output == "-" else sys.stdout):
        # The same object where it is the same place, so that it is read once.
        train = options.real if options.train == options.real else options.train
        record = evaluate(options.real, options.fake, options, train)
        print("\n".join(report(record)))
    if options.output:
        atomic_json("/dev/stdout" if options.output == "-" else options.output, record)


def report(record: dict[str, Any]) -> Iterator[str]:
    """What the screen says, line by line."""
    samples, reals, extractor = (record[key] for key in ("samples", "reals", "extractor"))
    first = record["metrics"]["frechet"]
    floor = first["floor"]
    yield f"samples    {samples['used']} of {samples['images']} in {samples['name']}, {record['size']}"
    yield (
        f"reals      {reals['used']} of {reals['images']} in {reals['name']}: means over "
        f"{first['draws']} x {first['reference']} to compare with, and {floor['draws']} x "
        f"{floor['n']} against {floor['reference']} for the floor"
    )
    about = f"; {extractor['about']}" if extractor["about"] else ""
    yield f"extractor  {extractor['name']}, {extractor['features']} features{about}"
    yield from (f"warning: {warning}" for warning in record["warnings"])
    yield ""
    distance = [record["classes"]["distance"]] if record["classes"] else []
    yield from _metrics([*record["metrics"].values(), *distance])
    yield ""
    yield from _verdict(record["verdict"])
    if record["classes"]:
        yield ""
        yield _classes(record["classes"])
    if record["by_class"]:
        yield ""
        yield from _by_class(record["by_class"])
    yield ""
    yield from _memorisation(record["memorisation"])
    yield ""
    yield from _leak(record["leak"], samples["used"], reals["used"])
    if record["detection"]:
        yield ""
        yield from _detection(record["detection"])


def _metrics(metrics: list[dict[str, Any]]) -> Iterator[str]:
    width = max(len(metric["label"]) for metric in metrics)
    yield f"{'':{width}} {'N':>6} {'samples':>11} {'± std':>9} {'floor':>11} {'± std':>9} {'ratio':>8}"
    for metric in metrics:
        floor = metric["floor"]
        # The floor's N is shown where it is another one.
        other = f"  (floor at N = {floor['n']})" if floor["n"] != metric["n"] else ""
        yield (
            f"{metric['label']:{width}} {metric['n']:6} {metric['value']:11.5g} "
            f"{_number(metric['std'], '.2g'):>9} {floor['mean']:11.5g} "
            f"{_number(floor['std'], '.2g'):>9} {_number(metric['ratio'], '.3f'):>8}{other}"
        )


def _verdict(verdict: dict[str, Any]) -> Iterator[str]:
    told = [line["label"] for line in verdict["lines"] if not line["passed"]]
    yield (
        f"verdict: told from real images by {', '.join(told)}"
        if told
        else "verdict: not told from real images by any of these"
    )
    for line in verdict["lines"]:
        yield (
            f"  {line['label']:15} {line['value']:11.5g}, real images among themselves {line['floor']:.5g} ±"
            f" {line['std']:.2g}: {line['z']:+.1f} deviations, {LIMIT:g} are allowed"
        )


def _by_class(lines: list[dict[str, Any]]) -> Iterator[str]:
    width = max(len("class"), *(len(line["name"]) for line in lines))
    heads = f"{'samples':>8} {'reals':>8} {'distance':>10} {'floor':>10} {'ratio':>7}  recognised"
    yield f"{'class':{width}} {heads}"
    for line in lines:
        seen = "-" if line["recognised"] is None else _percent(line["recognised"])
        yield (
            f"{line['name']:{width}} {line['samples']:8} {line['reals']:8} {line['value']:10.4g} "
            f"{line['floor']:10.4g} {_number(line['ratio'], '.3f'):>7}  {seen}"
        )


def _classes(classes: dict[str, Any]) -> str:
    counts = zip(classes["names"], classes["samples"], strict=True)
    known = len(classes["names"])
    missing = f", missing: {', '.join(classes['missing'])}" if classes["missing"] else ""
    return (
        f"{known - len(classes['missing'])} of {known} classes among the samples{missing}: "
        + ", ".join(f"{name}: {count}" for name, count in counts)
    )


def _memorisation(found: Optional[dict[str, Any]]) -> Iterator[str]:
    if found is None:
        yield "memorisation: not judged; give the images that were trained on as --train"
        return
    first = next(iter(found.values()))
    yield (
        f"nearest of {first['train']} training images, for {first['n']} samples and "
        f"{first['held_out']} held-out images:"
    )
    yield f"{'':12} {'samples':>10} {'held-out':>10}   (median distance)"
    for name, part in found.items():
        yield (
            f"{name:12} {part['median']:10.4g} {part['median_held_out']:10.4g}   nearer than the 1st / "
            f"5th percentile of held-out: {_percent(part['below_1'])} / {_percent(part['below_5'])}; "
            f"authentic {_percent(part['authentic'])} (held-out {_percent(part['authentic_held_out'])})"
            + (f"; {part['copies']} copies" if "copies" in part else "")
        )


def _leak(rows: list[dict[str, Any]], n: int, reals: int) -> Iterator[str]:
    width = max(len(row["name"]) for row in rows)
    yield f"{'leak meter':{width}} {f'{n} samples':>20} {f'{reals} raw reals':>20} {'z':>7}"
    for row in rows:
        shown = [f"{row[side][0]:.4f} ± {row[side][1]:.4f}" for side in ("fake", "real")]
        z = "-" if row["z"] is None else f"{row['z']:+.1f}"
        yield f"{row['name']:{width}} {shown[0]:>20} {shown[1]:>20} {z:>7}"


def _detection(found: dict[str, Any]) -> Iterator[str]:
    for name in ("samples", "reals"):
        rate = found[name]
        yield (
            f"faces by {found['detector']}, threshold {rate['threshold']:g}, {name}: "
            f"{_percent(rate['rate'])} ({rate['detected']} of {rate['n']})"
        )


def _number(value: Optional[float], form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    run(main)

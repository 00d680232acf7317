"""Diffusion beside denoising-diffusion-pytorch: speed, as ratios, peak memory, and loss curves.

    python -m benchmarks.diffusion

Both have a U-Net of width 32 with multiples 1, 2, 4 (their Unet(dim=32, dim_mults=(1, 2, 4)); the counts of
parameters are printed), and train with draws, loss, backward, clipping, Adam and the average of weights:
theirs inside its Trainer, ours inside fairseq's, both on one batch from memory. Sampling takes the same
number of steps. Reading begins with files the system has in its page cache. The loss curves are of one
network, ours, in both programs.

Sides alternate in one process; ratios are of medians, with the smallest and largest of a round; memory is
measured in fresh processes. What the machine does besides costs both sides, but not alike: run it when it
does nothing else. The tables are Markdown.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Optional

from benchmarks.common import (
    alternate,
    compare,
    in_fresh_process,
    machine,
    memory_increase,
    processor,
    status,
    summary,
)
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.cli import Parser, UserError, add_dataclass, from_args, run
from ext_common.manifest import versions

RESULT = RESULTS / "diffusion_speed.jsonl"
PEER = "denoising-diffusion-pytorch"
FURTHER = (PEER, "ema-pytorch", "accelerate", "torchvision", "pillow")


@dataclass
class Options:
    """What to run and where the result goes."""

    rounds: int = field(
        default=5, metadata={"help": "rounds, in each of which every side runs once"}
    )
    threads: Optional[int] = field(
        default=None, metadata={"help": "threads of torch; none: one for each CPU"}
    )
    output: str = field(default=str(RESULT), metadata={"help": "JSON-lines file for the figures"})
    folder: Optional[str] = field(
        default=None,
        metadata={"help": "where 0.5 GB of images are written; none: the temporary folder"},
    )
    quick: bool = field(default=False, metadata={"help": "tiny sizes: shows that it runs, no more"})
    memory_of: Optional[str] = field(
        default=None, metadata={"help": "used inside: train this side in --folder, print JSON"}
    )

    def __post_init__(self):
        for name in ("rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1")


def main(argv):
    """The command."""
    began = time.monotonic()
    parser = Parser(prog="python -m benchmarks.diffusion", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    options.threads = options.threads or len(os.sched_getaffinity(0))
    warnings.filterwarnings("ignore")
    if options.memory_of:
        print(json.dumps(measure_memory(options)))
        return
    check_peer()
    folder = Path(tempfile.mkdtemp(prefix="diffusion_benchmark_", dir=options.folder)).resolve()
    try:
        figures = measure(folder, options, argv)
    finally:
        shutil.rmtree(folder)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(table(figures))
    Results(options.output).put({"run": f"speed on {processor()}", **figures})
    print(f"\n{figures['machine']}; {figures['seconds']:.0f} s; written to {options.output}")


def check_peer():
    """UserError where the other program is not installed."""
    try:
        metadata.version(PEER)
    except metadata.PackageNotFoundError:
        raise UserError(f"{PEER} is not installed: pip install -e .[bench]") from None


def measure(folder, options, argv):
    """Everything, as one dict."""
    import torch

    from benchmarks.diffusion.cases import cases, default_side, write_data
    from benchmarks.diffusion.curves import compare_curves

    before = machine()
    # one round tells nothing, but shows that it runs
    options.rounds = 1 if options.quick else options.rounds
    torch.set_num_threads(options.threads)
    size = size_of(options)
    say("writing images")
    write_data(folder, size)
    default = default_side()
    results = [measure_case(case, folder, options) for case in cases(folder, size, default)]
    say("loss curves")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": before,
        "command": " ".join(["python -m benchmarks.diffusion", *argv]),
        "versions": versions() | {name: metadata.version(name) for name in FURTHER},
        "quick": options.quick,
        "rounds": options.rounds,
        "threads": options.threads,
        "size": asdict(size),
        "default": default,
        "cases": results,
        "curves": compare_curves(folder, size.curve_batch, size.updates, size.seeds),
    }


def measure_case(case, folder, options):
    """Speed of the sides of one case, and memory of those that train."""
    say(case.name)
    sides, before = case.build(case.sides)
    logging.getLogger().setLevel(logging.ERROR)

    def prepare(name):
        say(f"  {name}")
        before(name)

    rates = alternate(sides, options.rounds, 0 if options.quick else case.warmup, before=prepare)
    result = {
        "case": case.name,
        "unit": case.unit,
        "sides": {n: summary(seconds_of(r) if case.seconds else r) for n, r in rates.items()},
        "comparisons": [
            {**asdict(c), **compare(rates[c.ours], rates[c.theirs])} for c in case.comparisons
        ],
    }
    if case.name.startswith("training"):
        for name, side in sides.items():
            result["sides"][name]["parameters"] = side.parameters
        for name in case.sides[:1] if options.quick else case.sides:
            say(f"  memory of {name}")
            result["sides"][name]["memory"] = memory_in_process(name, folder, options)
    return result


def seconds_of(rates):
    return [1 / rate for rate in rates]


def memory_in_process(side, folder, options):
    """What `measure_memory` finds, in a process of its own."""
    arguments = ["-m", "benchmarks.diffusion", "--memory-of", side, "--folder", str(folder)]
    arguments += ["--threads", str(options.threads)]
    arguments += ["--quick"] if options.quick else []
    return in_fresh_process(arguments, ROOT)


def measure_memory(options):
    """Build one side and let it train: peak memory of the updates above that of the built program.

    process_mb: the peak of the whole process, with Python, torch and what else the program imports.
    """
    import torch

    from benchmarks.diffusion.sides import training_side

    torch.set_num_threads(options.threads)
    size = size_of(options)
    work = training_side(options.memory_of, Path(options.folder), size.batch, min(size.steps, 3))
    found = memory_increase(work)
    return {**found, "process_mb": status()["VmHWM"] / 1024}


def table(figures):
    """The figures as Markdown."""
    v = figures["versions"]
    lines = [
        f"{PEER} {v[PEER]}, torch {v['torch']}, {plural(figures['threads'], 'thread')},"
        f" {figures['machine'].split(', load')[0]}, {figures['date']}; medians of"
        f" {plural(figures['rounds'], 'alternating round')}; our default here: {figures['default']}"
    ]
    for case in figures["cases"]:
        lines += ["", *(training_rows if "training" in case["case"] else rows)(case), ""]
        lines += [f"- {sentence(c)}" for c in case["comparisons"]]
    return "\n".join([*lines, "", *curve_lines(figures["curves"])])


def rows(case):
    """The sides of a case, as a table."""
    yield f"| {case['case']} | {case['unit']} | smallest to largest |"
    yield "| --- | --- | --- |"
    for name, side in case["sides"].items():
        low, high = number(side["min"]), number(side["max"])
        yield f"| {name} | {number(side['median'])} | {low} to {high} |"


def training_rows(case):
    """The same with parameters and memory."""
    unit = case["unit"]
    yield f"| {case['case']} | parameters | {unit} | memory of an update | whole process |"
    yield "| --- | --- | --- | --- | --- |"
    for name, side in case["sides"].items():
        memory = side.get("memory")
        shown = ["", ""]
        if memory:
            shown = [f"{memory['peak_mb']:,.0f} MB", f"{memory['process_mb']:,.0f} MB"]
        cells = [name, f"{side['parameters']:,}", number(side["median"]), *shown]
        yield f"| {' | '.join(cells)} |"


def sentence(comparison):
    c = comparison
    goal = ""
    if c["goal"] is not None:
        goal = f"; goal {c['goal']:g}: {'met' if c['ratio'] >= c['goal'] else 'missed'}"
    return (
        f"{c['what']}: **{c['ratio']:.2f} ×** ({c['ratio_min']:.2f} to {c['ratio_max']:.2f}{goal})"
    )


def curve_lines(curves):
    """The loss curves, as a table and what it says."""
    names = {"ours": "ours", "theirs": "theirs", "theirs_with_our_draws": "theirs with our draws"}
    yield (
        f"| loss, {curves['updates']} updates, batch {curves['batch']},"
        f" {plural(curves['seeds'], 'seed')} | first tenth | last half |"
    )
    yield "| --- | --- | --- |"
    for name, shown in names.items():
        end = curves["last_half"][name]
        yield (
            f"| {shown} | {curves['curves'][name][0]:.4f} |"
            f" {end['mean']:.5f} ± {end['standard_error']:.5f} |"
        )
    yield ""
    yield (
        f"- our network of {curves['parameters']:,} parameters, {curves['images']:,} digits: ours and"
        f" theirs differ by {curves['difference']:+.5f}, which is"
        f" {abs(curves['difference_in_standard_errors']):.1f} standard errors; with the same draws no"
        f" update's losses differ by more than {curves['largest_relative_difference_same_draws']:.1e}"
        " of them"
    )
    yield f"- alike by `{curves['flags']}`"


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plural(count, noun):
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size_of(options):
    from benchmarks.diffusion.cases import Size

    return Size.quick() if options.quick else Size()


def say(text):
    print(f"{text} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)

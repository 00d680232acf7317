"""What is predicted, in how many steps, with which average: `python -m benchmarks.diffusion.objectives`.

Digits, configs/diffusion/digits.yaml with 300 updates, 3 seeds; sets of 500 samples by DPM-Solver++, judged
as in benchmarks.diffusion.tables. A line of benchmarks/results/diffusion_objectives.jsonl a training, to
which each set of samples is added when it is judged; what is there is not done again. One process, one
thread; then docs/pictures/objectives.png.

    objectives   v, flow and edm × 2, 5, 10 and 20 steps × the usual average and that of diffusion_ext.ema,
                 whose length is chosen on the held-out images
    guidance     v, 10 steps: by the class, everywhere and in an interval of noise; by a model of 100 updates
    muon         v, Adam and Muon, 150 and 300 updates (the rate falls to 0 in each), 10 steps; Muon's other
                 rates with seed 1
    times        edm and flow with other times than their own, 10 steps
"""

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.diffusion.tables import (
    CONFIGS,
    DIGITS,
    MUON_RATE,
    SAMPLER_SET,
    SEEDS,
    by_muon,
    prepare,
    python,
    today,
)
from benchmarks.recorded import RESULTS, ROOT, Results, changed_recipe, digest_of, run, train_by

RECORDED = Results(RESULTS / "diffusion_objectives.jsonl")
OBJECTIVES = ("v", "flow", "edm")
STEPS = (2, 5, 10, 20)
EARLY = 100
LAST = "checkpoints/checkpoint_last.pt"
GUIDANCE = {
    "none": {},
    "class 1.5": {"guidance": 1.5},
    "class 1.5, 0.3 to 3": {"guidance": 1.5, "interval": (0.3, 3.0)},
    "worse 1.5": {"guidance": 1.5},
    "worse 2": {"guidance": 2.0},
}
SHORTER, LONGER = 150, 300
MUON_RATES = (0.001, 0.002, 0.004, 0.008)
TIMES = (
    ("edm", "uniform"),
    ("edm", "edm:mean=0"),
    ("flow", "logit_normal"),
    ("flow", "edm:mean=0"),
)
CHANGES = {
    "optimization.max_update": LONGER,
    "model.ema_snapshots": 15,
    "task.epoch_updates": 150,
    "task.sample_interval": 0,
}


class Training(NamedTuple):
    """What is trained; title: what its folder has for `changes` of the recipe."""

    objective: str
    seed: int
    updates: int = LONGER
    changes: dict[str, Any] = {}
    title: str = ""


def recipe(training: Training) -> tuple[dict, str]:
    """The recipe of a training and its digest."""
    objective, seed, updates, more, _ = training
    changes = {**CHANGES, "task.objective": objective, "common.seed": seed, **more}
    changes["optimization.max_update"] = updates
    config = changed_recipe(CONFIGS / "digits.yaml", changes)
    return config, digest_of(config, DIGITS.name, DIGITS.size, SAMPLER_SET)


def trained(work: Path, training: Training) -> tuple[Path, float]:
    """(folder, CPU seconds) of a training with average.pt in it, which is done unless it was."""
    config, digest = recipe(training)
    folder = work / f"{training.objective}-{training.updates}{training.title}-{training.seed}"
    command = [*python("train"), work / DIGITS.name, "--config", folder / "recipe.yaml"]
    command += ["--save-dir", folder / "checkpoints"]
    seconds = train_by(command, config, digest, folder)["cpu_seconds"]
    # a fifth of a gigabyte that only the average needs is made into that
    average = folder / "average.pt"
    if not average.exists():
        run([*python("ema"), folder / LAST, "--output", average, "--draws", 4], folder / "ema.log")
        shutil.rmtree(folder / "checkpoints" / "ema")
    return folder, seconds


def cells_left(name: str, digest: str, wanted: Iterable[str]) -> list[str]:
    """The cells of a run that are not recorded with this recipe."""
    known = RECORDED.get(name)["cells"] if RECORDED.has(name, digest) else {}
    left = [cell for cell in wanted if cell not in known]
    if not left:
        print(f"{name}: done before", flush=True)
    return left


def put_cell(name: str, digest: str, cell: str, found: dict, **more) -> None:
    """Add a cell to the record of its run."""
    cells = RECORDED.get(name)["cells"] if RECORDED.has(name, digest) else {}
    record = {"run": name, **today(), "recipe_sha256": digest, **more}
    RECORDED.put({**record, "cells": {**cells, cell: found}})
    print(f"{name}, {cell}: {found['ratio']:.2f}", flush=True)


def judged(checkpoint: Path, store: Path, **options) -> dict:
    """500 samples, and what stands in the tables of them."""
    from diffusion_ext.evaluate import EvaluationOptions, evaluate
    from diffusion_ext.inference import DiffusionModel

    model = DiffusionModel.from_checkpoint(checkpoint, "cpu")
    numbers = range(SAMPLER_SET)
    images = model.sample(SAMPLER_SET, labels=model.classes_in_turn(numbers), **options)
    found = evaluate(str(store), images, EvaluationOptions(extractor="classifier"), str(store))
    near = found["memorisation"]["pixels"]
    metrics = {name: found["metrics"][name]["value"] for name in ("precision", "recall")}
    frechet = found["metrics"]["frechet"]
    nearest = near["median"] / near["median_held_out"]
    return {"frechet": frechet["value"], "ratio": frechet["ratio"], **metrics, "nearest": nearest}


def objectives(work: Path) -> None:
    wanted = {f"{average}-{n}": (average, n) for average in ("usual", "posthoc") for n in STEPS}
    for seed in SEEDS:
        for objective in OBJECTIVES:
            training = Training(objective, seed)
            name, (_, digest) = f"objective_{objective}-{seed}", recipe(training)
            for cell in cells_left(name, digest, wanted):
                folder, seconds = trained(work, training)
                made = folder / "average.pt"
                length = torch.load(made, weights_only=False)["posthoc_ema"]["sigma_rel"]
                average, steps = wanted[cell]
                checkpoint = made if average == "posthoc" else folder / LAST
                found = judged(checkpoint, work / DIGITS.name, steps=steps)
                put_cell(name, digest, cell, found, cpu_seconds=seconds, sigma_rel=length)


def guidance(work: Path) -> None:
    from diffusion_ext.inference import DiffusionModel

    for seed in SEEDS:
        training = Training("v", seed)
        name, (_, digest) = f"guidance_v-{seed}", recipe(training)
        for cell in cells_left(name, digest, GUIDANCE):
            folder, seconds = trained(work, training)
            options = dict(GUIDANCE[cell])
            if cell.startswith("worse"):
                early, _ = trained(work, Training("v", seed, EARLY))
                options["guide"] = DiffusionModel.from_checkpoint(early / LAST, "cpu")
            found = judged(folder / LAST, work / DIGITS.name, steps=10, **options)
            put_cell(name, digest, cell, found, cpu_seconds=seconds)


def ten_steps(work: Path, name: str, training: Training) -> None:
    """Judge a training in 10 steps, which is recorded as `name`."""
    name = f"{name}-{training.seed}"
    _, digest = recipe(training)
    for cell in cells_left(name, digest, ("10",)):
        folder, seconds = trained(work, training)
        made = judged(folder / LAST, work / DIGITS.name, steps=int(cell))
        put_cell(name, digest, cell, made, cpu_seconds=seconds)


def muon(work: Path) -> None:
    def by(rate: float, seed: int, updates: int) -> None:
        name = f"muon_muon, rate {rate:g}, {updates} updates"
        ten_steps(work, name, Training("v", seed, updates, by_muon(rate), f"-muon-{rate:g}"))

    for rate in MUON_RATES:
        by(rate, SEEDS[0], SHORTER)
    for seed in SEEDS:
        for updates in (SHORTER, LONGER):
            ten_steps(work, f"muon_Adam, {updates} updates", Training("v", seed, updates))
            by(MUON_RATE, seed, updates)


def times(work: Path) -> None:
    for seed in SEEDS:
        for objective, sampling in TIMES:
            changes = {"criterion.time_sampling": sampling}
            training = Training(objective, seed, changes=changes, title=f"-{sampling}")
            ten_steps(work, f"times_{objective}, {sampling}", training)


GROUPS = {"objectives": objectives, "guidance": guidance, "muon": muon, "times": times}


def picture() -> None:
    """docs/pictures/objectives.png: steps against distance, a line an objective and average; means."""
    from ext_common.plots import curves

    found = [record for record in RECORDED.all() if len(record["cells"]) == 2 * len(STEPS)]
    named = {}
    for objective in OBJECTIVES:
        own = [record for record in found if record["run"].startswith(f"objective_{objective}-")]
        for average, title in (("usual", ""), ("posthoc", ", length chosen")) if own else ():
            ratios = [[r["cells"][f"{average}-{n}"]["ratio"] for n in STEPS] for r in own]
            named[f"{objective}{title}"] = (np.array(STEPS), np.mean(ratios, 0))
    if named:
        labels = ("steps of DPM-Solver++", "Fréchet distance, × floor")
        curves(named, ROOT / "docs" / "pictures" / "objectives.png", "digits", labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="which (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "diffusion_objectives")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(DIGITS, args.work)
    for group in args.groups or GROUPS:
        GROUPS[group](args.work)
    picture()
    print(f"{RECORDED.path} has {len(RECORDED.all())} records", file=sys.stderr)


if __name__ == "__main__":
    main()

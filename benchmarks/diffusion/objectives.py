"""What is predicted, in how many steps, with which average: `python -m benchmarks.diffusion.objectives`.

Digits, configs/diffusion/digits.yaml with 300 updates, 3 seeds; sets of 500 samples by DPM-Solver++, judged
as in benchmarks.diffusion.tables. A line of benchmarks/results/diffusion_objectives.jsonl a training,
written when it is done, and not done again. One process, one thread.

    objectives   v, flow and edm × 2, 5, 10 and 20 steps × the usual average and that of diffusion_ext.ema,
                 whose length is chosen on the held-out images
    guidance     v, 10 steps: by the class, everywhere and in an interval of noise; by a model of 100 updates
    distilled    v, 150 updates more by diffusion_ext.distill, 1 and 2 steps
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.diffusion.tables import CONFIGS, DIGITS, SAMPLER_SET, SEEDS, prepare, python, today
from benchmarks.recorded import RESULTS, ROOT, Results, changed_recipe, digest_of, run, train_by

RECORDED = Results(RESULTS / "diffusion_objectives.jsonl")
OBJECTIVES = ("v", "flow", "edm")
STEPS = (2, 5, 10, 20)
EARLY = 100
GUIDANCE = {
    "none": {},
    "class 1.5": {"guidance": 1.5},
    "class 1.5, 0.3 to 3": {"guidance": 1.5, "interval": (0.3, 3.0)},
    "worse 1.5": {"guidance": 1.5},
    "worse 2": {"guidance": 2.0},
}
CHANGES = {
    "optimization.max_update": 300,
    "model.ema_snapshots": 15,
    "task.epoch_updates": 150,
    "task.sample_interval": 0,
}


def trained(
    objective: str, seed: int, work: Path, updates: int = CHANGES["optimization.max_update"]
) -> tuple[Path, str, float]:
    """(folder, digest of the recipe, CPU seconds) of a training, which is done unless it was."""
    changes = {**CHANGES, "task.objective": objective, "common.seed": seed}
    changes["optimization.max_update"] = updates
    config = changed_recipe(CONFIGS / "digits.yaml", changes)
    digest = digest_of(config, DIGITS.name, DIGITS.size, SAMPLER_SET)
    folder = work / f"{objective}-{updates}-{seed}"
    command = [*python("train"), work / DIGITS.name, "--config", folder / "recipe.yaml"]
    command += ["--save-dir", folder / "checkpoints"]
    seconds = train_by(command, config, digest, folder)["cpu_seconds"]
    # a fifth of a gigabyte that only the average needs is made into that
    average = folder / "average.pt"
    if not average.exists():
        last = folder / "checkpoints" / "checkpoint_last.pt"
        run([*python("ema"), last, "--output", average, "--draws", 4], folder / "ema.log")
        shutil.rmtree(folder / "checkpoints" / "ema")
    return folder, digest, seconds


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
    for seed in SEEDS:
        for objective in OBJECTIVES:
            name = f"objective_{objective}-{seed}"
            folder, digest, seconds = trained(objective, seed, work)
            if RECORDED.has(name, digest):
                print(f"{name}: done before", flush=True)
                continue
            averages = {"usual": folder / "checkpoints" / "checkpoint_last.pt"}
            averages["posthoc"] = folder / "average.pt"
            cells = {}
            for average, checkpoint in averages.items():
                for steps in STEPS:
                    found = judged(checkpoint, work / DIGITS.name, steps=steps)
                    cells[f"{average}-{steps}"] = found
                    print(f"{name}, {average}, {steps} steps: {found['ratio']:.2f}", flush=True)
            length = torch.load(averages["posthoc"], weights_only=False)["posthoc_ema"]["sigma_rel"]
            record = {"run": name, **today(), "recipe_sha256": digest, "cpu_seconds": seconds}
            RECORDED.put({**record, "sigma_rel": length, "cells": cells})


def guidance(work: Path) -> None:
    from diffusion_ext.inference import DiffusionModel

    for seed in SEEDS:
        name = f"guidance_v-{seed}"
        folder, digest, _ = trained("v", seed, work)
        early, _, _ = trained("v", seed, work, EARLY)
        if RECORDED.has(name, digest):
            print(f"{name}: done before", flush=True)
            continue
        last = "checkpoints/checkpoint_last.pt"
        guide = DiffusionModel.from_checkpoint(early / last, "cpu")
        cells = {}
        for way, options in GUIDANCE.items():
            if way.startswith("worse"):
                options = {**options, "guide": guide}
            cells[way] = judged(folder / last, work / DIGITS.name, steps=10, **options)
            print(f"{name}, {way}: {cells[way]['ratio']:.2f}", flush=True)
        RECORDED.put({"run": name, **today(), "recipe_sha256": digest, "cells": cells})


def distilled(work: Path) -> None:
    for seed in SEEDS:
        name = f"distilled_v-{seed}"
        folder, digest, _ = trained("v", seed, work)
        if RECORDED.has(name, digest):
            print(f"{name}: done before", flush=True)
            continue
        fast = folder / "distilled"
        shutil.rmtree(fast, ignore_errors=True)
        command = [*python("distill"), folder / "checkpoints" / "checkpoint_last.pt"]
        seconds = run([*command, "--save-dir", fast], folder / "distill.log")
        cells = {}
        for steps in (1, 2):
            last = fast / "checkpoint_last.pt"
            cells[f"{steps}"] = judged(last, work / DIGITS.name, steps=steps)
            print(f"{name}, {steps} steps: {cells[f'{steps}']['ratio']:.2f}", flush=True)
        record = {"run": name, **today(), "recipe_sha256": digest, "cpu_seconds": seconds}
        RECORDED.put({**record, "cells": cells})


GROUPS = {"objectives": objectives, "guidance": guidance, "distilled": distilled}


def picture() -> None:
    """docs/pictures/objectives.png: steps against distance, a line an objective and average; means."""
    from ext_common.plots import curves

    found = [record for record in RECORDED.all() if record["run"].startswith("objective_")]
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

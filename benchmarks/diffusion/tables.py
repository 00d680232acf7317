"""The trainings of docs/results/diffusion.md: `python -m benchmarks.diffusion.tables [GROUP …]`.

Every run is one `diffusion_ext.train` in a process of its own on one thread, then `sample` and `evaluate`;
one line of benchmarks/results/diffusion_tables.jsonl, written when it is done, with a grid of samples in
benchmarks/results/grids. A run that has its line is not done again. `--jobs 2` does two at a time.

    digits     configs/diffusion/digits.yaml, 3 seeds, with and without guidance; controls that must score
               clearly worse
    flow       the same with --objective flow, and in fewer steps; distilled, in one step and in two
    muon       the same by Muon; and half as long, seed 1
    unlabelled the same without classes
    nearest    how far held-out digits are from training ones, and from those of other hands
    samplers   samplers × steps on the first of them, sets of 500 images
    ablation   digits: 3 schedules × eps and v × no, leaky and non-leaky augmentation, 2 seeds; and sigmoid
               with v where 15 % of the images are changed, non-leaky
    emoji      emoji64 at 32 × 32: the default beside cosine and eps, without augmentation,
               2 seeds; the default with augmentation, 1 seed

Samples are judged 898 at a time, for more than half of the 1,797 digits have no floor; those of samplers in
sets of 500.
"""

import argparse
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from benchmarks.diffusion.report import report
from benchmarks.recorded import (
    RESULTS,
    ROOT,
    SHARED,
    Results,
    changed_recipe,
    digest_of,
    run,
    train_by,
)
from ext_common.manifest import atomic_json, versions

RECORDED = Results(RESULTS / "diffusion_tables.jsonl")
GRIDS = RESULTS / "grids"
CONFIGS = ROOT / "configs" / "diffusion"
SEEDS = (1, 2, 3)
SAMPLES = 898
HELD_OUT = (0.05, 1000)  # share and number of images at most, as the task has them
SAMPLER_SET = 500
GUIDANCE = (1.25, 1.5)
FEWER_STEPS = {f"_steps_{n}": ["--steps", n] for n in (10, 5)}
DISTILLED = {f"_distilled_steps_{n}": ["--steps", n] for n in (1, 2)}
# The best of benchmarks.diffusion.objectives; twice that is level with it.
MUON_RATE = 0.004
AUGMENTED = {"task.hflip": 0.5, "task.color_jitter": [0.5, 0.5, 0.5, 0.1]}
RARELY = "hflip:p=0.15;color_jitter:p=0.15"  # as often as Karras et al. 2022 for 64 × 64 faces
AUGMENTATIONS = {
    "none": {},
    "leaky": {**AUGMENTED, "task.leaky_augment": True},
    "nonleaky": AUGMENTED,
}
ABLATION = {"optimization.max_update": 600, "dataset.batch_size": 32}
EMOJI_UPDATES = 900
SAMPLERS = {
    "ddpm:variance=small": (20, 50, 100, 1000),
    "ddpm:variance=large": (100, 1000),
    "ddim": (10, 20, 50, 100),
    "heun": (5, 10, 25),
    "dpmpp_2m": (5, 10, 20, 50),
}
SPACINGS = {"dpmpp_2m": ("trailing", "logsnr")}
# Images in the order of the data that are left out around a held-out one; some 140 are of one hand.
GAPS, HAND = (70, 140, 280), 140
# of images; 3 of all others
SETS = {("ddpm:variance=small", 1000): 2, ("ddpm:variance=large", 1000): 1}


@dataclass(frozen=True)
class Data:
    """A prepared folder, and how samples of it are judged."""

    name: str
    size: int
    source: list
    extractor: str


DIGITS = Data("digits", 16, ["--image-dataset", "digits"], "classifier")
EMOJI = Data("emoji", 32, [SHARED / "emoji64"], "pca")


def digits_runs() -> dict:
    """Name → (data, recipe, changes, flags of `sample` by suffix)."""
    flags = {"": [], **{f"_guidance_{weight:g}": ["--guidance", weight] for weight in GUIDANCE}}
    return {f"digits-{s}": (DIGITS, "digits", {"common.seed": s}, flags) for s in SEEDS}


def flow_runs() -> dict:
    changes, flags = {"task.objective": "flow"}, {"": [], **FEWER_STEPS, **DISTILLED}
    return {f"flow-{s}": (DIGITS, "digits", {"common.seed": s, **changes}, flags) for s in SEEDS}


def by_muon(rate: float) -> dict:
    return {"optimizer._name": "muon", "optimization.lr": [rate]}


def muon_runs() -> dict:
    changes = {"task.objective": "flow", **by_muon(MUON_RATE)}
    lengths = {"": {}, "_600 updates": {"optimization.max_update": 600}}
    return {
        f"flow_muon{name}-1": (DIGITS, "digits", {"common.seed": 1, **changes, **more})
        for name, more in lengths.items()
    }


def unlabelled_runs() -> dict:
    changes = {"task.class_labels": False}
    return {f"unlabelled-{s}": (DIGITS, "digits", {"common.seed": s, **changes}) for s in SEEDS}


def ablation_runs() -> dict:
    """Name → (data, recipe, changes)."""
    runs = {}
    for seed in (1, 2):
        # sigmoid and v are the recipe's
        changes = {"common.seed": seed, **ABLATION, "task.augment": RARELY}
        runs[f"sigmoid_v_rarely-{seed}"] = (DIGITS, "digits", changes)
        for schedule in ("sigmoid", "cosine", "linear"):
            for objective in ("v", "eps"):
                for augmentation, flags in AUGMENTATIONS.items():
                    changes = {
                        "common.seed": seed,
                        "task.beta_schedule": schedule,
                        "task.objective": objective,
                        **ABLATION,
                        **flags,
                    }
                    runs[f"{schedule}_{objective}_{augmentation}-{seed}"] = (
                        DIGITS,
                        "digits",
                        changes,
                    )
    return runs


def emoji_runs() -> dict:
    other = {"task.beta_schedule": "cosine", "task.objective": "eps"}
    runs = {}
    for seed in (1, 2):
        base = {"common.seed": seed, "optimization.max_update": EMOJI_UPDATES}
        runs[f"emoji_default-{seed}"] = (EMOJI, "emoji32", base)
        if seed == 1:
            runs["emoji_augmented-1"] = (EMOJI, "emoji32", {**base, **AUGMENTED})
        runs[f"emoji_cosine_eps-{seed}"] = (EMOJI, "emoji32", {**base, **other})
    return runs


GROUPS = {
    "digits": digits_runs,
    "flow": flow_runs,
    "muon": muon_runs,
    "ablation": ablation_runs,
    "emoji": emoji_runs,
    "unlabelled": unlabelled_runs,
}


def one(
    name: str, data: Data, recipe: str, changes: dict, flags: dict | None = None, *, work: Path
) -> None:
    """Train, sample and judge one run, unless that is recorded.

    flags: of `sample`, by what they add to the name of the record.
    """
    config = changed_recipe(CONFIGS / f"{recipe}.yaml", changes)
    digest = digest_of(config, data.name, data.size, SAMPLES)
    stem, _, seed = name.rpartition("-")
    ways = {f"{stem}{suffix}-{seed}": more for suffix, more in (flags or {"": []}).items()}
    missing = [way for way in ways if not RECORDED.has(way, digest)]
    if not missing:
        print(f"{name}: done before", flush=True)
        return
    folder, store = work / name, work / data.name
    checkpoints = folder / "checkpoints"
    command = [*python("train"), store, "--config", folder / "recipe.yaml"]
    command += ["--save-dir", checkpoints]
    seconds = train_by(command, config, digest, folder)["cpu_seconds"]
    for way in missing:
        result = {"run": way, **today(), "recipe_sha256": digest}
        result.update(cpu_seconds=seconds, threads=1, recipe=config)
        checkpoint = checkpoints / "checkpoint_last.pt"
        if way.startswith(f"{stem}_distilled"):
            checkpoint, more = distilled(checkpoint, store, folder / "distilled")
            result["cpu_seconds"] += more
        found = judge(folder, data, store, checkpoint, *ways[way], name=way)
        shutil.copyfile(folder / f"{way}.grid.png", GRIDS / f"{way}.png")
        RECORDED.put({**result, "evaluation": found, "versions": versions()})
        frechet = found["metrics"]["frechet"]
        print(
            f"{way}: Fréchet {frechet['value']:.3g}, {frechet['ratio']:.2f} × floor, {seconds:.0f} CPU s",
            flush=True,
        )


def distilled(checkpoint: Path, store: Path, folder: Path) -> tuple[Path, float]:
    """(checkpoint, CPU seconds) of diffusion_ext.distill as it is, unless that was done."""
    note, last = folder.with_suffix(".json"), folder / "checkpoint_last.pt"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [*python("distill"), checkpoint, "--data", store, "--save-dir", folder]
        command += ["--sample-interval", 0]
        atomic_json(note, {"cpu_seconds": run(command, folder.with_suffix(".log"))})
    return last, json.loads(note.read_text())["cpu_seconds"]


def judge(
    folder: Path, data: Data, store: Path, checkpoint: Path, *flags, name: str, num=SAMPLES
) -> dict:
    """`sample`, then `evaluate`, whose JSON this is."""
    samples = folder / name
    command = [*python("sample"), samples, "--path", checkpoint, "--num", num]
    run([*command, "--precision", "bf16", *flags], folder / f"{name}.log")
    return evaluate(samples, data, store, folder / f"{name}.json")


def evaluate(fake: Path, data: Data, store: Path, output: Path) -> dict:
    command = [*python("evaluate"), "--real", store, "--fake", fake, "--train", store]
    run(
        [*command, "--extractor", data.extractor, "--output", output],
        output.with_suffix(".evaluate.log"),
    )
    found = json.loads(output.read_text())
    for side, folder in (("samples", fake), ("reals", store)):
        found[side]["name"] = folder.name  # wherever --work was
    return found


def controls(work: Path) -> None:
    """Judge what must score clearly worse than samples, and copies, which must be found out."""
    from benchmarks.diffusion.controls import averaged_images, copies, covariance_gaussian
    from diffusion_ext.store import Images

    if any(record["run"].startswith("control") for record in RECORDED.all()):
        print("controls: done before", flush=True)
        return
    store = Images.open(work / DIGITS.name)
    rows = store.rows("train", *HELD_OUT)
    pixels, labels = store.pixels[rows], store.labels[rows]
    made = {
        "covariance Gaussian": covariance_gaussian(pixels, SAMPLES, seed=1),
        "averages of 2 of a class": averaged_images(pixels, SAMPLES, 2, seed=1, labels=labels),
        "averages of 5 of a class": averaged_images(pixels, SAMPLES, 5, seed=1, labels=labels),
        "copies of training images": copies(pixels, SAMPLES, seed=1),
    }
    for number, (title, images) in enumerate(made.items()):
        array = work / f"control-{number}.npy"
        np.save(array, images)
        found = evaluate(array, DIGITS, work / DIGITS.name, work / f"control-{number}.json")
        RECORDED.put({"run": f"control: {title}", **today(), "evaluation": found})
        print(f"{title}: {found['metrics']['frechet']['ratio']:.2f} × floor", flush=True)


def nearest(work: Path) -> None:
    """Distances of held-out digits to the nearest training one that is not near in the order of the data.

    sklearn's digits stand in the order in which they were written, some 140 by each hand (13 writers in all).
    """
    from diffusion_ext.evaluate.neighbours import nearest_neighbours
    from diffusion_ext.store import Images

    store = Images.open(work / DIGITS.name)
    train, held_out = (store.rows(split, *HELD_OUT) for split in ("train", "valid"))
    flat = store.pixels.reshape(len(store), -1) / 255
    gaps = np.abs(held_out[:, None] - train[None])
    usual = nearest_neighbours(flat[held_out], flat[train])
    found = {"0": float(np.median(usual.distances))}
    for least in GAPS:
        own = [
            nearest_neighbours(flat[[row]], flat[train[gap >= least]]).distances[0]
            for row, gap in zip(held_out, gaps, strict=True)
        ]
        found[str(least)] = float(np.median(own))
    same = gaps < HAND
    alike = store.labels[held_out][:, None] == store.labels[train][None]
    record = {"run": "nearest", **today(), "held_out": found}
    record["same_hand"] = float(same[np.arange(len(held_out)), usual.indices].mean())
    record["by_chance"] = float(np.mean([s[a].mean() for s, a in zip(same, alike, strict=True)]))
    RECORDED.put(record)
    print(f"nearest: {found}", flush=True)


def sampler_cells() -> list[tuple]:
    """(sampler, spacing, steps, number of the set of images), in the order they are worth having."""
    cells = [
        (sampler, spacing, steps, number)
        for sampler, counts in SAMPLERS.items()
        for spacing in SPACINGS.get(sampler, ("trailing",))
        for steps in counts
        for number in range(SETS.get((sampler, steps), 3))
    ]
    # the one that only rounds off the table goes last; of the others the first set of each goes first
    cells.sort(key=lambda cell: (cell[0].endswith("large") and cell[2] == 1000, cell[3]))
    return cells


def sampler_set(sampler: str, spacing: str, steps: int, number: int, *, work: Path) -> None:
    """500 images from the checkpoint of digits-1, judged, unless that is recorded."""
    name = f"sampler-{sampler.replace(':', '_').replace('=', '')}-{spacing}-{steps}-{number}"
    if RECORDED.get(name):
        print(f"{name}: done before", flush=True)
        return
    checkpoint = work / "digits-1" / "checkpoints" / "checkpoint_last.pt"
    if not checkpoint.exists():
        raise SystemExit(
            f"error: {checkpoint} is not there: run the group digits first (and keep --work)"
        )
    folder = work / "samplers"
    shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    flags = ["--sampler", sampler, "--spacing", spacing, "--steps", steps]
    flags += ["--first", number * SAMPLER_SET]
    store = work / DIGITS.name
    found = judge(folder, DIGITS, store, checkpoint, *flags, name=name, num=SAMPLER_SET)
    record = {"run": name, **today(), "sampler": sampler, "spacing": spacing, "steps": steps}
    RECORDED.put({**record, "evaluation": found})
    print(f"{name}: {found['metrics']['frechet']['ratio']:.2f} × floor", flush=True)


def today() -> dict:
    return {"date": date.today().isoformat(), "machine": machine()}


def jobs_of(group: str) -> list[tuple]:
    """A function and its arguments each, but for `work`."""
    if group == "samplers":
        return [(sampler_set, *cell) for cell in sampler_cells()]
    return [(one, name, *what) for name, what in GROUPS[group]().items()]


def python(noun: str) -> list:
    return [sys.executable, "-m", f"diffusion_ext.{noun}"]


def prepare(data: Data, work: Path) -> None:
    if not (work / data.name / "manifest.json").exists():
        flags = data.source if data.source[0] == "--image-dataset" else []
        command = [*python("prepare"), *([] if flags else data.source), work / data.name, *flags]
        run([*command, "--image-size", data.size], work / f"prepare-{data.name}.log")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="of the above (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "diffusion_tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="print the tables of what is done")
    args = parser.parse_args()
    wanted = args.groups or [*GROUPS, "nearest", "samplers"]
    unknown = set(wanted) - {*GROUPS, "nearest", "samplers"}
    if unknown:
        parser.error(f"unknown group {', '.join(sorted(unknown))}")
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        GRIDS.mkdir(parents=True, exist_ok=True)
        for group in wanted:
            prepare(EMOJI if group == "emoji" else DIGITS, args.work)
            if group == "digits":
                controls(args.work)
            if group == "nearest":
                nearest(args.work)
                continue
            with ThreadPoolExecutor(args.jobs) as pool:
                done = [pool.submit(*job, work=args.work) for job in jobs_of(group)]
            for future in done:
                future.result()
    print(report(RECORDED.all()))


if __name__ == "__main__":
    main()

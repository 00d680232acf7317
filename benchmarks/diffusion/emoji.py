"""Emoji, an hour on one core, without classes and with: `python -m benchmarks.diffusion.emoji`.

emoji64 at 32 × 32 by configs/diffusion/emoji32.yaml with 7,200 updates and the objective `flow`, 1 seed; the
same with the objective `v`; with classes from the beginning; and 2,400 updates from the first (`--init-from`)
with classes. Classes are the groups of Unicode's emoji-test.txt (`apt install unicode-data`), of the smileys
only the faces. 500 samples of each, its classes in turn, with each weight of guidance: `evaluate`, and how
many of them a classifier that was trained on the real ones takes for their class. One line of
benchmarks/results/diffusion_emoji.jsonl; docs/pictures/emoji.png: the first samples of some classes beside
their nearest training images.
"""

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.diffusion.tables import CONFIGS, HELD_OUT, python, today
from benchmarks.recorded import (
    RESULTS,
    ROOT,
    Results,
    changed_recipe,
    data_file,
    digest_of,
    run,
    train_by,
)
from diffusion_ext.evaluate import EvaluationOptions, evaluate
from diffusion_ext.evaluate.classifier import Classifier, ClassifierOptions, train_classifier
from diffusion_ext.evaluate.neighbours import nearest_neighbours
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import sheet
from diffusion_ext.store import Images

RECORDED = Results(RESULTS / "diffusion_emoji.jsonl")

LISTED = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 32
SAMPLES, STEPS = 500, 20
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
# of the picture: a row each, so many samples, with this guidance
SHOWN, ACROSS, WEIGHT = ("faces", "flags", "people", "symbols", "food"), 5, 2.0
CHANGES = {
    "common.seed": 1,
    "task.objective": "flow",
    "task.sample_interval": 900,
    "optimization.max_update": 7200,
}
BY_V = {**CHANGES, "task.objective": "v"}
BY_CLASS = {**CHANGES, "task.class_labels": True}
ADDED = {**BY_CLASS, "optimization.lr": [0.0005], "optimization.max_update": 2400}
LAST = "checkpoints/checkpoint_last.pt"


def groups(text: str) -> dict[tuple[str, ...], str]:
    """Code points without the variation selector → class, of Unicode's emoji-test.txt."""
    found, group, subgroup = {}, "", ""
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif ";" in line and not line.startswith("#"):
            found[points(line.partition(";")[0].split())] = class_of(group, subgroup)
    return found


def class_of(group: str, subgroup: str) -> str:
    if group == "Smileys & Emotion":
        return "faces" if "face" in subgroup else "symbols"
    return group.partition(" ")[0].lower()


def points(codes: list[str]) -> tuple[str, ...]:
    return tuple(code.lower().lstrip("0") for code in codes if code.lower() != "fe0f")


def class_folders(work: Path) -> Path:
    """The emoji in a folder for each class, as links; those of no class are counted and left out."""
    if not LISTED.exists():
        raise SystemExit(f"error: {LISTED} is not there: apt install unicode-data")
    known, counts = groups(LISTED.read_text(encoding="utf-8")), Counter()
    folder = work / "classes"
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(data_file("emoji64").glob("*.png")):
        codes = points(path.stem.split("-"))
        # a sequence that is younger than the list belongs to what it begins with
        starts = (known.get(codes[:end]) for end in range(len(codes), 0, -1))
        name = next((start for start in starts if start), "")
        counts[name] += 1
        if name not in ("", "component"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            os.symlink(path.resolve(), folder / name / path.name)
    print(
        f"{counts.pop('', 0) + counts.pop('component', 0)} of no class; {dict(counts)}", flush=True
    )
    return folder


def trained(work: Path) -> tuple[list[Path], list[float]]:
    """(checkpoint without classes, by v, with classes added later, with classes; CPU seconds of each)."""
    store = work / "emoji"
    if not (store / "manifest.json").exists():
        command = [*python("prepare"), class_folders(work), store, "--image-size", SIZE]
        run(command, work / "prepare.log")
    checkpoints, seconds = [], []
    for name, changes in (
        ("trained", CHANGES),
        ("by_v", BY_V),
        ("by_class", ADDED),
        ("classes_first", BY_CLASS),
    ):
        config = changed_recipe(CONFIGS / "emoji32.yaml", changes)
        folder = work / name
        command = [*python("train"), store, "--config", folder / "recipe.yaml"]
        command += ["--save-dir", folder / "checkpoints"]
        command += ["--init-from", checkpoints[0]] if changes is ADDED else []
        digest = digest_of(config, "emoji by class", SIZE)
        seconds.append(train_by(command, config, digest, folder)["cpu_seconds"])
        checkpoints.append(folder / LAST)
    return checkpoints, seconds


def classifier_of(store: Images) -> tuple[Classifier, float]:
    """One of the real training images, each class as often, and its mean accuracy of classes held out."""
    rows = [store.rows(split, *HELD_OUT) for split in ("train", "valid")]
    (pixels, labels), (unseen, theirs) = ((store.pixels[one], store.labels[one]) for one in rows)
    random = np.random.default_rng(1)
    equal = np.concatenate(
        [
            random.choice(np.flatnonzero(labels == k), len(labels) // len(store.classes))
            for k in np.unique(labels)
        ]
    )
    options = ClassifierOptions(updates=1500)
    model = train_classifier(pixels[equal], labels[equal], len(store.classes), options)
    right = named(model, unseen) == theirs
    return model, float(np.mean([right[theirs == k].mean() for k in np.unique(theirs)]))


def named(model: Classifier, images: np.ndarray) -> np.ndarray:
    """The class that the classifier gives each of uint8 (N, C, H, W)."""
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(images))).argmax(1).numpy()


def measure(work: Path) -> dict:
    """The record: samples of either model, judged; and the picture."""
    (*plain, added, from_beginning), seconds = trained(work)
    store = Images.open(work / "emoji")
    classifier, real = classifier_of(store)
    cells = {}
    for name, checkpoint in zip(("no classes", "no classes, v"), plain, strict=True):
        model = DiffusionModel.from_checkpoint(checkpoint, "cpu")
        cells[name] = judged(model.sample(SAMPLES, steps=STEPS), store)
    for name, checkpoint in (("added", added), ("from the beginning", from_beginning)):
        model = DiffusionModel.from_checkpoint(checkpoint, "cpu")
        labels = np.array(model.classes_in_turn(range(SAMPLES)))
        for weight in GUIDANCE:
            images = model.sample(SAMPLES, labels=labels.tolist(), steps=STEPS, guidance=weight)
            right = float((named(classifier, images) == labels).mean())
            cell = judged(images, store) | {"right": right}
            cells[f"classes {name}, guidance {weight:g}"] = cell
            if weight == WEIGHT:
                drawn = images
    picture(store, drawn, labels)
    return {"run": "emoji_flow-1", **today(), "cpu_seconds": seconds, "real": real, "cells": cells}


def judged(images: np.ndarray, store: Images) -> dict:
    options = EvaluationOptions(extractor="pca")
    found = evaluate(str(store.path), images, options, str(store.path))
    near, metrics = found["memorisation"]["pixels"], found["metrics"]
    return {
        "frechet": metrics["frechet"]["value"],
        "ratio": metrics["frechet"]["ratio"],
        **{name: metrics[name]["value"] for name in ("precision", "recall")},
        "nearest": near["median"] / near["median_held_out"],
        "copies": near["copies"],
    }


def picture(store: Images, images: np.ndarray, labels: np.ndarray) -> None:
    """Samples of SHOWN, and their nearest training images in the same order."""
    bank = store.pixels[store.rows("train", *HELD_OUT)]
    rows = []
    for name in SHOWN:
        some = images[labels == store.classes.index(name)][:ACROSS]
        near = nearest_neighbours(some.reshape(len(some), -1), bank.reshape(len(bank), -1))
        rows.append([*some, None, *bank[near.indices]])
    drawn = sheet(rows, SHOWN, ["drawn", *[""] * ACROSS, "nearest"], scale=2)
    drawn.quantize().save(ROOT / "docs" / "pictures" / "emoji.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "emoji")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    RECORDED.put(measure(args.work))


if __name__ == "__main__":
    main()

"""One speaker with 400 recordings beside five with two: `python -m benchmarks.speaker.imbalance`.

Spoken digits (fsdd), the recipe fsdd with crops in proportion to the recordings and with as many of each
speaker, 3 seeds: accuracy on the official test recordings, 50 of each speaker. One line a model in
benchmarks/results/speaker_imbalance.jsonl.
"""

import argparse
import csv
import functools
import re
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from benchmarks.recorded import (
    RESULTS,
    ROOT,
    Results,
    changed_recipe,
    data_file,
    digest_of,
    train,
)
from benchmarks.speaker import protocols
from benchmarks.speaker.report import imbalance_table
from benchmarks.speaker.tables import CONFIGS, SEEDS
from ext_common.manifest import versions
from fairseq_ext.speaker.corpus import Corpus

RECORDED = Results(RESULTS / "speaker_imbalance.jsonl")
MUCH_HEARD, MANY, FEW, VALID = "george", 400, 2, 5
# --balance → the metric that selects the checkpoint, as presets have it
BALANCE = {"none": "accuracy", "speaker": "speaker_accuracy"}


@functools.cache
def prepared(work: Path) -> Path:
    """DATA: MANY training recordings of the first speaker, FEW of each of the others, VALID of all."""
    source = data_file("fsdd")
    names = sorted(path.name for path in source.glob("*.wav"))
    np.random.default_rng(1).shuffle(names)
    rows, counts = [], {}
    for name in names:
        speaker, number = re.fullmatch(r"\d_([a-z]+)_(\d+)\.wav", name).groups()
        most = MANY if speaker == MUCH_HEARD else FEW
        counts[speaker] = counts.get(speaker, 0) + (int(number) >= 5)
        if int(number) < 5:
            rows.append((name, speaker, "test"))
        elif counts[speaker] <= most + VALID:
            rows.append((name, speaker, "train" if counts[speaker] <= most else "valid"))
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "imbalance.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "speaker", "split"), *rows])
    return protocols.prepared(
        source, work / "data", "--layout", "csv", "--csv", work / "imbalance.csv"
    )


def measured(checkpoint: Path, data: Path) -> dict[str, float]:
    """Accuracy in % on test: mean over speakers, of the one with many recordings, mean of the others."""
    right, labels = protocols.named_rightly(checkpoint, data)
    names = Corpus.open(data).speakers
    each = {names[k]: 100 * float(right[labels == k].mean()) for k in np.unique(labels)}
    mean, many = float(np.mean([*each.values()])), each.pop(MUCH_HEARD)
    return {"speakers": mean, "many": many, "few": float(np.mean([*each.values()]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speaker_imbalance")
    args = parser.parse_args()
    for seed in SEEDS:
        for balance, metric in BALANCE.items():
            changes = {"common.seed": seed, "task.balance": balance}
            changes["checkpoint.best_checkpoint_metric"] = metric
            recipe = changed_recipe(CONFIGS / "fsdd.yaml", changes)
            run, digest = f"{balance}-{seed}", digest_of(recipe, MANY, FEW, VALID)
            if RECORDED.has(run, digest):
                continue
            data, folder = prepared(args.work), args.work / run
            seconds = train(recipe, data, digest, folder, CONFIGS / "model")
            found = measured(folder / "checkpoints" / "checkpoint_best.pt", data)
            record = {"run": run, "recipe_sha256": digest, "results": found, **seconds}
            record |= {"date": date.today().isoformat(), "machine": machine()}
            RECORDED.put({**record, "versions": versions()})
    print(imbalance_table(RECORDED.all()))


if __name__ == "__main__":
    main()

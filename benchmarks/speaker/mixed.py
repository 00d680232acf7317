"""What `--augment bandwidth` is worth: `python -m benchmarks.speaker.mixed`.

The recipe libri251 as it is and with half of the crops narrowed, each trained on the 102 people of
`benchmarks.speaker.open_set`, whose model is the first: pieces of 3 s of the 149 others at 16 kHz, and at 8
against 16; top-1 on the test segments of those who were trained on. One line a model in
benchmarks/results/speaker_mixed.jsonl.
"""

import argparse
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results, changed_recipe, digest_of, train
from benchmarks.speaker.audio import verification
from benchmarks.speaker.open_set import CONFIGS, SEED, prepared_part
from benchmarks.speaker.report import mixed_table
from ext_common.manifest import versions
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.inference import SpeakerModel

RECORDED = Results(RESULTS / "speaker_mixed.jsonl")
# name of the folder → augmentation
AUGMENT = {"libri251": "channel;specaugment", "narrowed": "bandwidth;channel;specaugment"}


def measured(name: str, recipe: dict, work: Path) -> dict:
    """EERs in % and top-1 in % of a model, which is trained where it is not there."""
    data, others = prepared_part(work)
    folder = work / name
    seconds = train(recipe, data, digest_of(recipe, SEED), folder, CONFIGS / "model")
    model = SpeakerModel.from_checkpoint(folder / "checkpoints" / "checkpoint_best.pt")
    corpus = Corpus.open(data)
    rows = corpus.rows("test")
    found = model.scores([corpus.read(row) for row in rows]).argmax(1)
    right = np.array(model.speakers)[found] == np.array(corpus.speakers)[corpus.labels[rows]]
    return {**verification(model, others), "top1": f"{100 * right.mean():.1f}", **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speaker_strangers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    for seed in args.seeds:
        for name, augment in AUGMENT.items():
            changes = {"common.seed": seed, "task.augment": augment}
            recipe = changed_recipe(CONFIGS / "libri251.yaml", changes)
            run = f"{name}-{seed}"
            digest = digest_of(recipe, SEED)
            if not RECORDED.has(run, digest):
                record = {"run": run, "recipe_sha256": digest}
                record["results"] = measured(run, recipe, args.work)
                record |= {"date": date.today().isoformat(), "machine": machine()}
                RECORDED.put({**record, "versions": versions()})
    print(mixed_table(RECORDED.all()))


if __name__ == "__main__":
    main()

"""What changes of the recipe libri251 are worth to strangers: `python -m benchmarks.speaker.variants`.

The recipe as it is, with half of the crops narrowed, trained on with longer crops and a larger margin, with
Muon in place of Adam at the same rate, and narrowed for twice as long; each on the 102 people of
`benchmarks.speaker.open_set`, whose model is the first: pieces of 3 s of the 149 others at 16 kHz, and at 8
against 16; top-1 on the test segments of those who were trained on. One line a model in
benchmarks/results/speaker_variants.jsonl.
"""

import argparse
from datetime import date
from pathlib import Path

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results, changed_recipe, digest_of, train
from benchmarks.speaker.audio import verification
from benchmarks.speaker.open_set import CONFIGS, SEED, prepared_part
from benchmarks.speaker.protocols import named_rightly
from benchmarks.speaker.report import variants_table
from ext_common.manifest import versions
from fairseq_ext.speaker.inference import SpeakerModel

RECORDED = Results(RESULTS / "speaker_variants.jsonl")
LARGE_MARGIN = {
    "task.augment": "channel",
    "task.crop_frames": 301,
    "criterion.m": 0.35,
    "optimization.lr": [2e-4],
    "optimization.max_update": 400,
    "lr_scheduler.warmup_updates": 50,
    "model.init_head": True,
}
NARROWED = {"task.augment": "bandwidth;channel;specaugment"}
# name of the folder → changes of the recipe; large_margin goes on from the first
VARIANTS: dict[str, dict] = {
    "libri251": {},
    "narrowed": NARROWED,
    "large_margin": LARGE_MARGIN,
    "muon": {"optimizer._name": "muon"},
    "narrowed_long": {**NARROWED, "optimization.max_update": 3200},
}


def measured(name: str, recipe: dict, digest: str, work: Path) -> dict:
    """EERs in % and top-1 in % of a model, which is trained where it is not there."""
    data, others = prepared_part(work)
    folder = work / name
    seconds = train(recipe, data, digest, folder, CONFIGS / "model")
    checkpoint = folder / "checkpoints" / "checkpoint_best.pt"
    right, _ = named_rightly(checkpoint, data)
    errors = verification(SpeakerModel.from_checkpoint(checkpoint), others)
    return {**errors, "top1": f"{100 * right.mean():.1f}", **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speaker_strangers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    for seed in args.seeds:
        for name, changes in VARIANTS.items():
            recipe = changed_recipe(CONFIGS / "libri251.yaml", {"common.seed": seed, **changes})
            run, digest = f"{name}-{seed}", digest_of(recipe, SEED)
            if RECORDED.has(run, digest):
                continue
            if name == "large_margin":
                first = args.work / f"libri251-{seed}" / "checkpoints" / "checkpoint_best.pt"
                recipe["model"]["init_from"] = str(first.resolve())
            record = {"run": run, "recipe_sha256": digest}
            record["results"] = measured(run, recipe, digest, args.work)
            record |= {"date": date.today().isoformat(), "machine": machine()}
            RECORDED.put({**record, "versions": versions()})
    print(variants_table(RECORDED.all()))


if __name__ == "__main__":
    main()

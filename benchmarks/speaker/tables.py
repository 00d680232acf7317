"""The trainings of docs/results/speaker.md: `python -m benchmarks.speaker.tables [GROUP …]`.

Every run is one `fairseq-hydra-train` in a process of its own, on one thread, and one line of
benchmarks/results/speaker_tables.jsonl, written when it is done; a run that has its line is not done again.
`--jobs 2` does two at a time, so that together they use two cores. `--report` only prints the tables.
"""

import argparse
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results, changed_recipe, digest_of, train
from benchmarks.speaker.protocols import prepare_digits, prepare_libri, prepare_shifted
from benchmarks.speaker.report import report
from ext_common.manifest import versions
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.inference import SpeakerModel, rank
from fairseq_ext.speaker.metrics import in_top

RECORDED = Results(RESULTS / "speaker_tables.jsonl")
CONFIGS = ROOT / "configs" / "speaker_id"
SEEDS = (1, 2, 3)
CHOICES = {
    "conv_front_end": {"model.front_end": "conv", "model.frame_stack": 1},
    "attentive_statistics": {"model.pooling": "attentive_statistics"},
    "utterance_mean_normalisation": {"model.feature_norm": "utterance"},
    "no_augmentation": {"task.augment": ""},
}
ONE_AT_A_TIME = threading.Lock()


def all_runs() -> dict:
    """Name → (recipe under configs/speaker_id, changes to it, data); the name ends in the seed."""
    runs = {}
    for seed in SEEDS:
        common = {"common.seed": seed}
        runs[f"main-ours-{seed}"] = ("libri251", common, "libri251")
    for seed in SEEDS:
        common = {"common.seed": seed}
        runs[f"main-baseline-{seed}"] = ("classroom_baseline", common, "libri251")
        runs[f"digits-ours-{seed}"] = ("fsdd", common, "fsdd")
        digits = {**common, "optimization.max_update": 600, "lr_scheduler.warmup_updates": 100}
        runs[f"digits-baseline-{seed}"] = ("classroom_baseline", digits, "fsdd")
        for encoder in ("transformer", "conformer"):
            for pooling in ("mean", "self_attention"):
                for criterion in ("softmax", "am_softmax"):
                    changes = {
                        **common,
                        "model.encoder": encoder,
                        "model.pooling": pooling,
                        "criterion._name": criterion,
                    }
                    name = f"ablation-{encoder}-{pooling}-{criterion}-{seed}"
                    runs[name] = ("ablation", changes, "libri251")
    for seed in SEEDS:
        # what else was decided, each against ablation-conformer-self_attention-am_softmax
        for name, changes in CHOICES.items():
            changes = {"common.seed": seed, **changes}
            runs[f"choices-{name}-{seed}"] = ("ablation", changes, "libri251")
    return runs


def recipe(name: str, changes: dict) -> dict:
    """A recipe of configs/speaker_id with dotted changes; a softmax criterion has no margin options."""
    config = changed_recipe(CONFIGS / f"{name}.yaml", changes)
    if config["criterion"]["_name"] == "softmax":
        config["criterion"] = {"_name": "softmax"}
    return config


def evaluate(name: str, data: Path, subset: str, work: Path) -> dict:
    """Top-1 and top-5 of the checkpoint that was best on valid, matched by the speakers' names."""
    with ONE_AT_A_TIME:
        model = SpeakerModel.from_checkpoint(work / name / "checkpoints" / "checkpoint_best.pt")
        corpus = Corpus.open(data)
        rows = corpus.rows(subset)
        ranked = rank(model.scores([corpus.read(row) for row in rows]), 5)
    label = {speaker: i for i, speaker in enumerate(model.speakers)}
    labels = np.array([label[corpus.speakers[i]] for i in corpus.labels[rows]])
    scores = {f"top{k}": float(in_top(ranked, labels, k).mean()) for k in (1, 5)}
    return {**scores, "utterances": len(rows)}


def one(name: str, recipe_name: str, changes: dict, data: str, prepared: dict, work: Path) -> None:
    config = recipe(recipe_name, changes)
    digest = digest_of(config, data)
    if RECORDED.has(name, digest):
        print(f"{name}: done before", flush=True)
        return
    result = {"run": name, "date": date.today().isoformat(), "recipe_sha256": digest}
    trained = train(config, prepared[data], digest, work / name, CONFIGS / "model")
    result.update(trained, threads=1, machine=machine(), recipe=config)
    sets = [(data, "test")] if data == "fsdd" else None
    sets = sets or [(d, s) for d in ("libri251", "libri251-shifted") for s in ("valid", "test")]
    for corpus, subset in sets:
        result[f"{corpus}/{subset}"] = evaluate(name, prepared[corpus], subset, work)
    RECORDED.put({**result, "versions": versions()})
    print(f"{name}: {result['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="main, digits, ablation, choices (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speaker_tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="print the tables of what is done")
    args = parser.parse_args()
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        prepared = {
            "libri251": prepare_libri(args.work),
            "libri251-shifted": prepare_shifted(args.work),
            "fsdd": prepare_digits(args.work),
        }
        chosen = {
            n: r for n, r in all_runs().items() if not args.groups or n.split("-")[0] in args.groups
        }
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda item: one(item[0], *item[1], prepared, args.work), chosen.items()))
    print(report(RECORDED.all()))


if __name__ == "__main__":
    main()

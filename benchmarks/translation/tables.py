"""The trainings of docs/results/translation.md: `python -m benchmarks.translation.tables [GROUP …]`.

English to Chinese on cmn-eng/cmn.txt. Every run is one `fairseq-hydra-train` in a process of its own, on
one thread, then the average of its last checkpoints, `translate` with beam 5 and `score`; one line of
benchmarks/results/translation_tables.jsonl, written when it is done, with the translations of test in it. A
run that has its line is not done again. `--jobs 2` does two at a time. What differs is then tested against
the references, which are not in this repository, and recorded in translation_tests.jsonl.

    tuning     with one seed: 3 factors of Noam for the Transformer, 3 rates × 2 dropouts for the LSTM
    chosen     of both the one that was best on valid, 3 seeds
    schedules  1,000 updates of Noam, 3 seeds, and of 3 constant rates
    constant   the constant rate that was best on valid, 3 seeds
    vocabulary what a larger vocabulary and fewer, wider layers change, one seed
    longer     both systems for 24 minutes on one core, the Transformer one seed
"""

import argparse
from pathlib import Path

from benchmarks.recorded import RESULTS, ROOT, Results, data_file, run
from benchmarks.translation.report import best_of, compared, report
from benchmarks.translation.runs import Runs, python
from benchmarks.translation.significance import record_tests

RECORDED = Results(RESULTS / "translation_tables.jsonl")
TESTS = Results(RESULTS / "translation_tests.jsonl")
CONFIGS = ROOT / "configs" / "translation"
SEEDS = (1, 2, 3)
NOAM_FACTORS = (0.45, 0.9, 1.5)
LSTM_RATES = (1e-3, 2e-3, 4e-3)
LSTM_DROPOUTS = (0.1, 0.3)
CONSTANT_RATES = (5e-4, 1e-3, 2e-3)
# Pieces, where the default for this corpus is 3,800.
SPM_SIZE = 8000
# What 24 minutes on one core are, from the seconds of the shorter runs.
LONGER = {"tiny_short": 10100, "lstm": 11400}
# A third of the updates, saved as often before the end.
SHORT = {
    "optimization.max_update": 1000,
    "checkpoint.save_interval_updates": 67,
    "task.no_valid_text": True,
}


def tuning_runs() -> dict:
    """Name → (recipe, changes): what is chosen from, with one seed, on valid."""
    runs = {f"noam-{factor:g}-1": noam(factor, 1) for factor in NOAM_FACTORS}
    for rate in LSTM_RATES:
        for dropout in LSTM_DROPOUTS:
            runs[f"lstm-{rate:g}-{dropout:g}-1"] = lstm(rate, dropout, 1)
    return runs


def chosen_runs() -> dict:
    """All seeds of what was best on valid; needs the tuning runs."""
    noam_name, lstm_name = best_of(RECORDED.all(), "noam"), best_of(RECORDED.all(), "lstm")
    runs = {}
    for seed in SEEDS:
        runs[f"{noam_name}-{seed}"] = noam(*options_of(noam_name), seed)
        runs[f"{lstm_name}-{seed}"] = lstm(*options_of(lstm_name), seed)
    return runs


def schedule_runs() -> dict:
    """Constant rates, seed 1, and the Noam that was chosen, 3 seeds, for SHORT updates."""
    runs = {f"constant-{rate:g}-1": constant(rate, 1) for rate in CONSTANT_RATES}
    factor = options_of(best_of(RECORDED.all(), "noam"))[0]
    for seed in SEEDS:
        recipe, changes = noam(factor, seed)
        runs[f"shortnoam-{factor:g}-{seed}"] = (recipe, {**changes, **SHORT})
    return runs


def constant_runs() -> dict:
    """All seeds of the constant rate that was best on valid; needs the schedule runs."""
    name = best_of(RECORDED.all(), "constant")
    return {f"{name}-{seed}": constant(*options_of(name), seed) for seed in SEEDS}


def longer_runs() -> dict:
    """The LSTM as chosen, and the Transformer in the better of its shapes, seed 1, for LONGER updates."""
    noam_name, lstm_name = best_of(RECORDED.all(), "noam"), best_of(RECORDED.all(), "lstm")
    runs = {f"shallow{noam_name}-1": shallow(*options_of(noam_name), 1)}
    runs |= {f"{lstm_name}-{seed}": lstm(*options_of(lstm_name), seed) for seed in SEEDS}
    return {
        f"longer{name}": (recipe, {**changes, "optimization.max_update": LONGER[recipe]})
        for name, (recipe, changes) in runs.items()
    }


def vocabulary_runs() -> dict:
    """A Transformer of 2 + 2 layers on either vocabulary, and the LSTM on the larger, seed 1."""
    recipe, wide = shallow(0.45, 1)
    return {
        "bigshallownoam-0.45-1": (recipe, wide, SPM_SIZE),
        "biglstm-0.004-0.1-1": (*lstm(0.004, 0.1, 1), SPM_SIZE),
        "shallownoam-0.45-1": (recipe, wide),
    }


def options_of(name: str) -> list[float]:
    """The numbers in a name: lstm-0.001-0.1 → [0.001, 0.1]."""
    return [float(part) for part in name.split("-")[1:]]


def noam(factor: float, seed: int) -> tuple:
    return "tiny_short", {"lr_scheduler.noam_factor": factor, "common.seed": seed}


def shallow(factor: float, seed: int) -> tuple:
    recipe, changes = noam(factor, seed)
    return recipe, {**changes, "defaults": [{"model": "shallow"}, "_self_"]}


def lstm(rate: float, dropout: float, seed: int) -> tuple:
    return "lstm", {"optimization.lr": [rate], "model.dropout": dropout, "common.seed": seed}


def constant(rate: float, seed: int) -> tuple:
    """The Transformer's recipe with the same linear warm-up, to a rate that then stays."""
    scheduler = {"_name": "fixed", "warmup_updates": 400}
    changes = {"lr_scheduler": scheduler, "optimization.lr": [rate], "common.seed": seed}
    return "tiny_short", {**changes, **SHORT}


def prepare(work: Path, spm_size: int | None = None) -> Path:
    """DATA, made by the real command."""
    data = work / (f"data-{spm_size}" if spm_size else "data")
    corpus = data_file("cmn-eng/cmn.txt")
    if not (data / "corpus.json").exists():
        command = [*python("translation.prepare"), corpus, data]
        command += ["--source-lang", "en", "--target-lang", "zh"]
        run([*command, "--spm-size", spm_size or "none"], work / f"prepare-{data.name}.log")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="of the above (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "translation_tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="print the tables of what is done")
    args = parser.parse_args()
    if not args.report:
        args.work.mkdir(parents=True, exist_ok=True)
        groups = {
            "tuning": tuning_runs,
            "chosen": chosen_runs,
            "schedules": schedule_runs,
            "constant": constant_runs,
            "vocabulary": vocabulary_runs,
            "longer": longer_runs,
        }
        for group, runs in groups.items():
            if args.groups and group not in args.groups:
                continue
            wanted = {
                name: (recipe, changes, prepare(args.work, *size))
                for name, (recipe, changes, *size) in runs().items()
            }
            Runs(RECORDED, CONFIGS, args.work).do(wanted, args.jobs)
        references = args.work / "data" / "text" / "test.zh"
        record_tests(TESTS, compared(RECORDED.all()), references)
    print(report(RECORDED.all(), TESTS.all()))


if __name__ == "__main__":
    main()

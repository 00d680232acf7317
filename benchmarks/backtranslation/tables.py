"""The trainings of docs/results/backtranslation.md: `python -m benchmarks.backtranslation.tables [GROUP …]`.

A low-resource trial on cmn-eng/cmn.txt: 8,000 pairs are the bitext, the Chinese side of the
others (what is not in the bitext too) is monolingual text. A reverse model, Chinese to English, is trained on
the bitext; it writes an English side for the monolingual text in each mode; a forward model, English to
Chinese, is trained on the bitext and on each mixture, for the same number of updates. valid and test are
those of the whole corpus, whose parts share no sentence.

Each run is one `fairseq-hydra-train` in a process of its own, on one thread, then the average of its last
checkpoints, `translate` with beam 5 and `score`; one line of benchmarks/results/backtranslation_tables.jsonl,
written when it is done. What is done is not done again. `--jobs 2` does two runs at a time. What differs is
then tested against the references and recorded in backtranslation_tests.jsonl.

    modes    bitext only, + beam, + topk, + sampling, + noised-beam, 3 seeds
    toggles  the default mode without tag, and without filters, 3 seeds
    early    bitext only and + beam after two thirds of the updates, 3 seeds
    ours     the same with our Transformer (configs/translation/compact_short.yaml) on both sides: bitext
             only, + beam without tag, 3 seeds; bitext only with more dropout, seed 1
    rounds   a second round of these without tag: the forward model of seed 1 writes Chinese for mono.en, on
             which a second reverse model is trained, seed 1
    noisy    the default mode, without tag, and without filters, where the monolingual text is another's: as
             many Chinese lines of pydocs, which the reverse model cannot read, seed 1
"""

import argparse
import gzip
import random
from pathlib import Path

from benchmarks.backtranslation.report import BITEXT, EARLY, NOISY, OURS, compared, report
from benchmarks.recorded import RESULTS, ROOT, Results, data_file, run
from benchmarks.translation.runs import Runs, python
from benchmarks.translation.significance import record_tests
from ext_common.manifest import atomic_write
from fairseq_ext.translation.text.normalise import match_key, read_lines

RECORDED = Results(RESULTS / "backtranslation_tables.jsonl")
TESTS = Results(RESULTS / "backtranslation_tests.jsonl")
CONFIGS = ROOT / "configs" / "backtranslation"
SEEDS = (1, 2, 3)
MODES = ("beam", "topk", "sampling", "noised-beam")
PAIRS = 8000
UPSAMPLE = 2
UPDATES_EARLY = 1600
# Level with noised-beam on valid, and the simpler of the two: the default of `generate`.
TOGGLED = "beam"
# BLEU on valid chooses, as after 600 updates of the bitext the loss rises while BLEU still does. Dropout for
# what is seen twenty times, as the preset has it, and none for mixtures, which are seen five times.
COMPACT, OUR_RECIPE = ROOT / "configs" / "translation", "compact_short"
OUR_CHANGES = {
    "optimization.max_update": 2400,
    "dataset.validate_interval": 1000,
    "checkpoint.save_interval": 1000,
    "checkpoint.patience": -1,
}
DROPOUT, MORE_DROPOUT = 0.1, 0.3
# Larger than the default for so few pairs, which costs Chinese characters and leaves English in syllables.
SPM_SIZE = 6000


def prepare(work: Path) -> Path:
    """DATA of the bitext, and mono.zh beside it."""
    corpus = data_file("cmn-eng/cmn.txt")
    languages = ["--source-lang", "en", "--target-lang", "zh"]
    whole, data = work / "whole", work / "data"
    run([*python("translation.prepare"), corpus, whole, *languages], work / "prepare-whole.log")
    if not (work / "mono.zh").exists():
        divide(whole, work)
    held_out = ["--valid", work / "valid.tsv", "--test", work / "test.tsv", "--on-leak", "remove"]
    command = [*python("translation.prepare"), work / "bitext.tsv", data, *languages, *held_out]
    run([*command, "--spm-size", SPM_SIZE], work / "prepare.log")
    return data


def divide(whole: Path, work: Path) -> None:
    """bitext.tsv, valid.tsv, test.tsv, mono.zh and, in another order, mono.en from the prepared whole."""

    def pairs(split: str) -> list[tuple[str, str]]:
        sides = (read_lines(whole / "text" / f"{split}.{lang}") for lang in ("en", "zh"))
        return list(zip(*sides, strict=True))

    train = pairs("train")
    random.Random(1).shuffle(train)
    tables = {"bitext": train[:PAIRS], "valid": pairs("valid"), "test": pairs("test")}
    for name, rows in tables.items():
        with atomic_write(work / f"{name}.tsv") as file:
            file.writelines(f"{source}\t{target}\n" for source, target in rows)
    for side, lang in ((0, "en"), (1, "zh")):
        known = {match_key(pair[side]) for pair in tables["bitext"]}
        others = {match_key(pair[side]): pair[side] for pair in train[PAIRS:]}
        lines = [line + "\n" for key, line in others.items() if key not in known]
        if lang == "en":
            random.Random(2).shuffle(lines)
        with atomic_write(work / f"mono.{lang}") as file:
            file.writelines(lines)


def manual(work: Path) -> str:
    """Name of a file of Chinese lines of pydocs, as many as mono.zh has."""
    path = work / "mono-pydocs.zh"
    if not path.exists():
        with gzip.open(data_file("pydocs/train.tsv.gz"), "rt", encoding="utf-8") as file:
            lines = [line.rstrip("\n").split("\t")[1] + "\n" for line in file]
        most = len(list(read_lines(work / "mono.zh")))
        with atomic_write(path) as file:
            file.writelines(random.Random(1).sample(lines, most))
    return path.name


def synthetic(
    work: Path, data: Path, name: str, model: Path, *flags: str, mono: str = "mono.zh"
) -> Path:
    """SYNTH of a model; the command itself knows what is done."""
    folder = work / f"synthetic-{name}"
    command = [*python("backtranslation.generate"), work / mono, folder, "--model", model]
    run([*command, "--guard", data, *flags], work / f"generate-{name}.log")
    return folder


def mixture(work: Path, data: Path, synth: Path, name: str, *flags: str) -> Path:
    """DATA_BT of a bitext and a SYNTH."""
    folder = work / f"data-{name}"
    command = [*python("backtranslation.assemble"), data, synth, folder]
    command += ["--upsample", UPSAMPLE, *flags]
    run(command, work / f"assemble-{name}.log")
    return folder


def forward(names: dict[str, Path], recipe: str = "forward", **more) -> dict[str, tuple]:
    """Name → (recipe, changes, DATA) of all seeds; more: changes beside the seed."""
    return {
        f"{name}-{seed}": (recipe, {"common.seed": seed, **more}, data)
        for seed in SEEDS
        for name, data in names.items()
    }


def our_recipe(source: str, target: str, dropout: float) -> dict:
    return {
        **OUR_CHANGES,
        "task.source_lang": source,
        "task.target_lang": target,
        "model.dropout": dropout,
    }


def ours(work: Path, data: Path, groups: list[str], jobs: int) -> None:
    """The groups ours and rounds."""
    runs = Runs(RECORDED, COMPACT, work, best_of=True)
    forwards, reverses = our_recipe("en", "zh", 0.0), our_recipe("zh", "en", 0.0)
    untagged = ("--tag", "none")
    if "ours" in groups:
        alone = our_recipe("en", "zh", DROPOUT)
        runs.do(forward({f"{BITEXT}{OURS}": data}, OUR_RECIPE, **alone), jobs)
        more = {**our_recipe("en", "zh", MORE_DROPOUT), "common.seed": 1}
        runs.do({f"{BITEXT}_dropout {MORE_DROPOUT}{OURS}-1": (OUR_RECIPE, more, data)}, jobs)
    back = {**our_recipe("zh", "en", DROPOUT), "common.seed": 1}
    reverse = runs.model(f"reverse{OURS}-1", OUR_RECIPE, back, data)
    synth = synthetic(work, data, "ours", reverse)
    mixed = mixture(work, data, synth, "ours-untagged", *untagged)
    first = forward({f"beam_untagged{OURS}": mixed}, OUR_RECIPE, **forwards)
    if "ours" in groups:
        runs.do(first, jobs)
    if "rounds" in groups:
        name = f"beam_untagged{OURS}-1"
        synth = synthetic(
            work, data, "ours-for-reverse", runs.model(name, *first[name]), mono="mono.en"
        )
        mixed = mixture(work, data, synth, "ours-for-reverse", *untagged)
        again = {**reverses, "common.seed": 1}
        second = runs.model(f"reverse2{OURS}-1", OUR_RECIPE, again, mixed)
        synth = synthetic(work, data, "ours-2", second)
        mixed = mixture(work, data, synth, "ours-2", *untagged)
        again = {**forwards, "common.seed": 1}
        runs.do({f"beam_untagged, 2 rounds{OURS}-1": (OUR_RECIPE, again, mixed)}, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="of the above (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "backtranslation_tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="print the tables of what is done")
    args = parser.parse_args()
    work = args.work
    if not args.report:
        do(work, args.groups or [*"modes toggles early ours rounds noisy".split()], args.jobs)
        record_tests(TESTS, compared(RECORDED.all()), work / "data" / "text" / "test.zh")
    print(report(RECORDED.all(), TESTS.all()))


def do(work: Path, groups: list[str], jobs: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    data = prepare(work)
    if {"ours", "rounds"} & set(groups):
        ours(work, data, groups, jobs)
    if not set(groups) - {"ours", "rounds"}:
        return
    runs = Runs(RECORDED, CONFIGS, work)
    reverse = runs.model("reverse-1", "reverse", {}, data)
    if "noisy" in groups:
        # its lines are long
        quick = ("--backend", "ctranslate2")
        synth = synthetic(work, data, "pydocs", reverse, *quick, mono=manual(work))
        names = {f"{TOGGLED}{NOISY}": mixture(work, data, synth, "pydocs")}
        names |= toggled(work, data, synth, "pydocs", NOISY)
        wanted = forward(names)
        runs.do({name: what for name, what in wanted.items() if name.endswith("-1")}, jobs)
    if {"modes", "early"} & set(groups):
        names = {BITEXT: data}
        for mode in MODES:
            names[mode] = mixture(
                work, data, synthetic(work, data, mode, reverse, "--mode", mode), mode
            )
    if "modes" in groups:
        runs.do(forward(names), jobs)
    if "toggles" in groups:
        synth = synthetic(work, data, TOGGLED, reverse)
        runs.do(forward(toggled(work, data, synth, TOGGLED)), jobs)
    if "early" in groups:
        early = {f"{name}{EARLY}": names[name] for name in (BITEXT, "beam")}
        runs.do(forward(early, **{"optimization.max_update": UPDATES_EARLY}), jobs)


def toggled(work: Path, data: Path, synth: Path, name: str, suffix: str = "") -> dict[str, Path]:
    """The mixtures without tag and without filters."""
    return {
        f"{TOGGLED}_untagged{suffix}": mixture(
            work, data, synth, f"{name}-untagged", "--tag", "none"
        ),
        f"{TOGGLED}_unfiltered{suffix}": mixture(
            work, data, synth, f"{name}-all", "--filters", "none"
        ),
    }


if __name__ == "__main__":
    main()

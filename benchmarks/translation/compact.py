"""Our Transformer beside the LSTM, for equal CPU time: `python -m benchmarks.translation.compact [GROUP …]`.

English to Chinese on cmn-eng/cmn.txt and pydocs. Every run is one `fairseq-hydra-train` on one thread, then
the average of its last checkpoints or its best one, whichever translates valid better, `translate` with beam
5 and `score`. One line a run in benchmarks/results/translation_compact.jsonl, written when it is done; a run
that has its line is not done again. How many updates fit into the time `pace` measures first, all systems in
turn, but for the ingredients. What is still to be run `--list` lists.

    pace         CPU seconds an update of each system and corpus
    search       seed 1: what is best on valid is chosen; the LSTM's search is that of translation_tables, too
    chosen       the best of either side, 3 seeds
    ingredients  the best Transformer without each of its parts, for as many updates, seed 1
    growing      both, on parts of pydocs of 5 to 49 thousand pairs, for 24 minutes, seed 1; then
                 docs/pictures/growing.png
    longer       both for 24 minutes on cmn-eng, 3 seeds; the LSTM's are of translation_tables
"""

import argparse
import gzip
import random
import statistics
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine
from benchmarks.pages import markdown, origin, spread
from benchmarks.recorded import (
    RESULTS,
    ROOT,
    Results,
    changed_recipe,
    data_file,
    digest_of,
    run,
    train,
)
from benchmarks.translation import tables
from benchmarks.translation.runs import Runs, python
from benchmarks.translation.significance import Pairs, record_tests, significance_table
from benchmarks.translation.tables import CONFIGS, SEEDS, prepare

COMMAND = "python -m benchmarks.translation.compact"
RECORDED = Results(RESULTS / "translation_compact.jsonl")
TABLE, GROWN = "compact", "growing"
# CPU seconds of a run's updates; a twelfth more goes into starting, validations and checkpoints.
SECONDS = {"short": 440.0, "long": 1320.0}
# Updates whose seconds `pace` subtracts, so that what happens once does not count.
PACE = (30, 110)
WARMUP = 200
# A twentieth of a run lies between two validations.
CHECKS = 20
SIZES = {"5": 5000, "12": 12000, "25": 25000, "49": 49075}
# Batches are alike in all parts of pydocs, and machines are not: these have the updates of the whole.
AS_THE_WHOLE = ("12", "25")
# Lines of pydocs are long: so many of valid and test are drawn, and the first 100 translated in validation.
DRAWN = {"valid": 300, "test": 1000}
OF_LONG_LINES = {"task.valid_sentences": 100, "dataset.max_tokens_valid": 2000}

Changes = dict[str, Any]


def transformer(rate: float, dropout: float) -> tuple[str, Changes]:
    return "compact_short", {"optimization.lr": [rate], "model.dropout": dropout}


def lstm(how: str, rate: float, dropout: float) -> tuple[str, Changes]:
    """With a rate that ends at 0, as the Transformer has, unless `how` is constant."""
    changes: Changes = {"optimization.lr": [rate], "model.dropout": dropout}
    if how != "constant":
        changes["lr_scheduler"] = {"_name": "cosine", "warmup_updates": WARMUP}
    if how == "muon":
        changes["optimizer"] = {"_name": "muon", "adam_betas": "(0.9, 0.98)"}
    return "lstm", changes


# What of our Transformer is changed, one at a time; all: fairseq's own of this size.
PARTS: dict[str, Changes] = {
    "rotary": {"model.no_rotary": True},
    "qk_norm": {"model.no_qk_norm": True},
    "neighbours": {"model.no_neighbours": True},
    "squared_relu": {"model.no_squared_relu": True},
    "zero_outputs": {"model.no_zero_outputs": False},
    "bf16_matrices": {"model.no_bf16_matrices": True},
    "muon": {"optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)"}},
    "all": {"defaults": [{"model": "shallow"}, "_self_"], "model": {"dropout": 0.0}},
}


# Named as `system` reads them.
SEARCH = (
    "transformer-0.008-0",
    "transformer-0.008-0-zero_outputs",
    "transformer-0.008-0-all",
    "transformer-0.016-0-all",
    "lstm-adam-0.004-0.1",
    "lstm-adam-0.008-0.1",
    "lstm-muon-0.004-0.1",
    "lstm-constant-0.008-0.1",
)
# Of translation_tables: the best of its search, of as many CPU seconds; three seeds of the short one.
KNOWN = {
    "short-lstm-constant-0.004-0.1": "lstm-0.004-0.1",
    "long-lstm-constant-0.004-0.1": "longerlstm-0.004-0.1",
}
# Who sees each pair 15 times learns it by heart without dropout.
LONG = "transformer-0.008-0.1"


def system_of(name: str) -> str:
    """What of a run's name decides on its CPU seconds an update: transformer, lstm-adam, …"""
    kind, *rest = name.split("-")
    ways = ("adam", "muon", "constant", *PARTS)
    return "-".join([kind, *(part for part in rest if part in ways)])


def runs_of(name: str, length: str = "short") -> list[dict]:
    """The records of a system that was searched or is known, one a seed."""
    name = f"{length}-{name}"
    there, name = (tables.RECORDED, KNOWN[name]) if name in KNOWN else (RECORDED, name)
    return [run for run in (there.get(f"{name}-{seed}") for seed in SEEDS) if run]


def best_of(side: str) -> str:
    """The run of the search that is best on valid, seed 1; SystemExit where none of it is recorded."""
    names = [name for name in SEARCH if name.startswith(side) and runs_of(name)]
    if not names:
        raise SystemExit(f"error: no run of {side} is recorded: run the group search first")
    names += [name.removeprefix("short-") for name in KNOWN if name.startswith(f"short-{side}")]
    return max(names, key=lambda name: runs_of(name)[0]["valid"]["bleu"])


def system(name: str) -> tuple[str, Changes]:
    """Recipe and changes of transformer-RATE-DROPOUT[-PART] or lstm-HOW-RATE-DROPOUT."""
    kind, *rest = name.split("-")
    if kind == "lstm":
        how, rate, dropout = rest
        return lstm(how, float(rate), float(dropout))
    rate, dropout, *part = rest
    recipe, changes = transformer(float(rate), float(dropout))
    return recipe, changes | (PARTS[part[0]] if part else {})


def wanted(group: str) -> dict[str, tuple[str, Changes, str]]:
    """Name of each run of a group → recipe, changes, corpus."""
    if group == "search":
        return {f"short-{name}-1": (*system(name), "cmn") for name in SEARCH}
    if group == "ingredients":
        # the best, which may be without one already, without each of the parts that were not searched
        best = best_of("transformer")
        whole = "-".join(best.split("-")[:3])
        same = {"optimization.max_update": runs_of(best)[0]["recipe"]["optimization"]["max_update"]}
        names = [name for part in PARTS if (name := f"{whole}-{part}") not in SEARCH]
        systems = {f"short-{name}-1": system(name) for name in names}
        return {
            name: (recipe, changes | same, "cmn") for name, (recipe, changes) in systems.items()
        }
    theirs = best_of("lstm")
    if group == "growing":
        names = (LONG, theirs)
        return {f"long-{n}-{size}k-1": (*system(n), size) for size in SIZES for n in names}
    length = "short" if group == "chosen" else "long"
    names = (best_of("transformer") if group == "chosen" else LONG, theirs)
    left = [name for name in names if f"{length}-{name}" not in KNOWN]
    return {f"{length}-{n}-{seed}": (*system(n), "cmn") for seed in SEEDS for n in left}


GROUPS = ("search", "chosen", "ingredients", "longer", "growing")


# --- how long -------------------------------------------------------------------------------------


def pace(work: Path, recipe: str, changes: Changes, corpus: str, system: str) -> float:
    """CPU seconds an update of a system; measured where that is not recorded."""
    name = f"pace-{system}-{corpus}"
    data = corpus_data(work, corpus)
    configs = [sized(recipe, changes, updates) for updates in PACE]
    digest = digest_of(system, PACE, (data / "corpus.json").read_text())
    if not RECORDED.has(name, digest):
        times = []
        for config, updates in zip(configs, PACE, strict=True):
            config["dataset"]["disable_validation"] = True
            config["checkpoint"]["no_save"] = True
            folder = work / f"{name}-{updates}"
            made = train(config, data, digest_of(digest, updates), folder, CONFIGS / "model")
            times.append(made["cpu_seconds"])
        seconds = (times[1] - times[0]) / (PACE[1] - PACE[0])
        record = {"run": name, "date": date.today().isoformat(), "recipe_sha256": digest}
        RECORDED.put({**record, "machine": machine(), "seconds_an_update": seconds})
        print(f"{name}: {seconds:.3f} CPU s an update", flush=True)
    found = RECORDED.get(name)
    assert found is not None
    return float(found["seconds_an_update"])


def sized(recipe: str, changes: Changes, updates: int) -> dict:
    """A recipe of so many updates, validated CHECKS times."""
    config = changed_recipe(CONFIGS / f"{recipe}.yaml", changes)
    config["optimization"]["max_update"] = updates
    config["checkpoint"]["save_interval_updates"] = max(1, updates // CHECKS)
    config["checkpoint"]["patience"] = -1
    return config


def with_length(work: Path, name: str, what: tuple[str, Changes, str]) -> tuple[str, Changes, Path]:
    """Recipe, changes and DATA of a run, of as many updates as fit into its time."""
    recipe, changes, corpus = what
    if corpus != "cmn":
        changes = {**changes, **OF_LONG_LINES}
    length, _, rest = name.partition("-")
    updates = changes.get("optimization.max_update")
    if updates is None:
        like = "49" if corpus in AS_THE_WHOLE else corpus
        seconds = pace(work, recipe, changes, like, system_of(rest.rsplit("-", 1)[0]))
        updates = round(SECONDS[length] / seconds / CHECKS) * CHECKS
    changes = {
        **changes,
        "optimization.max_update": updates,
        "checkpoint.save_interval_updates": updates // CHECKS,
        "checkpoint.patience": -1,
        "common.seed": int(name.rsplit("-", 1)[1]),
    }
    return recipe, changes, corpus_data(work, corpus)


# --- data -----------------------------------------------------------------------------------------


def corpus_data(work: Path, corpus: str) -> Path:
    """DATA of cmn-eng, or of so many thousand pairs of pydocs, made by the real command."""
    if corpus == "cmn":
        return prepare(work)
    data = work / f"data-pydocs-{corpus}"
    if not (data / "corpus.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        files = {
            split: write_pairs(
                work / f"{data.name}.{split}.tsv", split, DRAWN.get(split, SIZES[corpus])
            )
            for split in ("train", "valid", "test")
        }
        command = [*python("translation.prepare"), files["train"], data]
        command += ["--source-lang", "en", "--target-lang", "zh"]
        # 226 paragraphs of other documents have their like in valid or test
        command += ["--valid", files["valid"], "--test", files["test"], "--on-leak", "remove"]
        run(command, work / f"prepare-{data.name}.log")
    return data


def write_pairs(path: Path, split: str, most: int) -> Path:
    """Source and target of a split of pydocs, `most` pairs of it, drawn."""
    with gzip.open(data_file(f"pydocs/{split}.tsv.gz"), "rt", encoding="utf-8") as file:
        lines = ["\t".join(line.rstrip("\n").split("\t")[:2]) + "\n" for line in file]
    if most < len(lines):
        lines = random.Random(1).sample(lines, most)
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- tables ---------------------------------------------------------------------------------------


def compared() -> Pairs:
    """The best of either side in 8 minutes and in 24."""
    theirs = best_of("lstm")
    sides = {"short": best_of("transformer"), "long": LONG}
    pairs = {
        f"{k}-{ours} − {theirs}": (runs_of(ours, k), runs_of(theirs, k))
        for k, ours in sides.items()
    }
    return {title: pair for title, pair in pairs.items() if all(pair)}


def grown() -> Pairs:
    """Both, for each size of pydocs."""
    sides = (LONG, best_of("lstm"))
    names = {size: [f"long-{name}-{size}k-1" for name in sides] for size in SIZES}
    found = {size: [RECORDED.get(name) for name in pair] for size, pair in names.items()}
    return {
        f"{size}k, ours − LSTM": ([ours], [theirs])
        for size, (ours, theirs) in found.items()
        if ours and theirs
    }


def report(records: Iterable[dict], tests: Iterable[dict]) -> str:
    """A row a system: BLEU over its seeds, and what it took."""
    systems: dict[str, list[dict]] = {}
    for known, there in KNOWN.items():
        found = [r for r in map(tables.RECORDED.get, (f"{there}-{k}" for k in SEEDS)) if r]
        systems[known] = found
    for record in records:
        if not record["run"].startswith("pace-"):
            systems.setdefault(record["run"].rsplit("-", 1)[0], []).append(record)
    rows = []
    whole = best_of("transformer")
    parts = [name for part in PARTS if (name := f"{whole}-{part}") not in SEARCH]
    ingredients = {part: systems.pop(f"short-{part}", []) for part in parts}
    for name, runs in systems.items():
        updates = runs[0]["recipe"]["optimization"]["max_update"]
        cpu = statistics.mean(r["cpu_seconds"] for r in runs)
        parameters = f"{runs[0]['parameters']:,}"
        rows.append([name, *scores(runs), parameters, str(updates), f"{cpu:.0f}", str(len(runs))])
    head = ["run", "test BLEU", "valid BLEU", "parameters", "updates", "CPU s", "seeds"]
    runs = [run for some in systems.values() for run in some]
    tests = list(tests)
    made = [markdown(head, rows), significance_table(tests, TABLE)]
    made += [significance_table(tests, GROWN), origin(COMMAND, runs)]
    without = [run for some in ingredients.values() for run in some]
    if without:
        rows = [["nothing", *scores(runs_of(whole)), str(len(runs_of(whole)))]]
        rows += [
            [f"`{name.removeprefix(f'{whole}-')}`", *scores(runs), str(len(runs))]
            for name, runs in ingredients.items()
            if runs
        ]
        head = ["without, the same updates", "test BLEU", "valid BLEU", "seeds"]
        made += [markdown(head, rows), origin(f"{COMMAND} ingredients", without)]
    return "\n\n".join(part for part in made if part)


def scores(runs: list[dict]) -> list[str]:
    """BLEU on test and valid, over the seeds."""
    return [spread([r[subset]["bleu"] for r in runs]) for subset in ("test", "valid")]


def picture() -> None:
    """docs/pictures/growing.png: pairs of pydocs against BLEU on test, a line a side."""
    from ext_common.plots import curves

    lines = {}
    for side, name in {"our Transformer": LONG, "LSTM": best_of("lstm")}.items():
        runs = {pairs: RECORDED.get(f"long-{name}-{size}k-1") for size, pairs in SIZES.items()}
        found = {pairs: run["test"]["bleu"] for pairs, run in runs.items() if run}
        lines[side] = (np.array([*found]), np.array([*found.values()]))
    if all(len(pairs) > 1 for pairs, _ in lines.values()):
        labels = ("pairs of pydocs", "BLEU on test")
        curves(lines, ROOT / "docs" / "pictures" / "growing.png", "24 minutes on one core", labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="of the above (default: search and chosen)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "translation_compact")
    parser.add_argument("--only", metavar="RUN", help="only this one of them")
    parser.add_argument("--list", action="store_true", help="list what is still to be run")
    parser.add_argument("--report", action="store_true", help="print the table of what is done")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.list:
        print("\n".join(missing(args.groups or GROUPS)))
        return
    for group in () if args.report else args.groups or GROUPS[:2]:
        for name, what in wanted(group).items():
            if args.only in (None, name):
                made = with_length(args.work, name, what)
                Runs(RECORDED, CONFIGS, args.work, best_of=True).do({name: made}, 1)
    if not args.report:
        for table, pairs, corpus in ((TABLE, compared(), "cmn"), (GROWN, grown(), "49")):
            if pairs:
                references = corpus_data(args.work, corpus) / "text" / "test.zh"
                record_tests(tables.TESTS, {table: pairs}, references)
        picture()
    print(report(RECORDED.all(), tables.TESTS.all()))


def missing(groups: Iterable[str]) -> Iterator[str]:
    """A line for each run that has no record."""
    for group in groups:
        try:
            runs = wanted(group)
        except SystemExit as why:
            yield f"{group}: {why}"
            continue
        yield from (f"{group}: {name}" for name in runs if RECORDED.get(name) is None)


if __name__ == "__main__":
    main()

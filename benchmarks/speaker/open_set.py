"""Who is it, or nobody: `python -m benchmarks.speaker.open_set [asc20] [libri251]`.

libri251: a model is trained on the 28 people without test segments and 74 drawn ones; of the other 149 a
gallery of 25, 99 strangers to calibrate on and 25 to test are drawn 1,000 times, one test segment a person.
Enrolment and test are of one recording. A larger gallery has those who were trained on, too.
asc20 (its README has the roles): gallery 01-08 by round 1, six strangers 09-14 to calibrate (mean: round 1,
threshold: the others), rounds 5 and 9 of 01-08 and 15-20 to test; six can promise 1/7 and no less.
Thresholds are drawn 1,000 times. One line a model in benchmarks/results/speaker_open_set.jsonl.
"""

import argparse
import csv
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results, changed_recipe, data_file, digest_of, train
from benchmarks.speaker import protocols, strangers
from ext_common.manifest import sha256_file, versions
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.gallery.open_set import (
    conformal_threshold,
    open_set_curve,
    open_set_rates,
    strangers_needed,
)
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.verify.backend import Backend, Side

RECORDED = Results(RESULTS / "speaker_open_set.jsonl")
CONFIGS = ROOT / "configs" / "speaker_id"
DRAWS, SEED = 1000, 20261127
TRAINED_OTHERS, GALLERY, CALIBRATION, STRANGERS = 74, 25, 99, 25
SCORE = ("mean_cosine", "none")


def scores_of(backend: Backend, people: list[np.ndarray], tests: np.ndarray) -> np.ndarray:
    """float32 (T, M): of every test against every person."""
    ones = np.ones(len(people))
    sides = Side(people, ones, ones), Side.of_tests(tests, np.ones(len(tests)))
    first, second = np.indices((len(people), len(tests))).reshape(2, -1).astype(np.int32)
    return backend.scores(*sides, first, second).reshape(len(people), -1).T


def rates(
    strange: np.ndarray, known: np.ndarray, right: np.ndarray, others: np.ndarray, rate: float
):
    """(FPIR, DIR) of one draw: maxima of strangers to calibrate on, of the known, of strangers to test."""
    threshold = np.array([conformal_threshold(strange, rate)])
    best = np.concatenate([known, others])
    is_known = np.arange(len(best)) < len(known)
    hits, falses = open_set_rates(
        best, np.concatenate([right, np.zeros(len(others), bool)]), is_known, threshold
    )
    return float(falses[0]), float(hits[0])


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Mean FPIR with its standard error, mean DIR."""
    falses, hits = np.array(pairs).T
    error = float(falses.std(ddof=1) / np.sqrt(len(falses)))
    return {"fpir": float(falses.mean()), "fpir_error": error, "dir": float(hits.mean())}


def asc20(name: str, checkpoint: Path | None, work: Path) -> dict:
    """The record of a model on asc20; PLDA as `benchmarks.speaker.strangers` chose it."""
    found = strangers.embeddings(name, checkpoint, work)
    rows = strangers.clips()
    names = [f"{i:02d}" for i in range(1, 9)]

    def clips_of(speakers, rounds):
        return [i for i, r in enumerate(rows) if r["speaker"] in speakers and r["round"] in rounds]

    # the threshold comes from other recordings than the mean
    mean = found["clips"][clips_of(strangers.FITTED, ["1"])].mean(0, dtype=np.float64)
    fit = Backend.fit(*strangers.SCORES["plda"], found["pieces"], found["people"].tolist())
    backend = fit.recentred(mean)
    people = [found["clips"][clips_of([name], ["1"])] for name in names]
    tested = clips_of(strangers.TESTED, ["5", "9"])
    scores = scores_of(backend, people, found["clips"][tested])
    who = np.array([rows[i]["speaker"] for i in tested])
    known, right = np.isin(who, names), np.array(names)[scores.argmax(1)] == who
    best = scores.max(1)
    fitted = clips_of(strangers.FITTED, ["5", "9"])
    maxima = scores_of(backend, people, found["clips"][fitted]).max(1)
    owners = np.array([rows[i]["speaker"] for i in fitted])
    rng = np.random.default_rng(SEED)
    pairs = []
    for _ in range(DRAWS):
        drawn = [rng.choice(np.flatnonzero(owners == name)) for name in strangers.FITTED]
        pairs.append(rates(maxima[drawn], best[known], right[known], best[~known], 0.15))
    _, hits, falses = open_set_curve(best, right, known)
    refused = ""
    try:
        conformal_threshold(maxima[:6], 0.1)
    except ValueError as error:
        refused = str(error)
    return {
        "0.15": summary(pairs),
        "dir_at_fpir": {
            f"{r:g}": float(hits[falses <= r].max(initial=0)) for r in (0.01, 0.05, 0.15)
        },
        "closed_set": float(right[known].mean()),
        "refused": refused,
    }


def prepared_part(work: Path) -> tuple[Path, list[str]]:
    """libri251 of the people to train on, prepared, and the names of the others."""
    source = data_file("libri251")
    with open(source / "protocol.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    tested = sorted({row["speaker"] for row in rows if row["split"] == "test"})
    drawn = np.random.default_rng(SEED).choice(tested, TRAINED_OTHERS, replace=False)
    others = sorted(set(tested) - set(drawn.tolist()))
    work.mkdir(parents=True, exist_ok=True)
    table = work / "trained.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in rows if row["speaker"] not in others)
    flags = ("--layout", "csv", "--csv", table)
    return protocols.prepared(source, work / "libri251-trained", *flags), others


def libri251(work: Path, seed: int) -> tuple[dict, dict]:
    """(record, recipe) of a model trained on some of its people and tested on others."""
    data, others = prepared_part(work)
    config = changed_recipe(CONFIGS / "libri251.yaml", {"common.seed": seed})
    folder = work / f"libri251-{seed}"
    seconds = train(config, data, digest_of(config, SEED), folder, CONFIGS / "model")
    model = SpeakerModel.from_checkpoint(folder / "checkpoints" / "checkpoint_best.pt")
    trained = Corpus.open(data)
    mean_of = model.embed([trained.read(row) for row in trained.rows("train")])
    labels = [trained.speakers[trained.labels[row]] for row in trained.rows("train")]
    backend = Backend.fit(*SCORE, mean_of, labels)
    whole = Corpus.open(protocols.prepare_libri(work))
    names = np.array([whole.speakers[label] for label in whole.labels])
    enrolled = {n: np.flatnonzero((names == n) & (whole.splits == "train")) for n in others}
    tests = {n: np.flatnonzero((names == n) & (whole.splits == "test")) for n in others}
    x = {
        row: embedding
        for rows in (enrolled, tests)
        for which in [np.concatenate(list(rows.values()))]
        for row, embedding in zip(
            which.tolist(), model.embed([whole.read(i) for i in which]), strict=True
        )
    }
    order = list(others)
    people = [np.stack([x[i] for i in enrolled[n].tolist()]) for n in order]
    of_trained = [mean_of[np.array(labels) == n] for n in dict.fromkeys(labels)]
    rows = np.concatenate([tests[n] for n in order])
    tested = np.stack([x[i] for i in rows.tolist()])
    scores = scores_of(backend, people, tested)
    owner = np.array([order.index(n) for n in names[rows]])
    trained_best = scores_of(backend, of_trained, tested).max(1)
    larger = {"more": len(of_trained), **draws_of(scores, owner, trained_best)}
    alone = draws_of(scores, owner, np.full(len(rows), -np.inf))
    return {**alone, "larger": larger, **seconds}, config


def draws_of(scores: np.ndarray, owner: np.ndarray, elsewhere: np.ndarray) -> dict:
    """FPIR and DIR over draws of gallery, calibration and strangers; scores (T, M), owner (T,).

    elsewhere: (T,) the largest score over those who are always in the gallery too, −∞ without such.
    """
    rng = np.random.default_rng(SEED)
    count = int(owner.max()) + 1
    segments = [np.flatnonzero(owner == person) for person in range(count)]
    pairs: dict[float, list] = {0.01: [], 0.05: []}
    for _ in range(DRAWS):
        drawn = np.array([rng.choice(one) for one in segments])
        order = rng.permutation(count)
        edges = np.cumsum([GALLERY, CALIBRATION, STRANGERS])
        gallery, strange, others = np.split(order, edges)[:3]
        over = scores[:, gallery]
        best = np.maximum(over.max(1), elsewhere)
        mine = drawn[gallery]
        right = gallery[over[mine].argmax(1)] == gallery
        right &= over[mine].max(1) >= elsewhere[mine]
        for rate, found in pairs.items():
            maxima = best[drawn[strange]]
            found.append(rates(maxima, best[drawn[gallery]], right, best[drawn[others]], rate))
    return {f"{rate:g}": summary(found) for rate, found in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["asc20", "libri251"])
    parser.add_argument(
        "--checkpoints",
        default=str(ROOT / "runs/speaker_tables/main-ours-{seed}/checkpoints/checkpoint_best.pt"),
        help="where the models for asc20 lie",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speaker_strangers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    for seed in args.seeds:
        if "asc20" in args.parts:
            checkpoint = Path(args.checkpoints.format(seed=seed))
            digest = digest_of(sha256_file(checkpoint), strangers.SCORES["plda"], DRAWS, SEED, "1")
            if not RECORDED.has(f"asc20-{seed}", digest):
                record = asc20(f"ours-{seed}", checkpoint, args.work)
                put(f"asc20-{seed}", digest, record)
        if "libri251" in args.parts:
            recipe = changed_recipe(CONFIGS / "libri251.yaml", {"common.seed": seed})
            digest = digest_of(recipe, SCORE, DRAWS, SEED, "larger")
            if not RECORDED.has(f"libri251-{seed}", digest):
                put(f"libri251-{seed}", digest, libri251(args.work, seed)[0])
    assert strangers_needed(0.01) == CALIBRATION


def put(run: str, digest: str, record: dict) -> None:
    RECORDED.put(
        {
            "run": run,
            "recipe_sha256": digest,
            "date": date.today().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "results": record,
        }
    )
    print(run, record, flush=True)


if __name__ == "__main__":
    main()

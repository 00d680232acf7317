"""Ten million trials: how long, and how much memory: `python -m benchmarks.speaker.verification`.

From embeddings and row numbers in memory: scores (cosine; PLDA with AS-norm), metrics, intervals over
speakers, and reading and writing the list, each timed by itself in a process of its own, whose peak of memory
is told. Beside it, on the same embeddings and trials, the formulas as wespeaker and SpeechBrain compute them:
a cosine of two vectors at a time, a matrix of all for AS-norm with each side's best sorted, and the EER from
the ROC of scikit-learn. One line in benchmarks/results/speaker_verification.jsonl.
"""

import argparse
import resource
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import in_fresh_process, machine
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.manifest import versions
from fairseq_ext.speaker.verify import report
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.trials import Trials, read_trials, write_scores, write_trials

RECORDED = Results(RESULTS / "speaker_verification.jsonl")
SPEAKERS, EACH, DIMENSIONS, COHORT, TOP, SEED = 500, 10, 192, 1000, 300, 1
STEPS = ("ours", "beside", "lists", "intervals")


def simulated(trials: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(embeddings, speakers, first, second, cohort): a person's own direction and noise."""
    rng = np.random.default_rng(SEED)
    people = rng.normal(size=(SPEAKERS, DIMENSIONS)).astype(np.float32)
    speakers = np.repeat(np.arange(SPEAKERS), EACH)
    noise = rng.normal(size=(len(speakers), DIMENSIONS)).astype(np.float32)
    first, second = np.triu_indices(len(speakers), 1)
    chosen = np.sort(rng.choice(len(first), min(trials, len(first)), replace=False))
    cohort = rng.normal(size=(COHORT, DIMENSIONS)).astype(np.float32)
    picked = first[chosen].astype(np.int32), second[chosen].astype(np.int32)
    return people[speakers] + 2.0 * noise, speakers, *picked, cohort


def ours(trials: int) -> dict[str, float]:
    """Seconds of scoring and measuring."""
    x, speakers, first, second, cohort = simulated(trials)
    targets = speakers[first] == speakers[second]
    side = Side.of_tests(x, np.ones(len(x)))
    rng = np.random.default_rng(SEED)
    both = np.concatenate([cohort, cohort + rng.normal(size=cohort.shape)])
    names = [f"c{i}" for i in range(COHORT)] * 2
    backends = {
        "cosine": Backend.unfitted("cosine", DIMENSIONS),
        "plda, as_norm": Backend.fit("plda", f"as_norm:top={TOP}", both, names),
    }
    found: dict[str, float] = {"before_mb": peak()}
    for name, backend in backends.items():
        began = time.perf_counter()
        scores = backend.scores(side, side, first, second)
        scored = time.perf_counter()
        metrics = report.measure(scores, targets, True)
        found[f"{name}: scoring"] = scored - began
        found[f"{name}: measuring"] = time.perf_counter() - scored
        found[f"{name}: eer"] = metrics["eer"]
    return found


def beside(trials: int) -> dict[str, float]:
    """The same by the usual programs' formulas; a loop over pairs is timed on a hundredth of them."""
    from sklearn.metrics import roc_curve

    x, speakers, first, second, cohort = simulated(trials)
    targets = speakers[first] == speakers[second]
    found: dict[str, float] = {}
    few = len(first) // 100
    began = time.perf_counter()
    for a, b in zip(first[:few].tolist(), second[:few].tolist(), strict=True):
        float(np.dot(x[a], x[b]) / (np.linalg.norm(x[a]) * np.linalg.norm(x[b])))
    found["cosine, a pair at a time: scoring"] = 100 * (time.perf_counter() - began)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    scores = np.einsum("nd,nd->n", unit[first[:few]], unit[second[:few]])
    began = time.perf_counter()
    directions = cohort / np.linalg.norm(cohort, axis=1, keepdims=True)
    best = np.sort(unit @ directions.T, axis=1)[:, ::-1][:, :TOP]
    mean, deviation = best.mean(1), best.std(1)
    for i, (a, b) in enumerate(zip(first[:few].tolist(), second[:few].tolist(), strict=True)):
        s = scores[i]
        _ = 0.5 * ((s - mean[a]) / deviation[a] + (s - mean[b]) / deviation[b])
    found["as_norm, a pair at a time: scoring"] = 100 * (time.perf_counter() - began)
    rng = np.random.default_rng(SEED)
    values = rng.normal(size=len(first)).astype(np.float32) + 2 * targets
    began = time.perf_counter()
    accepts, hits, _ = roc_curve(targets, values)
    found["eer"] = float(accepts[np.nanargmin(np.abs(1 - hits - accepts))])
    found["roc of scikit-learn: measuring"] = time.perf_counter() - began
    return found


def lists(trials: int) -> dict[str, float]:
    """Seconds of writing scores and reading trials."""
    _, speakers, first, second, _ = simulated(trials)
    ids = [f"id{s:05d}/{i:05d}.wav" for i, s in enumerate(speakers)]
    targets = speakers[first] == speakers[second]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder, "trials"), Trials(first, second, targets)
        write_trials(path, made, ids)
        began = time.perf_counter()
        read = read_trials(path, {name: row for row, name in enumerate(ids)})
        found["reading"] = time.perf_counter() - began
        began = time.perf_counter()
        write_scores(Path(folder, "scores"), read, np.zeros(len(read), np.float32), ids, ids)
        found["writing"] = time.perf_counter() - began
    return found


def intervals(trials: int, draws: int = 10) -> dict[str, float]:
    """Seconds of a draw."""
    _, speakers, first, second, _ = simulated(trials)
    targets = speakers[first] == speakers[second]
    scores = np.random.default_rng(SEED).normal(size=len(first)).astype(np.float32) + 2 * targets
    began = time.perf_counter()
    sides = speakers[first].astype(np.int32), speakers[second].astype(np.int32)
    report.resampled(scores, targets, sides, True, draws, SEED)
    return {"a draw": (time.perf_counter() - began) / draws}


def peak() -> float:
    """The most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many counts")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help="print and record nothing")
    args = parser.parse_args()
    if args.step:
        import json

        found = globals()[args.step](args.trials)
        print(json.dumps({**found, "peak_mb": peak()}))
        return
    record: dict = {"run": "verification", "date": date.today().isoformat(), "steps": {}}
    for step in STEPS:
        arguments = ["-m", "benchmarks.speaker.verification", "--step", step]
        arguments += ["--trials", str(args.trials)]
        rounds = [in_fresh_process(arguments, ROOT) for _ in range(args.rounds)]
        median = {key: float(np.median([one[key] for one in rounds])) for key in rounds[0]}
        record["steps"][step] = median
        print(step, {key: round(value, 3) for key, value in median.items()}, flush=True)
    record |= {"trials": args.trials, "rounds": args.rounds, "machine": machine()}
    record |= {"versions": versions(), "command": "python -m benchmarks.speaker.verification"}
    if not args.dry:
        RECORDED.put(record)


if __name__ == "__main__":
    sys.exit(main())

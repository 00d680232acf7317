"""People, a language and devices that no model here was trained on: `python -m benchmarks.speaker.strangers`.

Verification on asc20 (its README has the roles of its people): trials among 01-08 and 15-20, round 1 against
rounds 5 and 9, other words; mean, calibration and choices from 09-14; PLDA and cohort from pieces of 1 s of
libri251's training cuts. A word against a word, and five against one. Models are the main runs of
`benchmarks.speaker.tables`, three seeds; Resemblyzer (extra `bench`) goes through the same. One line a model
in benchmarks/results/speaker_strangers.jsonl; a model that has its line is not measured again.
"""

import argparse
import csv
import sys
import types
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from benchmarks.recorded import RESULTS, ROOT, Results, data_file, digest_of
from ext_common.manifest import sha256_file, versions
from fairseq_ext.speaker.features import load_audio
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.verify import report
from fairseq_ext.speaker.verify.backend import Backend, Side

RECORDED = Results(RESULTS / "speaker_strangers.jsonl")
RATE, PIECE = 16000, 1.0
TESTED = tuple(f"{i:02d}" for i in (*range(1, 9), *range(15, 21)))
FITTED = tuple(f"{i:02d}" for i in range(9, 15))
WORDS = {"1 word": 1, "5 words": 5}
# name → (score, norm): chosen on 09-14 by --choose
SCORES = {
    "cosine": ("cosine", "none"),
    "mean_cosine": ("mean_cosine", "none"),
    "as_norm": ("mean_cosine", "as_norm:top=100"),
    "plda": ("plda:lda=128", "none"),
    "plda, as_norm": ("plda:lda=128", "as_norm:top=100"),
}
DRAWS, SEED = 200, 20261127


def clips() -> list[dict]:
    """The rows of asc20: path, speaker, word, round."""
    with open(data_file("asc20") / "clips.csv", newline="") as file:
        return list(csv.DictReader(file))


def pieces() -> tuple[list[np.ndarray], list[str]]:
    """Samples of PIECE seconds of libri251's training cuts, and who speaks in each."""
    source = data_file("libri251")
    found, speakers = [], []
    with open(source / "protocol.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    size = round(PIECE * RATE)
    for row in rows:
        cut = load_audio(source / row["path"], RATE, float(row["start"]), float(row["end"]))
        for start in range(0, len(cut) - size + 1, size):
            found.append(cut[start : start + size])
            speakers.append(row["speaker"])
    return found, speakers


def ours(path: Path) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Embeddings of samples by a checkpoint."""
    model = SpeakerModel.from_checkpoint(path)
    return lambda waves: model.embed(model.spec.features(wave) for wave in waves)


def resemblyzer() -> Callable[[list[np.ndarray]], np.ndarray]:
    """Embeddings of samples by Resemblyzer with its own preparation."""
    # it imports two modules by names that have gone since
    import scipy.ndimage

    sys.modules.setdefault("scipy.ndimage.morphology", scipy.ndimage)
    distribution = types.ModuleType("pkg_resources")
    distribution.get_distribution = lambda _: types.SimpleNamespace(version="0")
    sys.modules.setdefault("pkg_resources", distribution)
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(waves: list[np.ndarray]) -> np.ndarray:
        prepared = [preprocess_wav(wave) for wave in waves]
        # its trimming leaves nothing of some words: these are taken as they are
        pairs = zip(prepared, waves, strict=True)
        return np.stack([encoder.embed_utterance(p if len(p) > 1600 else w) for p, w in pairs])

    return embed


def embeddings(name: str, checkpoint: Path | None, work: Path) -> dict[str, np.ndarray]:
    """Those of all clips and of all pieces, kept in the work folder."""
    digest = digest_of(sha256_file(checkpoint) if checkpoint else name, PIECE)
    kept = work / f"{name}-{digest}.npz"
    if not kept.exists():
        embed = ours(checkpoint) if checkpoint else resemblyzer()
        folder = data_file("asc20")
        cuts, people = pieces()
        found = {
            "clips": embed([load_audio(folder / row["path"], RATE) for row in clips()]),
            "pieces": embed(cuts),
            "people": np.array(people),
        }
        work.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **found)
    with np.load(kept) as file:
        return {key: file[key] for key in file.files}


class Trials:
    """All fair trials among some speakers: `words` of round 1 against one word of rounds 5 and 9."""

    def __init__(self, speakers: tuple[str, ...], words: int) -> None:
        rows = clips()
        names = sorted({row["word"] for row in rows})
        # the same groups of words for everybody
        order = np.random.default_rng(SEED).permutation(len(names))
        group = {names[i]: place // words for place, i in enumerate(order)}
        enrolled: dict[tuple[str, int], list[int]] = {}
        tests = []
        for number, row in enumerate(rows):
            if row["speaker"] not in speakers:
                continue
            if row["round"] == "1":
                enrolled.setdefault((row["speaker"], group[row["word"]]), []).append(number)
            else:
                tests.append(number)
        self.people, self.tests = list(enrolled.values()), tests
        keys = list(enrolled)
        first, second = np.divmod(np.arange(len(keys) * len(tests)), len(tests))
        who = np.array([speakers.index(key[0]) for key in keys])
        words_of = np.array([key[1] for key in keys])
        test_who = np.array([speakers.index(rows[i]["speaker"]) for i in tests])
        test_words = np.array([group[rows[i]["word"]] for i in tests])
        fair = words_of[first] != test_words[second]
        self.first, self.second = first[fair].astype(np.int32), second[fair].astype(np.int32)
        self.speakers = who[self.first], test_who[self.second]
        self.targets = self.speakers[0] == self.speakers[1]

    def sides(self, clip_embeddings: np.ndarray) -> tuple[Side, Side, np.ndarray, np.ndarray]:
        x = clip_embeddings
        counts = np.array([len(rows) for rows in self.people])
        people = Side([x[rows] for rows in self.people], counts, counts)
        tests = Side.of_tests(x[self.tests], np.ones(len(self.tests)))
        return people, tests, self.first, self.second


def backend_of(found: dict[str, np.ndarray], score: str, norm: str) -> Backend:
    """Fitted on libri251's people, its mean from asc20's 09-14."""
    backend = Backend.fit(score, norm, found["pieces"], found["people"].tolist())
    if "mean" not in backend.parameters:
        return backend
    fitted = [i for i, row in enumerate(clips()) if row["speaker"] in FITTED]
    return backend.recentred(found["clips"][fitted].mean(0, dtype=np.float64))


def measured(found: dict[str, np.ndarray]) -> dict:
    """Metrics of every score in every condition, calibrated on 09-14; draws of the EER for paired tests."""
    result: dict = {}
    for condition, words in WORDS.items():
        tested, fitted = Trials(TESTED, words), Trials(FITTED, words)
        for name, (score, norm) in SCORES.items():
            backend = backend_of(found, score, norm)
            sides = fitted.sides(found["clips"])
            features = backend.features(backend.scores(*sides), *sides, ())
            backend = backend.calibrated(features, fitted.targets)
            sides = tested.sides(found["clips"])
            scores = backend.llr(backend.scores(*sides), *sides)
            metrics = report.measure(scores, tested.targets, True)
            drawn = report.resampled(scores, tested.targets, tested.speakers, True, DRAWS, SEED)
            result[f"{condition}, {name}"] = {
                "trials": len(scores),
                "targets": int(tested.targets.sum()),
                "metrics": metrics,
                "interval95": report.intervals(metrics, drawn),
                # the same people in the same draw for every model
                "eer_draws": [round(float(value), 5) for value in drawn[:, 0]],
            }
    return result


def choose(found: dict[str, np.ndarray]) -> None:
    """EER on 09-14 of the scores that could be chosen (a line each)."""
    trials = {name: Trials(FITTED, words) for name, words in WORDS.items()}
    scores = ["cosine", "mean_cosine", *(f"plda:lda={d}" for d in (32, 64, 128)), "plda"]
    scores += ["plda:lda=64,length=false"]
    for score in scores:
        for norm in ("none", *(f"as_norm:top={top}" for top in (20, 50, 100)), "s_norm"):
            backend = backend_of(found, score, norm)
            shown = []
            for one in trials.values():
                values = backend.scores(*one.sides(found["clips"]))
                metrics = report.measure(values, one.targets, False)
                shown.append(f"{100 * metrics['eer']:.2f} %, {metrics['min_cllr']:.3f}")
            print(f"{score} {norm}: {'; '.join(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--checkpoints",
        default=str(ROOT / "runs/speaker_tables/main-ours-{seed}/checkpoints/checkpoint_best.pt"),
        help="where the three models lie",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "speaker_strangers")
    parser.add_argument("--choose", action="store_true", help="only print EERs on 09-14")
    parser.add_argument("--only", help="one model: ours-1, ours-2, ours-3 or resemblyzer")
    args = parser.parse_args()
    models = {f"ours-{seed}": Path(args.checkpoints.format(seed=seed)) for seed in (1, 2, 3)}
    for name, checkpoint in {**models, "resemblyzer": None}.items():
        if args.only not in (None, name):
            continue
        digest = digest_of(
            sha256_file(checkpoint) if checkpoint else name, SCORES, PIECE, DRAWS, SEED
        )
        if RECORDED.has(f"asc20-{name}", digest) and not args.choose:
            print(f"{name}: done before")
            continue
        found = embeddings(name, checkpoint, args.work)
        if args.choose:
            print(name)
            choose(found)
            continue
        record = {"run": f"asc20-{name}", "recipe_sha256": digest, "results": measured(found)}
        record |= {"date": date.today().isoformat(), "machine": machine(), "versions": versions()}
        RECORDED.put(record)
        for condition, one in record["results"].items():
            print(f"{name}, {condition}: {report_line(one)}", flush=True)


def report_line(one: dict) -> str:
    metrics = one["metrics"]
    low, high = one["interval95"]["eer"]
    return (
        f"EER {100 * metrics['eer']:.1f} % ({100 * low:.1f} to {100 * high:.1f}), min DCF"
        f" {metrics['min_dcf_0.05']:.3f}, Cllr {metrics['cllr']:.3f} (min {metrics['min_cllr']:.3f})"
    )


if __name__ == "__main__":
    main()

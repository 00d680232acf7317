"""Is it the same person? Scores of pairs of recordings, and how good they are.

python -m fairseq_ext.speaker.verify a.wav b.wav --path CKPT
python -m fairseq_ext.speaker.verify DATA TRIALS --path CKPT --output scores.txt
python -m fairseq_ext.speaker.verify --fit DATA --score plda --norm as_norm --path CKPT --output B.npz
python -m fairseq_ext.speaker.verify DATA --calibrate TRIALS --backend B.npz --path CKPT --output C.npz
python -m fairseq_ext.speaker.verify DATA --make-trials trials.txt --subset test
"""

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import List, Optional

import numpy as np

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import MANIFEST_NAME, atomic_json, beside, known_sha256, versions
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.inference.inputs import (
    LIST_ENDINGS,
    STDIN,
    BatchOptions,
    check_output,
    check_positive,
)
from fairseq_ext.speaker.verify import report
from fairseq_ext.speaker.verify.backend import QUALITIES, Backend
from fairseq_ext.speaker.verify.compared import (
    Compared,
    asked_threshold,
    compared_files,
    measured,
)
from fairseq_ext.speaker.verify.norms import NORMS
from fairseq_ext.speaker.verify.scores import SCORES
from fairseq_ext.speaker.verify.trials import make_trials, write_scores, write_trials
from fairseq_ext.speaker.verify.voices import Runner, named_rows, open_voices

EPILOG = f"""
DATA is a folder made by fairseq_ext.speaker.prepare, a folder of audio (ids are paths below it, the first
part is the speaker), a list of audio files (.txt: a path a line; .scp) or an .npz of
fairseq_ext.speaker.embed. TRIALS has a pair a line, `1 a b` or `0 a b`, or
`a b target` or `a b nontarget`, or `a b` without answers.

The output has `a b score label` a line; the score is a natural log-likelihood ratio where --backend is
calibrated. Beside scores.txt are written scores.txt.metrics.json, .det.png, .histogram.png (where there are
answers) and .manifest.json. Intervals resample speakers. DCFs are those of NIST, at priors of a target of
0.01 and 0.05, divided by that of the better constant answer; actual DCF and Cllr are given where scores are
calibrated.

--score:
{SCORES.describe()}

--norm:
{NORMS.describe()}

--quality:
{QUALITIES.describe()}

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class VerifyOptions(BatchOptions):
    """Options of `verify`."""

    path: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint that fairseq-train wrote; not needed for an .npz"},
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "file to write; none: scores.txt or backend.npz"}
    )
    subset: Optional[str] = field(
        default=None,
        metadata={"help": "split of DATA; none: all of it, its train split with --fit"},
    )
    score: Optional[str] = field(
        default=None, metadata={"help": "score, with options; none: that of --backend, or cosine"}
    )
    norm: str = field(
        default="none", metadata={"help": "score normalisation that --fit prepares, with options"}
    )
    backend: Optional[str] = field(
        default=None, metadata={"help": "file that --fit or --calibrate wrote"}
    )
    enrol: Optional[str] = field(
        default=None,
        metadata={
            "help": "people of several recordings, `name id id …` a line: what a is in trials"
        },
    )
    fit: bool = field(default=False, metadata={"help": "fit a backend on DATA"})
    piece: Optional[float] = field(
        default=None,
        metadata={"help": "with --fit: cut recordings into pieces of so many seconds; none: whole"},
    )
    cohort: Optional[str] = field(
        default=None,
        metadata={
            "help": "with --fit: DATA of the people that --norm compares with; none: those fitted on"
        },
    )
    mean: Optional[str] = field(
        default=None,
        metadata={
            "help": "with --fit: DATA whose mean embedding is taken off instead, like what will be compared"
        },
    )
    calibrate: Optional[str] = field(
        default=None, metadata={"help": "trials to calibrate the scores of --backend on"}
    )
    quality: List[str] = field(
        default_factory=list,
        metadata={"help": "measures that the calibration uses beside the score"},
    )
    threshold: Optional[str] = field(
        default=None,
        metadata={
            "help": "where to say yes: fa=RATE of the others at most, cost=PRIOR of a target, or a number;"
            " kept in the backend with --calibrate"
        },
    )
    make_trials: Optional[str] = field(
        default=None, metadata={"help": "list of trials to write from DATA's speakers"}
    )
    pairs: Optional[int] = field(
        default=None, metadata={"help": "with --make-trials: how many to draw; none: all pairs"}
    )
    draws: int = field(
        default=200, metadata={"help": "resamplings of the intervals; 0: no intervals"}
    )
    seed: int = field(default=1, metadata={"help": "of the resampling and of --pairs"})

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "pairs")
        if self.draws < 0:
            raise ValueError(f"--draws must not be negative, got {self.draws}")
        if self.piece is not None and not self.piece > 0:
            raise ValueError(f"--piece must be positive, got {self.piece}")
        if bool(self.fit) + bool(self.calibrate) + bool(self.make_trials) > 1:
            raise ValueError("--fit, --calibrate and --make-trials are one at a time")
        if self.calibrate and not self.backend:
            raise ValueError("--calibrate needs --backend: verify --fit makes one")
        if self.backend and (self.score or self.norm != "none"):
            raise ValueError("--backend says the score and its norm: leave --score and --norm out")
        for name in self.quality:
            QUALITIES.get(name)


def main(argv):
    """The command."""
    parser = Parser(prog="python -m fairseq_ext.speaker.verify", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="DATA TRIALS, DATA, or two files"
    )
    add_dataclass(parser, VerifyOptions)
    args = parser.parse_args(argv)
    options = from_args(VerifyOptions, args)
    if options.fit or options.calibrate or options.make_trials:
        (data, *more) = args.inputs
        if more:
            raise UsageError(f"one DATA is enough here, got {' '.join(args.inputs)}")
        return (fit if options.fit else calibrate if options.calibrate else make)(data, options)
    if len(args.inputs) != 2:
        raise UsageError(f"give DATA and TRIALS, or two audio files, got {' '.join(args.inputs)}")
    one, two = args.inputs
    listed = Path(one).suffix in (".npz", *LIST_ENDINGS)
    if one == STDIN or (os.path.isfile(one) and not listed):
        return compare(args.inputs, options)
    return verify(one, two, options)


def load_runner(options) -> Runner:
    """The model of --path, or none."""
    model = None
    if options.path:
        model = SpeakerModel.from_checkpoint(options.path, options.device, options.user_dir)
    return Runner(model, options.path or "", options.batch_size, options.max_frames)


def load_backend(options, runner: Runner) -> Backend:
    """That of --backend, or of an exported model, or a score that needs none."""
    carried = None if options.score or options.norm != "none" else runner.backend
    given = options.backend or carried
    if not given:
        if options.norm != "none":
            raise UsageError(f"--norm {options.norm} needs a cohort: --fit with it makes a backend")
        return Backend.unfitted(options.score or "cosine", 0, runner.sha256)
    backend = Backend.load(given)
    backend.check_model(runner.sha256, options.backend or options.path)
    return backend


def make(data, options) -> int:
    """--make-trials."""
    voices = open_voices([data], options.subset)
    check_output(options.make_trials, [data])
    rows, names = named_rows(voices)
    recordings = [voices.recordings[row] for row in rows]
    trials = make_trials(names, recordings, options.pairs, options.seed)
    if not len(trials) or trials.targets.all() or not trials.targets.any():
        raise UserError(
            f"{voices.name}: no pairs of both kinds: two recordings of a speaker, and two speakers are needed"
        )
    write_trials(options.make_trials, trials, [voices.ids[row] for row in rows])
    print(
        f"{voices.name}: {len(trials):,} trials, {trials.targets.sum():,} of one person,"
        f" {len(set(names))} speakers, in {options.make_trials}"
    )
    return 0


def fit(data, options) -> int:
    """--fit."""
    output = options.output or "backend.npz"
    check_output(output, [data, options.path or ""])
    split = options.subset
    if split is None and os.path.exists(os.path.join(data, "corpus.json")):
        split = "train"
    voices, runner = open_voices([data], split), load_runner(options)
    embeddings, speakers = of_speakers(voices, runner, options.piece)
    notes = {"fitted_on": voices.name, "embeddings": len(speakers), "piece": options.piece}
    score = options.score or "cosine"
    backend = Backend.fit(score, options.norm, embeddings, speakers, runner.sha256, notes)
    sources = [voices]
    if options.cohort:
        others = open_voices([options.cohort])
        backend = backend.with_cohort(*of_speakers(others, runner, options.piece))
        backend.notes["cohort"] = others.name
        sources.append(others)
    if options.mean:
        alike = open_voices([options.mean])
        embeddings = alike.embed(runner, range(len(alike.ids))).embeddings
        backend = backend.recentred(embeddings.mean(0, dtype=np.float64))
        backend.notes["mean_of"] = alike.name
        sources.append(alike)
    backend.save(output)
    atomic_json(beside(output, MANIFEST_NAME), provenance(sources, options, [], backend.notes))
    print(
        f"{voices.name}: {score}, norm {options.norm}, fitted on {len(speakers)} embeddings of"
        f" {len(set(speakers))} people, in {output}"
    )
    return 0


def of_speakers(voices, runner, piece):
    """(embeddings, whose each is) of all recordings with a speaker, in pieces."""
    rows, names = named_rows(voices)
    found = voices.embed(runner, rows, piece)
    name_of = dict(zip(rows, names, strict=True))
    return found.embeddings, [name_of[row] for row in found.rows.tolist()]


def calibrate(data, options) -> int:
    """--calibrate."""
    output = options.output or "backend.npz"
    check_output(output, [data, options.calibrate, options.path or ""])
    runner = load_runner(options)
    backend = load_backend(options, runner)
    # whom it was calibrated on before no longer matters
    backend = replace(backend, calibration=None, calibration_speakers=(), qualities=())
    voices = open_voices([data], options.subset)
    compared = Compared(voices, options.calibrate, backend, runner, options.enrol)
    targets = compared.trials.targets
    if targets is None:
        raise UserError(
            f"{options.calibrate} has no answers: calibration needs `1 a b` and `0 a b`"
        )
    scores = backend.scores(*compared.sides)
    features = backend.features(scores, *compared.sides, options.quality)
    names = tuple(sorted(set(compared.speakers or ())))
    backend = backend.calibrated(features, targets, options.quality, names)
    llr = backend.llr(scores, *compared.sides)
    if options.threshold:
        asked = asked_threshold(options.threshold, True, llr, targets)
        backend = replace(backend, threshold=asked)
    record = report.measure(llr, targets, True)
    backend.save(output)
    others = [options.calibrate, options.backend]
    atomic_json(beside(output, MANIFEST_NAME), provenance([voices], options, others, record))
    print(
        f"{backend.score} calibrated on {len(targets):,} trials, {targets.sum():,} of one person,"
        f" {len(names) or 'unnamed'} speakers: Cllr {record['cllr']:.3f} on these; in {output}"
    )
    return 0


def verify(data, trials_path, options) -> int:
    """Scores of a list of trials."""
    output = options.output or "scores.txt"
    check_output(output, [data, trials_path, options.path or "", options.backend or ""])
    runner = load_runner(options)
    backend = load_backend(options, runner)
    began = time.perf_counter()
    voices = open_voices([data], options.subset)
    compared = Compared(voices, trials_path, backend, runner, options.enrol)
    read = time.perf_counter()
    scores = backend.scores(*compared.sides)
    if backend.calibration is not None:
        scores = backend.llr(scores, *compared.sides)
    scored = time.perf_counter()
    trials = compared.trials
    write_scores(output, trials, scores, *compared.ids)
    print(f"{voices.name}: {len(trials):,} scores in {output}")
    aside = os.path.isfile(output)  # beside a pipe there is no place
    if trials.targets is not None:
        record = measured(compared, scores, backend, options.threshold, options.draws, options.seed)
        record["seconds"] |= {"reading_and_embedding": read - began, "scoring": scored - read}
        if aside:
            atomic_json(beside(output, "metrics.json"), record)
            files = beside(output, "det.png"), beside(output, "histogram.png")
            report.pictures(scores, trials.targets, backend.score, *files)
        print("\n".join(report.lines(record)))
    if aside:
        others = [trials_path, *filter(None, (options.backend, options.enrol))]
        record = provenance([voices], options, others, {"trials": len(trials)})
        atomic_json(beside(output, MANIFEST_NAME), record)
    return 0


def compare(paths, options) -> int:
    """Two files."""
    runner = load_runner(options)
    backend = load_backend(options, runner)
    score, llr = compared_files(paths, runner, backend)
    if llr is not None:
        print(f"log-likelihood ratio {llr:.3f} (above 0: rather the same person)")
    else:
        print(f"{backend.score} {score:.4f}, not calibrated: --calibrate says what it is worth")
    threshold = backend.threshold
    if options.threshold:
        threshold = asked_threshold(options.threshold, llr is not None)
    if threshold is not None:
        value = score if llr is None else llr
        same = "the same person" if value >= threshold else "not the same person"
        print(f"{same}, at the threshold {threshold:.4g}")
    return 0


def provenance(sources, options, others, counts) -> dict:
    """The content of a manifest."""
    inputs = {path: known_sha256(path) for path in [*filter(None, [options.path]), *others]}
    for voices in sources:
        inputs |= voices.inputs()
    return {
        "inputs": inputs,
        "counts": counts,
        "options": options,
        "seed": options.seed,
        "versions": versions(),
    }


if __name__ == "__main__":
    run(main)

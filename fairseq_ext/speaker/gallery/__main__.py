"""Who is it, or nobody? People enrolled by their recordings in one file, without training.

python -m fairseq_ext.speaker.gallery enrol PEOPLE.npz anna.wav --name anna --path CKPT
python -m fairseq_ext.speaker.gallery enrol PEOPLE.npz RECORDINGS --path CKPT
python -m fairseq_ext.speaker.gallery calibrate PEOPLE.npz STRANGERS --fpir 0.01 --path CKPT
python -m fairseq_ext.speaker.gallery identify PEOPLE.npz x.wav --path CKPT
python -m fairseq_ext.speaker.gallery identify PEOPLE.npz long.wav --every 1.0 --path CKPT
python -m fairseq_ext.speaker.gallery remove PEOPLE.npz anna
python -m fairseq_ext.speaker.gallery show PEOPLE.npz
"""

import os
import sys

import numpy as np

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from fairseq_ext.speaker.gallery.identify import identify
from fairseq_ext.speaker.gallery.open_set import conformal_threshold
from fairseq_ext.speaker.gallery.options import (
    CalibrateOptions,
    EnrolOptions,
    GalleryIdentifyOptions,
    load_runner,
)
from fairseq_ext.speaker.gallery.store import Gallery, changing, window_key
from fairseq_ext.speaker.inference.inputs import check_output
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.voices import named_rows, open_voices

EPILOG = """
RECORDINGS and STRANGERS are a folder made by fairseq_ext.speaker.prepare, or a folder of audio with a folder
for each person.

calibrate finds the threshold that a stranger reaches with the asked probability at most, by the largest score
of each stranger over this very gallery: a longer list of people confuses more strangers, so that a changed
gallery makes the threshold stale. It takes 1/rate − 1 strangers, one recording each: 99 for 1 %.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


def main(argv):
    """The command."""
    name = "python -m fairseq_ext.speaker.gallery"
    parser = Parser(prog=name, description=__doc__, epilog=EPILOG)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (words, inputs, options, _) in VERBS.items():
        sub = verbs.add_parser(verb, help=words, description=words, prog=f"{name} {verb}")
        sub.add_argument("gallery", metavar="GALLERY", help="file of the gallery (.npz)")
        if inputs:
            sub.add_argument("inputs", nargs="+", metavar="INPUT", help=inputs)
        if options:
            add_dataclass(sub, options)
    args = parser.parse_args(argv)
    _, inputs, options, do = VERBS[args.verb]
    given = [args.inputs] if inputs else []
    return do(args.gallery, *given, *([from_args(options, args)] if options else []))


def enrol(path, inputs, options) -> int:
    """Embed, add, write."""
    check_output(path, [*inputs, options.path])
    if options.backend and os.path.exists(path):
        raise UsageError(f"{path} is there and has its backend: leave --backend out")
    voices = open_voices(inputs, options.subset)
    if options.name is not None:
        rows, names = list(range(len(voices.ids))), [options.name] * len(voices.ids)
    else:
        rows, names = named_rows(voices)
        if options.speakers is not None:
            missing = sorted(set(options.speakers) - set(names))
            if missing:
                raise UserError(f"{voices.name} has no {', '.join(missing)}: correct --speakers")
            kept = [i for i, name in enumerate(names) if name in options.speakers]
            rows, names = [rows[i] for i in kept], [names[i] for i in kept]
    # one at a time: what stands in the file does not depend on what else was enrolled with it
    runner = load_runner(options, batch_size=1)
    new = Gallery(runner.sha256, new_backend(options.backend, runner))
    found = voices.embed(runner, rows)
    with changing(path, new) as gallery:
        gallery.check_model(runner.sha256, path)
        for name in dict.fromkeys(names):
            chosen = [i for i, owner in enumerate(names) if owner == name]
            gallery.enrol(name, found.embeddings[chosen])
        said = what_changed(gallery)
    print(f"enrolled: {len(set(names))} people by {len(rows)} recordings; {said}")
    return 0


def new_backend(path, runner) -> Backend:
    """What a new gallery compares with."""
    given, path = path or runner.backend, path or runner.path
    if not given:
        return Backend.unfitted("cosine", 0, runner.sha256)
    backend = Backend.load(given)
    backend.check_model(runner.sha256, path)
    lost = [name for name in backend.qualities if name in ("duration", "bandwidth")]
    if lost:
        raise UserError(
            f"{path} is calibrated by {', '.join(lost)}, which a gallery does not keep: calibrate it with"
            " other measures (--quality norm,cohort)"
        )
    return backend


def what_changed(gallery) -> str:
    """How many there are, and whether thresholds still hold."""
    stale = [key for key, found in gallery.thresholds.items() if gallery.is_stale(found)]
    note = "; its threshold is stale now: calibrate again" if stale else ""
    return f"{len(gallery.members)} people in the gallery{note}"


def remove(path, names) -> int:
    """Forget people."""
    with changing(path) as gallery:
        for name in names:
            gallery.remove(name)
        said = what_changed(gallery)
    print(f"removed: {', '.join(names)}; {said}")
    return 0


def calibrate(path, inputs, options) -> int:
    """The threshold on the largest score over this gallery."""
    voices, gallery = open_voices(inputs, options.subset), Gallery.load(path)
    rows, names = named_rows(voices)
    enrolled = sorted(set(names) & set(gallery.members))
    if enrolled:
        raise UserError(
            f"{', '.join(enrolled[:3])} of {voices.name} are enrolled and no strangers: leave them out"
        )
    rng = np.random.default_rng(options.seed)
    # one recording a person: several of one person are not exchangeable with another's
    drawn = [
        rows[rng.choice([i for i, owner in enumerate(names) if owner == name])]
        for name in sorted(set(names))
    ]
    refuse_few(len(drawn), options.fpir)
    runner = load_runner(options)
    gallery.check_model(runner.sha256, path)
    found = voices.embed(runner, drawn, options.window)
    kept = [rng.choice(np.flatnonzero(found.rows == row)) for row in np.unique(found.rows)]
    lost = len(drawn) - len(kept)
    if lost:
        print(f"left out: {lost} strangers without {options.window:g} s of speech", file=sys.stderr)
    refuse_few(len(kept), options.fpir)
    gallery.backend.check_disjoint(names, voices.name)
    tests = Side.of_tests(found.embeddings[kept], found.seconds[kept])
    maxima = gallery.scores(tests).max(1)
    threshold = conformal_threshold(maxima, options.fpir)
    members = gallery.sha256
    with changing(path) as changed:
        changed.thresholds[window_key(options.window)] = {
            "threshold": threshold,
            "fpir": options.fpir,
            "strangers": len(kept),
            "of": voices.name,
            "seed": options.seed,
            "members": members,
        }
        stale = changed.sha256 != members
    print(
        f"threshold {threshold:.4f} for {100 * options.fpir:g} % of strangers, on {len(kept)} of them against"
        f" {len(gallery.members)} people" + ("; others were enrolled meanwhile" if stale else "")
    )
    return 0


def refuse_few(count, rate) -> None:
    """UserError, before anything is embedded, where there are too few strangers."""
    try:
        conformal_threshold(np.zeros(count), rate)
    except ValueError as error:
        raise UserError(f"{error}: give more strangers, or a larger --fpir") from None


def show(path) -> int:
    """Who is enrolled."""
    gallery = Gallery.load(path)
    backend = gallery.backend
    calibrated = "calibrated" if backend.calibration else "not calibrated"
    print(f"{len(gallery.members)} people, {backend.score}, norm {backend.norm}, {calibrated}")
    print(f"model {gallery.model}")
    for key, found in gallery.thresholds.items():
        what = "recordings" if key == window_key(None) else f"windows of {key} s"
        stale = ", STALE: the gallery has changed" if gallery.is_stale(found) else ""
        print(
            f"threshold {found['threshold']:.4f} for {what}: {100 * found['fpir']:g} % of strangers, found on"
            f" {found['strangers']} of {found['of']}{stale}"
        )
    for name in gallery.names:
        print(f"{name}  {len(gallery.members[name])} recordings")
    return 0


AUDIO = "audio files, a folder with a folder for each person, or a prepared folder"
VERBS = {
    "enrol": ("add people, or recordings of them", AUDIO, EnrolOptions, enrol),
    "remove": ("forget people", "names", None, remove),
    "calibrate": (
        "find the threshold between the people of the gallery and strangers",
        "a folder with a folder for each stranger, or a prepared folder",
        CalibrateOptions,
        calibrate,
    ),
    "identify": ("say who it is, or unknown", AUDIO, GalleryIdentifyOptions, identify),
    "show": ("say who is enrolled", None, None, show),
}


if __name__ == "__main__":
    run(main)

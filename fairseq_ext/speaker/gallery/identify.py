"""Naming recordings, or windows of them, by a gallery."""

import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ext_common.cli import UsageError, UserError
from ext_common.manifest import atomic_json, atomic_write, beside
from fairseq_ext.speaker.features import FeatureSpec, Heard
from fairseq_ext.speaker.gallery.open_set import open_set_curve, open_set_rates, posteriors
from fairseq_ext.speaker.gallery.options import GalleryIdentifyOptions, load_runner
from fairseq_ext.speaker.gallery.store import UNKNOWN, Gallery
from fairseq_ext.speaker.gallery.stream import rttm, turns
from fairseq_ext.speaker.inference.inputs import check_output
from fairseq_ext.speaker.verify.backend import Side
from fairseq_ext.speaker.verify.voices import AudioVoices, Runner, cuts_of, open_voices

RATES = (0.01, 0.05, 0.1, 0.2)


def identify(path: str, inputs: list[str], options: GalleryIdentifyOptions) -> int:
    """Names, or nobody's."""
    if options.output:
        check_output(options.output, [*inputs, path, options.path])
    gallery, runner = Gallery.load(path), load_runner(options)
    gallery.check_model(runner.sha256, path)
    threshold = threshold_of(gallery, options)
    if options.every is not None:
        return stream(gallery, runner, inputs, options, threshold)
    voices = open_voices(inputs, options.subset)
    rows = list(range(len(voices.ids)))
    found = voices.embed(runner, rows)
    scores = gallery.scores(Side.of_tests(found.embeddings, found.seconds))
    names, values = decide(gallery, scores, threshold, options.prior_known)
    calibrated = gallery.backend.calibration is not None
    head = ["Id", "Name", "Posterior" if calibrated else "Score"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(
        [voices.ids[row], name, f"{value:.4f}"]
        for row, name, value in zip(rows, names, values, strict=True)
    )
    if not options.output:
        sys.stdout.write(text.getvalue())
        return 0
    with atomic_write(options.output) as file:
        file.write(text.getvalue())
    print(f"{voices.name}: {len(rows)} recordings in {options.output}")
    if None not in voices.speakers and os.path.isfile(options.output):
        report(gallery, scores, voices.speakers, threshold, options.output)
    return 0


def threshold_of(gallery: Gallery, options: GalleryIdentifyOptions) -> float | None:
    """The score a name takes; what is doubtful about it is said on stderr."""
    if options.threshold is not None:
        return options.threshold
    window = None if options.every is None else options.window or options.every
    found = gallery.threshold(window)
    if found is None:
        of = "" if window is None else f" for windows of {window:g} s"
        if gallery.backend.calibration is None:
            print(
                f"no threshold{of}: everybody gets somebody's name (gallery calibrate finds one)",
                file=sys.stderr,
            )
        return None
    if gallery.is_stale(found):
        print(
            f"the gallery has changed since its threshold was found: {100 * found['fpir']:g} % of strangers"
            " no longer holds; calibrate again",
            file=sys.stderr,
        )
    return float(found["threshold"])


def decide(
    gallery: Gallery, scores: np.ndarray, threshold: float | None, prior_known: float
) -> tuple[list[str], np.ndarray]:
    """(names, values) of scores (T, N): the posterior of what is said where calibrated, else the score."""
    best = scores.argmax(1)
    values, accepted = scores.max(1), np.ones(len(scores), bool)
    if threshold is not None:
        accepted = values >= threshold
    if gallery.backend.calibration is not None:
        shares = posteriors(scores, prior_known)
        if threshold is None:
            accepted = shares[:, :-1].max(1) >= shares[:, -1]
        values = np.where(accepted, shares[np.arange(len(best)), best], shares[:, -1])
    names = gallery.names
    return [
        names[column] if yes else UNKNOWN for column, yes in zip(best, accepted, strict=True)
    ], values


def report(
    gallery: Gallery,
    scores: np.ndarray,
    speakers: Sequence[str | None],
    threshold: float | None,
    output: str,
) -> None:
    """Rates of a labelled set, and their picture."""
    from ext_common.plots import curves

    names, who = np.array(gallery.names), np.array(speakers)
    known, best = np.isin(who, names), scores.max(1)
    right = names[scores.argmax(1)] == who
    record: dict[str, Any] = {"known": int(known.sum()), "strangers": int((~known).sum())}
    print(f"{record['known']} recordings of people enrolled, {record['strangers']} of others")
    if threshold is not None:
        hit, false = (
            float(x[0]) for x in open_set_rates(best, right, known, np.array([threshold]))
        )
        record["at_threshold"] = {"threshold": threshold, "dir": hit, "fpir": false}
        rates = (("DIR", hit), ("FPIR", false))
        shown = [f"{name} {100 * rate:.1f} %" for name, rate in rates if np.isfinite(rate)]
        print(f"at the threshold {threshold:.4f}: {', '.join(shown)}")
    if known.any() and not known.all():
        _, hits, falses = open_set_curve(best, right, known)
        record["dir_at_fpir"] = {
            f"{rate:g}": float(hits[falses <= rate].max(initial=0.0)) for rate in RATES
        }
        for rate, hit in record["dir_at_fpir"].items():
            print(f"DIR {100 * hit:.1f} % at FPIR {100 * float(rate):g} %")
        picture = beside(output, "open-set.png")
        title = f"{len(names)} people enrolled"
        axes = "FPIR: strangers who get a name, %", "DIR: known who get theirs, %"
        curves({gallery.backend.score: (100 * falses, 100 * hits)}, picture, title, axes)
    atomic_json(beside(output, "metrics.json"), record)


def windows_of(
    spec: FeatureSpec, heard: Heard, window: float, every: float, starts: list[float]
) -> Iterator[np.ndarray]:
    """Features of the windows with speech; `starts` grows by the second where each begins."""
    for start, cut in cuts_of(spec, heard, window, every):
        starts.append(start)
        yield spec.features(cut)


def stream(
    gallery: Gallery,
    runner: Runner,
    inputs: list[str],
    options: GalleryIdentifyOptions,
    threshold: float | None,
) -> int:
    """Who speaks when, as RTTM."""
    assert options.every is not None
    voices, window = open_voices(inputs), options.window or options.every
    if not isinstance(voices, AudioVoices):
        raise UsageError("--every is for audio files: give these")
    spec, parts = runner.needed(voices.name).spec, []
    for row, heard in voices.source.heard(spec, range(len(voices.ids)), strict=False):
        starts: list[float] = []
        cuts = windows_of(spec, heard, window, options.every, starts)
        found = runner.embed(cuts, int(heard.seconds / options.every))
        if not starts:
            print(f"{voices.ids[row]}: no {window:g} s of speech on end: left out", file=sys.stderr)
            continue
        scores = gallery.scores(Side.of_tests(found, np.full(len(starts), window)))
        names, _ = decide(gallery, scores, threshold, options.prior_known)
        name = Path(voices.source.paths[row]).stem
        parts.append(rttm(name, turns(starts, names, window, options.every)))
    if not parts:
        raise UserError("no recording has speech enough: give longer ones, or a smaller --every")
    if options.output:
        with atomic_write(options.output) as file:
            file.writelines(parts)
        print(
            f"{voices.name}: {sum(part.count(chr(10)) for part in parts)} turns in {options.output}"
        )
    else:
        sys.stdout.writelines(parts)
    return 0 if len(parts) == len(voices.ids) else 1

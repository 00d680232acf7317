"""Who speaks: predictions of a trained model for a split of prepared data, or for audio files.

python -m fairseq_ext.speaker.identify DATA --path CKPT --subset test --output predictions.csv
python -m fairseq_ext.speaker.identify a.wav b.flac --path CKPT
"""

import csv
import io
import os
import sys
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from ext_common.cli import Parser, add_dataclass, from_args, run
from ext_common.manifest import MANIFEST_NAME, atomic_json, atomic_write, beside
from fairseq_ext.speaker.inference import SpeakerModel, rank
from fairseq_ext.speaker.inference.inputs import (
    PredictOptions,
    check_output,
    load_model,
    open_inputs,
    predictions,
    provenance,
)
from fairseq_ext.speaker.metrics import (
    accuracy,
    accuracy_by_label,
    confusion_counts,
    in_top,
)

SHOWN = 5  # worst speakers and pairs on the screen; the metrics have all speakers
PAIRS = 50  # most confused pairs in the metrics

EPILOG = """
The output is CSV with the columns Id,Category: the source path as in the data (path#start-end for
a cut) and the speaker's name, in source order. With --top-k K the columns are
Id,Category,Score1,Category2,Score2,...,CategoryK,ScoreK, best first. Scores are cosines in [-1, 1],
or log-probabilities where the model has a linear head.

Where the data names its speakers, the accuracy is measured: top-1 and top-5 with their 95 %
(Wilson) intervals and the accuracy of each speaker. Speakers are matched by name; utterances of
speakers that the model does not know are predicted, counted, and left out of the accuracy.

Beside predictions.csv are written predictions.manifest.json (inputs, options, counts, versions) and,
where accuracy is measured, predictions.metrics.json and predictions.confusion.png. Audio files are read
with the feature specification of the checkpoint. One that cannot be read is left out (exit code 1).

Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class IdentifyOptions(PredictOptions):
    """Options of `identify`."""

    subset: str = field(default="test", metadata={"help": "split of DATA to predict"})
    output: Optional[str] = field(
        default=None,
        metadata={
            "help": "file to write; none: predictions.csv for DATA, the screen for audio files"
        },
    )
    top_k: Optional[int] = field(
        default=None,
        metadata={"help": "candidates to write with their scores; none: the best, without score"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top-k must be at least 1, got {self.top_k}")


def main(argv):
    """The command."""
    parser = Parser(
        prog="python -m fairseq_ext.speaker.identify", description=__doc__, epilog=EPILOG
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="one folder made by fairseq_ext.speaker.prepare; or audio files, a folder or a list of them"
        " (.txt: a path a line; .scp), or - for audio on standard input",
    )
    add_dataclass(parser, IdentifyOptions)
    args = parser.parse_args(argv)
    return identify(args.inputs, from_args(IdentifyOptions, args))


def identify(inputs, options):
    """Predict, write and print; returns the exit code."""
    source = open_inputs(inputs, options.subset, options.channel)
    from_folder = os.path.isdir(inputs[0])
    if (options.output or from_folder) and any(source.speakers):
        # what the picture needs is asked for before the work
        import ext_common.plots  # noqa: F401
    output = options.output or ("predictions.csv" if from_folder else None)
    if output:
        check_output(output, [*inputs, options.path])
    model = load_model(source, options)
    best, scores = ranked_predictions(model, source, options)
    columns = min(options.top_k or 1, best.shape[1])
    rows = [
        [utterance, *candidates(model, best[i, :columns], scores[i], options.top_k)]
        for i, utterance in enumerate(source.ids)
    ]
    head = header(columns, options.top_k)
    if not output:
        sys.stdout.write(to_table(head, rows))
        return 1 if source.bad else 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    with atomic_write(output) as file:
        file.write(text.getvalue())
    truth, counts = known_labels(source.speakers, model.speakers)
    aside = os.path.isfile(output)  # beside a pipe there is no place
    if aside:
        atomic_json(beside(output, MANIFEST_NAME), provenance(source, options, counts))
    print(f"{source.name}: {len(rows)} utterances, predictions in {output}")
    if counts["labelled"]:
        measured = measure(best, truth, model.speakers)
        report(measured, counts)
        if aside and measured["top1"]["total"]:
            names = dict(checkpoint=options.path, source=source.name, output=output)
            write_metrics(output, {**names, **counts, **measured}, best, truth, model)
    return 1 if source.bad else 0


def ranked_predictions(model: SpeakerModel, source, options):
    """(classes int64 (N, K), scores float32 (N, K)), best first; K covers --top-k and top-5."""
    kept = min(max(5, options.top_k or 1), len(model.speakers))
    best = np.zeros((len(source), kept), dtype=np.int64)
    values = np.zeros((len(source), kept), dtype=np.float32)
    for positions, found in predictions(model, source, options, "identify"):
        order = rank(found["scores"], kept)
        best[positions] = order
        values[positions] = np.take_along_axis(found["scores"], order, axis=1)
    return best[: len(source.ids)], values[: len(source.ids)]


def known_labels(speakers, known):
    """Names (or None) → class numbers int64 (N,), -1 without a known one; and the counts."""
    index = {name: number for number, name in enumerate(known)}
    labels = np.array([index.get(name, -1) for name in speakers], dtype=np.int64)
    strangers = [name for name in speakers if name is not None and name not in index]
    counts = {
        "labelled": sum(name is not None for name in speakers),
        "unlabelled": sum(name is None for name in speakers),
        "of_unknown_speakers": len(strangers),
        "unknown_speakers": sorted(set(strangers)),
    }
    return labels, counts


def measure(best, truth, names):
    """Everything that predictions.metrics.json has, over the rows with a known label."""
    from ext_common.plots import most_confused

    ranked, labels = best[truth >= 0], truth[truth >= 0]
    hits = in_top(ranked, labels, 1)
    by_label = accuracy_by_label(hits, labels)
    shares = [correct / total for correct, total in by_label.values()]
    classes, counts = confusion_counts(labels, ranked[:, 0])
    return {
        "top1": accuracy(hits),
        "top5": accuracy(in_top(ranked, labels, 5)),
        "mean_over_speakers": float(np.mean(shares)) if shares else None,
        "speakers": {
            names[label]: {"correct": correct, "utterances": total, "accuracy": correct / total}
            for label, (correct, total) in by_label.items()
        },
        "most_confused": [
            {"true": true, "predicted": predicted, "count": count}
            for true, predicted, count in most_confused(counts, [names[c] for c in classes], PAIRS)
        ],
    }


def write_metrics(output, record, best, truth, model):
    """The metrics and the picture of the confusions, beside the predictions."""
    # matplotlib costs half a second that --help should not.
    from ext_common.plots import confusion_matrix

    metrics, picture = beside(output, "metrics.json"), beside(output, "confusion.png")
    atomic_json(metrics, record)
    classes, counts = confusion_counts(truth[truth >= 0], best[truth >= 0, 0])
    confusion_matrix(counts, [model.speakers[c] for c in classes], picture, record["source"])
    print(f"accuracy of every speaker in {metrics}, confusions in {picture}")


def report(measured, counts):
    """What the screen says of the accuracy."""
    strangers = counts["unknown_speakers"]
    if strangers:
        few = ", ".join(strangers[:SHOWN]) + (", …" if len(strangers) > SHOWN else "")
        print(
            f"left out of the accuracy: {counts['of_unknown_speakers']} utterances of"
            f" {len(strangers)} speakers that the model does not know ({few})"
        )
    if counts["unlabelled"]:
        print(f"left out of the accuracy: {counts['unlabelled']} utterances without a speaker")
    if not measured["top1"]["total"]:
        print("the model knows none of these speakers: no accuracy")
        return
    for key, name in (("top1", "top-1"), ("top5", "top-5")):
        a = measured[key]
        low, high = a["interval95"]
        print(
            f"{name} accuracy {percent(a['accuracy'])} ({a['correct']} of {a['total']},"
            f" 95 % interval {100 * low:.1f} to {percent(high)})"
        )
    speakers = measured["speakers"]
    worst = sorted(speakers, key=lambda name: (speakers[name]["accuracy"], name))
    worst = [name for name in worst if speakers[name]["accuracy"] < 1]
    shown = ", ".join(
        f"{name} {speakers[name]['correct']}/{speakers[name]['utterances']}"
        for name in worst[:SHOWN]
    )
    print(
        f"{len(speakers)} speakers: {percent(measured['mean_over_speakers'])} in the mean over"
        f" them, {len(worst)} with errors{f' (lowest: {shown})' if worst else ''}"
    )
    pairs = measured["most_confused"][:SHOWN]
    if pairs:
        text = ", ".join(f"{p['true']} → {p['predicted']} {p['count']}×" for p in pairs)
        print(f"most confused, true → predicted: {text}")


def header(columns, top_k):
    """Names of the columns."""
    if top_k is None:
        return ["Id", "Category"]
    rest = [name for k in range(2, columns + 1) for name in (f"Category{k}", f"Score{k}")]
    return ["Id", "Category", "Score1", *rest]


def candidates(model, classes, scores, top_k):
    """The cells of one row behind its id."""
    if top_k is None:
        return [model.speakers[classes[0]]]
    # Four digits: the fifth may depend on what shared the batch.
    return [
        cell
        for c, score in zip(classes, scores, strict=False)
        for cell in (model.speakers[c], f"{score:.4f}")
    ]


def to_table(head, rows):
    """Columns aligned with spaces."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = (
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        for row in [head, *rows]
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def percent(share):
    """A share as text."""
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    run(main)

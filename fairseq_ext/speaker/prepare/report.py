"""What prepare prints: the table of splits, what was left out and why."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fairseq_ext.speaker.balance import is_uneven, speaker_frames
from fairseq_ext.speaker.prepare.layouts import Bad

EXAMPLES = 3


def table(corpus: Any) -> str:
    """Speakers, utterances, hours and lengths of each split, as text."""
    seconds = (corpus.lengths - 1) * corpus.spec.seconds_per_frame
    order = {"train": 0, "valid": 1, "test": 2}
    names = sorted(set(corpus.splits.tolist()), key=lambda name: (order.get(name, 3), name))
    lines = ["split     speakers  utterances     hours  shortest    median   longest"]
    for name in names + (["all"] if len(names) > 1 else []):
        chosen = corpus.splits == name if name != "all" else np.ones(len(corpus), bool)
        labels = corpus.labels[chosen]
        speakers = len(np.unique(labels[labels >= 0]))
        times = seconds[chosen]
        lines.append(
            f"{name:<10}{speakers:>8}{chosen.sum():>12}{times.sum() / 3600:>10.2f}"
            f"{times.min():>8.2f} s{statistics.median(times):>8.2f} s{times.max():>8.2f} s"
        )
        unlabelled = int((labels < 0).sum())
        if unlabelled and name != "all":
            lines.append(f"          ({unlabelled} of {chosen.sum()} without a speaker)")
    return "\n".join(lines + shares(corpus))


def shares(corpus: Any) -> list[str]:
    """A line on speakers with much less or more speech in train than the others, if there are such."""
    trained = (corpus.splits == "train") & (corpus.labels >= 0)
    frames = speaker_frames(corpus.lengths[trained], corpus.labels[trained])
    if not is_uneven(frames):
        return []
    names = [corpus.speakers[label] for label in np.unique(corpus.labels[trained])]
    (least, few), (most, many) = (
        (frames[i] * corpus.spec.seconds_per_frame, names[i])
        for i in (int(frames.argmin()), int(frames.argmax()))
    )
    return [
        f"speakers have from {least:.1f} s ({few}) to {most:.1f} s ({many}) in train: where you say"
        " nothing, training draws as many crops of each (--balance speaker)"
    ]


def report_bad(bad: Sequence[Bad], total: int, allowed: float) -> None:
    """Print how many utterances cannot be used, by reason, with examples."""
    if not bad:
        return
    by_reason: dict[str, list[Bad]] = defaultdict(list)
    for item in bad:
        by_reason[item.reason].append(item)
    warn(
        f"{len(bad)} of {total} utterances cannot be used ({100 * len(bad) / total:.3g} %, "
        f"--max-bad allows {100 * allowed:.3g} %)"
    )
    for reason, items in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        print(f"  {reason}: {len(items)}", file=sys.stderr)
        for item in items[:EXAMPLES]:
            print(f"    {item.path}: {short(item)}", file=sys.stderr)


def report_duplicates(duplicates: Sequence[Mapping[str, Any]]) -> None:
    """Print utterances whose content was there before, first those whose speakers contradict."""
    if not duplicates:
        return
    left_out = sum(not item["kept"] for item in duplicates)
    warn(
        f"{len(duplicates)} utterances are exact duplicates, {left_out} left out; the first is kept"
    )
    contradict = [
        item
        for item in duplicates
        if item["speaker"] and item["of_speaker"] and item["speaker"] != item["of_speaker"]
    ]
    if contradict:
        print(f"  {len(contradict)} of them under another speaker", file=sys.stderr)
    for item in (contradict or duplicates)[:EXAMPLES]:
        print(
            f"    {item['path']} ({item['speaker'] or 'no speaker'}) = "
            f"{item['of']} ({item['of_speaker'] or 'no speaker'})",
            file=sys.stderr,
        )


def short(item: Bad) -> str:
    """The detail of a bad record without the path that is printed before it."""
    head, separator, rest = item.detail.partition(": ")
    return rest if separator and (head.endswith(item.path.split("#")[0])) else item.detail


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {text}", file=sys.stderr)

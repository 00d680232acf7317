"""What `--task speaker_id` wants where no flag says it: as data, by what is in DATA and by the machine.

The values are those of configs/speaker_id, where measured in docs; the recipes are snapshots of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ext_common.presets import Choice, Machine, TaskPresets, cosine, shared_batch
from ext_common.store import parts_of
from fairseq_ext.speaker.balance import is_uneven
from fairseq_ext.speaker.corpus import described, read_table

FRAMES_PER_HOUR = 360_000
# Mean length below which utterances are words, seconds.
WORDS = 0.8
# Hours from which the speakers of a course's size are expected.
MANY_HOURS = 10
TOTAL_BATCH = 64
# From this share of narrow recordings on there is a mixture to be learnt.
MIXED = 0.02


@dataclass(frozen=True)
class Facts:
    """What corpus.json says of all splits together; least, most: frames of a speaker in train;
    narrow: share of the recordings that lack high frequencies (`bandwidth`).
    """

    hours: float
    speakers: int
    utterances: int
    least: int = 0
    most: int = 0
    uneven: bool = False
    narrow: float = 0.0

    @property
    def seconds(self) -> float:
        """Mean length of an utterance."""
        return 3600 * self.hours / max(1, self.utterances)


@dataclass(frozen=True)
class Size:
    """crop: frames of 10 ms; the rest in updates, but for the rate lr."""

    about: str
    crop: int
    epoch: int
    lr: str
    warmup: int
    updates: int
    log_interval: int
    margin_end: int = 0
    workers: int = 0


SINGLE_WORDS = Size("single words", 51, 50, "0.002", 50, 300, 50)
MINUTES = Size("small, up to some hours", 101, 200, "0.004", 200, 1600, 50)
HOURS = Size("large, many hours", 128, 200, "0.002", 1000, 70000, 200, margin_end=4000, workers=2)


def read(data: str, asked: Mapping[str, Any]) -> Facts:
    """UserError where DATA is no folder made by speaker.prepare."""
    folders = [Path(part) for part in parts_of(data)]
    metas = [described(folder) for folder in folders]
    hours = sum(meta["frames"] for meta in metas) / FRAMES_PER_HOUR
    speakers = {name for meta in metas for name in meta["speakers"]}
    utterances = sum(meta["utterances"] for meta in metas)
    frames: Counter[str] = Counter()
    for folder in folders:
        frames += trained_frames(folder)
    each = list(frames.values())
    known = (min(each), max(each), is_uneven(each)) if each else (0, 0, False)
    narrow = sum(meta.get("narrow", 0) for meta in metas) / max(1, utterances)
    return Facts(hours, len(speakers), utterances, *known, narrow)


def trained_frames(data: Path) -> Counter[str]:
    """Frames that each speaker has in train."""
    frames: Counter[str] = Counter()
    if not (data / "utterances.csv").exists():
        return frames
    table = read_table(data / "utterances.csv")
    for speaker, split, n in zip(table["speaker"], table["split"], table["length"], strict=True):
        if split == "train" and speaker:
            frames[speaker] += int(n)
    return frames


def duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 0.1 else f"{60 * hours:.1f} minutes"


def size_of(facts: Facts) -> Size:
    if facts.hours >= MANY_HOURS:
        return HOURS
    return SINGLE_WORDS if facts.seconds < WORDS else MINUTES


def choose(facts: Facts, machine: Machine, asked: Mapping[str, Any]) -> Sequence[Choice]:
    size = size_of(facts)
    updates = asked.get("max_update", size.updates)
    batch, _, together = shared_batch(TOTAL_BATCH, machine.processes)
    margin = {"--m": "0.2", "--s": "30.0"}
    if size.margin_end:
        margin |= {"--margin-start": "0", "--margin-end": str(size.margin_end)}
    data = (
        f"{facts.speakers:,} speakers, {facts.utterances:,} utterances of {facts.seconds:.1f} s,"
        f" {duration(facts.hours)} in all: {size.about}"
    )
    metric = "speaker_accuracy" if facts.uneven else "accuracy"
    schedule = cosine(updates, size.warmup, asked)
    return [
        Choice("data", {"--crop-frames": str(size.crop), "--epoch-updates": str(size.epoch)}, data),
        balance_of(facts),
        *augmentation_of(facts),
        Choice("arch", {"--arch": "conformer_speaker"}, "the best encoder of the ablation"),
        Choice("criterion", {"--criterion": "am_softmax"} | margin, "earns 6 points over softmax"),
        Choice(
            "optimizer",
            {"--optimizer": "adam", "--adam-betas": "(0.9, 0.98)", "--weight-decay": "0.0001"},
            "decoupled, as AdamW",
        ),
        Choice("rate", {"--lr": size.lr}, f"for {TOTAL_BATCH} crops an update"),
        Choice("schedule", schedule, "falls to 0 at the end of the training"),
        Choice("clipping", {"--clip-norm": "5.0"}, "a rare large gradient costs nothing"),
        Choice("batch", {"--batch-size": str(batch)}, together or "crops an update"),
        Choice("length", {"--max-update": str(size.updates)}, "where accuracy stops rising"),
        Choice(
            "checkpoints",
            {"--keep-last-epochs": "5"},
            "the best, the last, and what can be averaged",
        ),
        Choice(
            "validation",
            {"--best-checkpoint-metric": metric, "--maximize-best-checkpoint-metric": None},
            "what identification is judged by",
        ),
        Choice(
            "loading",
            {"--num-workers": str(size.workers), "--log-interval": str(size.log_interval)},
            "crops are read faster than they are learnt",
        ),
    ]


def balance_of(facts: Facts) -> Choice:
    """As many crops of each where speakers have very different amounts of speech."""
    if not facts.uneven:
        return Choice("balance", {"--balance": "none"}, "all have about the same amount of speech")
    least, most = (f"{frames / 100:.0f} s" for frames in (facts.least, facts.most))
    return Choice(
        "balance", {"--balance": "speaker"}, f"as many crops of each: they have {least} to {most}"
    )


def augmentation_of(facts: Facts) -> list[Choice]:
    """Crops narrowed as the narrow recordings are, where there are some and not only these."""
    if not MIXED <= facts.narrow <= 1 - MIXED:
        return []
    about = f"{100 * facts.narrow:.0f} % of the recordings hold nothing above 5 kHz"
    return [Choice("augmentation", {"--augment": "bandwidth;channel;specaugment"}, about)]


PRESETS = TaskPresets(
    {
        "arch": "conformer_speaker",
        "criterion": "am_softmax",
        "optimizer": "adam",
        "lr_scheduler": "cosine",
    },
    read,
    choose,
)

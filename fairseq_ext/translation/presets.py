"""What `--task translation_spm` wants where no flag says it: as data, by what is in DATA and by the machine.

The values are those of configs/translation, where measured in docs; the recipes are snapshots of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ext_common.presets import Choice, Machine, TaskPresets, cosine, shared_batch, short_warmup
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.prepare.binarise import sentence_lengths

# Pairs from which a GPU trains the base model.
MANY_PAIRS = 200_000
PASSES = 5
ROUND_TO = 500
# From so many passes on a model of minutes learns its pairs by heart without dropout; its updates a minute
# on one core say what --minutes gives.
MANY_PASSES = 10
UPDATES_A_MINUTE = 350
# Pieces of a line from which fewer lines are translated in validation, and more at once: 1,737 lines of 54
# pieces took three quarters of a training's time.
LONG_LINES = 20
LINES_TIMES_PIECES = 20_000
TOKENS_VALID = 2000
# Of lengths of batches, where the network is compiled: a third more padding, and some 20 shapes for 500.
PADDED_TO = 16


@dataclass(frozen=True)
class Facts:
    """pairs: of all parts of train; joint: one vocabulary for both languages; pieces: of a line in the mean,
    of the language that has more.
    """

    pairs: int
    languages: tuple[str, str]
    joint: bool
    pieces: float


@dataclass(frozen=True)
class Size:
    """A model and how it is trained; tokens: padded pieces of an update, at most `most` of them a process.

    muon: the rate of Muon, with a cosine; Adam with Noam's rate, whose factor is `factor`, where it is 0.
    more: flags of the model.
    """

    about: str
    arch: str
    layers: int
    width: int
    inner: int
    heads: int
    dropout: str
    factor: float
    warmup: int
    updates: int
    tokens: int
    norm_first: bool = True
    muon: float = 0.0
    most: int = 0
    saved: int = 0
    keep: int = 10
    workers: int = 0
    more: tuple[str, ...] = ()


MINUTES = Size(
    "a small model for minutes on a CPU, five passes",
    *("transformer_compact", 2, 192, 384, 4, "0", 0.45, 200, 2500, 600),
    muon=0.008,
    saved=150,
    more=("--no-zero-outputs",),
    keep=5,
)
TINY = Size(
    "a small model until BLEU stops rising",
    *("transformer_iwslt_de_en", 4, 128, 256, 4, "0.3", 1.0, 2000, 40000, 1024),
    saved=500,
)
BASE = Size(
    "the base model of Vaswani et al. 2017",
    *("transformer", 6, 512, 2048, 8, "0.1", 2.0, 4000, 100000, 16384),
    norm_first=False,
    most=8192,
    workers=2,
)


def read(data: str, asked: Mapping[str, Any]) -> Facts:
    """UserError where a folder of DATA was not made by translation.prepare."""
    corpora = [Corpus.open(folder) for folder in data.split(":")]
    parts = [(corpus, name) for corpus in corpora for name in corpus.splits if name[:5] == "train"]
    pairs = sum(corpus.splits[name] for corpus, name in parts)
    sides = [
        sum(int(sentence_lengths(corpus.binarised(name, lang)).sum()) for corpus, name in parts)
        for lang in corpora[0].languages
    ]
    joint = all(corpus.joint for corpus in corpora)
    return Facts(pairs, corpora[0].languages, joint, max(sides) / max(1, pairs))


def size_of(facts: Facts, machine: Machine) -> Size:
    if not machine.gpu:
        return MINUTES
    return BASE if facts.pairs >= MANY_PAIRS else TINY


def choose(facts: Facts, machine: Machine, asked: Mapping[str, Any]) -> Sequence[Choice]:
    size = size_of(facts, machine)
    least, of_a_pass = size.updates, facts.pairs * facts.pieces / size.tokens
    if size is MINUTES:
        least = max(least, ROUND_TO * int(PASSES * of_a_pass / ROUND_TO))
    updates = asked.get("max_update", least)
    flags = model(size, facts.joint)
    longest = max(updates, machine.minutes * UPDATES_A_MINUTE)
    if size is MINUTES and longest > MANY_PASSES * of_a_pass:
        flags["--dropout"] = "0.1"
    shapes = {"--required-seq-len-multiple": str(PADDED_TO)} if asked.get("compile") else {}
    tokens, freq, together = shared_batch(size.tokens, machine.processes, size.most)
    batch = {"--max-tokens": str(tokens)} | ({"--update-freq": str(freq)} if freq > 1 else {})
    return [
        Choice(
            "data",
            {},
            f"{facts.pairs:,} pairs of {facts.pieces:.0f} pieces, {' and '.join(facts.languages)}:"
            f" {size.about}",
        ),
        Choice("arch", flags, size.about),
        Choice(
            "criterion",
            {"--criterion": "label_smoothed_cross_entropy", "--label-smoothing": "0.1"},
            "as Vaswani et al. 2017",
        ),
        *learning(size, updates, asked),
        Choice("batch", batch, together or "padded pieces of a side an update"),
        Choice("shapes", shapes, "few, as the network is compiled for each"),
        Choice("length", {"--max-update": str(least)}, f"at most, for {facts.pairs:,} pairs"),
        Choice("checkpoints", checkpoints(size, least), "for `average`, behind the best one"),
        *validation(facts, machine),
        Choice("stop", {"--patience": "10"}, "validations without a better BLEU"),
        Choice("loading", {"--num-workers": str(size.workers), "--log-interval": "100"}, ""),
    ]


def learning(size: Size, updates: int, asked: Mapping[str, Any]) -> list[Choice]:
    """Optimizer, rate and schedule."""
    optimizer: dict[str, str | None] = {"--optimizer": "adam", "--adam-betas": "(0.9, 0.98)"}
    # who names an option of Noam's schedule wants it
    if size.muon and not {"noam_factor", "noam_cooldown"} & asked.keys():
        optimizer["--optimizer"] = "muon"
        schedule, falls = cosine(updates, size.warmup, asked), "rises for a moment, then falls to 0"
        peak, why = size.muon, "for the matrices; Adam has the rest"
    else:
        warmup = short_warmup(updates, size.warmup)
        peak, why = size.factor / math.sqrt(size.width * size.warmup), "as Vaswani et al. 2017"
        # the peak of the rate stays where the warm-up is shorter
        factor = size.factor * math.sqrt(warmup / size.warmup)
        schedule = {"--lr-scheduler": "noam", "--noam-factor": f"{factor:g}"}
        schedule["--warmup-updates"] = str(warmup)
        falls = f"rises to {peak:.1e}, then falls with the inverse square root"
    own = asked.get("lr_scheduler", schedule["--lr-scheduler"])
    rate = {} if own == "noam" else {"--lr": f"{peak:.2g}"}
    return [
        Choice("optimizer", optimizer, why),
        Choice("rate", rate, f"the peak, for {size.tokens} pieces an update"),
        Choice("schedule", schedule, falls),
    ]


def model(size: Size, joint: bool) -> dict[str, str | None]:
    """Flags of the Transformer; a joint vocabulary has one table of embeddings."""
    flags: dict[str, str | None] = {"--arch": size.arch}
    for side in ("encoder", "decoder"):
        flags |= {
            f"--{side}-layers": str(size.layers),
            f"--{side}-embed-dim": str(size.width),
            f"--{side}-ffn-embed-dim": str(size.inner),
            f"--{side}-attention-heads": str(size.heads),
        }
        if size.norm_first:
            flags[f"--{side}-normalize-before"] = None
    shared = "--share-all-embeddings" if joint else "--share-decoder-input-output-embed"
    return flags | {shared: None, "--dropout": size.dropout} | dict.fromkeys(size.more)


def validation(facts: Facts, machine: Machine) -> list[Choice]:
    """What of valid is translated, where that is slow."""
    if machine.gpu or facts.pieces < LONG_LINES:
        return []
    lines = str(10 * round(LINES_TIMES_PIECES / facts.pieces / 10))
    flags = {"--valid-sentences": lines, "--max-tokens-valid": str(TOKENS_VALID)}
    return [Choice("validation", flags, "translated in validation: the lines are long")]


def checkpoints(size: Size, updates: int) -> dict[str, str | None]:
    """A long training is saved as often as a short one."""
    if not size.saved:
        return {"--keep-last-epochs": str(size.keep)}
    every = size.saved * max(1, updates // size.updates)
    return {
        "--save-interval-updates": str(every),
        "--keep-interval-updates": str(size.keep),
        "--no-epoch-checkpoints": None,
    }


PRESETS = TaskPresets(
    {
        "arch": "transformer_compact",
        "criterion": "label_smoothed_cross_entropy",
        "optimizer": "muon",
        "lr_scheduler": "noam",
    },
    read,
    choose,
)

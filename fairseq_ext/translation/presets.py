"""What `--task translation_spm` wants where no flag says it: as data, by what is in DATA and by the machine.

The values are those of configs/translation, where measured in docs; the recipes are snapshots of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ext_common.presets import Choice, Machine, TaskPresets, shared_batch, short_warmup
from fairseq_ext.translation.corpus import Corpus

# Pairs from which a GPU trains the base model.
MANY_PAIRS = 200_000
# Of short sentences: about so many pairs are an update of the model for minutes.
PAIRS_AN_UPDATE = 56
PASSES = 6
ROUND_TO = 500
# Of lengths of batches, where the network is compiled: a third more padding, and some 20 shapes for 500.
PADDED_TO = 16


@dataclass(frozen=True)
class Facts:
    """pairs: of all parts of train; joint: one vocabulary for both languages."""

    pairs: int
    languages: tuple[str, str]
    joint: bool


@dataclass(frozen=True)
class Size:
    """A model and how it is trained; tokens: padded pieces of an update, at most `most` of them a process."""

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
    most: int = 0
    saved: int = 0
    keep: int = 10
    workers: int = 0


MINUTES = Size(
    "a small model for minutes on a CPU, six passes",
    *("transformer_iwslt_de_en", 4, 128, 256, 4, "0.1", 0.45, 400, 3000, 600),
    saved=200,
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
    pairs = sum(n for corpus in corpora for name, n in corpus.splits.items() if name[:5] == "train")
    return Facts(pairs, corpora[0].languages, all(corpus.joint for corpus in corpora))


def size_of(facts: Facts, machine: Machine) -> Size:
    if not machine.gpu:
        return MINUTES
    return BASE if facts.pairs >= MANY_PAIRS else TINY


def choose(facts: Facts, machine: Machine, asked: Mapping[str, Any]) -> Sequence[Choice]:
    size = size_of(facts, machine)
    least = size.updates
    if size is MINUTES:
        passes = PASSES * facts.pairs / PAIRS_AN_UPDATE
        least = max(least, ROUND_TO * math.ceil(passes / ROUND_TO))
    updates = asked.get("max_update", least)
    warmup = short_warmup(updates, size.warmup)
    # the peak of the rate stays where the warm-up is shorter
    factor = size.factor * math.sqrt(warmup / size.warmup)
    peak = size.factor / math.sqrt(size.width * size.warmup)
    noam = {
        "--lr-scheduler": "noam",
        "--noam-factor": f"{factor:g}",
        "--warmup-updates": str(warmup),
    }
    rate = {} if asked.get("lr_scheduler", "noam") == "noam" else {"--lr": f"{peak:.2g}"}
    shapes = {"--required-seq-len-multiple": str(PADDED_TO)} if asked.get("compile") else {}
    tokens, freq, together = shared_batch(size.tokens, machine.processes, size.most)
    batch = {"--max-tokens": str(tokens)} | ({"--update-freq": str(freq)} if freq > 1 else {})
    return [
        Choice("data", {}, f"{facts.pairs:,} pairs, {' and '.join(facts.languages)}: {size.about}"),
        Choice("arch", model(size, facts.joint), size.about),
        Choice(
            "criterion",
            {"--criterion": "label_smoothed_cross_entropy", "--label-smoothing": "0.1"},
            "as Vaswani et al. 2017",
        ),
        Choice("optimizer", {"--optimizer": "adam", "--adam-betas": "(0.9, 0.98)"}, "as there"),
        Choice("rate", rate, f"the peak that noam would have, for {size.tokens} pieces an update"),
        Choice("schedule", noam, f"rises to {peak:.1e}, then falls with the inverse square root"),
        Choice("batch", batch, together or "padded pieces of a side an update"),
        Choice("shapes", shapes, "few, as the network is compiled for each"),
        Choice("length", {"--max-update": str(least)}, f"at most, for {facts.pairs:,} pairs"),
        Choice("checkpoints", checkpoints(size, least), "for `average`, behind the best one"),
        Choice("stop", {"--patience": "10"}, "validations without a better BLEU"),
        Choice("loading", {"--num-workers": str(size.workers), "--log-interval": "100"}, ""),
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
    return flags | {shared: None, "--dropout": size.dropout}


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
        "arch": "transformer_iwslt_de_en",
        "criterion": "label_smoothed_cross_entropy",
        "optimizer": "adam",
        "lr_scheduler": "noam",
    },
    read,
    choose,
)

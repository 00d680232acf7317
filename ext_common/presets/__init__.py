"""Presets: what a task wants where the user gave no flag, so that the shortest command trains well.

    fairseq-train DATA --user-dir fairseq_ext --task speaker_id

A task says what it wants as data (`TaskPresets`): a function of what is in DATA, of the machine and of the
minutes there are. Its flags go before the user's, so that a given flag wins; a given --optimizer, --arch, …
also takes out the rest of the part it replaces. fairseq then reads one whole command line, which is printed
and can be repeated.

Presets fill in where none of --arch, --criterion and --optimizer is given, or with `--presets on`. A training
that continues takes its choices from the checkpoint. What was chosen stands in `cfg.task.chosen`.
"""

from ext_common.given import given
from ext_common.presets.choices import (
    Choice,
    Machine,
    Plan,
    PresetOptions,
    TaskPresets,
    cosine,
    plan,
    shared_batch,
    short_warmup,
)
from ext_common.presets.command import apply, complete

__all__ = [
    "Choice",
    "Machine",
    "Plan",
    "PresetOptions",
    "TaskPresets",
    "apply",
    "complete",
    "cosine",
    "given",
    "plan",
    "shared_batch",
    "short_warmup",
]

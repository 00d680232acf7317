"""The choices of a training that continues, from the configuration in its checkpoint."""

import argparse
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ext_common.given import NAMES, whole_parser
from ext_common.presets.save_dirs import options_of, updates_of

# Groups of the configuration whose options are a training's own, and the part of the presets that they are.
GROUPS = {
    "model": "arch",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr_scheduler": "schedule",
    "optimization": "optimization",
    "dataset": "dataset",
    "checkpoint": "files",
    "ema": "ema",
    "task": "task",
    "common": "common",
}
PARTS = {
    "lr": "rate",
    "batch_size": "batch",
    "max_tokens": "batch",
    "update_freq": "batch",
    "max_update": "length",
    "max_epoch": "length",
    "no_epoch_checkpoints": "checkpoints",
    "save_interval": "checkpoints",
    "save_interval_updates": "checkpoints",
    "keep_interval_updates": "checkpoints",
    "keep_last_epochs": "checkpoints",
}
# What belongs to the call and not to the training.
ONLY_COMMON = frozenset({"seed", "fp16", "bf16", "amp", "log_interval"})
LEFT_OUT = frozenset(
    "data presets minutes chosen save_dir restore_file continue_once finetune_from_model"
    " reset_dataloader reset_lr_scheduler reset_meters reset_optimizer optimizer_overrides".split()
)
SHARED = ("batch_size", "max_tokens", "batch_size_valid", "max_tokens_valid")


def flags_of(
    state: Mapping[str, Any], parser: argparse.ArgumentParser, words: Sequence[str], processes: int
) -> dict[str, dict[str, str | None]]:
    """Part → flags of the training that a checkpoint is of, for today's number of processes."""
    cfg = {name: options_of(group) for name, group in state["cfg"].items()}
    names = {option: name for group, option in NAMES.items() if (name := name_in(cfg, group))}
    whole = whole_parser(parser, words, names)
    flags: dict[str, dict[str, str | None]] = {
        GROUPS[group]: {f"--{option.replace('_', '-')}": names[option]}
        for group, option in NAMES.items()
        if group != "task" and option in names
    }
    before = cfg.get("distributed_training", {}).get("distributed_world_size", 1)
    actions = {action.dest: action for action in whole._actions if action.option_strings}
    said = set(NAMES.values())
    of_model = model_options(names.get("arch"))
    for group, part in GROUPS.items():
        for option, value in cfg.get(group, {}).items():
            if option not in actions or option in LEFT_OUT or option in said:
                continue
            if group == "common" and option not in ONLY_COMMON:
                continue
            if group == "model" and option not in of_model:
                continue
            if option in SHARED and value:
                value = max(1, round(value * before / processes))
            said.add(option)
            flag = flag_of(actions[option], value)
            flags.setdefault(PARTS.get(option, part), {}).update(flag)
    return flags


def name_in(cfg: Mapping[str, Mapping[str, Any]], group: str) -> str | None:
    """The name of the model, criterion, … of a configuration."""
    options = cfg.get(group, {})
    return options.get("_name") or options.get(NAMES[group])


def model_options(arch: str | None) -> set[str]:
    """Options of an architecture; one without dataclass keeps those of all others beside them."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY

    own = argparse.ArgumentParser(add_help=False)
    cls = ARCH_MODEL_REGISTRY.get(arch) or MODEL_REGISTRY.get(arch)
    if cls is not None:
        cls.add_args(own)
    return {action.dest for action in own._actions}


def flag_of(action: argparse.Action, value: Any) -> dict[str, str | None]:
    """An option's value as its flag; nothing where that is the default."""
    flag = f"--{action.dest.replace('_', '-')}"
    flag = flag if flag in action.option_strings else action.option_strings[0]
    if isinstance(value, bool):
        switch = getattr(action, "const", None)
        return {flag: None} if action.nargs == 0 and switch is value else {}
    if isinstance(value, list | tuple):
        default = action.default
        if isinstance(default, list | tuple) and list(default) == list(value):
            return {}
        # fairseq's lists are typed with commas, its tuples as Python writes them
        listed = isinstance(action.type, types.FunctionType)
        value = ",".join(map(str, value)) if listed else str(tuple(value))
    if value in (None, "", action.default) or str(value) == str(action.default):
        return {}
    return {flag: str(value)}


def is_finished(state: Mapping[str, Any]) -> bool:
    """Whether a training has all its updates behind it."""
    length = options_of(state["cfg"].get("optimization")).get("max_update") or 0
    return 0 < length <= updates_of(state)

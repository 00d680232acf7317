"""From the words of a command to those of a whole one: presets where fairseq reads its command line."""

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ext_common.checkpoints import refuse_other_wing
from ext_common.cli import UserError
from ext_common.given import NAMES, given_by, remember, whole_parser
from ext_common.presets.choices import Choice, Machine, Plan, plan
from ext_common.presets.resumed import flags_of, is_finished
from ext_common.presets.save_dirs import LAST, absolute, default_save_dir, peek, updates_of

logger = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
# A command that names one of these is taken to be whole.
WHOLE = frozenset({"arch", "criterion", "optimizer"})
# What is said of the choices before the training; all reasons stand in the checkpoint.
SAID = ("data", "criterion", "schedule", "batch", "length")
# A part of the presets, and the options of which any takes its place.
REPLACED_BY = {
    "arch": {"arch"},
    "criterion": {"criterion"},
    "optimizer": {"optimizer"},
    "rate": {"optimizer", "lr"},
    "schedule": {"lr_scheduler"},
    "batch": {"max_tokens", "batch_size"},
    "length": {"max_epoch", "max_update"},
    "checkpoints": {
        "save_interval",
        "save_interval_updates",
        "keep_interval_updates",
        "keep_last_epochs",
    },
}


def complete(parser: Any, words: Sequence[str]) -> tuple[list[str], Plan | None]:
    """The arguments of a training with those that its task wants before them; what was chosen.

    Also the folder of a training that names none. parser: fairseq's training parser. The same words, and
    None, where the task has no presets.
    """
    from fairseq.tasks import TASK_REGISTRY

    asks = [word for word in words if word not in ("-h", "--help")]
    task = parser.parse_known_args(asks)[0].task
    presets = getattr(TASK_REGISTRY.get(task), "presets", None)
    if presets is None:
        return list(words), None
    whole = whole_parser(parser, asks)
    if len(asks) < len(words):
        # fairseq's own help comes before the flags of task, model, …
        whole.print_help()
        sys.exit(0)
    asked = vars(given_by(whole, words))
    check(asked)
    words = [*words, *place(asked, task)]
    args, unknown = whole.parse_known_args(list(words))
    last = Path(args.save_dir) / LAST
    state = None if "restore_file" in asked else peek(last)
    if state is not None:
        refuse_other_wing(state, last, task, "give another --save-dir")
    machine = machine_of(args, asked)
    if not wanted(asked):
        return same_length(state, parser, words, asked, machine)
    if state is None:
        choices = presets.choose(presets.read(asked["data"], asked), machine, asked)
    else:
        # a mistyped flag may be the longer length: fairseq's parser is to say so
        if not unknown and not REPLACED_BY["length"] & asked.keys() and is_finished(state):
            end(args.save_dir, updates_of(state))
        choices = [
            Choice(part, flags, f"as in {Path(args.save_dir) / LAST}")
            for part, flags in flags_of(state, parser, words, machine.processes).items()
        ]
    return planned(choices, words, asked, machine, state)


def planned(
    choices: Sequence[Choice],
    words: Sequence[str],
    asked: Mapping[str, Any],
    machine: Machine,
    state: Mapping[str, Any] | None,
) -> tuple[list[str], Plan]:
    """Choices beside what was asked for, as arguments and as what is noted of them."""
    own = {option_of(flag): value for choice in choices for flag, value in choice.flags.items()}
    # the name that was chosen, given once more, takes the place of nothing
    taken = {k for k, v in asked.items() if not (k in NAMES.values() and v == own.get(k))}
    left = [without_given(choice, asked, taken) for choice in choices]
    # what is in DATA is told also where nothing follows from it
    kept = [choice for choice in left if choice.flags or choice.part == "data"]
    pairs = [pair for choice in kept for pair in choice.flags.items()]
    command = [*(word for pair in pairs for word in pair if word is not None), *words]
    limit = max((choice.minutes for choice in kept), default=0.0)
    chosen = Plan(
        command=[*command, "--presets", "off"],
        why={choice.part: ": ".join(filter(None, (shown(choice), choice.why))) for choice in kept},
        data=absolute(asked["data"]),
        minutes=machine.minutes or limit,
        at_most=bool(limit or REPLACED_BY["length"] & asked.keys()),
    )
    if state:
        source = next((choice.why for choice in kept), "")
        chosen.why = {"data": source}
    before = plan(state["cfg"]) if state else None
    if before and before.updates:
        # the length stands in the checkpoint, and is not chosen again
        chosen.minutes, chosen.updates = before.minutes, before.updates
    return command, chosen


def same_length(
    state: Mapping[str, Any] | None,
    parser: Any,
    words: Sequence[str],
    asked: Mapping[str, Any],
    machine: Machine,
) -> tuple[list[str], Plan | None]:
    """A whole command, with the length that --minutes has chosen where its training continues."""
    before = plan(state["cfg"]) if state and asked.get("minutes") else None
    if (
        not state
        or not before
        or not before.updates
        or REPLACED_BY["length"] & asked.keys() - {"max_update"}
    ):
        return list(words), None
    parts = flags_of(state, parser, words, machine.processes)
    flags = {**parts.get("schedule", {}), **parts["length"]}
    # behind what was typed, as the length that was chosen is not the one there
    chosen = [word for pair in flags.items() for word in pair if word is not None]
    return [*words, *chosen], before


def check(asked: Mapping[str, Any]) -> None:
    """UserError for values that mean nothing."""
    if asked.get("presets", "auto") not in MODES:
        raise UserError(f"--presets {asked['presets']} is none of {', '.join(MODES)}")
    if not 0 <= asked.get("minutes", 0) < float("inf"):
        raise UserError(
            f"--minutes {asked['minutes']:g}: give the minutes there are, 0 for no limit"
        )
    if not 0 <= asked.get("save_minutes", 0) < float("inf"):
        raise UserError(
            f"--save-minutes {asked['save_minutes']:g}: give minutes, 0 for none between epochs"
        )


def place(asked: Mapping[str, Any], task: str) -> list[str]:
    """--save-dir where it was not given."""
    if "save_dir" in asked:
        return []
    folder, continued = default_save_dir(asked["data"], task)
    if continued and is_first():
        logger.info(f"goes on with the training in {folder} (--save-dir names another place)")
    return ["--save-dir", str(folder)]


def end(save_dir: str, updates: int) -> NoReturn:
    """Nothing is left to train."""
    if is_first():
        logger.info(
            f"the training in {save_dir} has all its {updates:,} updates: --max-update sets more, --save-dir"
            " begins another"
        )
    sys.exit(0)


def wanted(asked: Mapping[str, Any]) -> bool:
    """Whether presets fill in beside what was given."""
    mode = asked.get("presets", "auto")
    return mode == "on" or mode == "auto" and not WHOLE & asked.keys()


def without_given(choice: Choice, asked: Mapping[str, Any], taken: Set[str]) -> Choice:
    """What is left of a choice beside what was given; taken: the options that take the place of a part."""
    replaced = bool(REPLACED_BY.get(choice.part, set()) & taken)
    # the only schedule that has no use for a rate, and says so
    replaced |= choice.part == "rate" and asked.get("lr_scheduler") == "noam"
    pairs = {} if replaced else choice.flags
    left = {flag: value for flag, value in pairs.items() if option_of(flag) not in asked}
    return dataclasses.replace(choice, flags=left)


def option_of(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def shown(choice: Choice) -> str:
    return shlex.join(word for pair in choice.flags.items() for word in pair if word is not None)


def machine_of(args: Any, asked: Mapping[str, Any]) -> Machine:
    """The machine that parsed arguments are for."""
    import torch

    from ext_common.compat.processes import launched

    gpu = torch.cuda.is_available() and not args.cpu
    launch = launched()
    alone = 1 if not gpu else args.distributed_world_size
    processes = launch.world_size if launch else asked.get("distributed_world_size", alone)
    return Machine(gpu, processes, asked.get("minutes", 0.0))


# --- where fairseq reads its command line -------------------------------------------------------


def apply() -> None:
    """Let fairseq-train fill in presets and end on time; calling it again changes nothing."""
    from fairseq import options

    from ext_common.compat.command import in_training_command
    from ext_common.compat.patching import replace
    from ext_common.presets import minutes

    replace(options, "parse_args_and_arch", _with_presets, ("input_args", "ARCH_CONFIG_REGISTRY"))
    minutes.apply()
    in_training_command(_agreeing)


def _agreeing(train: ModuleType) -> None:
    from ext_common.compat.patching import after

    def all_alike(_none: None, cfg: Any) -> None:
        agree(cfg)

    after(train, "add_defaults", all_alike, ("merge_with_parent",))


def _with_presets(original: Callable[..., Any]) -> Callable[..., Any]:
    def parse_args_and_arch(
        parser: Any, input_args: Sequence[str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_training(parser):
            return original(parser, input_args, *args, **kwargs)
        words = list(sys.argv[1:] if input_args is None else input_args)
        remember(words if input_args is not None else None)
        words, chosen = complete(parser, words)
        result = original(parser, words, *args, **kwargs)
        parsed = result[0] if isinstance(result, tuple) else result
        if chosen:
            parsed.chosen = chosen.to_text()
            tell(chosen)
        return result

    return parse_args_and_arch


def is_training(parser: Any) -> bool:
    """fairseq's training parser has no name; it alone has --arch and --max-update."""
    return bool({"--arch", "--max-update"} <= parser._option_string_actions.keys())


def tell(chosen: Plan) -> None:
    """Log what was chosen and why, on the first process."""
    if not is_first():
        return
    logger.info("what no flag says is preset (--presets off: nothing is)")
    for part in SAID:
        if part in chosen.why:
            logger.info(f"{part}: {chosen.why[part]}")
    logger.info(f"the same again: fairseq-train {shlex.join(chosen.command)}")


def agree(cfg: Any) -> None:
    """UserError where the processes of a training have chosen differently; each reads DATA by itself."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    own = cfg.task.get("chosen", ""), cfg.checkpoint.save_dir
    first = [own]
    dist.broadcast_object_list(first, src=0)
    alike = [first[0] == own]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, alike[0])
    if not all(every):
        rank = every.index(False)
        raise UserError(
            f"process {rank} has chosen other presets than process 0: give all machines the same DATA and"
            " --save-dir, or the whole command that process 0 has printed"
        )


def is_first() -> bool:
    """Whether this process speaks for all."""
    from ext_common.compat.processes import launched

    launch = launched()
    return not launch or launch.rank == 0

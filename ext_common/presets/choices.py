"""What a task says of its presets, and what is noted of those that were chosen."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Of a training, the warm-up is at most one such part.
WARMUP_SHARE = 6


@dataclass(frozen=True)
class Machine:
    """What a training runs on. processes: of all machines together; minutes: asked for, 0 is no limit."""

    gpu: bool = False
    processes: int = 1
    minutes: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Flags of one part (see `REPLACED_BY`) and the reason in a line; None is the value of a switch.

    minutes: of a length, that it is cut where it would take longer.
    """

    part: str
    flags: Mapping[str, str | None]
    why: str
    minutes: float = 0.0


@dataclass(frozen=True)
class TaskPresets:
    """What a task's class has as `presets`.

    names: part → what it is called where nobody names another, as {"arch": "conformer_speaker"}: their flags
    are known before DATA is read. read(data, asked): the facts, from DATA's manifest. choose(facts, machine,
    asked): pure. asked: option → value of what the user gave.
    """

    names: Mapping[str, str]
    read: Callable[[str, Mapping[str, Any]], Any]
    choose: Callable[[Any, Machine, Mapping[str, Any]], Sequence[Choice]]


@dataclass
class PresetOptions:
    """Options of every task that has presets; the base of its configuration."""

    presets: str = field(
        default="auto",
        metadata={
            "help": "fill in what no flag says: auto (where none of --arch, --criterion and --optimizer is"
            " given), on or off"
        },
    )
    minutes: float = field(
        default=0.0,
        metadata={
            "help": "train so long, from start to exit: the speed of the first updates decides on the length"
            " and its schedule (0: as long as --max-update says)"
        },
    )
    save_minutes: float = field(
        default=10.0,
        metadata={
            "help": "write checkpoint_last.pt at least so often, minutes (0: with the epochs)"
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={
            "help": "the same bits again on the same GPU, by slower kernels (a CPU gives them anyway)"
        },
    )
    compile: str = field(
        default="",
        metadata={
            "help": "fuse the network's kernels by this backend of torch.compile, as inductor: the first"
            " updates take minutes ('': not)"
        },
    )
    chosen: str = field(default="", metadata={"help": "what was chosen, and why (JSON)"})

    def _get_all_attributes(self) -> list[str]:
        """Of fairseq, for its parser: what was chosen is no flag."""
        return [name for name in super()._get_all_attributes() if name != "chosen"]  # type: ignore[misc]


@dataclass
class Plan:
    """What was chosen. command: the whole command line; data: its absolute path.

    minutes: the budget, 0 for none; at_most: the length is not made longer to fill it; updates: the length
    that was chosen by it, 0 until then.
    """

    command: list[str]
    why: dict[str, str]
    data: str
    minutes: float = 0.0
    at_most: bool = False
    updates: int = 0

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def plan(cfg: Any) -> Plan | None:
    """What was chosen for a training; cfg: its configuration, or that in its checkpoint."""
    task = cfg.get("task") or {}
    text = task.get("chosen") if hasattr(task, "get") else None
    return Plan(**json.loads(text)) if text else None


def shared_batch(total: int, processes: int, most: int = 0) -> tuple[int, int, str]:
    """(batch of a process, --update-freq, a word on them): all processes together have `total` an update.

    most: of a process at a time, as its memory allows; 0 is no limit.
    """
    freq = -(-total // (processes * most)) if most else 1
    each = max(1, round(total / (processes * freq)))
    together = each * processes * freq
    about = f"{together:,} together" + (f", for {total:,}" if together != total else "")
    return each, freq, about if processes * freq > 1 else ""


def short_warmup(updates: int, warmup: int) -> int:
    """The warm-up of a training of so many updates: `warmup`, or its share of a short one."""
    return min(warmup, max(1, updates // WARMUP_SHARE))


def cosine(updates: int, warmup: int, asked: Mapping[str, Any]) -> dict[str, str | None]:
    """Flags of a cosine that falls to 0 at update `updates`; a short training has a short warm-up."""
    warmup = short_warmup(updates, warmup)
    flags: dict[str, str | None] = {"--lr-scheduler": "cosine", "--warmup-updates": str(warmup)}
    if "max_epoch" in asked and "max_update" not in asked:
        # its period is the length in updates, which nobody says then
        flags["--lr-period-updates"] = str(updates - warmup)
    return flags

"""The average of several checkpoints of one training, as one checkpoint.

python -m fairseq_ext.average CKPT/checkpoint3.pt CKPT/checkpoint4.pt --output CKPT/average.pt
python -m fairseq_ext.average CKPT --last 5 --output CKPT/average.pt
python -m fairseq_ext.average CKPT --best 5 --output CKPT/average.pt
python -m fairseq_ext.average CKPT --last 5 --best-of --output CKPT/chosen.pt
"""

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from ext_common.checkpoints import read_state
from ext_common.cli import Parser, UsageError, UserError, run
from ext_common.manifest import atomic_write, check_writable

_PARTS = ("model", "criterion")
_BEST_NAME = "checkpoint_best.pt"
_DROPPED = ("last_optimizer_state",)
_DROPPED_EXTRA = ("ema", "ema_fp32_params")
# A run that forgot --maximize-best-checkpoint-metric says the wrong thing about these.
_HIGHER = ("accuracy", "top5_accuracy", "bleu", "chrf")
_LOWER = ("loss", "nll_loss", "ppl", "ter", "wer")
# fairseq writes three decimals, and behind them random digits so that equal values get two files.
_BEST = re.compile(r"checkpoint\.best_(.+)_(-?\d+\.\d{3})\d*\.pt")


def main(argv: list[str], program: str = "fairseq_ext.average") -> None:
    args = build_parser(program).parse_args(argv)
    if os.path.isdir(args.output):
        raise UsageError(f"--output {args.output} is a folder: give the file to write")
    check_writable(args.output)
    paths = choose(args.checkpoints, args.last, args.best)
    if Path(args.output).resolve() in [path.resolve() for path in paths]:
        raise UsageError(f"--output {args.output} would replace an input: give another file")
    print(f"average of {len(paths)} checkpoints:")
    for path in paths:
        print(f"  {path}")
    state = average((str(path), read(path)) for path in paths)
    write(state, args.output)
    print(f"written to {args.output} (without optimizer state)")
    if args.validate or args.best_of:
        compare(Path(args.output), state, paths[-1].parent / _BEST_NAME, args.best_of, args.data)


def write(state: dict[str, Any], output: str | Path) -> None:
    with atomic_write(output, "wb") as file:
        torch.save(state, file)


def compare(output: Path, state: dict, best: Path, replace: bool, data: Optional[str]) -> None:
    """Say which is better on the validation data, the average or `best`; `replace` it by the better one.

    Averaging helps where the rate stays high to the end and harms a model that still improves.
    """
    from fairseq_ext.measured import measured

    if not best.exists():
        raise UserError(
            f"{best} is not there to be compared with: leave --validate and --best-of out"
        )
    other = read(best)
    ours, theirs = measured(output, state, data), measured(best, other, data)
    print(f"on the validation data: the average has {ours}, {best} {theirs}")
    if not theirs.is_better_than(ours):
        print(f"use {output}")
    elif replace:
        write(without_optimizer(other), output)
        print(f"{output} is now {best} (without optimizer state)")
    else:
        print(f"use {best}: averaging did not help here")


def build_parser(program: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python -m {program}",
        description="Average the weights of checkpoints of one training.",
        epilog="Weights are averaged in float64 and written as float32; integer buffers and all "
        "that is no tensor (options, dictionaries, speakers) are those of the last checkpoint. "
        "Optimizer state is left out, so the result is for inference and for "
        "--finetune-from-model.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="checkpoint files, or one folder of them"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="file to write")
    parser.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="of a folder, the N newest of checkpointEPOCH.pt and checkpoint_EPOCH_UPDATE.pt "
        "(default: all of them)",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help=f"measure the average and {_BEST_NAME} beside its inputs on the validation data of their"
        " training, and say which to use",
    )
    parser.add_argument(
        "--best-of",
        action="store_true",
        help="the same, and the better of the two is what is written",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="where the data of the training has moved to (with these two)",
    )
    parser.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="of a folder, the N best of checkpoint.best_METRIC_VALUE.pt, which fairseq-train keeps "
        "with --keep-best-checkpoints",
    )
    return parser


def choose(
    given: Sequence[str], last: Optional[int] = None, best: Optional[int] = None
) -> list[Path]:
    """The files to average: of a folder the newest, oldest first, or the best, best first."""
    if last is not None and best is not None:
        raise UsageError("give --last or --best, not both")
    flag, number = ("--best", best) if best is not None else ("--last", last)
    if number is not None and number < 1:
        raise UsageError(f"{flag} must be at least 1, got {number}")
    paths = [Path(name) for name in given]
    if not any(path.is_dir() for path in paths):
        if number is not None:
            raise UsageError(f"{flag} goes with one folder, not with files")
        return paths
    if len(paths) > 1:
        raise UsageError("give checkpoint files, or one folder, not both")
    return _choose_best(paths[0], best) if best else _choose_last(paths[0], last)


def _choose_last(folder: Path, last: Optional[int]) -> list[Path]:
    found = sorted(
        (order, path) for path in folder.iterdir() if (order := _order(path.name)) is not None
    )
    chosen = [path for _, path in found[-last if last else 0 :]]
    if not chosen or (last and len(chosen) < last):
        fewer = f"give --last {len(chosen)}, or " if len(chosen) > 1 else ""
        number = last or 5
        raise UserError(
            f"{folder} holds {len(chosen)} checkpoints named checkpointEPOCH.pt or "
            f"checkpoint_EPOCH_UPDATE.pt, but {last or 'at least 1'} are asked for: {fewer}train with "
            f"--keep-last-epochs {number} instead of --no-epoch-checkpoints, or with "
            f"--save-interval-updates UPDATES --keep-interval-updates {number}"
        )
    return chosen


def _choose_best(folder: Path, best: int) -> list[Path]:
    found = [(match, path) for path in folder.iterdir() if (match := _BEST.fullmatch(path.name))]
    metrics = sorted({match[1] for match, _ in found})
    if len(metrics) > 1:
        raise UserError(
            f"{folder} holds best checkpoints by {' and by '.join(metrics)}: give the files to average"
        )
    if len(found) < best:
        raise UserError(
            f"{folder} holds {len(found)} checkpoints named checkpoint.best_METRIC_VALUE.pt, but "
            f"{best} are asked for: train with --keep-best-checkpoints {best} or more"
        )
    sign = -1 if _higher_is_better(metrics[0], found[0][1]) else 1
    found.sort(key=lambda one: (sign * float(one[0][2]), one[1].name))
    return [path for _, path in found[:best]]


def _higher_is_better(metric: str, path: Path) -> bool:
    if metric in _HIGHER + _LOWER:
        return metric in _HIGHER
    cfg = read(path).get("cfg")
    node = cfg.get("checkpoint") if isinstance(cfg, dict) else None
    said = node.get("maximize_best_checkpoint_metric") if isinstance(node, dict) else None
    if said is None:
        raise UserError(f"{path} does not say whether more {metric} is better: give the files")
    return said


def read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, as it was saved; UserError where it has none."""
    state = read_state(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is no fairseq checkpoint: it has no model")
    return state


def average(states: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The mean of checkpoints' weights, with all else from the last one.

    `states` are pairs of a path, for messages, and what :func:`read` returns for it; they are
    taken one at a time.
    Floating tensors are summed in float64 and returned as float32 (float64 stays); where all
    checkpoints agree the value is theirs exactly. Tensors that share their storage in each of the
    checkpoints share it in the result. Raises UserError where architectures, parameters or
    shapes differ.
    """
    sums: dict[str, _Sum] = {}
    first: Optional[dict[str, Any]] = None
    state: dict[str, Any] = {}
    for path, state in states:
        weights = _weights(state)
        if first is None:
            first = {"path": path, "kind": _kind(state), "keys": set(weights)}
            sums = {name: _Sum(value) for name, value in weights.items()}
        _check_same(first, path, _kind(state), weights, sums)
        addresses = {name: _address(value) for name, value in weights.items()}
        for name, value in weights.items():
            sums[name].add(value, addresses[name])
    if first is None:
        raise UserError("no checkpoint to average")
    means: dict[tuple, torch.Tensor] = {}
    result = without_optimizer(state)
    for part in _PARTS:
        if isinstance(state.get(part), dict):
            result[part] = _like(state[part], f"{part}.", sums, means)
    return result


def without_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint is for inference and fine-tuning."""
    result = {name: value for name, value in state.items() if name not in _DROPPED}
    if isinstance(state.get("extra_state"), dict):
        result["extra_state"] = {
            name: value
            for name, value in state["extra_state"].items()
            if name not in _DROPPED_EXTRA
        }
    return result


# --- pure helpers -------------------------------------------------------------------------------


class _Sum:
    """A float64 sum of one floating tensor over checkpoints, and where all of them agree."""

    def __init__(self, value: torch.Tensor) -> None:
        self.shape, self.dtype = value.shape, value.dtype
        self.count = 0
        self.addresses: list[tuple] = []
        self._first = value
        self._sum = torch.zeros(value.shape, dtype=torch.float64)
        self._same = torch.ones(value.shape, dtype=torch.bool)

    def add(self, value: torch.Tensor, address: tuple) -> None:
        self.count += 1
        self.addresses.append(address)
        self._sum += value.double()
        self._same &= value == self._first

    def mean(self) -> torch.Tensor:
        # Equal values stay as they are: in float64 (x + x + x) / 3 need not be x.
        mean = torch.where(self._same, self._first.double(), self._sum / self.count)
        return mean if self.dtype == torch.float64 else mean.float()


def _order(name: str) -> Optional[tuple[int, float]]:
    match = re.fullmatch(r"checkpoint(\d+)\.pt|checkpoint_(\d+)_(\d+)\.pt", name)
    if match is None:
        return None
    if match[1]:
        return int(match[1]), float("inf")
    return int(match[2]), float(match[3])


def _weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The floating tensors of a checkpoint as `part.name` → tensor."""
    return {
        f"{part}.{name}": value
        for part in _PARTS
        for name, value in (state.get(part) or {}).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _kind(state: dict[str, Any]) -> tuple:
    cfg = state.get("cfg")
    if not isinstance(cfg, dict):
        return (getattr(state.get("args"), "arch", None),)
    names = []
    for part in ("task", "model"):
        node = cfg.get(part)
        node = vars(node) if isinstance(node, argparse.Namespace) else node or {}
        names.append(node.get("_name") or node.get("arch") or node.get("task"))
    return tuple(names)


def _check_same(first: dict, path: str, kind: tuple, weights: dict, sums: dict) -> None:
    if kind != first["kind"]:
        raise UserError(
            f"{path} is of {_words(kind)}, {first['path']} of {_words(first['kind'])}: "
            "only checkpoints of one architecture can be averaged"
        )
    different = sorted(first["keys"] ^ set(weights))
    if different:
        holder = first["path"] if different[0] in first["keys"] else path
        raise UserError(
            f"only {holder} has {different[0]} ({len(different)} such parameters): "
            f"{path} and {first['path']} are of different architectures"
        )
    for name, value in weights.items():
        if value.shape != sums[name].shape:
            raise UserError(
                f"{name} is {tuple(value.shape)} in {path} but {tuple(sums[name].shape)} in "
                f"{first['path']}: they are of different sizes"
            )


def _words(kind: tuple) -> str:
    return " / ".join(str(name) for name in kind)


def _address(value: torch.Tensor) -> tuple:
    storage = value.untyped_storage().data_ptr()
    return storage, value.storage_offset(), value.stride(), value.shape, value.dtype


def _like(part: dict, prefix: str, sums: dict[str, _Sum], means: dict[tuple, torch.Tensor]) -> dict:
    result = OrderedDict() if isinstance(part, OrderedDict) else {}
    for name, value in part.items():
        total = sums.get(prefix + name)
        if total is None:
            result[name] = value
            continue
        tie = tuple(total.addresses)
        if tie not in means:
            means[tie] = total.mean()
        result[name] = means[tie]
    if isinstance(part, OrderedDict):
        # Module versions, which load_state_dict reads.
        result.__dict__.update(part.__dict__)
    return result


if __name__ == "__main__":
    run(main)

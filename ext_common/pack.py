"""Pack a trained model into one file to hand on, or look into one.

    python -m ext_common.pack CKPT/checkpoint_best.pt voices.zip --data DATA --licence "CC BY 4.0"
    python -m fairseq_ext.speaker.identify a.wav --path voices.zip
    python -m ext_common.pack --unpack voices.zip voices

The file goes wherever a command takes a checkpoint.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, List, Optional

from ext_common import packed
from ext_common.checkpoints import name_of, plugin_of, read_state
from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.folders import making, refuse_file
from ext_common.manifest import MANIFEST_NAME, check_writable, known_sha256, versions

# A wing's entry is a function (`Wing`), its name the task of fairseq that trained the model.
GROUP = "ext_common.pack"
EPILOG = """
It holds the weights (safetensors), the configuration, what the wing of the model adds (speaker: labels,
feature specification, and an ONNX file, with which the pack works where torch is not installed; translation:
the SentencePiece models), what --include names (a gallery, a calibration), a model card with what is known of
data, figures and licence, and versions. The state of the optimizer is left out: a training cannot go on from
it. Every part has its SHA-256, by which damage is refused; nobody is kept from changing a part and its hash.

Needs pip install 'fairseq-ext[pack]'. Exit codes: 0 done, 1 failed, 2 bad usage.
"""


@dataclass
class PackOptions:
    """What the model card says beyond what the checkpoint knows, and what goes along."""

    data: Optional[str] = field(
        default=None,
        metadata={"help": "prepared folder it was trained on, which the card describes"},
    )
    licence: Optional[str] = field(
        default=None,
        metadata={"help": "licence of the data and of what follows from it, for the card"},
    )
    figures: List[str] = field(
        default_factory=list,
        metadata={
            "help": "JSON files that measurements wrote (predictions.metrics.json), for the card"
        },
    )
    not_for: Optional[str] = field(
        default=None,
        metadata={"help": "what it must not be used for, beside what the card says anyway"},
    )
    include: List[str] = field(
        default_factory=list, metadata={"help": "further files to pack (a gallery, a calibration)"}
    )
    user_dir: Optional[str] = field(
        default=None,
        metadata={"help": "plugin with the model's parts; none: the one it was trained with"},
    )


@dataclass
class Part:
    """What a wing says of its model. It may have written files, which are packed too.

    about: lines of the card. not_for: what it must not be used for. left_out: file → why it is not there.
    """

    about: List[str]
    not_for: List[str]
    left_out: Mapping[str, str] = field(default_factory=dict)


# (checkpoint, its state, folder to write into, options) → what it says
Wing = Callable[[str, Mapping[str, Any], Path, PackOptions], Part]


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m ext_common.pack", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="CKPT OUT.zip, or with --unpack FILE.zip [FOLDER]"
    )
    parser.add_argument("--unpack", action="store_true", help="check a pack and write its parts")
    add_dataclass(parser, PackOptions)
    args = parser.parse_args(argv)
    if args.unpack:
        if len(args.paths) > 2:
            raise UsageError("--unpack takes a pack and a folder to write")
        unpack(args.paths[0], args.paths[-1] if len(args.paths) == 2 else None)
        return
    if len(args.paths) != 2:
        raise UsageError("give a checkpoint and the file to write: CKPT OUT.zip")
    pack(args.paths[0], args.paths[1], from_args(PackOptions, args))


def pack(checkpoint: str, output: str, options: PackOptions) -> None:
    """Write the pack; UserError where it cannot be."""
    if Path(output).suffix != ".zip":
        raise UsageError(f"{output}: name the pack *.zip")
    check_writable(output)
    packed.import_safetensors()
    if packed.is_pack(checkpoint):
        raise UserError(f"{checkpoint} is a pack: give the checkpoint it was made of")
    state = read_state(checkpoint)
    task = name_of(state, "task") if isinstance(state, Mapping) else None
    if task is None or not all(isinstance(state.get(key), Mapping) for key in ("model", "cfg")):
        raise UserError(f"{checkpoint} is not a checkpoint of fairseq-train: give one")
    files: dict[str, bytes | Path] = {}
    for path in map(Path, options.include):
        if not path.is_file():
            raise UserError(f"--include {path} is no file: give what is to be packed")
        if path.name in files:
            raise UsageError(
                f"--include names two files {path.name}: give one of them another name"
            )
        files[path.name] = path
    with tempfile.TemporaryDirectory() as folder:
        said = wing_of(task)(checkpoint, state, Path(folder), options)
        own = {
            str(p.relative_to(folder)): p for p in sorted(Path(folder).rglob("*")) if p.is_file()
        }
        for name in set(files) & {*own, packed.ABOUT, packed.STATE, packed.WEIGHTS, packed.CARD}:
            raise UsageError(f"--include {name}: a pack has its own part of that name, rename it")
        files |= own
        about = {
            "task": task,
            "checkpoint": {"name": Path(checkpoint).name, "sha256": known_sha256(checkpoint)},
            "left_out": dict(said.left_out) | {n: "for training only" for n in packed.LEFT_OUT},
            "versions": versions(),
        }
        card = model_card(Path(output).stem, state, said, about, options)
        packed.write(output, about, state, {packed.CARD: card.encode(), **files})
    for name, why in said.left_out.items():
        print(f"left out: {name}: {why}")
    size = os.path.getsize(output) / 1e6
    print(f"{output}: {size:.1f} MB, {', '.join(packed.Pack(output).files)}")


def unpack(path: str, folder: str | None) -> None:
    """Check every part of a pack and write it into a new folder."""
    if not packed.is_pack(path):
        what = "is not a pack" if os.path.isfile(path) else "does not exist"
        raise UserError(f"{path} {what}: give a file that ext_common.pack wrote")
    found = packed.Pack(path)
    dest = Path(folder or Path(path).stem)
    refuse_file(dest)
    if dest.exists() and any(dest.iterdir()):
        raise UserError(f"{dest} exists and is not empty: give a new folder to write")
    with making(dest) as partial:
        assert partial is not None
        for name in found.files:
            place = (partial / name).resolve()
            if not place.is_relative_to(partial.resolve()):
                raise UserError(
                    f"{path} has a part {name} that would lie outside of {dest}: refused"
                )
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(found.read(name))
        (partial / packed.ABOUT).write_text(json.dumps(found.about, indent=2, ensure_ascii=False))
    print(f"{dest}: {', '.join(found.files)}, all as packed")


def wing_of(task: str) -> Wing:
    """What the wing that has a task registered; for a task without, what adds nothing."""
    for entry in metadata.entry_points(group=GROUP, name=task):
        wing: Wing = entry.load()
        return wing
    return lambda *_: Part([], [], {"parts of the wing": f"nothing is registered for task {task}"})


def model_card(
    name: str, state: Mapping[str, Any], said: Part, about: Mapping[str, Any], options: PackOptions
) -> str:
    """The card, Markdown."""
    weights = sum(value.numel() for value in state["model"].values())
    plugin = plugin_of(state, options.user_dir)
    arch, unknown = name_of(state, "model"), "not stated by who packed it"
    history: Sequence[Mapping[str, Any]] = state.get("optimizer_history") or [{}]
    updates = history[-1].get("num_updates")
    sections = {
        "What it is": [
            f"task {about['task']}, architecture {arch}, {weights:,} weights"
            + (f", {updates:,} updates" if updates else ""),
            *said.about,
            *([f"needs the plugin {Path(plugin).name}, given as --user-dir"] if plugin else []),
        ],
        "Data": [*described(options.data), f"licence: {options.licence or unknown}"],
        "Figures": [
            *best_of(state),
            *(line for path in options.figures for line in figures_of(path)),
        ]
        or [unknown],
        "What it must not be used for": [
            *said.not_for,
            *([options.not_for] if options.not_for else []),
            "anything that the data's licence does not allow",
        ],
        "Made with": [f"{name} {version}" for name, version in about["versions"].items()],
        "Where from": [
            f"{about['checkpoint']['name']}, SHA-256 {about['checkpoint']['sha256']}",
            *(f"left out: {name} ({why})" for name, why in about["left_out"].items()),
            f"the SHA-256 of each part stands in {packed.ABOUT}: it finds damage, not forgery",
        ],
    }
    text = [f"# {name}"]
    for title, lines in sections.items():
        text.append(f"## {title}\n\n" + "\n".join(f"* {line}" for line in lines))
    return "\n\n".join(text) + "\n"


def described(folder: str | None) -> list[str]:
    """Lines on a prepared folder, from its manifest."""
    if folder is None:
        return ["data: not stated by who packed it"]
    path = Path(folder) / MANIFEST_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--data {folder} has no readable {MANIFEST_NAME}: give a prepared folder"
        ) from None
    return [f"data: {Path(folder).resolve().name}", *numbers(record.get("counts"), "counted: ")]


def best_of(state: Mapping[str, Any]) -> list[str]:
    """The figure that chose the checkpoint, on valid."""
    options = state["cfg"].get("checkpoint")
    best = (state.get("extra_state") or {}).get("best")
    if not isinstance(options, Mapping) or not isinstance(best, int | float):
        return []
    return [
        f"{options.get('best_checkpoint_metric', 'loss')} on valid while it trained: {best:.4g}"
    ]


def figures_of(path: str) -> list[str]:
    """The numbers in a JSON file that a measurement wrote."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--figures {path} is no readable JSON: give what a measurement wrote"
        ) from None
    return numbers(record, f"{Path(path).name}: ")


def numbers(record: Any, before: str, depth: int = 2) -> list[str]:
    """`name value` for each number of a record and of the records in it, not deeper than `depth`."""
    found = []
    for key, value in record.items() if isinstance(record, Mapping) else []:
        if isinstance(value, Mapping) and depth > 1 and len(value) <= 8:
            found += numbers(value, f"{before}{key} ", depth - 1)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{before}{key} {value:.6g}")
    return found


if __name__ == "__main__":
    run(main)

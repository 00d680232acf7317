"""What the user gave: found by argparse itself, in one place, and handed on as data.

A value alone does not say whether somebody asked for it or whether it is a default. `given()` does, for
fairseq-train as for fairseq-hydra-train, where everything in the recipe counts as given.
"""

import argparse
import contextlib
import functools
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ext_common.cli import Parser

# A group of a recipe and the flag of fairseq-train that names what is in it.
NAMES = {
    "task": "task",
    "model": "arch",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr_scheduler": "lr_scheduler",
}
_typed: list[str] | None = None


def given() -> frozenset[str]:
    """Names of the options (`best_checkpoint_metric`) that the user of this training gave a value.

    A process that was spawned for the training has the arguments of its parent and says the same.
    """
    words = sys.argv[1:] if _typed is None else _typed
    return _given_in(tuple(words), _typed is None and "hydra" in Path(sys.argv[0]).name)


def remember(words: Sequence[str] | None) -> None:
    """The arguments a training was called with, where they are not those of the process."""
    global _typed
    _typed = None if words is None else list(words)


@functools.lru_cache(maxsize=8)
def _given_in(words: tuple[str, ...], hydra: bool) -> frozenset[str]:
    if hydra:
        return given_in_recipe(words)
    from fairseq import options

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parser = whole_parser(options.get_training_parser(), words)
            return frozenset(vars(given_by(parser, words)))
    except SystemExit:  # arguments of another program, which builds a training by itself
        return frozenset()


def given_by(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Only what is given in `words`: parsed while no action has a default.

    What the parser does not know is left to whoever parses in earnest.
    """
    with _without_defaults(parser):
        return parser.parse_known_args(list(words))[0]


def whole_parser(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    parts: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """A training parser with the flags of the task, model, criterion, … as well.

    parts: what is taken where `words` name none, as {"arch": "conformer_speaker"}, else what the task's
    presets name. What is named wrongly is left out: fairseq says so later.
    """
    from fairseq.dataclass.utils import gen_parser_from_dataclass
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_REGISTRY

    named, _ = parser.parse_known_args(list(words))
    presets = getattr(TASK_REGISTRY.get(named.task), "presets", None)
    if parts is None:
        parts = presets.names if presets else {}
    names = {**parts, **vars(given_by(parser, words))}
    whole = Parser(add_help=False, parents=[parser])
    model = whole.add_argument_group(argument_default=argparse.SUPPRESS)
    arch = names.get("arch")
    for registry, name, place in (
        (ARCH_MODEL_REGISTRY if arch in ARCH_MODEL_REGISTRY else MODEL_REGISTRY, arch, model),
        (TASK_REGISTRY, named.task, whole),
    ):
        if name in registry:
            registry[name].add_args(place)
    for kind, entry in REGISTRIES.items():
        cls = entry["registry"].get(names.get(kind, getattr(named, kind, None)))
        if hasattr(cls, "add_args"):
            cls.add_args(whole)
        elif getattr(cls, "__dataclass", None) is not None:
            gen_parser_from_dataclass(whole, getattr(cls, "__dataclass")())
    return whole


def given_in_recipe(words: Sequence[str]) -> frozenset[str]:
    """The same for fairseq-hydra-train: keys of the recipe and of what was typed after it."""
    from hydra._internal.utils import get_args_parser
    from omegaconf import OmegaConf

    typed, _ = get_args_parser().parse_known_args(list(words))
    found = {word.lstrip("+~").partition("=")[0] for word in typed.overrides}
    folder = typed.config_dir or typed.config_path
    if folder and typed.config_name:
        path = Path(folder) / typed.config_name
        path = path if path.suffix == ".yaml" else path.with_name(f"{path.name}.yaml")
        recipe: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
        for group, values in recipe.items():
            if isinstance(values, dict) and group != "hydra":
                found |= {f"{group}.{key}" for key in values}
            elif group == "defaults":
                found |= {name for entry in values if isinstance(entry, dict) for name in entry}
    return frozenset(_option(key) for key in found)


def _option(key: str) -> str:
    group, _, name = key.partition(".")
    return NAMES.get(group, group) if name in ("", "_name") else name.rpartition(".")[2]


@contextlib.contextmanager
def _without_defaults(parser: argparse.ArgumentParser) -> Iterator[None]:
    # Actions belong to the parser and to those that it was made from alike.
    actions: list[tuple[Any, Any]] = [(action, action.default) for action in parser._actions]
    defaults, parser._defaults = parser._defaults, {}
    for action, _ in actions:
        action.default = argparse.SUPPRESS
    try:
        yield
    finally:
        parser._defaults = defaults
        for action, default in actions:
            action.default = default

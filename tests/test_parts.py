"""Whatever is registered by name: its options stand in one place."""

import dataclasses
import importlib
import inspect
import pkgutil

import fairseq  # noqa: F401
import pytest
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY

import diffusion_ext
import fairseq_ext
from ext_common.cli import field_default
from ext_common.registry import Registry
from fairseq_ext.speaker.margins import am_softmax


def registries():
    """All there are, by kind and where they are; commands are left out, as importing one may run it."""
    found = {}
    for package in (fairseq_ext, diffusion_ext):
        for room in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not room.name.endswith("__main__"):
                module = vars(importlib.import_module(room.name))
                found |= {
                    id(value): value for value in module.values() if isinstance(value, Registry)
                }
    return list(found.values())


def parts():
    return [(registry, name) for registry in registries() for name in registry.names()]


PARTS = parts()


@pytest.mark.parametrize(
    "registry, name", PARTS, ids=[f"{registry.kind}-{name}" for registry, name in PARTS]
)
def test_a_part_takes_its_options_and_has_no_other_defaults(registry, name):
    options = registry._options[name]
    taken = inspect.signature(registry.get(name)).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for option in dataclasses.fields(options) if options else ():
        assert option.name in taken or any_name, f"{option.name} is not taken"
        default = taken[option.name].default if option.name in taken else inspect.Parameter.empty
        if default is not inspect.Parameter.empty:
            assert default == field_default(option), f"{option.name} has two defaults"


def test_all_kinds_are_looked_at():
    kinds = {registry.kind for registry, _ in PARTS}
    assert kinds >= {"margin", "pooling", "encoder", "augmentation", "mode", "sampler"}
    assert kinds >= {"filter", "beta schedule", "objective", "loss weighting", "spacing", "layout"}


def test_the_margin_of_am_softmax_is_that_of_its_paper():
    """As a function and as `--criterion`: 0.35 (Wang et al. 2018)."""
    criterion = CRITERION_DATACLASS_REGISTRY["am_softmax"]()
    assert criterion.m == inspect.signature(am_softmax).parameters["m"].default == 0.35
    assert CRITERION_DATACLASS_REGISTRY["aam_softmax"]().m == 0.2

"""What was imported or called by a name of before the rooms got new ones still is, and is the same thing."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ext_common.aliases import MOVED

# What documentation, examples and plugins of before name: by old module, old names.
PUBLIC = {
    "fairseq_ext.schedules": ["main"],
    "fairseq_ext.average": ["average"],
    "fairseq_ext.translation.average": ["average", "main"],
    "fairseq_ext.noam": ["get_rate"],
    "fairseq_ext.speaker": ["SpeakerModel"],
    "fairseq_ext.speaker.margins": ["am_softmax", "MARGINS"],
    "fairseq_ext.speaker.pooling": ["SelfAttentionPooling", "POOLINGS"],
    "fairseq_ext.speaker.augment": ["AUGMENTATIONS"],
    "fairseq_ext.speaker.layouts": ["LAYOUTS"],
    "fairseq_ext.speaker.prepare": ["prepare", "PrepareOptions", "main"],
    "fairseq_ext.translation": ["Translator"],
    "fairseq_ext.translation.decoding": ["DecodeOptions"],
    "fairseq_ext.translation.filters": ["FILTERS", "FilterChain"],
    "fairseq_ext.translation.metrics": ["tokenizer_for"],
    "fairseq_ext.translation.prepare": ["prepare", "PrepareOptions", "main"],
    "fairseq_ext.translation.score": ["main"],
    "fairseq_ext.translation.spm": ["Codec", "train_model"],
    "fairseq_ext.translation.text": ["normalise", "CONVENTIONS", "read_lines"],
    "fairseq_ext.backtranslation": ["back_translate"],
    "fairseq_ext.backtranslation.assemble": ["assemble", "AssembleOptions", "main"],
    "fairseq_ext.backtranslation.backends": ["BACKENDS", "Line", "ModelOptions", "open_model"],
    "fairseq_ext.backtranslation.generate": ["generate", "GenerateOptions", "main"],
    "fairseq_ext.backtranslation.modes": ["MODES"],
    "fairseq_ext.backtranslation.synthetic": ["Synthetic"],
    "fairseq_ext.backtranslation.synthetic_filters": ["FILTERS"],
    "diffusion_ext.augment": ["AUGMENTATIONS"],
    "diffusion_ext.evaluate": ["main"],
    "diffusion_ext.export": ["export", "ExportOptions", "load_exported"],
    "diffusion_ext.extractors": ["EXTRACTORS"],
    "diffusion_ext.image_datasets": ["IMAGE_DATASETS"],
    "diffusion_ext.image_store": ["Images", "open_images"],
    "diffusion_ext.objectives": ["OBJECTIVES"],
    "diffusion_ext.prepare": ["prepare", "PrepareOptions", "main"],
    "diffusion_ext.samplers": ["SAMPLERS"],
    "diffusion_ext.schedules": ["SCHEDULES", "sigmoid_beta_schedule"],
    "diffusion_ext.weightings": ["WEIGHTINGS"],
}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def known():
    from ext_common.checkpoints import untouched_logging

    with untouched_logging():
        import fairseq  # noqa: F401
    import diffusion_ext  # noqa: F401
    import fairseq_ext  # noqa: F401


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_same_module(old):
    new = importlib.import_module(MOVED[old])
    spec, name = new.__spec__, new.__name__
    package, _, room = old.rpartition(".")
    assert importlib.import_module(old) is new is sys.modules[old]
    assert getattr(importlib.import_module(package), room) is new
    assert (new.__spec__, new.__name__) == (spec, name) and spec.name == name
    assert not (ROOT / (old.replace(".", "/") + ".py")).exists(), "shadowed by a file"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there(module):
    found = importlib.import_module(module)
    values = [getattr(found, name) for name in PUBLIC[module]]
    assert None not in values
    homes = {getattr(value, "__module__", None) for value in values}
    for value, home in zip(values, homes, strict=False):
        if callable(value) and home in sys.modules:
            assert pickle.loads(pickle.dumps(value)) is value


def test_registered_by_an_old_name_is_known_to_all():
    from fairseq_ext.backtranslation.backends import BACKENDS as old
    from fairseq_ext.backtranslation.models.backends import BACKENDS as new

    assert old is new


def python(*words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_command_runs():
    assert "usage:" in python("-m", "fairseq_ext.schedules", "--help")


def test_an_unknown_name_is_unknown_as_ever():
    with pytest.raises(ModuleNotFoundError, match="fairseq_ext.translation.nothing"):
        importlib.import_module("fairseq_ext.translation.nothing")


def test_importing_a_wing_imports_none_of_them():
    ours = ("ext_common.", "fairseq_ext.", "diffusion_ext.")
    code = f"import sys, fairseq_ext, diffusion_ext; print([m for m in sys.modules if m.startswith({ours})])"
    assert python("-c", code).strip() == "['ext_common.threads', 'ext_common.aliases']"

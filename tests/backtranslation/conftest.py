"""The toy languages of the translation tests, and a tiny model that translates them the other way."""

import runpy
from pathlib import Path

import pytest

_translation = runpy.run_path(str(Path(__file__).parents[1] / "translation" / "conftest.py"))
_confident = runpy.run_path(str(Path(__file__).parents[1] / "translation" / "confident.py"))
_names = ("WORDS", "toy_pairs", "toy_tsv", "toy_data")
WORDS, toy_pairs, toy_tsv, toy_data = (_translation[name] for name in _names)


@pytest.fixture(scope="session")
def reverse_checkpoint(toy_data, tmp_path_factory) -> Path:
    """A tiny Transformer, Chinese to English, that is sure of what it says."""
    folder = tmp_path_factory.mktemp("toy_reverse")
    flags = ["-s", "zh", "-t", "en", "--max-update", 60, "--no-epoch-checkpoints"]
    _translation["fairseq"]("train", *_translation["train_flags"](toy_data, folder, *flags))
    swapped = [(target, source) for source, target in toy_pairs(700)]
    return _confident["confident"](folder / "checkpoint_best.pt", swapped)


@pytest.fixture(scope="session")
def toy_mono() -> list[str]:
    """Chinese lines of the toy language that the bitext has not."""
    known = {target for _, target in toy_pairs(700)}
    return [target for _, target in toy_pairs(900, seed=2) if target not in known]

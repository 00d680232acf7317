"""What a checkpoint of `--task translation_spm` holds, read without running anything that is in it."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ext_common import checkpoints
from ext_common.cli import UserError
from ext_common.manifest import Identity, identity
from fairseq_ext.translation.text.normalise import detokenise, normalise, written
from fairseq_ext.translation.text.sentences import Lines, split_sentences
from fairseq_ext.translation.text.spm import EOS, Codec

_STATE = {"source_lang", "target_lang", "normalise", "extra_symbols", "spm"}


@dataclass(frozen=True)
class Vocabulary:
    """From a line of text to a model's ids, and back.

    convention: the normalisation of the model's training data (`text.CONVENTIONS`). lines: what its source
    lines were; None where the checkpoint does not say, as those of before did not.
    """

    source: Codec
    target: Codec
    source_lang: str
    target_lang: str
    convention: str
    lines: Lines | None = None

    def clean(self, line: str) -> str:
        """The line as the model's training data would have it; "" where nothing can be seen."""
        return normalise(line, self.source_lang, self.convention).strip()

    def encode(self, text: str) -> list[int]:
        """Ids of cleaned text, `</s>` at the end."""
        return [*self.source.encode(text), EOS]

    def encode_target(self, text: str) -> list[int]:
        """Ids of a text of the target language, `</s>` at the end."""
        return [*self.target.encode(text), EOS]

    def text(self, ids: Sequence[int]) -> str:
        """Detokenised target text of ids, on one line and without a tab."""
        return written(self.target.decode(ids), self.target_lang)

    def sentences(self, text: str, ids: Sequence[int]) -> list[str]:
        """The parts that cleaned text of these ids is to be translated in, by the lines of the training."""
        if self.lines is None or not self.lines.splits(text, len(ids)):
            return [text]
        return split_sentences(text, self.source_lang)

    def join(self, texts: Sequence[str]) -> str:
        """The text of sentences; no space between them where the target language has none."""
        return detokenise(" ".join(filter(None, texts)), self.target_lang)


def split_paths(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The checkpoints of an ensemble, given as a list or as one string with colons."""
    if isinstance(paths, str | os.PathLike):
        paths = os.fspath(paths)
        # a single file may have a colon in its name
        paths = [paths] if os.path.exists(paths) else paths.split(":")
    found = [os.fspath(path) for path in paths]
    if not found or not all(found):
        raise UserError("no checkpoint given: give the path of one, or several as a.pt:b.pt")
    return found


def read_state(path: str | os.PathLike[str], again: bool = False) -> dict[str, Any]:
    """What `torch.save` wrote, as plain dicts and tensors on the CPU; nothing in it is run.

    again: the file will be wanted once more, and is kept for the next call. UserError where it is missing,
    damaged, or of anything but a translation_spm model.
    """
    now = identity(path) if os.path.isfile(path) else None
    state = _kept.pop(now, None)
    if state is None:
        state = _read(path)
    if again:
        _kept.clear()
        _kept[now] = state
    return state


_kept: dict[Identity | None, dict[str, Any]] = {}


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    state: dict[str, Any] = checkpoints.read_state(path)
    why = why_no_translation_model(state)
    if why:
        raise UserError(f"{path} {why}: give a checkpoint trained with --task translation_spm")
    # two thirds of a file are moments of the optimizer
    state.pop("last_optimizer_state", None)
    return state


def with_ema(state: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """A state whose weights are the averaged ones that --store-ema kept; UserError where there are none."""
    extra = state.get("extra_state") or {}
    if "ema" not in extra:
        raise UserError(
            f"{path} holds no averaged weights (it was trained without --store-ema): leave --ema out"
        )
    averaged = {**extra["ema"], **extra.get("ema_fp32_params", {})}
    return {
        **state,
        "model": {key: averaged.get(key, value) for key, value in state["model"].items()},
    }


def why_no_translation_model(state: Any) -> str | None:
    """The second half of a sentence about a checkpoint's content; None for a translation model."""

    def saved(task_state: Mapping[str, Any]) -> bool:
        found = task_state.get("translation")
        return isinstance(found, Mapping) and set(found) >= _STATE

    why = checkpoints.why_unfit(state, saved, "translation_spm")
    if why:
        own = isinstance(state, Mapping) and checkpoints.name_of(state, "task") == "translation"
        kept = "is of fairseq's own --task translation, which keeps no vocabulary in its files"
        return kept if own else why
    found = state["task_state"]["translation"]
    missing = {found["source_lang"], found["target_lang"]} - set(found["spm"])
    if missing:
        return f"has no SentencePiece model for {' and '.join(sorted(missing))}"
    return None


def vocabulary_of(state: Mapping[str, Any], path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary in a checkpoint's state."""
    saved = state["task_state"]["translation"]
    source, target = saved["source_lang"], saved["target_lang"]
    codecs = codecs_of(saved, os.fspath(path))
    lines = lines_of(saved)
    return Vocabulary(codecs[source], codecs[target], source, target, saved["normalise"], lines)


def lines_of(saved: Mapping[str, Any]) -> Lines | None:
    """What a description of a vocabulary says of the lines of the training."""
    lines = saved.get("lines")
    return Lines(int(lines["longest"]), float(lines["several"])) if lines else None


def codecs_of(state: Mapping[str, Any], name: str = "the checkpoint") -> dict[str, Codec]:
    """Language → Codec of what `vocabulary.to_state` saved."""
    return {
        lang: Codec(
            model.numpy().tobytes(), state["extra_symbols"], f"the model of {lang} in {name}"
        )
        for lang, model in state["spm"].items()
    }


def check_alike(vocabularies: Mapping[str, Vocabulary]) -> None:
    """UserError where the models of an ensemble would not understand each other."""
    (first, ours), *others = vocabularies.items()
    for path, theirs in others:
        if (ours.source_lang, ours.target_lang) != (theirs.source_lang, theirs.target_lang):
            raise UserError(
                f"{first} translates {ours.source_lang} to {ours.target_lang}, {path}"
                f" {theirs.source_lang} to {theirs.target_lang}: an ensemble needs one direction"
            )
        if (ours.source.sha256, ours.target.sha256) != (theirs.source.sha256, theirs.target.sha256):
            raise UserError(
                f"{first} and {path} have different SentencePiece models: an ensemble needs models"
                " trained on the same prepared data"
            )
        if ours.convention != theirs.convention:
            raise UserError(
                f"{first} was trained on text normalised as {ours.convention!r}, {path} as"
                f" {theirs.convention!r}: an ensemble needs one convention"
            )


def build_model(
    state: Mapping[str, Any], path: str | os.PathLike[str], user_dir: str | None = None
) -> Any:
    """The fairseq model of a checkpoint's state with its weights, in evaluation mode."""
    # fairseq's encoders give one mask as bool, one as float
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    parts = ["fairseq_ext.translation.task", "fairseq_ext.translation.model"]
    network = checkpoints.build_network(state, Path(path), parts, user_dir)
    return network.eval().requires_grad_(False)

"""The models that write the synthetic side, behind one interface: a fairseq checkpoint or several, a
Hugging Face folder, a CTranslate2 folder.

    model = open_model("checkpoint_best.pt", ModelOptions())
    encoded = model.encode(lines)
    found = model.translate(encoded, numbers=range(1, len(lines) + 1), mode=make_mode("topk"))

Someone's own is a class with the static methods `describe(path, options)` and `open(path, options)`
that their `--user-dir` registers in BACKENDS.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ext_common.cli import UserError
from ext_common.manifest import known_sha256
from ext_common.random import line_seed
from ext_common.registry import Registry
from fairseq_ext.backtranslation.models.options import ModelOptions
from fairseq_ext.backtranslation.modes import Mode
from fairseq_ext.translation.corpus import Corpus
from fairseq_ext.translation.decode.checkpoint import read_state, split_paths
from fairseq_ext.translation.decode.options import Candidate, Source
from fairseq_ext.translation.decode.translator import Translator, mean_score
from fairseq_ext.translation.text.normalise import BROKEN

BACKENDS = Registry("backend")
# The ids of the parts of a line, one mostly.
Parts = tuple[tuple[int, ...], ...]


class Line(NamedTuple):
    """The synthetic side of a line.

    score: mean log-probability of its pieces; reason: why there is none, with text "" and score None.
    """

    text: str
    score: float | None
    reason: str | None = None


class ReverseModel:
    """Lines of real text to synthetic ones, each with draws of its own.

    translator: a vocabulary and a backend. description: what :func:`describe_model` says of the model.
    """

    def __init__(self, translator: Translator, description: dict[str, Any], options: ModelOptions):
        self.translator, self.description, self.options = translator, description, options
        self.name = translator.backend.name
        self.source_lang = translator.vocabulary.source_lang
        self.target_lang = translator.vocabulary.target_lang
        self.sha256 = description["sha256"]

    def encode(self, lines: Sequence[str]) -> list[Parts]:
        """Ids of the parts of each line, none where there is nothing to translate; may run beside
        `translate`. There is more than one part where a paragraph is split into sentences."""
        return list(map(self._parts, lines))

    def _parts(self, line: str) -> Parts:
        vocabulary = self.translator.vocabulary
        text = vocabulary.clean(line)
        if not text:
            return ()
        ids = vocabulary.encode(text)
        split = getattr(vocabulary, "sentences", None) if self.options.split else None
        sentences = split(text, ids) if split else [text]
        if len(sentences) == 1:
            return (tuple(ids),)
        return tuple(tuple(vocabulary.encode(one)) for one in sentences)

    def translate(
        self,
        encoded: Sequence[Parts],
        numbers: Sequence[int],
        mode: Mode,
        seed: int = 1,
        round: int = 1,
        nbest: int = 1,
        done: Callable[[int], object] = lambda n: None,
    ) -> list[list[Line]]:
        """`nbest` synthetic sides of each line.

        encoded: of :meth:`encode`; numbers: what identifies each line, whose draws come from (seed,
        number, round) only. done: called with the number of lines that were decoded since.
        """
        options = mode.search(nbest, **self.options.lengths())
        longest = self.translator.backend.max_source
        sources = []
        for parts, number in zip(encoded, numbers, strict=True):
            if not parts or max(map(len, parts)) > longest:
                sources.append([])
            elif options.sampled:
                seeds = [line_seed(seed, number, round, rank) for rank in range(nbest)]
                drawn = [(ids, one, place) for one in seeds for place, ids in enumerate(parts)]
                # the first part has the seed of the line, as a line of one part has
                sources.append([Source(i, line_seed(s, p, 0) if p else s) for i, s, p in drawn])
            else:
                sources.append([Source(ids) for ids in parts])
        decoded = self.translator.decode_window(sources, options, done)
        found = []
        for parts, number, candidates in zip(encoded, numbers, decoded, strict=True):
            if not candidates:
                found.append([Line("", None, self._why_not(parts))] * nbest)
                continue
            lines = []
            for rank in range(nbest):
                if options.sampled:
                    # a sample is a source of its own, the hypotheses of a search are of one source
                    own = [c[0] for c in candidates[rank * len(parts) : (rank + 1) * len(parts)]]
                else:
                    own = [c[min(rank, len(c) - 1)] for c in candidates]
                lines.append(self._line(own, mode, line_seed(seed, number, round, rank)))
            found.append(lines)
        return found

    def _why_not(self, parts: Parts) -> str:
        if not parts:
            return "the line is empty"
        longest = self.translator.backend.max_source
        return f"the line has {max(map(len, parts))} pieces, the model holds {longest}"

    def _line(self, parts: Sequence[Candidate], mode: Mode, seed: int) -> Line:
        for one in parts:
            if one.cut:
                return Line("", None, f"the output did not end within {len(one.ids)} pieces")
        vocabulary = self.translator.vocabulary
        texts = [vocabulary.text(one.ids) for one in parts]
        text = texts[0] if len(texts) == 1 else vocabulary.join(texts)
        if BROKEN in text:
            return Line("", None, "the output has bytes that are no character")
        text = mode.finish(text, seed, self.target_lang) if text else text
        return Line(text, mean_score(parts)) if text else Line("", None, "the output is empty")


def describe_model(path: str, options: ModelOptions) -> dict[str, Any]:
    """{"sha256", "backend", "compute_type", "source_lang", "target_lang"} of a model, not loaded."""
    return backend_of(path, options).describe(path, options)


def open_model(path: str, options: ModelOptions) -> ReverseModel:
    """The model, ready to decode. UserError, in one sentence, where that fails."""
    return backend_of(path, options).open(path, options)


def backend_of(path: str, options: ModelOptions) -> Any:
    """The backend that was asked for, or the one for what `path` is; UserError where an option is not its."""
    backend = BACKENDS.get(kind_of(path) if options.backend == "auto" else options.backend)
    if options.shortlist and backend is not CTranslate2:
        raise UserError(
            "--shortlist is for --backend ctranslate2: give it, or leave --shortlist out"
        )
    return backend


def kind_of(path: str) -> str:
    """fairseq, huggingface or ctranslate2, by the files of a model."""
    if not os.path.isdir(path):
        looks_like_file = path.endswith(".pt") or os.path.exists(path) or ".pt:" in path
        hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        return "huggingface" if hub_name and not looks_like_file else "fairseq"
    folder = Path(path)
    if (folder / "model.bin").exists():
        return "ctranslate2"
    if (folder / "config.json").exists():
        return "huggingface"
    checkpoints = sorted(folder.glob("checkpoint*.pt"))
    hint = f": give a file, such as {checkpoints[0]}" if checkpoints else ""
    raise UserError(
        f"{path} is no folder of a model (it has neither config.json nor model.bin){hint}"
        + ("" if hint else ": give a checkpoint of fairseq-train, or a folder of a model")
    )


@BACKENDS.register("fairseq")
class Fairseq:
    """A checkpoint of --task translation_spm, or an ensemble as a.pt:b.pt."""

    @staticmethod
    def describe(path: str, options: ModelOptions) -> dict[str, Any]:
        # whoever asks what a model is mostly opens it next
        saved = read_state(split_paths(path)[0], again=True)["task_state"]["translation"]
        return Fairseq.described(path, options, saved["source_lang"], saved["target_lang"])

    @staticmethod
    def described(path: str, options: ModelOptions, source: str, target: str) -> dict[str, Any]:
        return {
            "sha256": sha256_of(split_paths(path)),
            "backend": "fairseq",
            "compute_type": options.compute_type or "float32",
            "source_lang": source,
            "target_lang": target,
        }

    @staticmethod
    def open(path: str, options: ModelOptions) -> ReverseModel:
        translator = Translator.from_checkpoint(
            split_paths(path),
            "fairseq",
            options.device,
            options.compute_type,
            options.user_dir,
            options.threads,
        )
        known = translator.vocabulary
        description = Fairseq.described(path, options, known.source_lang, known.target_lang)
        return ReverseModel(translator, description, options)


@BACKENDS.register("huggingface")
class HuggingFace:
    """A sequence-to-sequence model of transformers, Marian first: a folder, or a name on the hub."""

    @staticmethod
    def describe(path: str, options: ModelOptions) -> dict[str, Any]:
        from fairseq_ext.backtranslation.models import huggingface_folder

        found = huggingface_folder.describe(path, *_saying(options))
        return {**found, "compute_type": options.compute_type or "float32"}

    @staticmethod
    def open(path: str, options: ModelOptions) -> ReverseModel:
        from fairseq_ext.backtranslation.models import huggingface

        pair = huggingface.open_model(
            path,
            options.device,
            options.compute_type,
            *_saying(options),
            threads=options.threads,
        )
        return ReverseModel(Translator(*pair), HuggingFace.describe(path, options), options)


@BACKENDS.register("ctranslate2")
class CTranslate2:
    """A CTranslate2 folder, or one of the others' models, converted once and kept beside it.

    Its draws are of the batch, not of the line: with the modes that draw, other --max-tokens or
    --chunk-lines give other lines. A run that is killed and goes on ends with the same bytes all the same.
    """

    @staticmethod
    def describe(path: str, options: ModelOptions) -> dict[str, Any]:
        from fairseq_ext.translation.decode.ctranslate import usable_device
        from fairseq_ext.translation.decode.ctranslate_backend import import_ctranslate2

        device, _ = usable_device(options.device, import_ctranslate2())
        kind = _quantised(options, device)
        if _is_checkpoint(path):
            found = _converted(path, options, kind) or Fairseq.describe(path, options)
        else:
            from fairseq_ext.backtranslation.models import huggingface_ctranslate

            found = huggingface_ctranslate.describe(path, *_saying(options), options.tokenizer)
        found |= {"backend": "ctranslate2", "compute_type": kind}
        if options.shortlist:
            found["shortlist"] = Corpus.open(options.shortlist).split_sha256
        return {**found, "max_tokens": options.max_tokens or (1024 if device == "cpu" else 4096)}

    @staticmethod
    def open(path: str, options: ModelOptions) -> ReverseModel:
        from fairseq_ext.translation.decode import ctranslate

        device, _ = ctranslate.usable_device(options.device, ctranslate.import_ctranslate2())
        kind = _quantised(options, device)
        if _is_checkpoint(path):
            pair = ctranslate.open_model(
                split_paths(path),
                options.device,
                kind,
                options.user_dir,
                options.threads,
                shortlist=options.shortlist,
            )
        else:
            from fairseq_ext.backtranslation.models import huggingface_ctranslate

            pair = huggingface_ctranslate.open_model(
                path,
                options.device,
                kind,
                *_saying(options),
                tokenizer=options.tokenizer,
                threads=options.threads,
                shortlist=options.shortlist,
            )
        return ReverseModel(Translator(*pair), CTranslate2.describe(path, options), options)


def greedy(model: Any, lines: Sequence[str]) -> list[str]:
    """What greedy search makes of lines, "" where nothing can be used."""
    from fairseq_ext.backtranslation.modes import make_mode

    found = model.translate(model.encode(lines), [0] * len(lines), make_mode("beam", {"beam": 1}))
    return [best.text for best, *_ in found]


def _saying(options: ModelOptions) -> tuple[str | None, str | None, str | None]:
    return options.model_source, options.model_target, options.prefix


def _quantised(options: ModelOptions, device: str) -> str:
    return options.compute_type or ("int8" if device == "cpu" else "float16")


def _converted(path: str, options: ModelOptions, kind: str) -> dict[str, Any] | None:
    """What `Fairseq.describe` would say of a checkpoint that CTranslate2 has already, without torch."""
    from fairseq_ext.translation.decode.ctranslate import already_converted, read_description

    paths = [Path(one) for one in split_paths(path)]
    folder = already_converted(paths[0], kind) if len(paths) == 1 and paths[0].is_file() else None
    if folder is None:
        return None
    known = read_description(folder)["vocabulary"]
    return Fairseq.described(path, options, known["source_lang"], known["target_lang"])


def _is_checkpoint(path: str) -> bool:
    return not os.path.isdir(path) and kind_of(path) == "fairseq"


def sha256_of(paths: Sequence[str]) -> str:
    """SHA-256 of a file; of several, that of their hashes."""
    digests = [known_sha256(path) for path in paths]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()

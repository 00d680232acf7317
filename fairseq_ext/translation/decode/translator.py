"""A trained translation model outside of training: lines of text in, as many lines out.

    translate = Translator.from_checkpoint("CKPT/checkpoint_best.pt")
    translate(["How are you?", "It is raining."])

Needs the checkpoint and nothing else: no data folder, no environment variable, any working folder. What comes
out for a line does not depend on what is translated with it. torch and fairseq are imported when first used.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from ext_common.cli import UserError
from fairseq_ext.translation.decode.checkpoint import (
    Vocabulary,
    build_model,
    check_alike,
    read_state,
    split_paths,
    vocabulary_of,
    with_ema,
)
from fairseq_ext.translation.decode.options import (
    Backend,
    Candidate,
    DecodeOptions,
    SampleOptions,
    Source,
    make_batches,
)
from fairseq_ext.translation.text.normalise import BROKEN, repaired
from fairseq_ext.translation.text.overlong import split_line

BACKENDS = ("fairseq", "ctranslate2")
# Lines that are held at a time to be sorted by length.
WINDOW = 10_000


class Hypothesis(NamedTuple):
    """A translation and its score: mean log-probability of its pieces where lenpen is 1."""

    text: str
    score: float


@dataclass(frozen=True)
class Translation:
    """What became of one line; hypotheses are best first, and one for an empty line.

    parts: in how many the line was translated. cut: an output that was used reached its limit.
    broken: one that was used had bytes that are no character, which are left out.
    """

    hypotheses: tuple[Hypothesis, ...]
    parts: int = 1
    cut: bool = False
    broken: bool = False

    @property
    def text(self) -> str:
        return self.hypotheses[0].text

    @property
    def score(self) -> float:
        return self.hypotheses[0].score


Done = Callable[[int], object]
_NOTHING = Translation((Hypothesis("", 0.0),), parts=0)


def _nobody(lines: int) -> None:
    pass


class Translator:
    """A vocabulary and a backend that decodes. Made by :meth:`from_checkpoint`."""

    def __init__(self, backend: Backend, vocabulary: Vocabulary, window: int = WINDOW):
        self.backend, self.vocabulary, self.window = backend, vocabulary, window

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        backend: str = "fairseq",
        device: str = "cpu",
        compute_type: str | None = None,
        user_dir: str | None = None,
        threads: int | None = None,
        ema: bool = False,
    ) -> "Translator":
        """The model in a checkpoint of fairseq-train, or the ensemble of several.

        path: "a.pt", "a.pt:b.pt" or a list. backend: "fairseq" or "ctranslate2" (converted once and
        kept beside the checkpoint). compute_type: float32, float16, bfloat16; int8 too with ctranslate2.
        user_dir: folder of the plugin with the model, in place of the one it was trained with. ema: the
        averaged weights of `--store-ema`, in place of the last ones.
        UserError, in one sentence, where it fails.
        """
        paths = split_paths(path)
        if backend == "ctranslate2":
            from fairseq_ext.translation.decode.ctranslate import open_model

            return cls(*open_model(paths, device, compute_type, user_dir, threads, ema))
        if backend != "fairseq":
            raise UserError(f"unknown backend {backend!r}: there are {', '.join(BACKENDS)}")
        from ext_common.checkpoints import usable_device

        models, vocabularies = [], {}
        for one in paths:
            state = with_ema(read_state(one), one) if ema else read_state(one)
            vocabularies[one] = vocabulary_of(state, one)
            check_alike(vocabularies)
            models.append(build_model(state, one, user_dir))
        from fairseq_ext.translation.decode.decoder import FairseqBackend

        decoder = FairseqBackend(models, usable_device(device), compute_type, threads)
        return cls(decoder, vocabularies[paths[0]])

    def __call__(self, lines: Iterable[str], **options: Any) -> list[str]:
        """The best translation of each line, in order. options: fields of `DecodeOptions`."""
        options.setdefault("nbest", 1)
        return [found.text for found in self.translate(lines, DecodeOptions(**options))]

    def translate(
        self,
        lines: Iterable[str],
        options: DecodeOptions | None = None,
        done: Done = _nobody,
    ) -> Iterator[Translation]:
        """A `Translation` for each line, in order; lines are read in windows.

        done: called with the number of lines that were translated since.
        """
        if isinstance(lines, str):
            raise TypeError("lines must be a list of lines, not one str: give [line]")
        options = options or DecodeOptions()
        lines = iter(lines)
        while window := list(itertools.islice(lines, self.window)):
            yield from self.translate_window(window, options, done)

    def translate_window(
        self, lines: Sequence[str], options: DecodeOptions | None = None, done: Done = _nobody
    ) -> list[Translation]:
        """:meth:`translate` for lines that may be held in memory at once."""
        options = options or DecodeOptions()
        sources = [[Source(ids) for ids in self.parts(line, options)] for line in lines]
        return [self.join(parts) for parts in self.decode_window(sources, options, done)]

    def decode_window(
        self, sources: Sequence[Sequence[Source]], options: DecodeOptions, done: Done = _nobody
    ) -> list[list[list[Candidate]]]:
        """For each line, and each of its sources, the candidates, best first (one where drawn)."""
        # one source is decoded once, however often it comes; most corpora repeat short lines
        wanted: dict[Source, list[int]] = {}
        for number, parts in enumerate(sources):
            for source in parts:
                wanted.setdefault(source, []).append(number)
        waiting = [len(parts) for parts in sources]
        done(waiting.count(0))
        found: dict[Source, list[Candidate]] = {}
        max_tokens = options.max_tokens or self.backend.max_tokens
        batches = list(make_batches(list(wanted), options, self.backend.max_target, max_tokens))
        decoded = self._decode_all(batches, options)
        for (_, batch), candidates in zip(batches, decoded, strict=True):
            found.update(zip(batch, candidates, strict=True))
            finished = 0
            for source in batch:
                for number in wanted[source]:
                    waiting[number] -= 1
                    finished += not waiting[number]
            done(finished)
        return [[found[source] for source in parts] for parts in sources]

    def parts(self, line: str, options: DecodeOptions) -> list[tuple[int, ...]]:
        """Ids of the parts of a line: one mostly, none where there is nothing to translate."""
        text = self.vocabulary.clean(line)
        if not text:
            return []
        ids = self.vocabulary.encode(text)
        sentences = self.vocabulary.sentences(text, ids) if options.split else [text]
        if len(sentences) == 1:
            return self._held(text, ids, options)
        encode = self.vocabulary.encode
        return [part for one in sentences for part in self._held(one, encode(one), options)]

    def _held(self, text: str, ids: list[int], options: DecodeOptions) -> list[tuple[int, ...]]:
        """The ids of a text in parts that the model can hold."""
        limit = min(self.backend.max_source, options.max_source or self.backend.max_source)
        if len(ids) <= limit:
            return [tuple(ids)]
        parts = split_line(text, lambda part: len(self.vocabulary.encode(part)), limit)
        # only a single character can still be too long, where a model holds next to nothing
        return [tuple(self.vocabulary.encode(part)[-self.backend.max_source :]) for part in parts]

    def _decode_all(
        self, batches: Sequence[tuple[int, list[Source]]], options: DecodeOptions
    ) -> Iterator[list[list[Candidate]]]:
        """Decode batches, in order, as many at a time as the backend has workers."""
        workers = min(self.backend.workers, len(batches))
        if workers < 2:
            for limit, batch in batches:
                yield self._decode(batch, options, limit)
            return
        pool = ThreadPoolExecutor(workers)
        try:
            yield from pool.map(lambda one: self._decode(one[1], options, one[0]), batches)
        finally:
            # after an error or Ctrl-C nobody wants the rest
            pool.shutdown(cancel_futures=True)

    def _decode(
        self, batch: Sequence[Source], options: DecodeOptions, limit: int
    ) -> list[list[Candidate]]:
        """Decode a batch, in halves where the device has not the memory for the whole."""
        ids = [source.ids for source in batch]
        try:
            if isinstance(options, SampleOptions):
                seeds = [cast(int, source.seed) for source in batch]
                return [[one] for one in self.backend.sample(ids, seeds, options, limit)]
            return self.backend.decode(ids, options, limit)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise UserError(
                    f"the memory of the device is too small for a line of {len(ids[0])} pieces with a"
                    f" beam of {options.beam}: give a smaller --beam or --max-source, or --device cpu"
                ) from error
        # outside of the handler, which would keep the tensors of the failed attempt alive
        self._free()
        middle = len(batch) // 2
        return [
            found
            for half in (batch[:middle], batch[middle:])
            for found in self._decode(half, options, limit)
        ]

    def _free(self) -> None:
        import sys

        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    def join(self, parts: list[list[Candidate]]) -> Translation:
        """The translation of a line from the candidates of its parts."""
        if not parts:
            return _NOTHING
        hypotheses, broken = [], False
        for rank in range(min(map(len, parts))):
            chosen = [candidates[rank] for candidates in parts]
            score = mean_score(chosen)
            texts = [self.vocabulary.text(c.ids) for c in chosen]
            broken |= any(BROKEN in text for text in texts)
            text = self.vocabulary.join(list(map(repaired, texts)))
            hypotheses.append(Hypothesis(text, score))
        return Translation(tuple(hypotheses), len(parts), any(c[0].cut for c in parts), broken)


def mean_score(parts: Sequence[Candidate]) -> float:
    """The score of a line of several parts, each of which counts as much as it is long."""
    if len(parts) == 1:
        return parts[0].score
    weights = [len(part.ids) + 1 for part in parts]
    return sum(part.score * w for part, w in zip(parts, weights, strict=True)) / sum(weights)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError of torch or CTranslate2 says that a device's memory is full."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()

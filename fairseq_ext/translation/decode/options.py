"""How to decode: options with fairseq's meanings, what a backend is, and its batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Optional, Protocol

from ext_common.random import STREAM

# Where the longest output depends on the length of the source, it does so in steps of so many pieces.
_STEP = 8


@dataclass
class DecodeOptions:
    """How to search for a translation; every meaning is that of fairseq-generate."""

    sampled: ClassVar[bool] = False

    beam: int = field(
        default=5, metadata={"help": "hypotheses kept while searching (1: greedy, the fastest)"}
    )
    lenpen: float = field(
        default=1.0,
        metadata={
            "help": "scores are divided by length to this power: above 1 favours longer output"
        },
    )
    nbest: int = field(
        default=1, metadata={"help": "translations of each line, at most --beam (above 1: a table)"}
    )
    max_len_a: float = field(
        default=2.0,
        metadata={"help": "output ends at the latest after A · pieces of the source + B pieces: A"},
    )
    max_len_b: int = field(default=50, metadata={"help": "B of the same, in pieces"})
    min_len: int = field(default=1, metadata={"help": "pieces that an output has at least"})
    no_repeat_ngram: int = field(
        default=0,
        metadata={"help": "never repeat so many pieces within one output (0: may repeat)"},
    )
    unkpen: float = field(
        default=math.inf,
        metadata={
            "help": "taken off the score of <unk>, which is never right here (inf: never used)"
        },
    )
    max_tokens: Optional[int] = field(
        default=None,
        metadata={
            "help": "pieces of padded source in a batch: less memory where smaller; none: what is fastest"
            " (1024 on a CPU, 4096 with CUDA)"
        },
    )
    split: bool = field(
        default=True,
        metadata={
            "help": "translate the sentences of a line one by one, where the training had one in a line or "
            "the line is longer than nearly all of its lines"
        },
    )
    max_source: Optional[int] = field(
        default=None,
        metadata={"help": "split lines above so many pieces; none: above what the model can hold"},
    )

    def __post_init__(self) -> None:
        for name in ("beam", "nbest", "min_len"):
            _at_least(1, name, getattr(self, name))
        if self.max_tokens is not None:
            _at_least(1, "max_tokens", self.max_tokens)
        for name in ("no_repeat_ngram", "max_len_a", "max_len_b", "unkpen"):
            _at_least(0, name, getattr(self, name))
        if self.max_source is not None:
            _at_least(2, "max_source", self.max_source)
        if self.nbest > self.beam:
            raise ValueError(
                f"--nbest {self.nbest} needs a --beam at least as large, which is {self.beam}"
            )
        if not (math.isfinite(self.lenpen) and math.isfinite(self.max_len_a)):
            raise ValueError("--lenpen and --max-len-a must be finite numbers")

    def limit(self, length: int, positions: int) -> int:
        """The largest number of ids of an output, for a source of `length` ids."""
        length = math.ceil(length / _STEP) * _STEP
        longest = int(min(self.max_len_a * length + self.max_len_b, positions - 1))
        return max(longest, min(self.min_len, positions - 1))


@dataclass
class SampleOptions(DecodeOptions):
    """How to draw a translation piece by piece; of the search, only lengths and batches count."""

    sampled: ClassVar[bool] = True

    topk: int = field(default=0, metadata={"help": "only the k most probable pieces (0: all)"})
    topp: float = field(
        default=1.0, metadata={"help": "only the fewest pieces whose probabilities sum to this"}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "divides the logits: below 1 is nearer to greedy search"}
    )
    stream: Optional[str] = field(
        default=STREAM,
        metadata={"help": "of the draws; none: that of versions before it had a name"},
    )

    def __post_init__(self) -> None:
        # a sample is one hypothesis, of which there may be several independent ones
        self.beam = max(self.beam, self.nbest)
        super().__post_init__()
        _at_least(0, "topk", self.topk)
        if not 0 < self.topp <= 1:
            raise ValueError(f"--topp must lie in (0, 1], got {self.topp}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"--temperature must be above 0, got {self.temperature}")


class Source(NamedTuple):
    """What is decoded once: ids with `</s>`, and the seed of its sample where one is drawn."""

    ids: tuple[int, ...]
    seed: int | None = None


class Candidate(NamedTuple):
    """What a backend finds: ids without `</s>`, score (natural logarithm, divided by
    length ** lenpen), and whether the output was cut at its limit."""

    ids: list[int]
    score: float
    cut: bool


class Backend(Protocol):
    """Decodes ids.

    max_source, max_target: positions, `</s>` among them. max_tokens: a good size of batches.
    workers: batches that may be decoded at the same time, each in a thread.
    """

    name: str
    max_source: int
    max_target: int
    max_tokens: int
    workers: int

    def decode(
        self, batch: Sequence[Sequence[int]], options: DecodeOptions, limit: int
    ) -> list[list[Candidate]]:
        """For each source the `nbest` best targets of at most `limit` ids, best first."""

    def sample(
        self,
        batch: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: SampleOptions,
        limit: int,
    ) -> list[Candidate]:
        """For each source a target of at most `limit` ids, drawn with its seed.

        score: mean log-probability of its pieces, `</s>` among them.
        """


def make_batches(
    sources: Sequence[Source], options: DecodeOptions, positions: int, max_tokens: int
) -> Iterator[tuple[int, list[Source]]]:
    """(limit of the output's length, batch) for each batch; longest sources first.

    A batch has at most `max_tokens` ids with padding (but always one source), and sources with the
    same limit only, so that what a source gets does not depend on its batch.
    """
    batch: list[Source] = []
    last = -1
    # the ids settle ties, so that a corpus in another order has the same batches
    for source in sorted(sources, key=lambda source: (-len(source.ids), source)):
        limit = options.limit(len(source.ids), positions)
        if batch and (limit != last or (len(batch) + 1) * len(batch[0].ids) > max_tokens):
            yield last, batch
            batch = []
        batch.append(source)
        last = limit
    if batch:
        yield last, batch


def _at_least(least: float, name: str, value: float) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")

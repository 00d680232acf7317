"""Filters for pairs of which a model wrote the source; importing this registers them with the others.

They are filters as `translation.pair_filters` describes them, with four more things that they may have:

    wants_score = True     called with the reverse model's score of the pair (or None) as a third argument;
                           `fit_scores(scores)` is called before, with all scores of one folder
    raw = True             sees the text as it stands in the files, before normalisation
    batched = True         `judge_many(pairs)` gives the reasons of many pairs at once
    setup(context)         called once before everything else, with a :class:`Context`

`repetition` already removes loops on one side only, so there is no other filter for these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, List

import numpy as np
import regex

from ext_common.cli import OptionError, UsageError, UserError
from fairseq_ext.backtranslation.assemble.synthetic import without_gaps
from fairseq_ext.backtranslation.modes import FILLER
from fairseq_ext.translation.prepare.filters import FILTERS, LengthRatio
from fairseq_ext.translation.prepare.hashes import HashSet, text_hash
from fairseq_ext.translation.text.normalise import match_key

DEFAULT_SYNTHETIC_FILTERS = (
    "empty; leftovers; length; script; language; identical; repetition; length_ratio; "
    "ratio_quantile; duplicate"
)
_ENOUGH_PAIRS = 100
# The shortest side whose ratio says something, as for length_ratio.
_CALIBRATION_UNITS = 5
_RESIDUE = (
    r"<unk>|</?s>|<pad>|\u2581|@@(?=\s|$)|@-@|>>[A-Za-z][\w+-]{1,15}<<|<0x[0-9A-Fa-f]{2}>|\uFFFD"
)


@dataclass(frozen=True)
class Context:
    """What filters may need to know beside the pairs.

    symbols: extra symbols of the vocabulary; forward: checkpoint that translates the synthetic language
    into the real one, or None; user_dir: plugin with the parts of its model.
    """

    symbols: tuple[str, ...] = ()
    forward: str | None = None
    user_dir: str | None = None


@dataclass
class LeftoversOptions:
    more: List[str] = field(
        default_factory=list, metadata={"help": "further strings that no translation may hold"}
    )


@FILTERS.register("leftovers", options=LeftoversOptions)
class Leftovers:
    """Pairs whose source holds what belongs to a model: <unk>, ▁, @@, >>xx<<, </s>, <0x0A>, <BT>, …

    What the target holds as well is part of the text, and stays.
    """

    raw = True

    def __init__(self, languages: Sequence[str], more: Sequence[str]) -> None:
        self.more = tuple(more)
        self._use(self.more)

    def setup(self, context: Context) -> None:
        self._use((*self.more, *context.symbols))

    def _use(self, strings: Iterable[str]) -> None:
        own = [regex.escape(text) for text in strings if text and text != FILLER]
        self.pattern = regex.compile("|".join([_RESIDUE, *own]))

    def __call__(self, source: str, target: str) -> str | None:
        for found in self.pattern.finditer(source):
            if found[0] not in target:
                return f"{found[0]} was left in the source"
        return None


@dataclass
class RatioQuantileOptions:
    low: float = field(default=0.001, metadata={"help": "part of the bitext below the range"})
    high: float = field(default=0.999, metadata={"help": "part of the bitext up to its end"})
    slack: float = field(
        default=5.0, metadata={"help": "units added to each limit (characters beside words)"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise OptionError(
                f"low and high must be 0 ≤ low < high ≤ 1, got {self.low:g}, {self.high:g}"
            )


@FILTERS.register("ratio_quantile", options=RatioQuantileOptions)
class RatioQuantile(LengthRatio):
    """Pairs whose ratio of lengths hardly any pair of the bitext has.

    Units are those of length_ratio. The quantiles are of pairs with 5 units or more on both sides; for
    shorter ones, whose ratios are coarse, the slack is there. With fewer than 100 such pairs all stay.
    """

    def __init__(self, languages: Sequence[str], low: float, high: float, slack: float) -> None:
        super().__init__(languages, factor=1.0, slack=slack, ratio=None)
        self.quantiles = low, high
        self.limits: tuple[float, float] | None = None

    def fit(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().fit(pairs)
        counts = [self._lengths(*pair) for pair in pairs]
        ratios = [t / s for s, t in counts if min(s, t) >= _CALIBRATION_UNITS]
        enough = len(ratios) >= _ENOUGH_PAIRS
        least, most = np.quantile(ratios, self.quantiles) if enough else (0.0, 0.0)
        self.limits = (float(least), float(most)) if enough else None

    def __call__(self, source: str, target: str) -> str | None:
        if self.limits is None:
            return None
        (low, high), (s, t) = self.limits, self._lengths(source, target)
        # The slack counts on the side with the finer unit: a pair and its mirror image get one verdict.
        a, b = (0.0, self.slack) if self.ratio >= 1 else (self.slack, 0.0)
        if low * (s - a) - b <= t <= high * (s + a) + b:
            return None
        return f"lengths {s} and {t}, the bitext has {low:.2f} to {high:.2f} for one"


@dataclass
class ScoreQuantileOptions:
    q: float = field(default=0.05, metadata={"help": "part with the worst scores to remove"})

    def __post_init__(self) -> None:
        if not 0 <= self.q < 1:
            raise OptionError(f"q must lie in [0, 1), got {self.q:g}")


@FILTERS.register("score_quantile", options=ScoreQuantileOptions)
class ScoreQuantile:
    """Pairs with the worst scores of the reverse model, in each synthetic folder by itself.

    Folders are apart because another mode or model scores otherwise: what sampling writes is less
    probable than what beam search finds. Pairs without a score stay.
    """

    wants_score = True

    def __init__(self, languages: Sequence[str], q: float) -> None:
        self.q, self.limit = q, -np.inf

    def fit_scores(self, scores: Sequence[float]) -> None:
        """Set the limit to that score of a folder below which at most the part q lies."""
        values = np.asarray(scores, dtype=np.float64)
        place = int(self.q * len(values))
        self.limit = float(np.partition(values, place)[place]) if len(values) else -np.inf

    def __call__(self, source: str, target: str, score: float | None = None) -> str | None:
        if score is None or not score < self.limit:
            return None
        return f"score {score:.3f} is among the worst {self.q:.1%} (below {self.limit:.3f})"


@dataclass
class RepeatedTargetOptions:
    max: int = field(default=10, metadata={"help": "pairs with the same real line that stay"})

    def __post_init__(self) -> None:
        if self.max < 1:
            raise OptionError(f"max must be at least 1, got {self.max}")


@FILTERS.register("repeated_target", options=RepeatedTargetOptions)
class RepeatedTarget:
    """Pairs whose target occurred often enough before, but for case and punctuation."""

    stateful = True

    def __init__(self, languages: Sequence[str], max: int) -> None:
        self.max, self.seen = max, HashSet()

    def __call__(self, source: str, target: str) -> str | None:
        key = match_key(target)
        if any(self.seen.add(text_hash(f"{time} {key}")) for time in range(self.max)):
            return None
        return f"the same target occurred {self.max} times before"


@dataclass
class RoundTripOptions:
    min: float = field(
        default=5.0, metadata={"help": "smallest chrF (0 to 100) of the target translated back"}
    )
    beam: int = field(default=1, metadata={"help": "hypotheses of the forward model (1: greedy)"})

    def __post_init__(self) -> None:
        if not 0 <= self.min <= 100:
            raise OptionError(f"min must lie in [0, 100], got {self.min:g}")
        if self.beam < 1:
            raise OptionError(f"beam must be at least 1, got {self.beam}")


@FILTERS.register("round_trip", options=RoundTripOptions)
class RoundTrip:
    """Pairs whose source a forward model (--forward) does not translate to something like the target.

    Measured by sacreBLEU's chrF2 of the sentence (Popović 2015). Gaps of noised text are left out. With a
    small model trained on 28,000 pairs of Tatoeba, 5 is reached by 93 % of 300 English–Chinese pairs, and by
    15 % when their targets are exchanged; languages written in letters need more, as better models allow.
    """

    batched = True
    # not because of a memory: it is no work for processes, nor for a sample of the bitext
    stateful = True

    def __init__(self, languages: Sequence[str], min: float, beam: int) -> None:
        self.languages, self.min, self.beam = tuple(languages), min, beam
        self.translator: Any = None

    def setup(self, context: Context) -> None:
        if context.forward is None:
            raise UsageError("the filter round_trip needs a forward model: give --forward CKPT")
        from fairseq_ext.translation.decode.translator import Translator

        translator = Translator.from_checkpoint(
            context.forward, device="auto", user_dir=context.user_dir
        )
        vocabulary = translator.vocabulary
        if (vocabulary.source_lang, vocabulary.target_lang) != self.languages:
            raise UserError(
                f"{context.forward} translates {vocabulary.source_lang} to {vocabulary.target_lang}, the "
                f"round trip needs {self.languages[0]} to {self.languages[1]}: give another --forward"
            )
        self.translator = translator

    def __call__(self, source: str, target: str) -> str | None:
        return self.judge_many([(source, target)])[0]

    def judge_many(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        """The reason, or None, for each pair."""
        if self.translator is None:
            raise UsageError("the filter round_trip judges synthetic text only: use it in assemble")
        back = self.translator([without_gaps(source) for source, _ in pairs], beam=self.beam)
        return [self._judge(text, real) for text, (_, real) in zip(back, pairs, strict=True)]

    def _judge(self, back: str, target: str) -> str | None:
        score = self._chrf.sentence_score(back, [target]).score
        return None if score >= self.min else f"chrF {score:.1f} of the way back: {back}"

    @cached_property
    def _chrf(self) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()

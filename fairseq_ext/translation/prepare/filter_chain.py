"""Which pairs of a bitext are kept, as a chain of small filters that say what they removed and why.

    chain = FilterChain("empty; script:min_share=0.6; near_duplicate", "en", "zh")
    chain.fit(sample)                              # for filters that look at the corpus first
    reason = chain("Good morning.", "早上好。")      # None: keep

A filter works on normalised text and does not know which side is real, so synthetic pairs pass through the
same ones. Someone's own is a class that their `--user-dir` registers:

    @FILTERS.register("no_urls")
    class NoUrls:
        '''Pairs with a web address.'''

        def __init__(self, languages): ...
        def __call__(self, source, target): return "has a web address" if ... else None
"""

import random
from collections.abc import Iterable
from typing import Any

from ext_common.cli import OptionError
from fairseq_ext.translation.prepare.filters import CALIBRATION_PAIRS, FILTERS

__all__ = ["DEFAULT_FILTERS", "FILTERS", "FilterChain", "parse_filters", "sample"]

DEFAULT_FILTERS = (
    "empty; length; script; language; identical; repetition; length_ratio; duplicate; "
    "near_duplicate"
)


class FilterChain:
    """Filters in a row, itself a filter; a pair is counted under the first that removes it.

    spec: `"name; name:option=value,option=value"`; "none" keeps every pair.
    `kept` and `counts` (name → removed) are how many pairs went where.
    Raises UnknownName and OptionError for a spec that does not fit.
    """

    def __init__(self, spec: str, source_lang: str, target_lang: str) -> None:
        self.languages = (source_lang, target_lang)
        self.spec = spec
        self.filters: dict[str, Any] = {}
        for name, options in parse_filters(spec):
            if name in self.filters:
                raise OptionError(f"filter {name!r} is in the chain twice: give it once")
            self.filters[name] = FILTERS.build(name, self.languages, options=options)
        self.reset()

    def reset(self) -> None:
        """Set the counts to 0; what filters remember of the pairs stays."""
        self.kept = 0
        self.counts = dict.fromkeys(self.filters, 0)

    def fit(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Show a random sample of the corpus (see :func:`sample`) to the filters that look at one.

        Each sees what the filters before it leave over, so that rubbish does not calibrate.
        """
        pairs = list(pairs)
        for one in self.filters.values():
            if hasattr(one, "fit"):
                one.fit(pairs)
            # pairs of a corpus have no scores
            if not (getattr(one, "stateful", False) or getattr(one, "wants_score", False)):
                pairs = [pair for pair in pairs if one(*pair) is None]

    def __call__(self, source: str, target: str, score: float | None = None) -> str | None:
        found = self.judge(source, target, score)
        return found and f"{found[0]}: {found[1]}"

    def judge(self, source: str, target: str, score: float | None = None) -> tuple[str, str] | None:
        """(name of the filter, reason) for a pair to remove, None for one to keep; counted.

        score: of the model that wrote one side, for filters with `wants_score = True`.
        """
        for name, one in self.filters.items():
            more = (score,) if getattr(one, "wants_score", False) else ()
            reason = one(source, target, *more)
            if reason is not None:
                self.counts[name] += 1
                return name, reason
        self.kept += 1
        return None


def parse_filters(spec: str) -> list[tuple[str, str]]:
    """(name, options) of each filter in `"name; name:option=value"`; none for "none"."""
    if spec.strip() == "none":
        return []
    parts = [part.strip() for part in spec.split(";")]
    if not all(parts):
        raise OptionError(f"a filter without a name in {spec!r}: write 'name; name:option=value'")
    split = (part.partition(":") for part in parts)
    return [(name.strip(), options.strip()) for name, _, options in split]


def sample(
    pairs: Iterable[tuple[str, str]], size: int = CALIBRATION_PAIRS, seed: int = 1
) -> list[tuple[str, str]]:
    """`size` of the pairs, each with the same probability, in one pass (reservoir sampling)."""
    rng = random.Random(seed)
    drawn: list[tuple[str, str]] = []
    for seen, pair in enumerate(pairs):
        place = seen if seen < size else rng.randrange(seen + 1)
        if place < size:
            drawn[place : place + 1] = [pair]
    return drawn

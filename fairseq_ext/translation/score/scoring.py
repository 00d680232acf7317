"""Corpus scores by sacreBLEU with their uncertainty, alone and against a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, List, Optional, cast

import numpy as np

from ext_common.cli import UsageError, UserError, progress
from fairseq_ext.translation.score import significance
from fairseq_ext.translation.score.checks import check_lines, warnings_about
from fairseq_ext.translation.score.metrics import tokenizer_for
from fairseq_ext.translation.text.moses import detokeniser
from fairseq_ext.translation.text.normalise import language, normalise, unit

FORMULAS = {"bleu": significance.bleu, "chrf": significance.chrf, "ter": significance.ter}
METRICS = tuple(FORMULAS)
# A system is compared where higher is better; TER seldom tells more than these.
COMPARED = ("bleu", "chrf")


@dataclass
class ScoringOptions:
    """How to score."""

    tokenizer: Optional[str] = field(
        default=None, metadata={"help": "sacreBLEU tokenizer for BLEU; none: that of the language"}
    )
    normalise: bool = field(
        default=False, metadata={"help": "normalise hypotheses and references first"}
    )
    detokenise: bool = field(
        default=False, metadata={"help": "undo Moses' tokenization of all of them before"}
    )
    metrics: List[str] = field(
        default_factory=lambda: list(METRICS),
        metadata={"help": "what to compute", "choices": METRICS},
    )
    bootstrap: int = field(default=1000, metadata={"help": "bootstrap resamples of the lines"})
    randomisations: int = field(
        default=10_000, metadata={"help": "trials of approximate randomisation"}
    )
    seed: int = field(default=12345, metadata={"help": "seed of the resamples and trials"})

    def __post_init__(self) -> None:
        if self.bootstrap < 1 or self.randomisations < 1:
            raise ValueError("--bootstrap and --randomisations must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must not be negative")
        if not self.metrics:
            raise ValueError(f"--metrics needs at least one of {', '.join(METRICS)}")


@dataclass(frozen=True)
class MetricScore:
    """One metric over all lines, with the 95 % interval of bootstrap resampling."""

    name: str
    value: float
    interval: tuple[float, float]
    signature: str


@dataclass(frozen=True)
class Comparison:
    """A system less a baseline by one metric; :mod:`significance` says what wins and each p are."""

    baseline: float
    difference: float
    interval: tuple[float, float]
    wins: float
    bootstrap_p: float
    sacrebleu_bootstrap_p: float
    randomisation_p: float


@dataclass(frozen=True)
class Scores:
    """What :func:`score` finds; metrics and comparisons by "bleu", "chrf" and "ter"."""

    lang: str
    lines: int
    references: int
    empty: int
    tokenizer: str
    tokenizer_reason: str
    normalised: bool
    metrics: dict[str, MetricScore]
    comparisons: dict[str, Comparison]
    warnings: list[str]

    @property
    def bleu(self) -> float:
        """BLEU in [0, 100]."""
        return self.metrics["bleu"].value

    @property
    def chrf(self) -> float:
        """chrF2 in [0, 100]."""
        return self.metrics["chrf"].value

    @property
    def ter(self) -> float:
        """TER in percent; lower is better."""
        return self.metrics["ter"].value


def score(
    hypotheses: Sequence[str],
    references: Sequence[str] | Sequence[Sequence[str]],
    lang: str,
    baseline: Optional[Sequence[str]] = None,
    source: Optional[Sequence[str]] = None,
    options: Optional[ScoringOptions] = None,
    names: Optional[dict[str, Any]] = None,
) -> Scores:
    """BLEU, chrF and TER of translations, against a baseline where one is given.

    hypotheses, baseline, source: N lines. references: N lines, or a list of such lists, of which a
    line may be empty where another reference has it. names: what messages call each of these.
    Raises UserError where the numbers would mean nothing: see :func:`scoring_checks.check_lines`.
    """
    options = options or ScoringOptions()
    hypotheses = list(hypotheses)
    if not references or isinstance(references[0], str):
        references = [cast(Sequence[str], references)]
    if options.detokenise:
        whole = detokeniser(lang)
        hypotheses = list(map(whole, hypotheses))
        references = [list(map(whole, one)) for one in references]
        baseline = baseline and list(map(whole, baseline))
    check_lines(hypotheses, references, baseline, source, names)
    warned = warnings_about(hypotheses, references, baseline, source, lang, names)
    tokenizer, reason = choose_tokenizer(lang, options.tokenizer)
    if tokenizer != tokenizer_for(lang):
        warned.append(
            f"{tokenizer} is not the tokenizer of {lang}, which is {tokenizer_for(lang)}: this "
            "BLEU can be compared only with others of the same tokenizer"
        )
    if options.normalise:
        hypotheses = [normalise(line, lang) for line in hypotheses]
        references = [[normalise(line, lang) for line in one] for one in references]
        baseline = baseline and [normalise(line, lang) for line in baseline]
    metrics, comparisons = {}, {}
    for key in dict.fromkeys(options.metrics):
        metric = Metric.of(key, lang, tokenizer, references)
        ours = metric.statistics(hypotheses)
        metrics[key] = measure(metric, ours, options)
        if baseline is not None and key in COMPARED:
            theirs = metric.statistics(baseline)
            comparisons[key] = compare(metric.formula, ours, theirs, options)
    return Scores(
        lang=lang,
        lines=len(hypotheses),
        references=len(references),
        empty=sum(not line.strip() for line in hypotheses),
        tokenizer=tokenizer,
        tokenizer_reason=reason,
        normalised=options.normalise,
        metrics=metrics,
        comparisons=comparisons,
        warnings=warned,
    )


def measure(metric: "Metric", statistics: np.ndarray, options: ScoringOptions) -> MetricScore:
    """A corpus score and its interval, of per-sentence statistics (N, K)."""
    (resampled,) = significance.bootstrap(
        metric.formula, statistics, trials=options.bootstrap, seed=options.seed
    )
    return MetricScore(
        metric.name,
        significance.total(metric.formula, statistics),
        significance.interval(resampled),
        metric.signature(),
    )


def compare(
    formula: significance.Formula,
    ours: np.ndarray,
    theirs: np.ndarray,
    options: ScoringOptions,
) -> Comparison:
    """Both tests on per-sentence statistics (N, K) of a system and a baseline."""
    paired = significance.paired_bootstrap(formula, ours, theirs, options.bootstrap, options.seed)
    base = significance.total(formula, theirs)
    return Comparison(
        baseline=base,
        difference=significance.total(formula, ours) - base,
        interval=paired.interval,
        wins=paired.wins,
        bootstrap_p=paired.p,
        sacrebleu_bootstrap_p=paired.sacrebleu_p,
        randomisation_p=significance.randomisation(
            formula, ours, theirs, options.randomisations, options.seed
        ),
    )


@dataclass
class Metric:
    """A metric of sacreBLEU with its references, and the formula of its sums."""

    name: str
    formula: significance.Formula
    sacrebleu: Any
    split: Optional[Callable[[str], str]] = None

    @classmethod
    def of(
        cls, key: str, lang: str, tokenizer: str, references: Sequence[Sequence[str]]
    ) -> "Metric":
        """ "bleu", "chrf" or "ter" for translations into `lang`."""
        from sacrebleu.metrics import BLEU, CHRF, TER

        asian = language(lang) in ("zh", "yue")
        split = characters if key == "ter" and unit(lang) == "characters" and not asian else None
        if split:
            references = [[split(line) for line in one] for one in references]
        given: Any = references
        if len(references) > 1:
            given = [[line if line.strip() else None for line in one] for one in references]
        metric: Any
        if key == "bleu":
            metric = BLEU(tokenize=tokenizer, references=given)
        elif key == "chrf":
            metric = CHRF(references=given)
        else:
            metric = TER(normalized=asian, asian_support=asian, references=given)
        name = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER"}[key]
        return cls(name, FORMULAS[key], metric, split)

    def statistics(self, hypotheses: Sequence[str]) -> np.ndarray:
        """float64 (N, K); which, :mod:`significance` says."""
        metric, rows = self.sacrebleu, []
        # TER of a long line that shares little with its reference can take a second.
        for line, reference in zip(
            progress(hypotheses, self.name, "lines", total=len(hypotheses)),
            metric._ref_cache,
            strict=True,
        ):
            line = metric._preprocess_segment(self.split(line) if self.split else line)
            rows.append(metric._compute_segment_statistics(line, reference))
        return np.array(rows, dtype=np.float64)

    def signature(self) -> str:
        """sacreBLEU's, and what was done before."""
        return f"{self.sacrebleu.get_signature()}{'|unit:char' if self.split else ''}"


def choose_tokenizer(lang: str, wanted: Optional[str] = None) -> tuple[str, str]:
    """sacreBLEU's tokenizer for translations into `lang`, and why this one.

    Raises UsageError for one that sacreBLEU has not, UserError for one that cannot be used here.
    """
    if wanted is None:
        name = tokenizer_for(lang)
        if name in ("13a", "zh") or "mecab" in name:
            return name, f"sacreBLEU's for {lang}"
        if unit(lang) == "characters" and language(lang) != "ja":
            return name, f"characters, because {lang} is written without spaces"
        return name, f"characters, because MeCab for {lang} is not installed"
    from sacrebleu.metrics import BLEU

    if wanted not in BLEU.TOKENIZERS:
        raise UsageError(f"no tokenizer {wanted!r}: sacreBLEU has {', '.join(BLEU.TOKENIZERS)}")
    try:
        BLEU(tokenize=wanted)
    # Its tokenizers fail in their own ways without MeCab or without a network: RuntimeError,
    # ImportError, URLError and even SystemExit.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"sacreBLEU's tokenizer {wanted} cannot be used here: {' '.join(str(error).split())}"
        ) from error
    return wanted, "given"


def characters(line: str) -> str:
    """`line` with a space between any two of its characters."""
    return " ".join("".join(line.split()))

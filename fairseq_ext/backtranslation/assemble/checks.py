"""What must agree before synthetic pairs are trained on: direction, files, script.

A set that is the wrong way round trains without an error, on sources that are targets. Three things are
compared: which languages the reverse model reads and writes, which ones the files are named after, and the
script of the text; of languages of one script (English and German) the n-grams of the bitext's sides.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

import regex

from ext_common.cli import UserError, progress
from ext_common.manifest import MANIFEST_NAME, sha256_file
from fairseq_ext.backtranslation.assemble.synthetic import Synthetic
from fairseq_ext.translation.prepare.filter_chain import FilterChain
from fairseq_ext.translation.text.normalise import language, script_share, unit

LEAST = 0.5
"""The part of its letters that a typical line has in the scripts of its language, at least, as long as
lines of the bitext have: half of what these have is asked for."""
MARGIN = 0.2
"""By how much more, summed over both sides, the exchanged languages may fit before a set is refused."""
_LETTER = regex.compile(r"\p{L}")
_LATIN_WORD = regex.compile(r"(\p{Latin})\p{Latin}+")


def check_direction(synthetic: Synthetic, languages: Sequence[str]) -> tuple[str, str]:
    """(synthetic language, real language) as the bitext spells them.

    languages: the two of the bitext. UserError where the manifest contradicts itself or the bitext.
    """
    path = synthetic.path / MANIFEST_NAME
    sides = {
        "real": (synthetic.real_lang, synthetic.model.get("source_lang"), "reads"),
        "synthetic": (synthetic.synthetic_lang, synthetic.model.get("target_lang"), "writes"),
    }
    for side, (lang, of_model, does) in sides.items():
        if not isinstance(of_model, str) or language(of_model) != language(lang):
            raise UserError(
                f"{path}: the {side} text is {lang}, but the reverse model {does} {of_model}: generate "
                "with the model of the other direction, or from the other text"
            )
    written, real = (_match(sides[side][0], languages) for side in ("synthetic", "real"))
    if written is None or real is None or written == real:
        raise UserError(
            f"{synthetic.path} is of {synthetic.real_lang} and {synthetic.synthetic_lang}, the bitext of "
            f"{' and '.join(languages)}: give synthetic text of the languages of the bitext"
        )
    return written, real


def check_one_direction(directions: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """The direction that all folders have; UserError where they differ."""
    (first, one), *others = directions.items()
    for path, other in others:
        if other != one:
            raise UserError(
                f"the synthetic side of {first} is {one[0]}, of {path} {other[0]}: assemble one folder "
                "for each direction"
            )
    return one


def hash_files(synthetic: Synthetic) -> dict[str, str]:
    """SHA-256 of each file; UserError where the real text is not what was translated."""
    files = progress(synthetic.files, f"read {synthetic.path.name}", "files")
    hashes = {str(file): sha256_file(file) for file in files}
    if hashes[str(synthetic.real)] != synthetic.real_sha256:
        raise UserError(
            f"{synthetic.real} is not the text that was translated (its SHA-256 is not that in "
            f"{MANIFEST_NAME}): restore it, or generate again"
        )
    return hashes


def check_scripts(
    synthetic: Synthetic,
    direction: tuple[str, str],
    pairs: Iterable[tuple[str, str]],
    bitext: Iterable[tuple[str, str]],
) -> None:
    """UserError where text is not in the script of its language.

    direction: (synthetic language, real language), in whose order `pairs` and `bitext` are samples
    of (source, target) lines. What a line of the language looks like is taken from the bitext, so that a
    language that is not written as usual (Tatar in Latin letters) passes.
    """
    sides, usual = list(zip(*pairs, strict=True)), list(zip(*bitext, strict=True))
    if not sides:
        return
    own = [typical_share(side, lang) for side, lang in zip(sides, direction, strict=True)]
    other = [typical_share(side, lang) for side, lang in zip(sides, direction[::-1], strict=True)]
    names = [synthetic.outputs[0], synthetic.real]
    if sum(other) - sum(own) > MARGIN:
        shares = " and ".join(
            f"{name.name} is {share:.0%} {lang}"
            for name, share, lang in zip(names, other, direction[::-1], strict=True)
        )
        raise UserError(
            f"{synthetic.path}: the two sides are exchanged ({shares}, by the letters of a typical line): "
            "generate again from the text of the real language"
        )
    for place, (share, lang) in enumerate(zip(own, direction, strict=True)):
        expected = typical_share(usual[place], lang) if usual else 1.0
        if share < LEAST * expected:
            raise UserError(
                f"{names[place]}: {share:.0%} of the letters of a typical line are of {lang}, in the "
                f"bitext {expected:.0%}: give text of that language"
            )


def check_languages(
    synthetic: Synthetic, chain: FilterChain, pairs: Sequence[tuple[str, str]]
) -> None:
    """UserError where most pairs of a sample have a side in the other side's language."""
    judge = chain.filters.get("language")
    reasons = Counter(filter(None, (judge(*pair) for pair in pairs))) if judge else Counter()
    if reasons.total() > LEAST * len(pairs):
        told = " and ".join(f"of {count:,} {reason}" for reason, count in reasons.most_common())
        raise UserError(
            f"{synthetic.path}: of {len(pairs):,} pairs {told}: generate again from text of the real "
            "language, with the model that reads it"
        )


def typical_share(lines: Iterable[str], lang: str) -> float:
    """The median over lines of the share of letters in the scripts of `lang`; 1.0 without letters.

    In languages written in characters a Latin word counts as one letter, as for the filter "script".
    """
    shares = [_share(line, lang) for line in lines if _LETTER.search(line)]
    return median(shares) if shares else 1.0


def _share(line: str, lang: str) -> float:
    return script_share(_LATIN_WORD.sub(r"\1", line) if unit(lang) == "characters" else line, lang)


def _match(lang: str, languages: Sequence[str]) -> str | None:
    """What the bitext calls a language: itself, or the only one of the same (zho, cmn: zh)."""
    if lang in languages:
        return lang
    same = [one for one in languages if language(one) == language(lang)]
    return same[0] if len(same) == 1 else None

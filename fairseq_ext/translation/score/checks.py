"""What makes a score meaningless: refused in one sentence, or told beside the score."""

import re
from collections.abc import Sequence
from typing import Any

from ext_common.cli import UserError
from fairseq_ext.translation.text.moses import looks_tokenised
from fairseq_ext.translation.text.normalise import script_share

# Kind of residue → what it looks like. "@@" alone is no piece: diffs and e-mail have it too.
_PIECES = {
    "SentencePiece pieces (▁)": re.compile("▁"),
    "BPE pieces (@@)": re.compile(r"\w@@(?= |$)"),
    "byte pieces (<0x..>)": re.compile(r"<0x[0-9A-F]{2}>"),
}
_SYMBOLS = re.compile(r"<unk>|</?s>|<pad>|⁇")
_EXAMPLE = 40  # characters of a line that messages show


def check_lines(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    baseline: Sequence[str] | None = None,
    source: Sequence[str] | None = None,
    names: dict[str, Any] | None = None,
) -> None:
    """UserError where a score of these lines would mean nothing.

    names: {"hypotheses", "references" (a list), "baseline", "source"} → what to call each.
    """
    named = _named(hypotheses, references, baseline, source, names)
    if not hypotheses:
        raise UserError(f"{named[0][0]} is empty: there is nothing to score")
    _check_counts(named)
    _check_references(references, [name for name, _ in named[1 : 1 + len(references)]])
    # The source may be in pieces: only whether it was copied is asked of it.
    for name, lines in named[: len(named) - (source is not None)]:
        _check_pieces(name, lines)
    if source is not None:
        for name, lines in named[:1] + ([named[-2]] if baseline is not None else []):
            _check_copies(name, lines, named[-1])


def warnings_about(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    baseline: Sequence[str] | None = None,
    source: Sequence[str] | None = None,
    lang: str = "",
    names: dict[str, Any] | None = None,
) -> list[str]:
    """Sentences on what is suspicious, but can be right."""
    found = []
    named = _named(hypotheses, references, baseline, None, names)
    hypothesis, translations = named[0][0], [named[0], *named[1 + len(references) :]]
    for name, lines in translations:
        empty = sum(not line.strip() for line in lines)
        if empty:
            found.append(f"{_count(empty, 'line')} of {name} empty: scored as such")
        symbols = sum(_SYMBOLS.search(line) is not None for line in lines)
        if symbols:
            found.append(
                f"{_count(symbols, 'line')} of {name} with <unk> or another special symbol"
            )
    for name, lines in named:
        share = script_share("\n".join(lines), lang)
        if share < 0.5:
            found.append(
                f"only {100 * share:.0f} % of the letters of {name} are of the script of {lang}: "
                "is --lang the language of the translations?"
            )
        why = looks_tokenised(lines, lang)
        if why:
            found.append(
                f"{name} looks as if it had been tokenised ({why}): scores are of plain text, --detokenise "
                "undoes it"
            )
    for name, reference in named[1 : 1 + len(references)]:
        if list(hypotheses) == list(reference):
            found.append(f"{hypothesis} and {name} are equal line by line")
    if baseline is not None and list(hypotheses) == list(baseline):
        found.append(f"{hypothesis} and {named[-1][0]} are equal line by line")
    if source is not None:
        copied = _copies(hypotheses, source)
        if copied > 0.1 * len(hypotheses):
            found.append(f"{_count(copied, 'line')} of {hypothesis} copied from the source")
    return found


def _named(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    baseline: Sequence[str] | None,
    source: Sequence[str] | None,
    names: dict[str, Any] | None,
) -> list[tuple[str, Sequence[str]]]:
    """(name, lines) of hypotheses, references, baseline and source, in this order."""
    names = names or {}
    default = (
        ["the references"]
        if len(references) == 1
        else [f"reference {i}" for i in range(1, len(references) + 1)]
    )
    found = [(names.get("hypotheses") or "the hypotheses", hypotheses)]
    found += zip(names.get("references") or default, references, strict=True)
    if baseline is not None:
        found.append((names.get("baseline") or "the baseline", baseline))
    if source is not None:
        found.append((names.get("source") or "the source", source))
    return found


def _check_counts(named: list[tuple[str, Sequence[str]]]) -> None:
    (first, lines), *others = named
    for name, other in others:
        if len(other) != len(lines):
            raise UserError(
                f"{first} has {_count(len(lines), 'line')}, {name} has {len(other)}: line i of one "
                "must belong to line i of the other"
            )


def _check_references(references: Sequence[Sequence[str]], names: list[str]) -> None:
    empty = [
        number
        for number, lines in enumerate(zip(*references, strict=True), 1)
        if not any(line.strip() for line in lines)
    ]
    if empty:
        more = f" ({len(empty)} such lines)" if len(empty) > 1 else ""
        raise UserError(
            f"{' and '.join(names)}, line {empty[0]}: empty reference{more}: remove the line from "
            "all files"
        )


def _check_pieces(name: str, lines: Sequence[str]) -> None:
    for kind, pattern in _PIECES.items():
        for number, line in enumerate(lines, 1):
            if pattern.search(line):
                raise UserError(
                    f"{name}, line {number} is in {kind}: {_shown(line)}: scores are of plain "
                    "text, as fairseq_ext.translation.translate writes it"
                )


def _check_copies(name: str, lines: Sequence[str], source: tuple[str, Sequence[str]]) -> None:
    if _copies(lines, source[1]) == len(lines):
        raise UserError(f"every line of {name} is that of {source[0]}: nothing was translated")


def _copies(lines: Sequence[str], source: Sequence[str]) -> int:
    return sum(a.split() == b.split() for a, b in zip(lines, source, strict=True))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _shown(line: str) -> str:
    return repr(line if len(line) <= _EXAMPLE else f"{line[:_EXAMPLE]}…")

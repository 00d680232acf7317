"""Lines of text: read without shifting one, normalised by one convention, measured per language.

Everything that asks "is this the same sentence" uses :func:`match_key`, everything that asks "how long is
it" uses :func:`length`, so that filters, splits and leak guards cannot disagree.
"""

import functools
import os
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import regex

from ext_common.cli import UsageError, UserError
from ext_common.registry import Registry
from fairseq_ext.translation.text.files import raw_lines
from fairseq_ext.translation.text.languages import language as language

CONVENTIONS = Registry("normalisation")
"""name → function(text, lang) → text. Both ends of a system use the one its data were made with."""

_UNSPACED = frozenset("zh ja th lo km my yue".split())
_HAN_PUNCTUATED = frozenset("zh ja yue".split())
CHINESE = ("zh", "yue")
BROKEN = "\ufffd"
_BROKEN = regex.compile(f" ?{BROKEN}+")
# Bytes that a model writes can spell whatever some program ends a line or a column at.
_BREAKS = dict.fromkeys(map(ord, "\n\r\t\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029"), " ") | {0: None}
_SCRIPTS = {
    "Arabic": "ar fa ps ug ur",
    "Armenian": "hy",
    "Bengali": "as bn",
    "Cyrillic": "be bg kk ky mk mn ru sr tg tt uk",
    "Devanagari": "hi mr ne sa",
    "Ethiopic": "am ti",
    "Georgian": "ka",
    "Greek": "el",
    "Gujarati": "gu",
    "Gurmukhi": "pa",
    "Han": "ja ko yue zh",
    "Hangul": "ko",
    "Hebrew": "he yi",
    "Hiragana": "ja",
    "Kannada": "kn",
    "Katakana": "ja",
    "Khmer": "km",
    "Lao": "lo",
    "Latin": "af az bs ca cs cy da de en eo es et eu fi fr ga gl ha hr hu id is it kk la lt lv ms mt "
    "nb nl nn no pl pt ro sk sl so sq sr sv sw tl tr uz vi zu",
    "Malayalam": "ml",
    "Myanmar": "my",
    "Oriya": "or",
    "Sinhala": "si",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
    "Tibetan": "bo dz",
}

# Punctuation of Chinese and Japanese that NFKC would fold to ASCII, and characters whose folding
# changes the number they are part of: 10² is not 102, 1½ is not 11⁄2.
_UNFOLDED = "，！？：；（）～…⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅟↉"
_FOLDED_RUN = regex.compile(f"[^{_UNFOLDED}]+")

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_CJK_MARKS = r"\u3001-\u3003\u3008-\u301F，．！？：；（）～・"
_SHARED_MARKS = "“”‘’…—·"
_JOINING = "".join(
    rf"\p{{{name}}}"
    for name in "Arabic Syriac Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu Kannada Malayalam "
    "Sinhala Khmer Myanmar Tibetan".split()
)
_FLAG_TAGS = r"[\U000E0020-\U000E007F]"
_INVISIBLE = regex.compile(
    rf"""
    # everything without a shape of its own, but for the Arabic signs that only are filed with these
      [[\p{{Cc}}\p{{Cf}}\p{{Cs}}\p{{DI}}\p{{NChar}}]--[\u200C\u200D\uFE0E\uFE0F\U000E0020-\U000E007F\p{{Prepended_Concatenation_Mark}}]]
    # joiners stay where they shape a word, and where they make one emoji of two
    | (?<![{_JOINING}]) \u200C | \u200C (?![[{_JOINING}]&&[\p{{L}}\p{{M}}]])
    | (?<![{_JOINING}\p{{Extended_Pictographic}}\p{{Emoji_Modifier}}\uFE0F]) \u200D
    | \u200D (?![[{_JOINING}]&&[\p{{L}}\p{{M}}]]|\p{{Extended_Pictographic}})
    # variation selectors that choose between text and emoji
    | (?<!\p{{Extended_Pictographic}}) [\uFE0E\uFE0F] (?!\u20E3)
    # the flags of England, Scotland and Wales
    | (?<![\U0001F3F4\U000E0020-\U000E007F]) {_FLAG_TAGS}+
    """,
    regex.VERSION1 | regex.VERBOSE,
)
_PLAIN = regex.compile(r"(?:[!-~]+(?: [!-~]+)*)?")

_WIDE = str.maketrans(",.!?:;()", "，。！？：；（）")
_BRACKETS = regex.compile(
    rf"(?<=[{_CJK}{_CJK_MARKS}])\([^()]*\)|\((?=[{_CJK}])[^()]*\)"
    rf"|\([^()]*(?<=[{_CJK}])\)|\([^()]*\)(?=[{_CJK}])"
)
# Not "...": three of "。" are no ellipsis. Not "微软.NET" either. The space behind an ASCII mark is
# part of writing it.
_AFTER_CJK = regex.compile(rf"(?<=[{_CJK}][，。！？：；（）]*)(?:[,!?:;()]|\.(?![.A-Za-z0-9]))+ ?")
_CJK_GAP = regex.compile(
    rf"(?<=[{_CJK}{_CJK_MARKS}]) +(?=[{_CJK}{_CJK_MARKS}{_SHARED_MARKS}])"
    rf"|(?<=[{_SHARED_MARKS}]) +(?=[{_CJK}{_CJK_MARKS}])"
)

_ASCII_REST = bytes(set(range(128)) - set(b"abcdefghijklmnopqrstuvwxyz0123456789"))
_REST = regex.compile(r"(?V1)[[^\p{L}\p{N}\p{M}]\p{DI}]+")
_CARRIER = regex.compile(r"[\p{L}\p{N}]")


def normalise(text: str, lang: str, convention: str = "standard") -> str:
    """`text` in the stated convention; doing it twice changes nothing.

    convention: a name in CONVENTIONS, or one with a conversion of OpenCC for Chinese: "standard+t2s".
    Raises UnknownName for a convention that is not registered.
    """
    name, _, conversion = convention.partition("+")
    if conversion and language(lang) in CHINESE:
        text = opencc(conversion).convert(CONVENTIONS.get("none")(text, lang))
    normalised: str = CONVENTIONS.get(name)(text, lang)
    return normalised


@functools.cache
def opencc(conversion: str) -> Any:
    """OpenCC's converter; UserError where the package or the conversion does not exist."""
    try:
        import opencc
    except ImportError as error:
        raise UserError(
            f"the conversion {conversion} of Chinese needs the package opencc: install it with "
            "pip install 'fairseq-ext[opencc]'"
        ) from error
    known = sorted(config.removesuffix(".json") for config in opencc.CONFIGS)
    if conversion not in known:
        raise UsageError(f"OpenCC has no conversion {conversion!r}: it has {', '.join(known)}")
    return opencc.OpenCC(conversion)


@CONVENTIONS.register("standard")
def standard(text: str, lang: str) -> str:
    """NFKC without the folding of CJK punctuation; nothing invisible; one kind of space.

    Superscripts, subscripts and vulgar fractions stay as well. "▁", SentencePiece's own space, becomes "_".
    In zh, ja and yue, ASCII , . ! ? : ; ( ) behind Han or kana become full width.
    """
    if _PLAIN.fullmatch(text):
        return text
    cjk = language(lang) in _HAN_PUNCTUATED
    # Removing a character can let its neighbours compose, so one pass is not always the last.
    for _ in range(8):
        before = text
        text = _INVISIBLE.sub("", " ".join(text.split())).replace("\u2581", "_")
        if not unicodedata.is_normalized("NFKC", text):
            text = _FOLDED_RUN.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text)
        text = " ".join(text.split())
        if cjk:
            text = _BRACKETS.sub(lambda found: f"（{found[0][1:-1]}）", text)
            text = _AFTER_CJK.sub(lambda found: found[0].rstrip().translate(_WIDE), text)
        if text == before:
            break
    return text


@CONVENTIONS.register("none")
def unbroken(text: str, lang: str) -> str:
    """Only what would break a file of lines: newlines, NUL, lone surrogates and "▁"."""
    text = text.replace("\n", " ").replace("\r", " ").replace("\0", "").replace("\u2581", "_")
    return text if text.isascii() else regex.sub(r"\p{Cs}", "", text)


def match_key(text: str) -> str:
    """What two texts share that are the same but for case, width, spacing and punctuation.

    Letters, numbers and marks after NFKC and case folding. A text without letter and number (so that
    "?!" and "…" differ) keeps all that is visible. `match_key(normalise(text)) == match_key(text)`.
    """
    if text.isascii():
        key = text.lower().encode().translate(None, _ASCII_REST).decode()
    else:
        shown = unicodedata.normalize("NFKC", _INVISIBLE.sub("", " ".join(text.split())))
        folded = unicodedata.normalize("NFKC", shown.casefold())
        key = unicodedata.normalize("NFKC", _REST.sub("", folded))
    if _CARRIER.search(key):
        return key
    shown = "".join(unicodedata.normalize("NFKC", standard(text, "")).split())
    return unicodedata.normalize("NFKC", shown)


def length(text: str, lang: str) -> int:
    """Characters that are not spaces for zh, ja, th, lo, km, my and yue; words for the others."""
    if language(lang) in _UNSPACED:
        return sum(map(len, text.split()))
    return len(text.split())


def unit(lang: str) -> str:
    """What :func:`length` counts, for messages."""
    return "characters" if language(lang) in _UNSPACED else "words"


def script_share(text: str, lang: str) -> float:
    """The share of the letters that belong to the scripts of `lang`.

    1.0 for a text without letters and for a language whose scripts are not known here.
    """
    own = _script_pattern(language(lang))
    letters = sum(map(str.isalpha, text))
    if own is None or not letters:
        return 1.0
    # regex knows letters of a later Unicode than str
    return min(1.0, len(own.findall(text)) / letters)


def written(text: str, lang: str) -> str:
    """What a model wrote, for a file of lines: on one line, without a tab, detokenised."""
    return detokenise(text.translate(_BREAKS).strip(), lang)


def repaired(text: str) -> str:
    """What a model wrote without U+FFFD, in whose place are bytes that spell no character."""
    return _BROKEN.sub("", text).strip() if BROKEN in text else text


def detokenise(text: str, lang: str) -> str:
    """In zh, ja and yue no space between two Han, kana or CJK punctuation marks; else unchanged.

    Quotation marks and dashes that Latin text has too count where their neighbour is CJK.
    """
    return _CJK_GAP.sub("", text) if language(lang) in _HAN_PUNCTUATED else text


def _uneven(inputs: Sequence[object], source: int, target: int) -> UserError:
    return UserError(
        f"{inputs[0]} has {source:,} lines and {inputs[1]} {target:,}: parallel files need the same "
        "number, so give the pair that belongs together"
    )


@functools.cache
def _script_pattern(lang: str) -> regex.Pattern[Any] | None:
    own = [rf"\p{{scx={script}}}" for script, langs in _SCRIPTS.items() if lang in langs.split()]
    return regex.compile(f"(?V1)[\\p{{L}}&&[{''.join(own)}]]") if own else None


def read_pairs(
    inputs: Sequence[str | os.PathLike[str]], columns: Sequence[int] = (1, 2)
) -> Iterator[tuple[int, str, str]]:
    """(1-based line number, source, target), raw; a column that a row does not have is "".

    inputs: one tab-separated file, of which `columns` (1-based) are taken, or two parallel files.
    Raises UserError where parallel files differ in their number of lines.
    """
    if len(inputs) == 1:
        if len(columns) != 2 or min(columns) < 1:
            raise UsageError(f"expected two columns counted from 1, got {columns}")
        first, second = (column - 1 for column in columns)
        for number, line in enumerate(read_lines(inputs[0]), 1):
            cells = line.split("\t")
            yield (
                number,
                cells[first] if first < len(cells) else "",
                cells[second] if second < len(cells) else "",
            )
        return
    if len(inputs) != 2:
        raise UsageError(f"expected one tab-separated file or two parallel ones, got {len(inputs)}")
    if all(os.fspath(path) == "-" for path in inputs):
        raise UsageError("only one of two parallel files can be the standard input")
    source, target = map(read_lines, inputs)
    number = 0
    for number, line in enumerate(source, 1):
        other = next(target, None)
        if other is None:
            lines = number + sum(1 for _ in source)
            raise _uneven(inputs, lines, number - 1)
        yield number, line, other
    surplus = sum(1 for _ in target)
    if surplus:
        raise _uneven(inputs, number, number + surplus)


def read_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    r"""The lines of a UTF-8 file, "-" for the standard input; .gz and .zst are unpacked.

    Only "\n" ends a line. A byte order mark at the start and one "\r" at a line's end are dropped.
    Raises UserError for a file that cannot be read and for bytes that are not UTF-8.
    """
    number = 0
    try:
        for number, raw in enumerate(raw_lines(path), 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            yield raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        wide = number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        what, origin = ("is UTF-16", "-f UTF-16 ") if wide else ("is not UTF-8", "")
        raise UserError(
            f"{path}, line {number} {what} (byte {error.start + 1}: 0x{raw[error.start]:02x}): "
            f"convert the file with iconv {origin}-t UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read after line {number}: {reason}") from error

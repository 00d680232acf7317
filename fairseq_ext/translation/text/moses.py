"""Text that was cut into tokens for other programs (Moses): noticed, and put together again.

A model that learns from "don &apos;t" and "high @-@ speed ." writes so too, and no reader wants it; a score
of such text is not comparable with any other.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import regex

from ext_common.cli import UserError
from fairseq_ext.translation.text.languages import language

# What is written for characters that mean something to Moses, and its hyphen within a word.
_ENTITY = regex.compile(r"&(?:apos|quot|amp|lt|gt|#91|#93|#124);|(?<=\w )@[-/]@(?= \w)")
# Not ! ? : and ;, before which French has a space.
_APART = regex.compile(r"\p{L} [.,](?: |$)")
_CUT = regex.compile(
    r"(?<=[\p{Han}\p{Hiragana}\p{Katakana}]) (?=[\p{Han}\p{Hiragana}\p{Katakana}])"
)
_MARK = regex.compile(r"\p{L} ?[.,](?: |$)")
TOO_MANY = 0.3
"""Share of the lines with a full stop or comma behind a word in which a space is before it."""
_ENTITIES = 0.01


def looks_tokenised(lines: Iterable[str], lang: str) -> str | None:
    """What shows that lines were tokenised, in words; None where nothing does."""
    count = apart = marked = entities = cut = 0
    unspaced = language(lang) in ("zh", "yue", "ja")
    shown = ""
    for line in lines:
        count += 1
        found = _ENTITY.search(line)
        entities += found is not None
        shown = shown or (found[0] if found else "")
        cut += unspaced and len(_CUT.findall(line)) > 2
        marked += _MARK.search(line) is not None
        apart += _APART.search(line) is not None
    if entities > _ENTITIES * count:
        return f"{entities / count:.0%} of the lines have {shown} or the like"
    if cut > TOO_MANY * count:
        return f"{cut / count:.0%} of the lines have spaces between words"
    if apart > TOO_MANY * marked:
        return f"{apart / marked:.0%} of the lines with a full stop or comma have a space before it"
    return None


def detokeniser(lang: str) -> Callable[[str], str]:
    """A line as Moses' tokenizer had it before: `don &apos;t` is don't, `high @-@ speed .` high-speed.

    UserError where the package sacremoses is not installed.
    """
    moses = _moses(language(lang))
    return lambda line: str(moses.detokenize(line.split(" ")))


@functools.cache
def _moses(lang: str) -> Any:
    try:
        from sacremoses import MosesDetokenizer
    except ImportError as error:
        raise UserError(
            "--detokenise needs the package sacremoses: install it with pip install 'fairseq-ext[moses]'"
        ) from error
    return MosesDetokenizer(lang=lang)

"""Lines that are too long for a model: cut where it hurts least, every character kept."""

import re
from collections.abc import Callable, Iterator

# Behind the end of a sentence (and the quotation marks and brackets that close with it); then behind
# a clause; then behind a space. ASCII marks count before a space only: 3.14 and 1,000 stay whole.
SENTENCE_END = re.compile(
    r"(?<=[。！？…])(?![。！？…”’」』）]|$)|(?<=[。！？][”’」』）])(?!$)|(?<=[.!?])(?=\s)|(?<=[.!?][\"')\]])(?=\s)"
)
_CUTS = [
    SENTENCE_END,
    re.compile(r"(?<=[，、；：])|(?<=[,;:])(?=\s)"),
    re.compile(r"(?<=\s)(?=\S)"),
]


def split_line(text: str, size: Callable[[str], int], limit: int) -> list[str]:
    """Parts of a text, in order, none of them larger than `limit` and none blank.

    size: what is limited, such as the number of pieces. Parts end at sentences where these fit, else at
    clauses, words, or between any two characters; joined they are the text, but for white space at
    their ends. A single character is never cut, whatever its size.
    """
    parts = (part.strip() for part in _split(text, lambda part: size(part.strip()), limit, 0))
    return [part for part in parts if part]


def _split(text: str, size: Callable[[str], int], limit: int, level: int) -> Iterator[str]:
    if len(text) <= 1 or size(text) <= limit:
        yield text
        return
    if level == len(_CUTS):
        middle = len(text) // 2
        pieces = [text[:middle], text[middle:]]
        for piece in pieces:
            yield from _split(piece, size, limit, level)
        return
    packed, total = "", 0
    for piece in _CUTS[level].split(text):
        length = size(piece)
        if packed and total + length > limit:
            yield from _split(packed, size, limit, level + 1)
            packed, total = "", 0
        packed, total = packed + piece, total + length
    # the sizes of pieces do not quite add up to that of their sum, so every part is measured again
    yield from _split(packed, size, limit, level + 1)

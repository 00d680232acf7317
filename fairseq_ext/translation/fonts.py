"""Which installed fonts can draw a text: a picture must not show boxes where Chinese should be."""

import functools

DEFAULT = "DejaVu Sans"  # comes with matplotlib
# Has a picture of a box for every character.
_NO_FONT = "LastResort"


def fonts_for(text: str) -> tuple[list[str], frozenset[str]]:
    """(font families, best first; characters that no installed font has).

    matplotlib takes each character from the first family of the list that has it.
    """
    families, missing = [DEFAULT], _needed(text) - _characters(_default_file())
    while missing:
        best = max(_candidates(), key=lambda one: len(missing & _characters(one[1])), default=None)
        if best is None or not missing & _characters(best[1]):
            break
        families.append(best[0])
        missing -= _characters(best[1])
    return families, missing


def _needed(text: str) -> frozenset[str]:
    return frozenset(c for c in text if not c.isspace())


def _default_file() -> str:
    from matplotlib import font_manager

    return font_manager.findfont(DEFAULT)


def _candidates() -> list[tuple[str, str]]:
    """(family, file) of the installed fonts in their regular weight first, sorted by name."""
    from matplotlib import font_manager

    found = {
        (font.weight not in (400, "normal", "regular"), font.name, font.fname)
        for font in font_manager.fontManager.ttflist
        if _NO_FONT not in font.name.replace(" ", "") and font.style == "normal"
    }
    return [(name, file) for _, name, file in sorted(found)]


@functools.cache
def _characters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # removed or damaged since matplotlib listed it
        return frozenset()

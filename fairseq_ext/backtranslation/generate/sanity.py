"""Whether a model writes text at all, asked of the first lines before a night is spent on the others.

An upgrade of a library, a wrong tokenizer or tied weights that came untied turn a good model into one that
writes garbage and says nothing. Only that is stopped: a model that is merely weak passes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice

import regex

from ext_common.cli import UserError
from fairseq_ext.translation.prepare.filters import longest_loop
from fairseq_ext.translation.text.normalise import script_share, unit

LINES = 20
# More than this share of the lines is garbage, not bad luck; of fewer than FEW lines, all of them.
GARBAGE = 0.5
FEW = 5
# Different lines that become one and the same: nearly all, since a weak model has a favourite too.
SAME = 0.8
_LEFTOVER = regex.compile(r"<unk>|<pad>|</?s>|\u2581|@@(?= |$)|>>[^<> ]+<<")
_SHOWN = 60


def check(
    translate: Callable[[list[str]], list[str]],
    lines: Sequence[str],
    target_lang: str,
    where: str,
) -> None:
    """UserError where the first lines that are not empty become garbage.

    translate: by greedy search. where: what the message calls the model.
    """
    sources = list(islice((line for line in lines if line.strip()), LINES))
    if not sources:
        return
    outputs = translate(sources)
    if len(outputs) != len(sources):
        raise ValueError(f"{len(sources)} lines were translated to {len(outputs)}")
    seen = faults(sources, outputs, target_lang)
    if seen is None:
        return
    what, bad = seen
    examples = " and ".join(f"{_short(sources[n])} -> {_short(outputs[n])}" for n in bad[:2])
    raise UserError(
        f"{where} writes garbage: {what} for {len(bad)} of {len(sources)} lines ({examples}): check that"
        " these lines are in the language it reads, or give another model"
    )


def faults(
    sources: Sequence[str], outputs: Sequence[str], target_lang: str
) -> tuple[str, list[int]] | None:
    """What is wrong with most outputs, and with which; None where most are text."""
    pairs = list(zip(sources, outputs, strict=True))
    found = {
        n: fault
        for n, (source, output) in enumerate(pairs)
        if (fault := fault_of(source, output, target_lang))
    }
    few = len(pairs) < FEW
    if len(found) == len(pairs) or (not few and len(found) > GARBAGE * len(pairs)):
        names = Counter(found.values())
        # the commonest first, so that the examples show it
        order = sorted(found, key=lambda n: -names[found[n]])
        return " or ".join(name for name, _ in names.most_common()), order
    distinct = dict(reversed(pairs))
    output, times = Counter(distinct.values()).most_common(1)[0]
    if len(distinct) >= FEW and times > SAME * len(distinct):
        return "the same output", [n for n, (_, one) in enumerate(pairs) if one == output]
    return None


def fault_of(source: str, output: str, target_lang: str) -> str | None:
    """What makes an output no translation whatever the source means; None for what may be one."""
    if not output.strip():
        return "no output"
    if not set(_LEFTOVER.findall(output)) <= set(_LEFTOVER.findall(source)):
        return "output with pieces or tags left in"
    if _loops(output, target_lang) and not _loops(source, ""):
        return "output that repeats itself"
    if any(map(str.isalpha, source)):
        if not any(map(str.isalpha, output)):
            return "output without a letter"
        if script_share(output, target_lang) < 0.5:
            return f"output that is not in the script of {target_lang}"
    return None


def _loops(text: str, lang: str) -> bool:
    """Whether half of a text or more is one phrase said again and again."""
    words = text.split()
    characters = [c for c in text if not c.isspace()]
    times, _ = longest_loop(characters, 0.5)
    if times >= (4 if unit(lang) == "characters" else 8):
        return True
    return longest_loop(words, 0.5)[0] >= 4


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")

"""Back-translation: monolingual text becomes training data, with a model that translates the other way."""

from collections.abc import Iterable
from typing import Any

__all__ = ["back_translate"]


def back_translate(
    lines: Iterable[str],
    model: Any,
    mode: str = "beam",
    mode_options: Any = None,
    seed: int = 1,
    round: int = 1,
    **options: Any,
) -> list[str]:
    """The synthetic source of each line, "" where there is none.

    model: a checkpoint ("a.pt", "a.pt:b.pt"), a Hugging Face or CTranslate2 folder, or what
    `backends.open_model` returned, which keeps it for the next call. mode, mode_options: of
    `modes.MODES`. options: fields of `options.ModelOptions`. The draws of a line come from (seed, number of
    the line from 1, round) only. UserError, in one sentence, where a model cannot be used.
    """
    from fairseq_ext.backtranslation.models.backends import ReverseModel, open_model
    from fairseq_ext.backtranslation.models.options import ModelOptions
    from fairseq_ext.backtranslation.modes import make_mode

    if isinstance(lines, str):
        raise TypeError("lines must be a list of lines, not one str: give [line]")
    chosen = make_mode(mode, mode_options)
    if not isinstance(model, ReverseModel):
        model = open_model(model, ModelOptions(**options))
    elif options:
        raise TypeError("a model that is open has its options: give none")
    lines = list(lines)
    found = model.translate(
        model.encode(lines), range(1, len(lines) + 1), chosen, seed=seed, round=round
    )
    return [best.text for best, *_ in found]

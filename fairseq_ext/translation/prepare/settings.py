"""What prepare works with once options, defaults and --vocab-from have been brought together."""

from dataclasses import dataclass
from typing import Any

from ext_common.cli import UsageError, UserError
from ext_common.manifest import sha256_file
from fairseq_ext.translation.corpus import Corpus, with_conversion
from fairseq_ext.translation.text import normalise as text
from fairseq_ext.translation.text.normalise import CHINESE, CONVENTIONS, language

HELD_OUT = 0.02


@dataclass(frozen=True)
class Settings:
    """Options with what --vocab-from and the defaults decide filled in.

    base: the corpus of --vocab-from or None; fractions: of the pairs for valid and test.
    """

    base: Corpus | None
    normalise: str
    opencc: str | None
    joint: bool
    extra_symbols: tuple[str, ...]
    fractions: dict[str, float]

    @property
    def convention(self) -> str:
        return with_conversion(self.normalise, self.opencc)

    def fingerprint(self) -> dict[str, Any] | None:
        """What of --vocab-from decides the result."""
        if self.base is None:
            return None
        models = {lang: self.base.spm[lang]["sha256"] for lang in sorted(self.base.languages)}
        held_out = {
            f"{name}.{lang}": sha256_file(self.base.text(name, lang))
            for name in held_out_splits(self.base)
            for lang in sorted(self.base.languages)
        }
        return {"models": models, "held_out": held_out}


def settle(options: Any) -> Settings:
    """The settings of options; UserError where they contradict --vocab-from or each other."""
    base = Corpus.open(options.vocab_from) if options.vocab_from else None
    fractions = {}
    for name in ("valid", "test"):
        fraction = getattr(options, f"{name}_fraction")
        given = getattr(options, name)
        fractions[name] = (0 if given or base else HELD_OUT) if fraction is None else fraction
    if base is None:
        normalise, opencc = options.normalise, options.opencc
        joint, symbols = options.joint, tuple(options.extra_symbols)
    else:
        check_base(base, options)
        normalise, opencc = base.normalise, base.opencc
        joint, symbols = base.joint, base.extra_symbols
    CONVENTIONS.get(normalise)
    if opencc:
        text.opencc(opencc)
        if not any(language(lang) in CHINESE for lang in options.languages):
            raise UsageError("--opencc converts Chinese, and neither language is zh or yue")
    return Settings(base, normalise, opencc, joint, symbols, fractions)


def check_base(base: Corpus, options: Any) -> None:
    """UserError where options are not those of the folder that gives the vocabulary."""
    if set(base.languages) != set(options.languages):
        raise UserError(
            f"{base.path} is of {' and '.join(base.languages)}, not of "
            f"{' and '.join(options.languages)}: its models cannot be used"
        )
    default = type(options)(*options.languages)
    models = ("spm_kind", "spm_size", "character_coverage", "joint", "extra_symbols")
    for name in ("normalise", "opencc", *models):
        value = getattr(options, name)
        own = getattr(base, name, None)
        own = list(own) if isinstance(own, tuple) else own
        if value not in (getattr(default, name), own):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag} belongs to the folder that gives the vocabulary, {base.path}: leave it out"
            )


def held_out_splits(corpus: Corpus) -> list[str]:
    return [name for name in corpus.splits if not name.startswith("train")]

"""Options of scripts/backtranslate.py, and what of them is checked before anything is trained."""

import hashlib
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Optional

from recipe_steps import Recipe, read_recipe
from steps import ROOT, relative

from ext_common.cli import UserError
from ext_common.manifest import sha256_file

CONFIGS = ROOT / "configs" / "backtranslation"
# In place of a value: what generate or assemble takes by itself. "none" means something to them.
OWN = "default"
SAMPLED = 2000


@dataclass
class BacktranslateOptions:
    """How to back-translate. What is not given is what generate and assemble take by themselves."""

    source_lang: str = field(metadata={"help": "language that the forward model reads: en"})
    target_lang: str = field(metadata={"help": "language that it writes, that of MONO: zh"})
    mode: str = field(
        default=OWN,
        metadata={
            "help": "how models write synthetic text: beam, noised-beam, sampling, topk, topp "
            "(generate --help); default: generate's"
        },
    )
    mode_options: Optional[str] = field(
        default=None, metadata={"help": "options of the mode, such as k=10,temperature=0.9"}
    )
    backend: Optional[str] = field(
        default=None,
        metadata={"help": "what decodes synthetic text (generate --help): ctranslate2 is faster"},
    )
    tag: str = field(
        default=OWN,
        metadata={
            "help": "extra symbol of DATA put before synthetic sources, none: no tag; default: assemble's"
        },
    )
    upsample: Optional[int] = field(
        default=None, metadata={"help": "copies of the bitext in a mixture; none: as assemble does"}
    )
    filters: str = field(
        default=OWN,
        metadata={
            "help": "what removes synthetic pairs (assemble --help), none: nothing; default: assemble's"
        },
    )
    rounds: int = field(default=1, metadata={"help": "rounds; above 1 with --mono-source"})
    mono_source: Optional[str] = field(
        default=None, metadata={"help": "text of the source language, for rounds after the first"}
    )
    reverse: Optional[str] = field(
        default=None,
        metadata={
            "help": "reverse model for the first round, none is trained then: checkpoint, folder of "
            "Hugging Face or CTranslate2"
        },
    )
    prefix: Optional[str] = field(
        default=None,
        metadata={"help": "put before each line where --reverse wants one, such as >>eng<<"},
    )
    reverse_config: Optional[str] = field(
        default=None,
        metadata={"help": "recipe of reverse models; none: configs/backtranslation/reverse.yaml"},
    )
    forward_config: Optional[str] = field(
        default=None,
        metadata={"help": "recipe of forward models; none: configs/backtranslation/forward.yaml"},
    )
    average: int = field(
        default=5, metadata={"help": "checkpoints of a training, its last ones, that are averaged"}
    )
    baseline: bool = field(
        default=False,
        metadata={
            "help": "also train a forward model on DATA alone, for as many updates, and say whether the "
            "difference is significant"
        },
    )
    seed: int = field(default=1, metadata={"help": "seed of trainings, draws and samples"})
    fresh: bool = field(default=False, metadata={"help": "start over"})

    def __post_init__(self):
        for name in ("rounds", "average", "upsample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        if self.rounds > 1 and not self.mono_source:
            raise ValueError("--rounds above 1 needs --mono-source, text of the source language")
        if self.mono_source and self.rounds == 1:
            raise ValueError("--mono-source is for rounds after the first: give --rounds 2 or more")
        if self.prefix and not self.reverse:
            raise ValueError("--prefix belongs to --reverse")
        if self.source_lang == self.target_lang:
            raise ValueError(f"--source-lang and --target-lang are both {self.source_lang}")


class Plan(NamedTuple):
    """What was checked before anything is done.

    subset: the split that is scored; model_flags: what generate must be told of --reverse.
    """

    data: Path
    mono: Path
    subset: str
    reverse: Recipe
    forward: Recipe
    model_flags: list
    options: BacktranslateOptions


def check(data, mono, options):
    """(Plan, {what: hash} of all that is read). Raises UserError."""
    from fairseq_ext.backtranslation.assemble.__main__ import (
        AssembleOptions,
        make_chain,
        open_bitext,
    )
    from fairseq_ext.backtranslation.modes import make_mode

    corpus, languages = open_bitext(Path(data)), (options.source_lang, options.target_lang)
    if set(corpus.languages) != set(languages):
        raise UserError(
            f"{data} is of {' and '.join(corpus.languages)}, not of {' and '.join(languages)}: give its "
            "languages as --source-lang and --target-lang"
        )
    if "valid" not in corpus.splits:
        raise UserError(f"{data} has no valid, which training needs: prepare it with one")
    texts = {"MONO": (mono, languages[1]), "--mono-source": (options.mono_source, languages[0])}
    texts = {what: one for what, one in texts.items() if one[0]}
    for path, lang in texts.values():
        check_text(path, lang, corpus)
    make_mode(mode_of(options), options.mode_options)
    mixing = {name: getattr(options, name) for name in ("tag", "filters")}
    mixing = AssembleOptions(**{name: value for name, value in mixing.items() if value != OWN})
    if mixing.tag != "none":
        for lang in languages if options.rounds > 1 else languages[:1]:
            corpus.codec(lang).symbol_id(mixing.tag)
    if "round_trip" in make_chain(mixing, languages).filters:
        raise UserError(
            "the filter round_trip needs a forward model, which there is not before the end: leave it out of "
            "--filters"
        )
    recipes = [
        read_recipe(Path(path or CONFIGS / f"{kind}.yaml"), options.average)
        for kind, path in (("reverse", options.reverse_config), ("forward", options.forward_config))
    ]
    described, flags = check_model(options)
    files = [corpus.path / "corpus.json", *sorted((corpus.path / "text").iterdir())]
    inputs = {"DATA": digest(files), "the recipes": digest([f for r in recipes for f in r.files])}
    inputs |= {what: sha256_file(path) for what, (path, _) in texts.items()}
    inputs |= {"the model of --reverse": described["sha256"]} if described else {}
    subset = "test" if "test" in corpus.splits else "valid"
    return Plan(relative(data), relative(mono), subset, *recipes, flags, options), inputs


def check_text(path, lang, corpus):
    """UserError where there is no text, or by its letters none of `lang`."""
    from fairseq_ext.backtranslation.assemble.checks import LEAST, typical_share
    from fairseq_ext.backtranslation.generate import mono as monolingual
    from fairseq_ext.translation.text.normalise import read_lines

    if path == "-":
        raise UserError("MONO must be a file: what stops and continues cannot read a pipe again")
    monolingual.check(path)
    share, usual = (
        typical_share(islice(read_lines(one), SAMPLED), lang)
        for one in (path, corpus.text("train", lang))
    )
    if share < LEAST * usual:
        raise UserError(
            f"{path}: {share:.0%} of the letters of a typical line are of {lang}, in the bitext "
            f"{usual:.0%}: give text of that language"
        )


def mode_of(options):
    from fairseq_ext.backtranslation.generate.__main__ import GenerateOptions

    taken = GenerateOptions.__dataclass_fields__["mode"].default
    return taken if options.mode == OWN else options.mode


def check_model(options):
    """(what is known of --reverse, flags that generate needs for it); UserError for another direction."""
    if not options.reverse:
        return None, []
    from fairseq_ext.backtranslation.models.backends import ModelOptions, describe_model
    from fairseq_ext.translation.text.normalise import language

    known = {"backend": options.backend} if options.backend else {}
    described = describe_model(options.reverse, ModelOptions(prefix=options.prefix, **known))
    flags = ["--prefix", options.prefix] if options.prefix else []
    wanted = {"source": options.target_lang, "target": options.source_lang}
    for side, lang in wanted.items():
        said = described[f"{side}_lang"]
        if not said:
            flags += [f"--model-{side}", lang]
        elif language(said) != language(lang):
            raise UserError(
                f"{options.reverse} translates from {described['source_lang']} to "
                f"{described['target_lang']}: give as --reverse a model that translates from "
                f"{wanted['source']} to {wanted['target']}"
            )
    return described, flags


def given(options, *names):
    """Flags of options that were given."""
    flags = []
    for name in names:
        value = getattr(options, name)
        if value not in (None, OWN):
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def digest(files):
    """One hash for several files, by their names and content."""
    parts = "\n".join(f"{file.name} {sha256_file(file)}" for file in files)
    return hashlib.sha256(parts.encode()).hexdigest()

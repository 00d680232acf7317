"""From a bitext to translations with a score: English to Chinese, or your own languages.

bash scripts/quickstart.sh translation                           sentences made from CLDR: no download
bash scripts/quickstart.sh translation --data pairs.tsv          your own, source<TAB>target
bash scripts/quickstart.sh translation --data a.de a.en --source-lang de --target-lang en --mono more.en

Then back-translation: a second model learns from the bitext and from text of the target language alone, for
which a model of the other direction writes the source; both are scored. CLDR gives such text, for your own
pairs it is --mono.

Shows each command as it runs it, so that you can run it yourself with other options. Called again
it continues where it was stopped, skips what is done, and trains on where --updates is higher. At the
end it translates what you type, where somebody can type.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from backtranslation import back_translate, compare
from steps import ROOT, Steps, relative, show_command
from translation_steps import train, translate

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from fairseq_ext.translation.text.normalise import language, read_lines

OUT = "quickstart-translation"
OWNED = (
    "corpus data checkpoints train.log learning_curve.png test.out test.out.manifest.json "
    "scores.json attention.svg backtranslation"
).split()
SAMPLES = 6


@dataclass
class QuickstartOptions:
    """What to run it on."""

    data: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "tab-separated file (source, target), or two files with the same number of lines, the "
            "source first; none: sentences made from CLDR"
        },
    )
    source_lang: str = field(default="en", metadata={"help": "language of the source of --data"})
    target_lang: str = field(default="zh", metadata={"help": "language of the target of --data"})
    out: Optional[str] = field(
        default=None,
        metadata={"help": f"folder to write; none: {OUT}, and {OUT}-NAME with --data NAME"},
    )
    updates: int = field(default=1200, metadata={"help": "updates to train for"})
    mono: Optional[str] = field(
        default=None,
        metadata={
            "help": "text of the target language, a sentence a line, for back-translation beside --data"
        },
    )
    back_translation: bool = field(
        default=True,
        metadata={
            "help": "back-translate and train a second model; beside --data only with --mono"
        },
    )
    fresh: bool = field(default=False, metadata={"help": "start over"})

    def __post_init__(self):
        if self.updates < 1:
            raise ValueError(f"--updates must be at least 1, got {self.updates}")
        if self.data is not None and len(self.data) > 2:
            raise ValueError(f"--data takes one file or two, got {len(self.data)}")
        if self.data is None and (self.source_lang, self.target_lang) != ("en", "zh"):
            raise ValueError(
                "--source-lang and --target-lang belong to --data: CLDR gives en and zh here"
            )
        if self.mono and self.data is None:
            raise ValueError("--mono belongs to --data: CLDR gives its own text")
        if self.mono and not self.back_translation:
            raise ValueError("--mono is for back-translation: leave out --no-back-translation")

    @property
    def languages(self):
        return self.source_lang, self.target_lang


def main(argv):
    """The command."""
    parser = Parser(prog="bash scripts/quickstart.sh translation", description=__doc__)
    described = QuickstartOptions.__dataclass_fields__["data"].metadata["help"]
    parser.add_argument("--data", nargs="+", metavar="FILE", help=described)
    add_dataclass(parser, QuickstartOptions, skip=["data"])
    options = from_args(QuickstartOptions, parser.parse_args(argv))
    try:
        quickstart(options)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 130


def quickstart(options):
    """All steps. Raises UserError."""
    for path in options.data or ():
        if not Path(path).is_file():
            raise UserError(f"{path} is not a file: give the file(s) with the sentence pairs")
    if options.mono and not Path(options.mono).is_file():
        raise UserError(f"{options.mono} is not a file: give text of {options.target_lang}")
    files = options.data and [os.path.abspath(path) for path in options.data]
    out = Path(options.out or default_out(files))
    job = {
        "quickstart": "translation",
        "data": files and " ".join(files),
        "languages": f"{options.source_lang}-{options.target_lang}",
    }
    if files and out.resolve() in [Path(path).resolve() for path in files]:
        raise UsageError("--out is the file with the sentence pairs: give a folder to write")
    with Steps(relative(out), job, OWNED, options.fresh) as steps:
        print("To run the commands below yourself: source .venv/bin/activate")
        data = prepare(steps, options)
        checkpoint = train(steps, data, options)
        translate(steps, data, checkpoint, options)
        pictures(steps, data, checkpoint, options)
        mono, second = monolingual(steps, options), None
        if mono:
            second = back_translate(steps, data, mono, options)
        closing(steps, data, checkpoint, second, options)
    type_and_translate(checkpoint, options)


def default_out(files):
    return f"{OUT}-{Path(files[0]).name.split('.')[0]}" if files else OUT


def monolingual(steps, options):
    """The text to back-translate, None for no back-translation."""
    if not options.back_translation:
        return None
    if options.data is None:
        return steps.folder / "corpus" / "mono.zh"
    return relative(options.mono) if options.mono else None


def prepare(steps, options):
    """The prepared folder."""
    data = steps.folder / "data"
    languages = ["--source-lang", options.source_lang, "--target-lang", options.target_lang]
    command = ["python", "-m", "fairseq_ext.translation.prepare"]
    if options.data:
        # Of the user's own files only the command itself knows whether they are still the same.
        command += [*(relative(path) for path in options.data), data, *languages]
        prepare_step(steps, command, [], data, always=True)
        return data
    corpus = steps.folder / "corpus"
    files = {split: corpus / f"{split}.tsv" for split in ("train", "valid", "test")}
    steps.do(
        "make sentence pairs from CLDR",
        ["python", relative(ROOT / "scripts" / "cldr_corpus.py"), corpus],
        outputs=[corpus / "manifest.json", corpus / "mono.zh", *files.values()],
    )
    command += [
        files["train"],
        data,
        *languages,
        "--valid",
        files["valid"],
        "--test",
        files["test"],
    ]
    # Sentences here are few and short: some of train hold most of one of test, with another value.
    command += ["--on-leak", "remove", "--spm-size", "1000"]
    prepare_step(steps, command, list(files.values()), data)
    return data


def prepare_step(steps, command, inputs, data, always=False):
    try:
        outputs = [data / "corpus.json"]
        steps.do("prepare the bitext", command, inputs=inputs, outputs=outputs, always=always)
    except UserError as error:
        raise UserError(f"{error}; if the files have changed, start over with --fresh") from None


def pictures(steps, data, checkpoint, options):
    """The learning curve, and where the model looks in the first sentence of test."""
    log, curve = steps.folder / "train.log", steps.folder / "learning_curve.png"
    command = ["python", "-m", "ext_common.plots", log, curve]
    steps.do("draw the learning curve", command, inputs=[log], outputs=[curve])
    # An svg: its letters are drawn by the viewer's fonts, which have Chinese where ours may not.
    picture = steps.folder / "attention.svg"
    sentence = next(read_lines(data / "text" / f"test.{options.source_lang}"))
    command = ["python", "-m", "fairseq_ext.translation.attention", picture, "--path", checkpoint]
    command += ["--source", sentence]
    steps.do("draw the attention", command, inputs=[checkpoint], outputs=[picture])


def closing(steps, data, checkpoint, second, options):
    """Samples, the scores with what they mean, where everything is, and what to do next.

    second: folder of what back-translation made, or None.
    """
    folder = steps.folder
    test = [
        data / "text" / f"test.{options.source_lang}",
        data / "text" / f"test.{options.target_lang}",
    ]
    lines = list(zip(*map(list, map(read_lines, [*test, folder / "test.out"])), strict=True))
    print("\n== some of test")
    for source, reference, output in lines[:: max(1, len(lines) // SAMPLES)][:SAMPLES]:
        mark = "right" if output == reference else f"reference: {reference}"
        print(f"{source}\n    {output}   ({mark})")
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    bleu, chrf = scores["metrics"]["bleu"], scores["metrics"]["chrf"]
    low, high = bleu["interval"]
    print(
        f"\n== result\nBLEU {bleu['value']:.1f} (95 % interval {low:.1f} to {high:.1f}, tokenizer "
        f"{scores['tokenizer']}), chrF {chrf['value']:.1f}, on {scores['lines']} sentences of test"
    )
    print(meaning(folder, data, lines) if options.data is None else OWN_MEANING)
    if second:
        print(compare(scores, second, options))
    files = {
        "translations": folder / "test.out",
        "scores": folder / "scores.json",
        "pictures": f"{folder / 'learning_curve.png'}  {folder / 'attention.svg'}",
        "model": checkpoint,
    }
    if second:
        files["back-translation"] = second
    print()
    for name, place in files.items():
        print(f"{name:16} {place}")
    print("\n== next")
    for text, command in next_commands(options, checkpoint):
        print(f"# {text}\n{show_command(command)}")


OWN_MEANING = (
    "Nothing of test occurs in train on either side. A model this small, trained this shortly, is a "
    "beginning: see\ndocs/translation.md for a real recipe."
)


def meaning(folder, data, lines):
    """What a score on generated text says: exact shares of the kinds of lines."""
    kinds = [line.split("\t")[2] for line in read_lines(folder / "corpus" / "test.tsv")]
    # The number of the line in test.tsv of each line of test.
    kept = [kinds[int(number) - 1] for number in read_lines(data / "text" / "test.ids")]
    right = {True: [], False: []}
    for (_, reference, output), kind in zip(lines, kept, strict=True):
        right[kind == "name"].append(output == reference)
    names, values = right[True], right[False]
    return (
        f"This is generated text, a few sentences with other values: the figure shows that all parts work "
        f"and says\nnothing about real text. Values and names of test are in no line of train. Word for word "
        f"right are\n{sum(values)} of {len(values)} sentences with dates, times, numbers and amounts, which "
        f"can be worked out from their parts, and\n{sum(names)} of {len(names)} with names of countries, "
        f"languages and currencies, which nobody can know who never saw them."
    )


def next_commands(options, checkpoint):
    """(what it is for, command) to go on with."""
    quickstart = ["bash", relative(ROOT / "scripts" / "quickstart.sh"), "translation"]
    chosen = ["--data", *options.data] if options.data else []
    if options.data:
        chosen += ["--source-lang", options.source_lang, "--target-lang", options.target_lang]
    if options.mono:
        chosen += ["--mono", options.mono]
    if not options.back_translation:
        chosen.append("--no-back-translation")
    if options.out:
        chosen += ["--out", options.out]
    translate = ["python", "-m", "fairseq_ext.translation.translate"]
    return [
        ("train on", [*quickstart, *chosen, "--updates", 3 * options.updates]),
        ("translate a file of yours", [*translate, "INPUT", "OUTPUT", "--path", checkpoint]),
        ("translate what you type", [*translate, "-", "-", "--path", checkpoint]),
        ("your own sentence pairs", [*quickstart, "--data", "PAIRS.tsv"]),
    ]


def type_and_translate(checkpoint, options):
    """Translate lines from the terminal until its end; nothing where there is none."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history for input()
    print(f"\n== type a line of {language(options.source_lang)}, Ctrl-D ends")
    from fairseq_ext.translation.decode.translator import Translator

    translator = Translator.from_checkpoint([checkpoint])
    while True:
        try:
            line = input(f"{options.source_lang}> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        print(f"{options.target_lang}> {translator([line])[0]}")


if __name__ == "__main__":
    run(main)

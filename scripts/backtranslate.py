"""From a bitext and monolingual text to a forward model that was trained on both, in one command.

bash scripts/backtranslate.sh DATA mono.zh OUT --source-lang en --target-lang zh
bash scripts/backtranslate.sh DATA mono.zh OUT --source-lang en --target-lang zh --mode beam --baseline
bash scripts/backtranslate.sh DATA mono.zh OUT --source-lang en --target-lang zh --rounds 2 \\
    --mono-source mono.en

DATA is a folder of fairseq_ext.translation.prepare, MONO text of the target language, a sentence a line. A
reverse model (target to source) is trained on DATA and writes a source for each line of MONO (generate);
what passes the filters is mixed with DATA (assemble), and a forward model is trained on the mixture. It
translates test of DATA, and is scored.

With --rounds N, every round but the first begins with --mono-source, text of the source language: the
forward model of the round before writes its targets, and on these and DATA a new reverse model is trained.

OUT gets, for each round,
  roundN/reverse, roundN/forward   checkpoints, train.log and average.pt, the model that is used
  roundN/synthetic, roundN/data    what generate and assemble wrote
  roundN/test.LANG, scores.json    translations and their scores
and, from the second round, synthetic-for-reverse and data-for-reverse.

Shows each command as it runs it. Called again it continues where it was stopped, at Ctrl-C, kill -9 or
power cut, and skips what is done: the synthetic text and the mixture are the same bytes as without a stop.
More --rounds, or --baseline, can be asked for later.
"""

import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "quickstart"))
from recipe_options import BacktranslateOptions, check, given
from recipe_steps import average_step, train_step, translate_and_score
from steps import Steps, relative

from ext_common.cli import Parser, UserError, add_dataclass, from_args, run


def main(argv):
    """The command."""
    parser = Parser(prog="bash scripts/backtranslate.sh", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="prepared bitext")
    parser.add_argument("mono", metavar="MONO", help="text of the target language")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_dataclass(parser, BacktranslateOptions)
    args = parser.parse_args(argv)
    options = from_args(BacktranslateOptions, args)
    try:
        backtranslate(args.data, args.mono, args.out, options)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 130


def backtranslate(data, mono, out, options):
    """All rounds. Raises UserError."""
    plan, inputs = check(data, mono, options)
    owned = [path.name for path in Path(out).glob("round*") if re.fullmatch(r"round\d+", path.name)]
    job = describe_job(plan)
    with Steps(relative(out), job, [*owned, "baseline"], options.fresh, flag="OUT") as steps:
        check_unchanged(steps, inputs)
        print("To run the commands below yourself: source .venv/bin/activate")
        do_rounds(steps, plan)
        print(closing(steps.folder, plan))


def do_rounds(steps, plan):
    """Every step that is not done."""
    options = plan.options
    source, target = options.source_lang, options.target_lang
    if options.baseline:
        folder = steps.folder / "baseline"
        model = train(steps, plan, "baseline", folder / "forward", plan.data, plan.forward, source)
        translate_and_score(
            steps, "baseline", folder, model, plan.data, plan.subset, target, source
        )
    reverse, flags = options.reverse and as_typed(options.reverse), plan.model_flags
    for number in range(1, options.rounds + 1):
        name, folder = f"round {number}", steps.folder / f"round{number}"
        if number > 1:
            place = folder / "synthetic-for-reverse", folder / "data-for-reverse"
            mixture = mix(
                steps, plan, f"{name}, {target}", relative(options.mono_source), model, place
            )
            reverse = train(steps, plan, name, folder / "reverse", mixture, plan.reverse, target)
            flags = []
        elif not reverse:
            reverse = train(steps, plan, name, folder / "reverse", plan.data, plan.reverse, target)
        place = folder / "synthetic", folder / "data"
        mixture = mix(steps, plan, f"{name}, {source}", plan.mono, reverse, place, flags)
        model = train(steps, plan, name, folder / "forward", mixture, plan.forward, source)
        baseline = options.baseline and steps.folder / "baseline" / f"{plan.subset}.{target}"
        translate_and_score(
            steps, name, folder, model, plan.data, plan.subset, target, source, baseline
        )


def train(steps, plan, name, folder, data, recipe, source):
    """The averaged model of a training that reads `source`."""
    options = plan.options
    languages = options.source_lang, options.target_lang
    direction = languages if source == languages[0] else languages[::-1]
    kind = folder.name
    title = f"{name}: train the {kind} model, {direction[0]} to {direction[1]}"
    train_step(steps, title, folder, data, recipe, direction, options.seed)
    return average_step(steps, f"{name}: average the {kind} model", folder, options.average)


def mix(steps, plan, name, mono, model, place, model_flags=()):
    """The mixture of DATA with what `model` writes for `mono`; place: of synthetic text and mixture."""
    options, (synthetic, mixture) = plan.options, place
    number = re.search(r"round (\d+)", name)[1]
    command = ["python", "-m", "fairseq_ext.backtranslation.generate", mono, synthetic]
    command += ["--model", model, "--guard", plan.data, *model_flags]
    command += [*given(options, "mode", "mode_options", "backend"), "--round", number]
    command += ["--seed", options.seed]
    files = [model] if isinstance(model, Path) and model.is_file() else []
    outputs = [synthetic / "manifest.json"]
    steps.do(f"{name}: write synthetic text", command, inputs=files, outputs=outputs)
    command = [
        "python",
        "-m",
        "fairseq_ext.backtranslation.assemble",
        plan.data,
        synthetic,
        mixture,
    ]
    command += [*given(options, "tag", "upsample", "filters"), "--seed", options.seed]
    inputs, outputs = [synthetic / "manifest.json"], [mixture / "manifest.json"]
    steps.do(f"{name}: mix it with the bitext", command, inputs=inputs, outputs=outputs)
    return mixture


def closing(folder, plan):
    """The table of scores and where everything is, as text."""
    options = plan.options
    names = ["baseline"] if options.baseline else []
    names += [f"round{number}" for number in range(1, options.rounds + 1)]
    scores = {
        name: json.loads((folder / name / "scores.json").read_text(encoding="utf-8"))
        for name in names
    }
    first = scores[names[0]]
    lines = [
        "\n== result",
        f"{options.source_lang} to {options.target_lang}, {first['lines']:,} lines of {plan.subset} of "
        f"{plan.data}, BLEU with the tokenizer {first['tokenizer']}",
        "                BLEU      95 %            chrF",
    ]
    for name, one in scores.items():
        bleu, chrf = one["metrics"]["bleu"], one["metrics"]["chrf"]
        low, high = bleu["interval"]
        row = f"{name:12} {bleu['value']:7.2f}   {low:5.2f} to {high:5.2f}   {chrf['value']:6.2f}"
        against = (one.get("comparisons") or {}).get("bleu")
        if against:
            row += f"   BLEU {against['difference']:+.2f}, p = {against['bootstrap_p']:.4f}"
        lines.append(row)
    if plan.subset == "valid":
        lines.append("DATA has no test: checkpoints were chosen on valid, so figures are too high")
    last = folder / names[-1]
    places = {
        "forward model": last / "forward" / "average.pt",
        "synthetic text": last / "synthetic",
        "mixture": last / "data",
        "translations": last / f"{plan.subset}.{options.target_lang}",
        "scores": last / "scores.json",
    }
    if (last / "reverse").exists():
        places["reverse model"] = last / "reverse" / "average.pt"
    return "\n".join([*lines, "", *(f"{what:15} {where}" for what, where in places.items())])


def check_unchanged(steps, inputs):
    """UserError where a file is another one than when OUT was begun."""
    before = steps.record.setdefault("inputs", {})
    for what, value in inputs.items():
        if before.setdefault(what, value) != value:
            raise UserError(
                f"{what} is not what {steps.folder} was begun with: give another OUT, or start over "
                "with --fresh"
            )
    steps.save()


def describe_job(plan):
    """What must be the same when OUT is continued."""
    options = plan.options
    names = "mode mode_options backend tag upsample filters prefix seed".split()
    reverse = options.reverse and os.path.abspath(options.reverse)
    return {
        "backtranslation": f"{options.source_lang}-{options.target_lang}",
        "data": os.path.abspath(plan.data),
        "mono": os.path.abspath(plan.mono),
        "options": " ".join(map(str, given(options, *names))),
        "reverse": reverse and f"--reverse {reverse}",
    }


def as_typed(model):
    """A model as generate is told of it: a path where it is one, else a name or a.pt:b.pt."""
    return relative(model) if os.path.exists(model) else model


if __name__ == "__main__":
    run(main)

"""The back-translation step of the translation quickstart: a second model, from more text of the target."""

import json

from recipe_steps import translate_and_score
from translation_steps import train

from ext_common.cli import UserError

# Enough for the reverse model to write sentences; the same whatever --updates is from here on, so that a
# model that trains on goes on with the same synthetic text.
REVERSE_UPDATES = 300
# After fewer a model says one word over and over, which `generate` refuses at its start.
LEAST_UPDATES = 100


def back_translate(steps, data, mono, options):
    """The folder of what was made: reverse model, synthetic text, mixture, second model and its score.

    The second model is trained for as many updates as the first one. None where these are too few.
    """
    if options.updates < LEAST_UPDATES:
        print(
            f"\n== back-translation\nleft out: a reverse model needs {LEAST_UPDATES} updates to write "
            f"sentences, and --updates is {options.updates}"
        )
        return None
    source, target = options.languages
    reverse_updates = min(options.updates, REVERSE_UPDATES)
    place = steps.folder / "backtranslation"
    place.mkdir(exist_ok=True)
    # A reverse model of fewer updates writes other text.
    place /= str(reverse_updates)
    place.mkdir(exist_ok=True)
    name = f"train the reverse model, {target} to {source}, for {reverse_updates} updates"
    reverse = train(
        steps, data, options, reverse_updates, place / "reverse", options.languages[::-1], name
    )
    synthetic, mixture = place / "synthetic", place / "data"
    command = ["python", "-m", "fairseq_ext.backtranslation.generate", mono, synthetic]
    command += ["--model", reverse, "--guard", data]
    inputs, outputs = [mono, reverse], [synthetic / "manifest.json"]
    try:
        steps.do(f"write the {source} side of {mono.name}", command, inputs=inputs, outputs=outputs)
    except UserError as error:
        raise UserError(
            f"{error}; a model that writes garbage needs more --updates, changed files need --fresh, and "
            "--no-back-translation leaves this step out"
        ) from None
    command = ["python", "-m", "fairseq_ext.backtranslation.assemble", data, synthetic, mixture]
    inputs, outputs = [synthetic / "manifest.json"], [mixture / "manifest.json"]
    steps.do("mix it with the bitext", command, inputs=inputs, outputs=outputs)
    name = f"train a second model on the mixture for {options.updates} updates"
    second = train(
        steps, mixture, options, folder=place / "forward", direction=options.languages, name=name
    )
    first = steps.folder / "test.out"
    translate_and_score(
        steps, "second model", place, second, data, "test", target, source, baseline=first
    )
    return place


def compare(scores, place, options):
    """Both scores side by side and what the comparison means, as text."""
    second = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    report = json.loads((place / "data" / "manifest.json").read_text(encoding="utf-8"))["report"]
    effective, against = report["effective"], second["comparisons"]["bleu"]
    lines = ["\n== with back-translation", "                      BLEU      95 %            chrF"]
    for name, one in (("bitext", scores), ("and back-translated", second)):
        bleu, chrf = one["metrics"]["bleu"], one["metrics"]["chrf"]
        low, high = bleu["interval"]
        lines.append(
            f"{name:20} {bleu['value']:6.1f}   {low:5.1f} to {high:5.1f}   {chrf['value']:6.1f}"
        )
    lines.append(
        f"BLEU {against['difference']:+.1f} (p = {against['bootstrap_p']:.3f}), both models after "
        f"{options.updates} updates: the second saw {effective['bitext']:,} pairs\nof the bitext and "
        f"{effective['synthetic']:,} lines of {options.target_lang} whose {options.source_lang} side the "
        "reverse model wrote."
    )
    lines.append(CLDR_MEANING if options.data is None else OWN_MEANING)
    return "\n".join(lines)


CLDR_MEANING = (
    "This is generated text too: the added lines are the same few sentences with other values, which the "
    "bitext\nshows often enough, and names of test are not among them. A reverse model that was trained this "
    "shortly writes\nmany a wrong number, and equal updates leave fewer for real pairs. So an improvement "
    "is not promised, a lower\nscore is no surprise: the comparison shows that the steps work, not what "
    "back-translation is worth on real text."
)
OWN_MEANING = (
    "An improvement is not promised: it takes a reverse model that is good enough, and text like that "
    "which is to be\ntranslated. scripts/backtranslate.sh has modes, tags, filters and rounds to try."
)

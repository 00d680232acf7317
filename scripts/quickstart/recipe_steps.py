"""Steps of recipes that train translation models: train from a YAML file, average, translate, score."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from steps import ROOT, relative
from training import train_shown

from ext_common.cli import UserError


class Recipe(NamedTuple):
    """A recipe of fairseq-hydra-train.

    files: what it is read from; metric: what a validation measures; ours: whether its plugin is ours; keys:
    what it sets, "task.data".
    """

    path: Path
    updates: int
    files: tuple
    metric: str
    ours: bool
    keys: frozenset


def read_recipe(path, average):
    """The recipe in a YAML file; UserError where it is none, or leaves fewer than `average` checkpoints."""
    if not path.is_file() or path.suffix != ".yaml":
        raise UserError(f"{path} is no YAML file: give a recipe such as those below {ROOT}/configs")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        sections = {
            name: dict(config.get(name) or {})
            for name in ("optimization", "checkpoint", "common", "task")
        }
        groups = [one for one in config.get("defaults") or [] if isinstance(one, dict)]
        updates = int(sections["optimization"].get("max_update") or 0)
        interval = int(sections["checkpoint"].get("save_interval_updates") or 0)
        keep = int(sections["checkpoint"].get("keep_interval_updates") or -1)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is no recipe ({said}): give one of fairseq-hydra-train") from None
    files = [path.parent / name / f"{one}.yaml" for group in groups for name, one in group.items()]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, which {path} names under defaults")
    if updates < 1:
        raise UserError(f"{path} has no optimization.max_update: say how long to train")
    if interval > 0 and sections["checkpoint"].get("no_epoch_checkpoints"):
        left = updates // interval if keep < 0 else min(keep, updates // interval)
        if left < average:
            raise UserError(
                f"{path} leaves {left} checkpoints (max_update {updates}, save_interval_updates "
                f"{interval}, keep_interval_updates {keep}), and --average is {average}: change one of them"
            )
    ours = sections["common"].get("user_dir") == "fairseq_ext"
    metric = "ppl" if sections["task"].get("no_valid_text") else "bleu"
    keys = frozenset(f"{name}.{key}" for name, section in sections.items() for key in section)
    return Recipe(path, updates, (path, *files), metric, ours, keys)


def train_step(steps, name, folder, data, recipe, direction, seed):
    """Train in `folder`/checkpoints; a run that was stopped goes on from its last checkpoint."""
    checkpoints = folder / "checkpoints"
    # Absolute: the step is the same when it is continued from another working folder.
    values = {
        "task.data": data.resolve(),
        "task.source_lang": direction[0],
        "task.target_lang": direction[1],
        "checkpoint.save_dir": checkpoints.resolve(),
        "common.seed": seed,
    }
    if recipe.ours:
        values["common.user_dir"] = ROOT / "fairseq_ext"
    command = ["fairseq-hydra-train", "--config-dir", relative(recipe.path.parent)]
    command += ["--config-name", recipe.path.stem]
    # hydra takes what is new only as such
    command += [
        override(key if key in recipe.keys else f"+{key}", value) for key, value in values.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    train_shown(
        steps,
        data,
        command,
        recipe.updates,
        checkpoints / "checkpoint_last.pt",
        name=name,
        log=(folder / "train.log").relative_to(steps.folder),
        inputs=[data / "manifest.json", *recipe.files],
        metric=recipe.metric,
        unit="",
    )


def average_step(steps, name, folder, number):
    """`folder`/average.pt, of the last checkpoints of the training in `folder`."""
    checkpoints, output = folder / "checkpoints", folder / "average.pt"
    command = ["python", "-m", "fairseq_ext.translation.average", checkpoints, "--last", number]
    command += ["--output", output]
    inputs = [checkpoints / "checkpoint_last.pt"]
    steps.do(name, command, inputs=inputs, outputs=[output])
    return output


def translate_and_score(steps, name, folder, model, data, subset, target, source, baseline=None):
    """`folder`/SUBSET.LANG and scores.json; baseline: translations to compare with, or None."""
    text, reference = (data / "text" / f"{subset}.{lang}" for lang in (source, target))
    output, scores = folder / f"{subset}.{target}", folder / "scores.json"
    command = ["python", "-m", "fairseq_ext.translation.translate", text, output, "--path", model]
    steps.do(f"{name}: translate {subset}", command, inputs=[text, model], outputs=[output])
    command = ["python", "-m", "fairseq_ext.translation.score", output, "--ref", reference]
    command += ["--lang", target, "--source", text, "--json", scores]
    inputs = [output, reference]
    if baseline:
        command += ["--baseline", baseline]
        inputs.append(baseline)
    steps.do(f"{name}: score", command, inputs=inputs, outputs=[scores])


def override(key, value):
    """`key=value` as Hydra reads it, whatever is in the value."""
    text = str(value)
    if not re.fullmatch(r"[\w./@+-]+", text, re.ASCII):
        text = "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
    return f"{key}={text}"

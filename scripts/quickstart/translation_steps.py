"""Training and translation as the translation quickstart does them, for either direction."""

from steps import ROOT, relative
from training import train_shown

from fairseq_ext.translation.corpus import Corpus


def train(steps, data, options, updates=None, folder=None, direction=(), name=None):
    """The best checkpoint of a training in `folder`, else the one of the steps.

    direction: (source, target), else that of the data; name: of the step.
    """
    folder, updates = folder or steps.folder, updates or options.updates
    folder.mkdir(exist_ok=True)
    best = folder / "checkpoints" / "checkpoint_best.pt"
    command = ["fairseq-train", data, "--user-dir", relative(ROOT / "fairseq_ext")]
    command += ["--task", "translation_spm", "--max-update", updates, "--patience", -1]
    command += [
        "--save-dir",
        folder / "checkpoints",
        "--log-interval",
        10,
        "--log-format",
        "simple",
    ]
    for flag, lang in zip(("--source-lang", "--target-lang"), direction, strict=False):
        command += [flag, lang]

    train_shown(
        steps,
        data,
        command,
        updates,
        best,
        name=name,
        log=(folder / "train.log").relative_to(steps.folder),
        inputs=[data / "manifest.json"] if name else [],
        metric="bleu",
        unit="",
    )
    return best


def translate(steps, data, checkpoint, options):
    """test.out and scores.json."""
    source, reference = (data / "text" / f"test.{lang}" for lang in Corpus.open(data).languages)
    output, scores = steps.folder / "test.out", steps.folder / "scores.json"
    command = ["python", "-m", "fairseq_ext.translation.translate", source, output]
    command += ["--path", checkpoint]
    steps.do("translate test", command, inputs=[source, checkpoint], outputs=[output])
    command = ["python", "-m", "fairseq_ext.translation.score", output, "--ref", reference]
    command += ["--lang", options.target_lang, "--source", source, "--json", scores]
    steps.do("score the translations", command, inputs=[output, reference], outputs=[scores])

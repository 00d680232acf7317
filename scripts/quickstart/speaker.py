"""From recordings to predictions: who speaks?

bash scripts/quickstart.sh speaker                     voices of eSpeak NG: no download
bash scripts/quickstart.sh speaker --data RECORDINGS   your own, one folder for each speaker
bash scripts/quickstart.sh speaker --data fsdd         six real people say the digits

Shows each command as it runs it, so that you can run it yourself with other options. Called again
it continues where it was stopped, skips what is done, and trains on where --updates is higher.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from steps import ROOT, Steps, relative, show_command
from training import train_shown

from ext_common.cli import Parser, UsageError, UserError, add_dataclass, from_args, run
from ext_common.manifest import beside
from fairseq_ext.speaker.corpus import Corpus

OUT = "quickstart-speaker"
# Numbers 0 to 4 of each digit and speaker are the official test split.
FSDD_PATTERN = r"\d_(?P<speaker>[a-z]+)_(?:(?P<test>[0-4])|\d+)\.wav"
TABLES = {"wav.scp": "kaldi", "metadata.csv": "csv", "mapping.json": "hw4"}
OWNED = (
    "people.npz recordings data checkpoints train.log learning_curve.png predictions.csv valid.csv "
    "predictions.manifest.json predictions.metrics.json predictions.confusion.png "
    "valid.manifest.json valid.metrics.json valid.confusion.png "
    "metrics.json confusion.png"  # of version 0.1
).split()


@dataclass
class QuickstartOptions:
    """What to run it on."""

    data: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder with recordings (SPEAKER/FILE), with wav.scp (Kaldi), metadata.csv or "
            "mapping.json (the course's data); fsdd: real digits; none: synthetic voices"
        },
    )
    pattern: Optional[str] = field(
        default=None,
        metadata={
            "help": "regular expression with a group `speaker` over paths below --data, where the "
            "files do not lie in a folder for each speaker"
        },
    )
    out: Optional[str] = field(
        default=None,
        metadata={"help": f"folder to write; none: {OUT}, and {OUT}-NAME with --data NAME"},
    )
    updates: int = field(default=300, metadata={"help": "updates to train for"})
    fresh: bool = field(default=False, metadata={"help": "start over"})

    def __post_init__(self):
        if self.updates < 1:
            raise ValueError(f"--updates must be at least 1, got {self.updates}")
        if self.pattern and self.data in (None, "fsdd"):
            raise ValueError("--pattern belongs to --data FOLDER")


def main(argv):
    """The command."""
    parser = Parser(prog="bash scripts/quickstart.sh speaker", description=__doc__)
    add_dataclass(parser, QuickstartOptions)
    options = from_args(QuickstartOptions, parser.parse_args(argv))
    try:
        quickstart(options)
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 130


def quickstart(options):
    """All steps. Raises UserError."""
    if options.data not in (None, "fsdd") and not Path(options.data).is_dir():
        raise UserError(f"{options.data} is not a folder: give the folder with the recordings")
    source = options.data and (
        options.data if options.data == "fsdd" else os.path.abspath(options.data)
    )
    out = Path(options.out or default_out(source))
    job = {"quickstart": "speaker", "data": source, "pattern": options.pattern}
    if source and out.resolve() == Path(source).resolve():
        raise UsageError("--out is the folder with the recordings: give another one to write")
    with Steps(relative(out), job, OWNED, options.fresh) as steps:
        print("To run the commands below yourself: source .venv/bin/activate")
        recordings, how = find_recordings(steps, options)
        data = prepare(steps, recordings, how)
        checkpoint = train(steps, data, options.updates)
        predict(steps, data, checkpoint)
        closing(steps, options, data, checkpoint)


def default_out(source):
    name = source and Path(source).name
    return f"{OUT}-{name}" if name else OUT


def find_recordings(steps, options):
    """(folder, flags of prepare), with the recordings made or fetched where need be."""
    own = steps.folder / "recordings"
    if options.data is None:
        steps.do(
            "make recordings of synthetic voices",
            ["python", script("espeak_voices.py"), own],
            outputs=[own],
        )
        return own, ["--layout", "csv"]
    if options.data == "fsdd":
        shared = Path(os.environ.get("FAIRSEQ_EXT_DATA") or ROOT.parent / "shared" / "data")
        local = shared / "fsdd"
        if not local.is_dir():
            local = own
            steps.do(
                "fetch the Free Spoken Digit Dataset",
                ["python", script("download_fsdd.py"), own],
                outputs=[own],
            )
        return relative(local), ["--layout", "folder", "--pattern", FSDD_PATTERN]
    source = Path(options.data)
    if options.pattern:
        return source, ["--layout", "folder", "--pattern", options.pattern]
    found = [layout for table, layout in TABLES.items() if (source / table).is_file()]
    return source, ["--layout", *(found[:1] or ["folder"])]


def prepare(steps, recordings, how):
    """The prepared folder."""
    data = steps.folder / "data"
    command = ["python", "-m", "fairseq_ext.speaker.prepare", recordings, data, *how]
    # Of the user's own files only the command itself knows whether they are still the same.
    ours = Path(recordings) == steps.folder / "recordings"
    corpus = data / "corpus.json"
    try:
        steps.do("prepare features", command, outputs=[corpus], always=not ours)
    except UserError as error:
        again = "; if the recordings have changed, start over with --fresh" if not ours else ""
        raise UserError(f"{error}{again}") from None
    return data


def train(steps, data, updates):
    """The best checkpoint."""
    if not has_labels(data, "valid"):
        raise UserError(
            f"{data} has no utterance to validate on: give at least three recordings of a speaker"
        )
    folder, log = steps.folder / "checkpoints", steps.folder / "train.log"
    best = folder / "checkpoint_best.pt"
    command = (
        f"fairseq-train {{}} --user-dir {{}} --task speaker_id --arch conformer_speaker "
        f"--criterion am_softmax --m 0.2 --optimizer adam --lr 2e-3 "
        f"--lr-scheduler inverse_sqrt --warmup-updates 100 --batch-size 64 --epoch-updates 25 "
        f"--max-update {updates} --best-checkpoint-metric accuracy "
        f"--maximize-best-checkpoint-metric --save-dir {{}} --no-epoch-checkpoints "
        f"--save-interval-updates 100 --keep-interval-updates 1 --log-interval 5 "
        f"--log-format simple"
    ).split()
    places = iter([data, relative(ROOT / "fairseq_ext"), folder])
    command = [next(places) if part == "{}" else part for part in command]

    train_shown(steps, data, command, updates, best)
    curve = steps.folder / "learning_curve.png"
    command = ["python", "-m", "ext_common.plots", log, curve]
    steps.do("draw the learning curve", command, inputs=[log], outputs=[curve])
    return best


def predict(steps, data, checkpoint):
    """predictions.csv, and metrics of a split with labels."""
    inputs = [data / "corpus.json", checkpoint]
    measured = measured_split(data)
    tasks = {measured: "predictions.csv"}
    if measured == "valid":
        tasks = {"valid": "valid.csv"}
        if "test" in splits(data):
            tasks["test"] = "predictions.csv"
    for subset, name in tasks.items():
        output = steps.folder / name
        command = ["python", "-m", "fairseq_ext.speaker.identify", data, "--path", checkpoint]
        command += ["--subset", subset, "--output", output]
        outputs = [output]
        if subset == measured:
            outputs += [beside(output, "metrics.json"), beside(output, "confusion.png")]
        steps.do(f"identify the speakers of {subset}", command, inputs=inputs, outputs=outputs)


def closing(steps, options, data, checkpoint):
    """The figure with what it means, where everything is, and what to do next."""
    folder = steps.folder
    predictions = folder / ("predictions.csv" if "test" in splits(data) else "valid.csv")
    of_speakers = folder / ("predictions.csv" if measured_split(data) == "test" else "valid.csv")
    metrics, confusion = beside(of_speakers, "metrics.json"), beside(of_speakers, "confusion.png")
    measured = json.loads(metrics.read_text(encoding="utf-8"))
    top1, corpus = measured["top1"], Corpus.open(data)
    low, high = top1["interval95"]
    subset = measured_split(data)
    chance = 1 / len(corpus.speakers)
    print(
        f"\n== result\naccuracy {percent(top1['accuracy'])}: {top1['correct']} of {top1['total']} "
        f"recordings of {subset} (95 % interval {100 * low:.1f} to {percent(high)}; guessing gives "
        f"{percent(chance)} with {len(corpus.speakers)} speakers)"
    )
    print(meaning(options, subset))
    files = {
        "predictions": predictions,
        "accuracy of each speaker": metrics,
        "pictures": f"{folder / 'learning_curve.png'}  {confusion}",
        "model": checkpoint,
    }
    print()
    for name, place in files.items():
        print(f"{name:25} {place}")
    print("\n== next")
    for text, command in next_commands(options, data, checkpoint, folder):
        print(f"# {text}\n{show_command(command)}")


def meaning(options, subset):
    """What the accuracy says and what it does not."""
    if options.data is None:
        return (
            "These are synthetic voices of eSpeak NG, other sentences in test than in train: the "
            "figure shows\nthat all parts work and says nothing about real speech."
        )
    if options.data == "fsdd":
        return (
            "Six people saying digits are easy to tell apart, and a microphone or a room may give "
            "them away as\nmuch as the voice: the figure measures speaker and channel together."
        )
    text = (
        "Where a speaker was recorded with one microphone, in one room or on one day, the figure "
        "measures\nspeaker and channel together."
    )
    if subset == "valid":
        text += " The model was chosen on valid, so it is a little too high."
    return text


def next_commands(options, data, checkpoint, folder):
    """(what it is for, command) to go on with."""
    quickstart = ["bash", script("quickstart.sh"), "speaker"]
    chosen = []
    for flag in ("data", "pattern", "out"):
        if getattr(options, flag):
            chosen += [f"--{flag}", getattr(options, flag)]
    embed = ["python", "-m", "fairseq_ext.speaker.embed", data, "--path", checkpoint]
    identify = ["python", "-m", "fairseq_ext.speaker.identify"]
    gallery = ["python", "-m", "fairseq_ext.speaker.gallery"]
    people = folder / "people.npz"
    enrol = [*gallery, "enrol", people, "ME.wav", "--name", "me", "--path", checkpoint]
    commands = [
        ("enrol yourself, without training", enrol),
        ("is it you, or nobody", [*gallery, "identify", people, "OTHER.wav", "--path", checkpoint]),
        ("train on", [*quickstart, *chosen, "--updates", 3 * options.updates]),
        ("a vector for each recording", [*embed, "--output", folder / "embeddings.npz"]),
        ("who speaks in files of yours", [*identify, "FILE.wav", "--path", checkpoint]),
        ("your recordings, a folder for each speaker", [*quickstart, "--data", "RECORDINGS"]),
        ("the course's data", [*quickstart, "--data", "DATASET", "--updates", 20000]),
    ]
    if options.data != "fsdd":
        commands.append(("real digits", [*quickstart, "--data", "fsdd"]))
    return commands


def splits(data):
    return set(Corpus.open(data).splits.tolist())


def has_labels(data, split):
    corpus = Corpus.open(data)
    return bool(((corpus.splits == split) & (corpus.labels >= 0)).any())


def measured_split(data):
    """test where its speakers are known, else valid."""
    return "test" if has_labels(data, "test") else "valid"


def script(name):
    return relative(ROOT / "scripts" / name)


def percent(share):
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    run(main)

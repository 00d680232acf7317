"""A speaker model as an ONNX file beside the same model in torch, one utterance at a time, and starting up.

    python -m benchmarks.speaker.exported

The network that presets train, with random weights and 251 speakers. Features to embedding, and samples to
embedding with the features inside the file; then the whole command that identifies one recording, in a
process of its own each time. Sides alternate; ratios are of medians.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import alternate, compare, machine, summary
from benchmarks.pages import markdown, origin
from benchmarks.recorded import RESULTS, ROOT, Results
from ext_common.cli import Parser, add_dataclass, from_args, run
from ext_common.manifest import versions

RESULT = RESULTS / "speaker_export.jsonl"
SECONDS = (1, 5, 15)
GOAL = 1.3
SIDES = ("torch", "ONNX", "ONNX int8")
STARTS = ("ONNX", "ONNX, features inside", "checkpoint")


@dataclass
class Options:
    """What to run and where the result goes."""

    rounds: int = field(
        default=15, metadata={"help": "rounds, in each of which every side runs once"}
    )
    work: float = field(
        default=60.0, metadata={"help": "seconds of speech that a side embeds in a round"}
    )
    output: str = field(default=str(RESULT), metadata={"help": "JSON-lines file for the figures"})


def main(argv):
    """The command."""
    parser = Parser(prog="python -m benchmarks.speaker.exported", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="speaker_export_") as folder:
        figures = measure(Path(folder), options)
    figures["seconds"] = round(time.monotonic() - began, 1)
    print(table(figures))
    Results(options.output).put({"run": "export", **figures})


def measure(folder, options):
    """Everything, as one dict."""
    import torch

    from benchmarks.speaker.cases import embedding_checkpoint
    from fairseq_ext.speaker.export import graph
    from fairseq_ext.speaker.export.__main__ import ExportOptions, checked
    from fairseq_ext.speaker.export.exported import Description, ExportedNetwork
    from fairseq_ext.speaker.inference import ExportedModel, SpeakerModel

    path = folder / "checkpoint.pt"
    torch.save(embedding_checkpoint(), path)
    model = SpeakerModel.from_checkpoint(path)
    data, parity = checked(model, str(path), ExportOptions(features="outside"))
    inside, _ = checked(model, str(path), ExportOptions())
    (folder / "outside.onnx").write_bytes(data)
    (folder / "inside.onnx").write_bytes(inside)
    network = ExportedNetwork(data, "float32")
    scorer = graph.Scorer(model.network, False)
    integers = graph.in_integers(graph.scorer_graph(scorer, model.spec.n_mels))
    described = Description(**{**vars(network.description), "weights": "int8"})
    int8 = ExportedNetwork(graph.to_bytes(integers, described), "int8")
    models = dict(zip(SIDES, (model, ExportedModel(network), ExportedModel(int8)), strict=True))
    whole = {"torch": model, "ONNX": ExportedModel(ExportedNetwork(inside, "inside"))}
    threads = torch.get_num_threads()
    cases = [embedding(models, n, options) for n in SECONDS]
    cases += [embedding(whole, n, options, samples=True) for n in SECONDS]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "command": "python -m benchmarks.speaker.exported",
        "versions": versions(),
        "threads": threads,
        "parity": parity,
        "bytes": {"ONNX": len(data), "ONNX int8": len(graph.to_bytes(integers, described))},
        "cases": cases,
        "startup": startup(folder, options),
    }


def embedding(models, seconds, options, samples=False):
    """Utterances a second of so many seconds, one at a time."""
    import numpy as np

    from fairseq_ext.speaker.features import log_mel

    rng = np.random.default_rng(seconds)
    waveform = rng.standard_normal(16000 * seconds).astype(np.float32) / 10
    features = log_mel(waveform, next(iter(models.values())).spec)
    times = max(1, round(options.work / seconds))

    def side(model):
        def work():
            for _ in range(times):
                if not samples:
                    model.embed([features])
                elif isinstance(model.network, type(models["ONNX"].network)):
                    model.embed([waveform])
                else:
                    model.embed([log_mel(waveform, model.spec)])
            return times

        return work

    rates = alternate({name: side(model) for name, model in models.items()}, options.rounds)
    return {
        "seconds": seconds,
        "from": "samples" if samples else "features",
        "sides": {name: summary(r) for name, r in rates.items()},
        "ratios": {n: compare(rates[n], rates["torch"]) for n in rates if n != "torch"},
    }


def startup(folder, options):
    """Seconds of the command that identifies one recording of 3 s."""
    import numpy as np
    import soundfile

    samples = np.random.default_rng(1).standard_normal(48000).astype(np.float32) / 10
    soundfile.write(folder / "a.wav", samples, 16000)
    paths = dict(zip(STARTS, ("outside.onnx", "inside.onnx", "checkpoint.pt"), strict=True))

    def side(name):
        command = [sys.executable, "-m", "fairseq_ext.speaker.identify", folder / "a.wav", "--path"]

        def work():
            subprocess.run(
                [*map(str, command), str(folder / paths[name])],
                check=True,
                capture_output=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            return 1

        return work

    rates = alternate({name: side(name) for name in STARTS}, options.rounds)
    return {name: summary([1 / rate for rate in found]) for name, found in rates.items()}


def table(figures):
    """Markdown: speed and start-up."""
    rows = []
    for case in figures["cases"]:
        for name, ratio in case["ratios"].items():
            goal = (
                f"{GOAL:g}: {'met' if ratio['ratio'] >= GOAL else 'missed'}"
                if name == "ONNX"
                else ""
            )
            rows.append(
                [
                    f"{case['from']} of {case['seconds']} s, {name}",
                    f"{case['sides'][name]['median']:,.1f} /s",
                    f"{case['sides']['torch']['median']:,.1f} /s",
                    f"{ratio['ratio']:.2f} ×",
                    f"{ratio['ratio_min']:.2f} to {ratio['ratio_max']:.2f}",
                    goal,
                ]
            )
    head = ["one utterance at a time", "here", "torch", "ratio", "its smallest to largest", "goal"]
    starts = [f"{name} {found['median']:.2f} s" for name, found in figures["startup"].items()]
    return f"{markdown(head, rows)}\n\nIdentifying one recording, start-up and all: {', '.join(starts)}."


def section(records):
    """The part of docs/results/speed.md, with its heading; empty where it was not run yet."""
    parts = []
    for f in records:
        mb = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in f["bytes"].items())
        gap = f["parity"]["difference"]
        note = f"{f['threads']} threads; {mb}; file and model differ by at most {gap:.1e}."
        parts = ["## A speaker model as an ONNX file", table(f), note, origin(f["command"], [f])]
    return "\n\n".join(parts)


if __name__ == "__main__":
    run(main)

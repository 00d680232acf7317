"""Prepare and predict a generated set of the course's shape: time, peak memory, how soon crops are read.

    python -m benchmarks.speaker.prepare --output benchmarks/results/speaker_prepare.jsonl

The set has the layout of HW4: 600 speakers, 56,666 labelled utterances of 91 to 7,193 frames
(median 541, mean 658), 8,000 unlabelled ones, one float32 (T, 40) .pt file each; about 7 GB, and 7
GB more prepared. Values are random: what is measured does not depend on them. Both are deleted
afterwards unless --keep.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from benchmarks.common import evict, machine
from benchmarks.recorded import ROOT, Results
from ext_common.cli import Parser, UserError, add_dataclass, from_args, progress, run
from ext_common.manifest import versions

N_MELS = 40
FULL, FULL_TEST, SPEAKERS = 56_666, 8_000, 600
SHORTEST, MEDIAN, LONGEST, SIGMA = 91, 541, 7_193, 0.6256
TEST_SHORTEST, TEST_LONGEST = 214, 4_940
CROP, CROPS = 200, 64

READ = """
import json, os, sys, time
began = time.perf_counter()
import numpy as np
from fairseq_ext.speaker.corpus import Corpus
imported = time.perf_counter()
corpus = Corpus.open(sys.argv[1])
opened = time.perf_counter()
rng = np.random.default_rng(1)
rows = corpus.rows("train")
rows = rows[corpus.lengths[rows] >= {crop}]
for row in rng.choice(rows, {crops}):
    corpus.read(row, int(rng.integers(corpus.lengths[row] - {crop} + 1)), {crop})
done = time.perf_counter()
print(json.dumps(dict(import_s=imported - began, open_s=opened - imported, crops_s=done - opened,
                      total_s=done - began)))
"""


@dataclass
class Options:
    """What to generate and where."""

    utterances: int = field(default=FULL, metadata={"help": "labelled utterances to generate"})
    folder: Optional[str] = field(
        default=None, metadata={"help": "where to generate; none: the system's temporary folder"}
    )
    workers: Optional[int] = field(
        default=None, metadata={"help": "processes of prepare; none: one for each CPU"}
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "JSON-lines file for the figures"}
    )
    keep: bool = field(default=False, metadata={"help": "do not delete what was generated"})
    seed: int = field(default=1, metadata={"help": "of the lengths and values"})


def main(argv):
    """The command."""
    parser = Parser(prog="python -m benchmarks.speaker.prepare", description=__doc__)
    add_dataclass(parser, Options)
    options = from_args(Options, parser.parse_args(argv))
    if options.utterances < 1:
        raise UserError("--utterances must be at least 1")
    folder = Path(tempfile.mkdtemp(prefix="prepare_scale_", dir=options.folder))
    try:
        figures = measure(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    print(json.dumps(figures, indent=2))
    if options.output:
        Results(options.output).put({"run": "hw4", **figures})


def measure(folder, options):
    """Generate, prepare, read; the figures as a dict."""
    source, dest = folder / "source", folder / "data"
    began = time.monotonic()
    shape = generate(source, options.utterances, options.seed)
    generated = time.monotonic() - began
    command = [sys.executable, "-m", "fairseq_ext.speaker.prepare", source, dest, "--layout", "hw4"]
    if options.workers:
        command += ["--workers", options.workers]
    before = machine()
    seconds, peaks = watched([str(part) for part in command])
    read = [sys.executable, "-c", READ.format(crop=CROP, crops=CROPS), str(dest)]
    evict(dest / "features.bin")
    cold, warm = (
        json.loads(subprocess.run(read, check=True, capture_output=True).stdout) for _ in range(2)
    )
    trained, predicted, submission = submit(folder, dest)
    total = shape["utterances"] + shape["unlabelled"]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": before,
        "command": "python -m benchmarks.speaker.prepare " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "set": shape,
        "generate_s": round(generated, 1),
        "prepare_s": round(seconds, 1),
        "utterances_per_s": round(total / seconds, 1),
        "features_gb": round((dest / "features.bin").stat().st_size / 1e9, 3),
        **peaks,
        "first_crops_file_not_cached": cold,
        "first_crops_file_cached": warm,
        "crops": f"{CROPS} of {CROP} frames",
        "train_2_updates_s": round(trained[0], 1),
        "train_2_updates": trained[1],
        "identify_s": round(predicted[0], 1),
        "identify": predicted[1],
        "rows_of_submission": submission,
    }


def submit(folder, data):
    """Train the course's recipe for 2 updates and predict testdata.json with it.

    Returns ((seconds, peaks) of training, the same of predicting, rows of the submission file).
    """
    checkpoints, output = folder / "checkpoints", folder / "submission.csv"
    train = [
        *(Path(sys.executable).parent / "fairseq-hydra-train", "--config-name", "hw4"),
        *("--config-dir", ROOT / "configs" / "speaker_id"),
        *(f"task.data={data}", f"checkpoint.save_dir={checkpoints}"),
        *("optimization.max_update=2", "lr_scheduler.warmup_updates=1"),
        "dataset.disable_validation=true",
    ]
    identify = [
        *(sys.executable, "-m", "fairseq_ext.speaker.identify", data, "--subset", "test"),
        *("--path", checkpoints / "checkpoint_last.pt", "--output", output),
    ]
    figures = [watched([str(part) for part in command]) for command in (train, identify)]
    return *figures, len(output.read_text().splitlines()) - 1


def generate(source, utterances, seed):
    """Write the set; returns its shape."""
    import torch

    source.mkdir()
    rng = np.random.default_rng(seed)
    unlabelled = max(1, round(FULL_TEST * utterances / FULL))
    lengths = draw_lengths(rng, utterances, SHORTEST, LONGEST)
    test_lengths = draw_lengths(rng, unlabelled, TEST_SHORTEST, TEST_LONGEST)
    pool = rng.standard_normal((100_000, N_MELS), dtype=np.float32) * 5 - 2
    speakers = [f"id{10_000 + number}" for number in range(min(SPEAKERS, utterances))]
    metadata = {name: [] for name in rng.permutation(speakers)}
    entries = []
    for number, length in enumerate(
        progress(np.append(lengths, test_lengths), "generate", "files")
    ):
        first = int(rng.integers(len(pool) - length))
        frames = pool[first : first + length].copy()
        frames[0, 0] = number
        name = f"uttr-{number:032x}.pt"
        torch.save(torch.from_numpy(frames), source / name)
        entries.append({"feature_path": name, "mel_len": int(length)})
    for number, entry in enumerate(entries[:utterances]):
        metadata[speakers[number % len(speakers)]].append(entry)
    ids = {name: number for number, name in enumerate(speakers)}
    mapping = {"speaker2id": ids, "id2speaker": {str(n): name for name, n in ids.items()}}
    contents = {
        "mapping.json": mapping,
        "metadata.json": {"n_mels": N_MELS, "speakers": metadata},
        "testdata.json": {"n_mels": N_MELS, "utterances": entries[utterances:]},
    }
    for name, content in contents.items():
        (source / name).write_text(json.dumps(content))
    return {
        "speakers": len(speakers),
        "utterances": utterances,
        "unlabelled": unlabelled,
        "frames_min": int(lengths.min()),
        "frames_median": float(np.median(lengths)),
        "frames_mean": round(float(lengths.mean()), 1),
        "frames_max": int(lengths.max()),
    }


def draw_lengths(rng, number, shortest, longest):
    """Log-normal lengths with the course's median and mean; the extremes are always there."""
    lengths = np.exp(rng.normal(np.log(MEDIAN), SIGMA, number)).round().astype(np.int64)
    lengths = lengths.clip(shortest, longest)
    lengths[0] = shortest
    lengths[-1] = longest
    return lengths


def watched(command):
    """Run a command; returns (seconds, peaks in MB over the process tree)."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    peaks = {"peak_rss_main_mb": 0.0, "peak_rss_tree_mb": 0.0, "peak_pss_tree_mb": 0.0}
    stop = threading.Event()

    def watch():
        while not stop.wait(0.1):
            tree = descendants(process.pid)
            rss = [memory_of(pid, "Rss") for pid in tree]
            now = (rss[0], sum(rss), sum(memory_of(pid, "Pss") for pid in tree))
            for name, value in zip(list(peaks), now, strict=True):
                peaks[name] = max(peaks[name], round(value, 1))

    thread = threading.Thread(target=watch)
    thread.start()
    code = process.wait()
    seconds = time.monotonic() - began
    stop.set()
    thread.join()
    if code:
        raise UserError(f"{' '.join(command[:3])} ended with exit code {code}")
    return seconds, peaks


def descendants(pid):
    """`pid` and all processes below it."""
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                text = Path(f"/proc/{parent}/task/{task}/children").read_text()
                found += [int(child) for child in text.split()]
        except OSError:
            continue
    return found


def memory_of(pid, kind):
    """MB of a process; Pss counts a page shared by n processes as 1/n. 0 for one that is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(kind + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


if __name__ == "__main__":
    run(main)

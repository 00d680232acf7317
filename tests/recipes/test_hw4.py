"""The course's layout in its true shapes, few utterances each: from .pt files to a submission."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import processes

SPEAKERS, MELS = 600, 40
BIN = Path(sys.executable).parent


def write_course(folder: Path) -> tuple:
    """mapping.json, metadata.json, testdata.json and uttr-*.pt; returns test files and names."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    # names and numbers as the course has them: not in the order of the names
    names = [f"id{n:05d}" for n in rng.permutation(20000)[:SPEAKERS]]
    speakers, test = {}, []

    def utterance(length):
        name = f"uttr-{len(speakers):03d}-{rng.integers(1 << 40):010x}.pt"
        features = rng.normal(-2, 4, (length, MELS)).astype(np.float32)
        torch.save(torch.from_numpy(features), folder / name)
        return {"feature_path": name, "mel_len": length}

    for name in names:
        speakers[name] = [utterance(int(rng.integers(91, 200))) for _ in range(3)]
    for length in (214, 541, 4940, 7193):
        test.append(utterance(length))
    mapping = {
        "speaker2id": {name: i for i, name in enumerate(names)},
        "id2speaker": {str(i): name for i, name in enumerate(names)},
    }
    (folder / "mapping.json").write_text(json.dumps(mapping))
    (folder / "metadata.json").write_text(json.dumps({"n_mels": MELS, "speakers": speakers}))
    (folder / "testdata.json").write_text(json.dumps({"n_mels": MELS, "utterances": test}))
    return [u["feature_path"] for u in test], names


@pytest.mark.slow
def test_from_the_course_files_to_a_submission(repo_root, tmp_path):
    test, names = write_course(tmp_path / "Dataset")

    def run(*command):
        result = processes.run(
            [str(part) for part in command],
            cwd=repo_root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return result.stdout

    data, save_dir = tmp_path / "data", tmp_path / "ck"
    python = [sys.executable, "-m"]
    run(
        *(*python, "fairseq_ext.speaker.prepare", tmp_path / "Dataset", data),
        *("--layout", "hw4", "--workers", 1, "--valid-fraction", 0.34),
    )
    corpus = json.loads((data / "corpus.json").read_text())
    assert corpus["speakers"] == names
    assert corpus["splits"] == {"train": 1200, "valid": 600, "test": 4}
    run(
        *(BIN / "fairseq-hydra-train", "--config-dir", repo_root / "configs" / "speaker_id"),
        *("--config-name", "hw4", f"task.data={data}", f"checkpoint.save_dir={save_dir}"),
        *("optimization.max_update=2", "lr_scheduler.warmup_updates=1", "dataset.num_workers=0"),
        "dataset.batch_size=8",
    )
    output = tmp_path / "submission.csv"
    run(
        *(*python, "fairseq_ext.speaker.identify", data, "--subset", "test"),
        *("--path", save_dir / "checkpoint_best.pt", "--output", output),
    )
    with open(output, newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Id", "Category"] and [row[0] for row in rows[1:]] == test
    assert {row[1] for row in rows[1:]} <= set(names)

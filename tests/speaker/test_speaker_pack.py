"""A pack of a speaker model: the same answers as its checkpoint's, also where there is no torch."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ext_common import packed
from ext_common.pack import PackOptions, pack
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.export import parity
from fairseq_ext.speaker.inference import SpeakerModel

pytest.importorskip("onnxscript")


def test_a_pack_answers_as_its_checkpoint_with_and_without_torch(
    tiny_checkpoint, tiny_data, tiny_recordings, tmp_path, monkeypatch, repo_root
):
    monkeypatch.setattr(parity, "FRAMES", (1, 30))
    path = tmp_path / "voices.zip"
    pack(str(tiny_checkpoint), str(path), PackOptions(data=str(tiny_data)))
    assert {"model.onnx", "speakers.json", "features.json"} <= set(packed.Pack(path).files)
    model, theirs = map(SpeakerModel.from_checkpoint, (tiny_checkpoint, path))
    corpus = Corpus.open(tiny_data)
    utterances = [corpus.read(row) for row in range(8)]
    np.testing.assert_array_equal(theirs.scores(utterances), model.scores(utterances))
    assert theirs.sha256 == model.sha256
    assert model.sha256 in packed.Pack(path).read(packed.CARD).decode()
    recordings = [str(tiny_recordings / name / "9.wav") for name in ("dora", "anna")]
    program = (
        "import sys; sys.modules.update(torch=None, torchaudio=None, safetensors=None)\n"
        "from fairseq_ext.speaker.identify import main\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *recordings, "--path", str(path)],
        env={**os.environ, "PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
    )
    names = [found.speaker for found in model.identify(recordings)]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert rows == [list(row) for row in zip(recordings, names, strict=True)], done.stderr

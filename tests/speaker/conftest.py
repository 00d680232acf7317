"""A tiny corpus of synthetic voices and a model that tells them apart without training."""

import copy
from dataclasses import asdict

import numpy as np
import pytest
import soundfile

SPEAKERS = ("anna", "ben", "carl", "dora")
PITCH = {"anna": 210.0, "ben": 110.0, "carl": 150.0, "dora": 260.0}
RATE = 16000


def voice(speaker: str, seconds: float, seed: int) -> np.ndarray:
    """float32 (n,): harmonics of the speaker's pitch in a little noise."""
    rng = np.random.default_rng((seed, SPEAKERS.index(speaker)))
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = PITCH[speaker] * rng.uniform(0.98, 1.02)
    parts = [np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6)) / k for k in range(1, 12)]
    return (0.1 * sum(parts) + 0.003 * rng.standard_normal(len(t))).astype(np.float32)


@pytest.fixture(scope="session")
def tiny_recordings(tmp_path_factory):
    """SRC/<speaker>/<n>.wav: 4 speakers, 10 utterances each of 0.2 to 1.1 s."""
    folder = tmp_path_factory.mktemp("tiny") / "recordings"
    for speaker in SPEAKERS:
        (folder / speaker).mkdir(parents=True)
        for n in range(10):
            samples = voice(speaker, 0.2 + 0.1 * n, n)
            soundfile.write(folder / speaker / f"{n}.wav", samples, RATE, subtype="FLOAT")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_recordings):
    """The recordings prepared: train 24, valid 8, test 8 utterances."""
    from fairseq_ext.speaker.prepare.__main__ import PrepareOptions, prepare

    data = tiny_recordings.parent / "data"
    options = PrepareOptions(workers=1, valid_fraction=0.2, test_fraction=0.2)
    prepare(tiny_recordings, data, options)
    return data


@pytest.fixture(scope="session")
def tiny_state(tiny_data):
    """What a checkpoint of a speaker model holds; class weights are mean embeddings, not trained.

    Laid out as by fairseq's Trainer.state_dict; a test loads a checkpoint of fairseq-train too.
    """
    import torch

    from ext_common.checkpoints import untouched_logging

    with untouched_logging():
        import fairseq  # noqa: F401

    from ext_common import compat

    compat.apply()
    from fairseq_ext.speaker import model as models  # noqa: F401
    from fairseq_ext.speaker import task as tasks
    from fairseq_ext.speaker.corpus import Corpus
    from fairseq_ext.speaker.network import NetworkOptions, SpeakerNetwork

    corpus = Corpus.open(tiny_data)
    options = NetworkOptions(
        d_model=16,
        nhead=2,
        d_ffn=32,
        layers=1,
        kernel_size=7,
        pooling="mean",
        embedding_dim=8,
        front_end="linear",
    )
    torch.manual_seed(1)
    network = SpeakerNetwork(options, corpus.spec.n_mels, len(SPEAKERS)).eval()
    network.feature_mean.copy_(torch.from_numpy(corpus.mean))
    network.feature_std.copy_(torch.from_numpy(corpus.std))
    train = corpus.rows("train")
    with torch.no_grad():
        found = torch.cat(
            [network(torch.from_numpy(corpus.read(row))[None])["embedding"] for row in train]
        )
        # Without their common mean the embeddings of an untrained network hardly differ.
        network.embedding.bias -= found.mean(0)
        found = torch.nn.functional.normalize(found - found.mean(0), dim=1)
        labels = torch.from_numpy(corpus.labels[train])
        for label in range(len(SPEAKERS)):
            network.head.weight[label] = found[labels == label].mean(0)
    task = asdict(
        tasks.SpeakerIdConfig(data="no/such/folder", seed=1, train_subset="train", update_freq=[1])
    )
    return {
        "args": None,
        "cfg": {
            "common": {"user_dir": "fairseq_ext", "seed": 1},
            "task": {**task, "_name": "speaker_id"},
            "model": {
                **asdict(options),
                "_name": "conformer_speaker",
                "head": "cosine",
                "init_from": None,
                "freeze_encoder": False,
                "criterion": "am_softmax",
            },
            "criterion": {"_name": "am_softmax"},
        },
        "model": {f"network.{key}": value for key, value in network.state_dict().items()},
        "criterion": {},
        "optimizer_history": [{"num_updates": 7}],
        "task_state": {
            "speakers": list(corpus.speakers),
            "spec": corpus.spec.to_dict(),
            "scale": 9.0,
        },
        "extra_state": {},
    }


@pytest.fixture
def save_checkpoint(tiny_state, tmp_path):
    """Write the tiny checkpoint, changed by a function of its state; returns the path."""
    import torch

    def save(change=None, name="checkpoint.pt"):
        state = copy.deepcopy(tiny_state)
        if change is not None:
            change(state)
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_state, tmp_path_factory):
    """The tiny checkpoint as a file."""
    import torch

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(tiny_state, path)
    return path

"""What benchmarks/speaker.py measures: sides are built once, then run as often as asked.

A side is a function without arguments that does its work once and returns the number of units done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import evict
from benchmarks.speaker.peers import (
    N_MELS,
    SAME_SIZE,
    SPEAKERS,
    ecapa_network,
    encoder_parameters,
    our_network,
    torchaudio_network,
    training_step,
)
from ext_common.store import StoreWriter
from fairseq_ext.speaker.corpus import Corpus, write_corpus
from fairseq_ext.speaker.dataset import CropDataset
from fairseq_ext.speaker.features import FeatureSpec
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.network import NetworkOptions

CROP, BATCH = 101, 64
# of the course's 56,666 utterances
SHORTEST, MEDIAN, LONGEST, SIGMA = 91, 541, 7_193, 0.6256
PAD_VALUE = -20.0  # what course code pads log-mel features with

Side = Callable[[], int]


@dataclass
class Size:
    """How much is done; the quick one only shows that everything runs."""

    utterances: int = 3_000
    batches: int = 24
    cold_batches: int = 4
    embed: int = 96
    steps: int = 2

    @classmethod
    def quick(cls) -> "Size":
        return cls(utterances=80, batches=1, cold_batches=1, embed=5, steps=1)


def training_side(side: str, size: Size) -> Side:
    """`size.steps` updates on one batch of crops: forward, backward, clipping and AdamW."""
    network = {
        "ours": our_network,
        "torchaudio": torchaudio_network,
        "our default": lambda: our_network(NetworkOptions()),
    }[side]()
    generator = torch.Generator().manual_seed(1)
    batch = BATCH if size.steps > 1 else 4
    source = torch.randn(batch, CROP, N_MELS, generator=generator)
    step = training_step(network, source, torch.randint(SPEAKERS, (batch,), generator=generator))
    return lambda: sum(step() for _ in range(size.steps))


def embedding_checkpoint() -> dict:
    """What a checkpoint of our default network with random weights holds, for inference."""
    network = our_network(NetworkOptions()).eval()
    names = [f"id{n:05d}" for n in range(SPEAKERS)]
    return {
        "cfg": {
            "task": {"_name": "speaker_id"},
            "model": {"_name": "conformer_speaker"},
            "criterion": {"_name": "am_softmax"},
        },
        "model": {f"network.{name}": value for name, value in network.state_dict().items()},
        "task_state": {"speakers": names, "spec": FeatureSpec().to_dict()},
    }


def write_utterances(folder: Path, number: int) -> None:
    """The same utterances twice: folder/files/*.pt, float32 (T, 40), and folder/store."""
    files, store = folder / "files", folder / "store"
    files.mkdir(parents=True)
    writer = StoreWriter(store, (N_MELS,), "float32")
    rows = []
    for index, features in enumerate(utterances(number)):
        torch.save(torch.from_numpy(features), files / f"uttr-{index:06d}.pt")
        offset = writer.append(f"uttr-{index:06d}.pt", features)
        speaker = f"id{index % SPEAKERS:05d}"
        rows.append((f"uttr-{index:06d}.pt", speaker, "train", None, offset, len(features)))
    writer.sync()
    speakers = sorted({row[1] for row in rows})
    write_corpus(store, writer.part, rows, speakers, FeatureSpec(n_mels=N_MELS))
    writer.finish()


def reading_side(side: str, size: Size, folder: Path, cold: bool = False) -> Side:
    """Batches of random crops from random utterances, in this process.

    cold: nothing of what is read is in the page cache. Returns after the same work on both sides:
    a batch of `BATCH` crops of `CROP` frames with labels, padded where an utterance is shorter.
    """
    if side == "store":
        return _StoreReader(folder / "store", size, cold)
    return _FileReader(folder / "files", size, cold)


class _StoreReader:
    def __init__(self, path: Path, size: Size, cold: bool):
        self.path, self.cold, self.epoch = path, cold, 0
        self.batches = size.cold_batches if cold else size.batches
        self.dataset = None
        self.prepare()

    def prepare(self) -> None:
        """A new epoch; for a cold read, with the store out of the page cache (not timed)."""
        self.epoch += 1
        if self.dataset is None or self.cold:
            self.dataset = None
            if self.cold:
                evict(self.path / "features.bin")
            corpus = Corpus.open(self.path)
            self.dataset = CropDataset(corpus, corpus.rows("train"), CROP, seed=1)
        self.dataset.set_epoch(self.epoch)
        self.order = self.dataset.ordered_indices()

    def __call__(self) -> int:
        done = 0
        for number in range(self.batches):
            indices = self.order[number * BATCH : (number + 1) * BATCH]
            batch = self.dataset.collater(self.dataset.__getitems__(indices.tolist()))
            done += len(batch["target"])
        return done


class _FileReader:
    """One `torch.load` an utterance, as course code has it: random crop, pad_sequence."""

    def __init__(self, path: Path, size: Size, cold: bool):
        self.files = sorted(path.glob("*.pt"))
        self.cold = cold
        self.batches = size.cold_batches if cold else size.batches
        self.rng = np.random.default_rng(1)
        self.prepare()

    def prepare(self) -> None:
        self.order = self.rng.permutation(len(self.files))[: self.batches * BATCH]
        if self.cold:
            for index in self.order:
                evict(self.files[index])

    def item(self, index: int) -> tuple[torch.Tensor, int]:
        mel = torch.load(self.files[index])
        if len(mel) > CROP:
            start = int(self.rng.integers(len(mel) - CROP + 1))
            mel = mel[start : start + CROP]
        return mel, index % SPEAKERS

    def __call__(self) -> int:
        done = 0
        for number in range(self.batches):
            indices = self.order[number * BATCH : (number + 1) * BATCH]
            items = [self.item(int(i)) for i in indices]
            mels = torch.nn.utils.rnn.pad_sequence(
                [mel for mel, _ in items], batch_first=True, padding_value=PAD_VALUE
            )
            done += len(mels) if len(torch.tensor([label for _, label in items])) else 0
        return done


def embedding_networks() -> dict:
    """The networks by side: of equal size to 10 %, and SpeechBrain's only where it is installed."""
    networks = {"ours": our_network(SAME_SIZE), "torchaudio": torchaudio_network(SAME_SIZE)}
    ecapa = ecapa_network(encoder_parameters(networks["ours"]))
    if ecapa is not None:
        networks["speechbrain"] = ecapa
    return {name: network.eval() for name, network in networks.items()}


def embedding_side(side: str, size: Size, networks: dict) -> Side:
    """Embeddings of `size.embed` utterances of the course's lengths.

    ours: `SpeakerModel.embed`. "NAME, one by one": an utterance a call. "NAME, batches of 8": in
    the order of the files, padded to the longest.
    """
    features = utterances(size.embed)
    name, _, how = side.partition(", ")
    network = networks[name]
    if name == "ours":
        model = SpeakerModel(network, [str(n) for n in range(SPEAKERS)], FeatureSpec(n_mels=N_MELS))
        return lambda: len(model.embed(features))
    batch = 1 if how == "one by one" else 8
    inputs = [torch.from_numpy(x) for x in features]

    def run() -> int:
        done = []
        with torch.inference_mode():
            for first in range(0, len(inputs), batch):
                part = inputs[first : first + batch]
                lengths = torch.tensor([len(x) for x in part])
                source = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
                done.append(_embed(network, source, lengths))
        return len(torch.cat(done))

    return run


def _embed(network, source, lengths):
    if hasattr(network, "encoder"):
        mask = torch.arange(source.shape[1]) >= lengths[:, None]
        return network(source, mask if mask.any() else None)["embedding"]
    return network(source, lengths / source.shape[1]).squeeze(1)


def utterances(number: int, seed: int = 1) -> list[np.ndarray]:
    """Random features float32 (T, 40) whose lengths are distributed as the course's."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(MEDIAN), SIGMA, number)).round().astype(np.int64)
    pool = rng.standard_normal((50_000, N_MELS), dtype=np.float32) * 5 - 2
    result = []
    for length in lengths.clip(SHORTEST, LONGEST):
        first = int(rng.integers(len(pool) - length))
        result.append(pool[first : first + length].copy())
    return result

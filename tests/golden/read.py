"""What a version reads in the files of this folder, by the API of its commands, as plain JSON.

Old names on purpose: they are read by the version that wrote them and by today's.
"""

from dataclasses import asdict
from pathlib import Path

LINES = ["I like red apples.", "we see big houses.", "", "gold 鑫"]


def read(folder: Path) -> dict:
    """Everything, by job; floats as they came."""
    jobs = (speaker, translation, backtranslation, diffusion)
    return {job.__name__: job(folder / job.__name__) for job in jobs}


def speaker(folder: Path) -> dict:
    from fairseq_ext.speaker import SpeakerModel
    from fairseq_ext.speaker.corpus import Corpus

    corpus = Corpus.open(folder / "data")
    model = SpeakerModel.from_checkpoint(folder / "checkpoint.pt", device="cpu")
    rows = corpus.rows("test")
    features = [corpus.read(row) for row in rows]
    return {
        "speakers": corpus.speakers,
        "spec": asdict(corpus.spec),
        "splits": {name: corpus.rows(name).tolist() for name in ("train", "valid", "test")},
        "labels": corpus.labels.tolist(),
        "mean": corpus.mean.tolist(),
        "std": corpus.std.tolist(),
        "sums": [float(each.sum()) for each in features],
        "known": list(model.speakers),
        "scores": model.scores(features).tolist(),
        "embeddings": model.embed(features).tolist(),
    }


def translation(folder: Path) -> dict:
    from fairseq_ext.translation import Translator
    from fairseq_ext.translation.corpus import Corpus

    corpus = Corpus.open(folder / "data")
    translator = Translator.from_checkpoint(str(folder / "checkpoint.pt"), device="cpu")
    found = list(translator.translate(LINES))
    codec = corpus.codec("zh")
    return {
        "languages": list(corpus.languages),
        "splits": corpus.splits,
        "normalise": corpus.normalise,
        "pieces": codec.size,
        "ids": [codec.encode(line) for line in LINES],
        "texts": [each.text for each in found],
        "scores": [each.score for each in found if each.hypotheses],
    }


def backtranslation(folder: Path) -> dict:
    from fairseq_ext.backtranslation.chunks import Chunks
    from fairseq_ext.backtranslation.synthetic import Synthetic

    synthetic = Synthetic.open(folder / "synthetic")
    chunks = Chunks(folder / "stopped" / ".work")
    return {
        "languages": [synthetic.synthetic_lang, synthetic.real_lang],
        "lines": synthetic.lines,
        "synthetic": (folder / "synthetic" / "synthetic.zh").read_text("utf-8"),
        "done": chunks.done_lines(),
        "of": chunks.lines,
        "chunks": [chunks.read(number) for number in range(chunks.count)],
    }


def diffusion(folder: Path) -> dict:
    from diffusion_ext.image_store import Images
    from diffusion_ext.inference import DiffusionModel

    images = Images.open(folder / "data")
    model = DiffusionModel.from_checkpoint(folder / "checkpoint.pt", "cpu")
    drawn = model.sample(2, seed=3, sampler="ddim", steps=4, labels=[0, 1])
    return {
        "classes": list(images.classes),
        "names": list(images.names),
        "labels": images.labels.tolist() if hasattr(images.labels, "tolist") else images.labels,
        "content_hash": images.content_hash,
        "sum": int(images.pixels.sum()),
        "shape": list(model.shape),
        "known": model.classes,
        "drawn": drawn.tolist(),
    }

"""What is timed: models of Marian's size with random weights, and lines of about 20 pieces.

FOLDER/data      prepared bitext of which `test` are the lines, for fairseq-generate, and model.pt
FOLDER/marian    the same sizes and the same vocabulary as a Hugging Face folder
FOLDER/lines     the lines
FOLDER/case.json what :func:`write_case` returns
"""

import hashlib
import json
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from benchmarks.translation.cases import LANGUAGES, SPLIT, read_corpus, write_model
from benchmarks.translation.speed import default_corpus, named
from ext_common.cli import UserError
from ext_common.manifest import atomic_json

BYTES_OF_SCORE = b"\x15\x00\x00\x00\x00"  # 0.0
UNUSED = b"\x18\x05"


@dataclass(frozen=True)
class Size:
    """Sizes of the network; pieces: of a line with </s> (their mean); length: of every output.

    trained: pieces that SentencePiece learns, none: as `prepare` would. The others are never used.
    """

    vocabulary: int = 32_000
    trained: int | None = None
    dim: int = 512
    ffn: int = 2048
    heads: int = 8
    layers: int = 6
    pieces: int = 20
    length: int = 25

    @classmethod
    def tiny(cls) -> "Size":
        return cls(vocabulary=800, trained=700, dim=64, ffn=128, heads=4, layers=1, length=7)


def write_case(folder: Path, corpus, size: Size, count: int, generated: int) -> dict:
    """FOLDER with `count` lines, the first `generated` of them in `data`; returns statistics."""
    from fairseq_ext.translation.text.normalise import normalise
    from fairseq_ext.translation.text.spm import Codec, train_model

    (folder / "data").mkdir(parents=True)
    pairs = [
        tuple(normalise(text, lang) for text, lang in zip(pair, LANGUAGES, strict=True))
        for pair in corpus
    ]
    pairs = [pair for pair in dict.fromkeys(pairs) if all(pair)]
    text = folder / "all.txt"
    text.write_text("".join(f"{a}\n{b}\n" for a, b in pairs), encoding="utf-8")
    model = train_model([text], size.trained, pairs=len(pairs))
    learned = Codec(model, ["<BT>"]).size
    model = with_unused_pieces(model, size.vocabulary - learned)
    codec = Codec(model, ["<BT>"])

    def pieces_of(line: str) -> int:
        return len(codec.encode(line)) + 1

    sentences = list(dict.fromkeys(source for source, _ in pairs))
    random.Random(1).shuffle(sentences)
    lines = joined(sentences, pieces_of, size.pieces, count)
    (folder / "lines").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_data(folder / "data", model, codec, lines[:generated], pairs)
    parameters = {
        "fairseq": write_model(folder / "data", size),
        "marian": write_marian(folder / "marian", model, codec, size),
    }
    lengths = [pieces_of(line) for line in lines]
    case = {
        "lines": len(lines),
        "source_pieces": statistics.mean(lengths),
        "source_pieces_deviation": statistics.pstdev(lengths),
        "source_pieces_longest": max(lengths),
        "target_pieces": size.length,
        "vocabulary": codec.size,
        "vocabulary_learned": learned,
        "parameters": parameters,
        "size": asdict(size),
    }
    atomic_json(folder / "case.json", case)
    return case


def joined(
    sentences: Sequence[str], pieces_of: Callable[[str], int], mean: float, count: int
) -> list[str]:
    """`count` different lines, each of one sentence or more, of `mean` pieces on the average.

    A line takes sentences as long as all lines up to it have less than their share.
    """
    supply, lines, total = cycle(sentences), [], 0
    seen: set[str] = set()
    while len(lines) < count:
        line = next(supply)
        while total + pieces_of(line) < mean * (len(lines) + 1) or line in seen:
            line = f"{line} {next(supply)}"
        seen.add(line)
        lines.append(line)
        total += pieces_of(line)
    return lines


def with_unused_pieces(model: bytes, count: int) -> bytes:
    """A SentencePiece model with `count` more pieces that no text turns into.

    A model is a protocol buffer (sentencepiece_model.proto): fields of type 1 are the pieces, and more of
    them may follow behind all others.
    """
    if count < 0:
        raise ValueError(f"the model has {-count} pieces too many")
    return model + b"".join(_unused_piece(number) for number in range(count))


def _unused_piece(number: int) -> bytes:
    name = f"<unused{number}>".encode()
    piece = bytes([0x0A, len(name)]) + name + BYTES_OF_SCORE + UNUSED
    return bytes([0x0A, len(piece)]) + piece


def write_data(
    folder: Path, model: bytes, codec, lines: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> None:
    """A prepared bitext of `pairs`, whose valid and test are `lines` on both sides: only one is read."""
    import torch
    from fairseq.data import indexed_dataset

    (folder / "text").mkdir()
    pieces = codec.pieces(range(4, codec.size))
    splits = {"train": list(zip(*pairs, strict=True)), "valid": [lines] * 2, SPLIT: [lines] * 2}
    for side, lang in enumerate(LANGUAGES):
        (folder / f"spm.{lang}.model").write_bytes(model)
        (folder / f"dict.{lang}.txt").write_text("".join(f"{p} 1\n" for p in pieces), "utf-8")
        for split, texts in splits.items():
            stem = folder / f"{split}.{LANGUAGES[0]}-{LANGUAGES[1]}.{lang}"
            builder = indexed_dataset.make_builder(f"{stem}.bin", "mmap", codec.size)
            for line in texts[side]:
                builder.add_item(torch.IntTensor([*codec.encode(line), 2]))
            builder.finalize(f"{stem}.idx")
            written = "".join(f"{line}\n" for line in texts[side])
            (folder / "text" / f"{split}.{lang}").write_text(written, encoding="utf-8")
    digest = hashlib.sha256(model).hexdigest()
    description = {
        "kind": "translation",
        "version": 1,
        "languages": list(LANGUAGES),
        "normalise": "standard",
        "joint": True,
        "extra_symbols": ["<BT>"],
        "spm": {lang: {"file": f"spm.{lang}.model", "sha256": digest} for lang in LANGUAGES},
        "splits": {split: len(texts[0]) for split, texts in splits.items()},
        "split_sha256": "",
        "opencc": None,
    }
    (folder / "corpus.json").write_text(json.dumps(description), encoding="utf-8")


def write_marian(folder: Path, model: bytes, codec, size: Size) -> int:
    """A Marian model with random weights and its tokenizer; returns its size."""
    import torch
    import transformers
    from transformers import GenerationConfig, MarianConfig, MarianMTModel, MarianTokenizer

    from fairseq_ext.backtranslation.models.huggingface import quiet

    folder.mkdir()
    for side in ("source", "target"):
        (folder / f"{side}.spm").write_bytes(model)
    names = ["</s>", "<unk>", "<s>", *codec.pieces(range(4, codec.size)), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    with quiet(transformers):
        tokenizer = MarianTokenizer(
            *(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")),
            source_lang=LANGUAGES[0],
            target_lang=LANGUAGES[1],
            model_max_length=512,
        )
    pad = len(names) - 1
    parts = {}
    for part in ("encoder", "decoder"):
        parts[f"{part}_layers"] = size.layers
        parts[f"{part}_ffn_dim"] = size.ffn
        parts[f"{part}_attention_heads"] = size.heads
    torch.manual_seed(1)
    network = MarianMTModel(
        MarianConfig(
            vocab_size=len(names),
            d_model=size.dim,
            **parts,
            max_position_embeddings=512,
            activation_function="swish",
            scale_embedding=True,
            static_position_embeddings=True,
            share_encoder_decoder_embeddings=True,
            pad_token_id=pad,
            eos_token_id=0,
            decoder_start_token_id=pad,
            forced_eos_token_id=None,
            # logits that differ clearly, as those of a trained model do
            init_std=0.1,
        )
    )
    with torch.no_grad():
        # as in Marian, which decodes from a zero vector
        network.model.shared.weight[pad] = 0
    network.generation_config = GenerationConfig(
        max_length=512, eos_token_id=0, pad_token_id=pad, decoder_start_token_id=pad
    )
    with quiet(transformers):
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in network.parameters())


def corpus_of(options) -> tuple[str, list]:
    """(what it is, its pairs)."""
    path = options.corpus or default_corpus()
    if options.corpus and not os.path.exists(path):
        raise UserError(f"{path} does not exist: give a tab-separated bitext with --corpus")
    if options.tiny or not os.path.exists(path):
        return "invented, sentences of 2 to 14 words, all lengths alike", read_corpus(None)
    return named(path), read_corpus(path)


def endless(corpus) -> Iterator[str]:
    """The source lines of a bitext, over and over, each with its number: no two are equal."""
    for number, (source, _) in enumerate(cycle(corpus), 1):
        yield f"{source} {number}"

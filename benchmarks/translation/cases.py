"""What is timed: a Transformer of base size with random weights, and sentences of real lengths."""

import hashlib
import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

LANGUAGES = ("en", "zh")
SPLIT = "test"


@dataclass(frozen=True)
class Size:
    """Sizes of the network and the text; length: pieces of every output."""

    sentences: int = 600
    vocabulary: int = 7800
    dim: int = 512
    ffn: int = 2048
    heads: int = 8
    layers: int = 6

    @classmethod
    def quick(cls) -> "Size":
        return cls(sentences=24, vocabulary=700, dim=16, ffn=32, heads=2, layers=1)


def read_corpus(path):
    """Pairs of a tab-separated file, or of an invented language where there is none."""
    if path and os.path.exists(path):
        from fairseq_ext.translation.text.normalise import read_pairs

        return [(source, target) for _, source, target in read_pairs([path])]
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(400)]
    lengths = [draw.randint(2, 14) for _ in range(800)]
    return [
        (" ".join(draw.choices(words, k=n)) + ".", "".join(draw.choices(words, k=n)))
        for n in lengths
    ]


def write_case(folder: Path, corpus, size: Size) -> dict:
    """DATA with one split, the lines of it as `lines.txt`, and `model.pt`; returns its statistics."""
    import torch
    from fairseq.data import indexed_dataset

    from fairseq_ext.translation.text.normalise import normalise
    from fairseq_ext.translation.text.spm import Codec, train_model

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [
        tuple(normalise(text, lang) for text, lang in zip(pair, LANGUAGES, strict=True))
        for pair in corpus
    ]
    pairs = [pair for pair in dict.fromkeys(pairs) if all(pair)]
    text = folder / "all.txt"
    text.write_text("".join(f"{a}\n{b}\n" for a, b in pairs), encoding="utf-8")
    model = train_model([text], size=size.vocabulary)
    codec = Codec(model, ["<BT>"])
    chosen = random.Random(1).sample(pairs, min(size.sentences, len(pairs)))
    lengths = {lang: [] for lang in LANGUAGES}
    (folder / "text").mkdir()
    for side, lang in enumerate(LANGUAGES):
        (folder / f"spm.{lang}.model").write_bytes(model)
        pieces = codec.pieces(range(4, codec.size))
        (folder / f"dict.{lang}.txt").write_text("".join(f"{p} 1\n" for p in pieces), "utf-8")
        for split in ("train", "valid", SPLIT):
            stem = folder / f"{split}.{LANGUAGES[0]}-{LANGUAGES[1]}.{lang}"
            builder = indexed_dataset.make_builder(f"{stem}.bin", "mmap", codec.size)
            for pair in chosen:
                ids = [*codec.encode(pair[side]), 2]
                builder.add_item(torch.IntTensor(ids))
                if split == SPLIT:
                    lengths[lang].append(len(ids))
            builder.finalize(f"{stem}.idx")
            lines = "".join(f"{pair[side]}\n" for pair in chosen)
            (folder / "text" / f"{split}.{lang}").write_text(lines, encoding="utf-8")
    digest = hashlib.sha256(model).hexdigest()
    spm = {lang: {"file": f"spm.{lang}.model", "sha256": digest} for lang in LANGUAGES}
    description = {
        "kind": "translation",
        "version": 1,
        "languages": list(LANGUAGES),
        "normalise": "standard",
        "joint": True,
        "extra_symbols": ["<BT>"],
        "spm": spm,
        "splits": dict.fromkeys(("train", "valid", SPLIT), len(chosen)),
        "split_sha256": "",
        "opencc": None,
    }
    (folder / "corpus.json").write_text(json.dumps(description), encoding="utf-8")
    parameters = write_model(folder, size)
    mean = {lang: sum(found) / len(found) for lang, found in lengths.items()}
    return {
        "sentences": len(chosen),
        "vocabulary": codec.size,
        "parameters": parameters,
        "source_pieces": mean[LANGUAGES[0]],
        "target_pieces": mean[LANGUAGES[1]],
        # without </s>
        "length": max(1, round(mean[LANGUAGES[1]]) - 1),
        "size": asdict(size),
    }


def write_model(folder: Path, size: Size) -> int:
    """A Transformer as fairseq initialises it, saved as fairseq-train does; returns its size."""
    import torch
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    from ext_common import compat

    compat.apply()
    from fairseq_ext.translation import task as _  # noqa: F401

    flags = f"""{folder} --task translation_spm --arch transformer --share-all-embeddings
        --source-lang {LANGUAGES[0]} --target-lang {LANGUAGES[1]}
        --optimizer adam --criterion label_smoothed_cross_entropy --max-tokens 4096"""
    for part in ("encoder", "decoder"):
        flags += f""" --{part}-embed-dim {size.dim} --{part}-ffn-embed-dim {size.ffn}
            --{part}-layers {size.layers} --{part}-attention-heads {size.heads}"""
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, flags.split())
    cfg = convert_namespace_to_omegaconf(args)
    torch.manual_seed(1)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "criterion": {},
        "optimizer_history": [
            {
                "criterion_name": "",
                "optimizer_name": "",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": task.state_dict(),
        "extra_state": {},
        "last_optimizer_state": None,
    }
    torch.save(state, folder / "model.pt")
    return sum(p.numel() for p in model.parameters())

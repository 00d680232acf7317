"""A toy language pair, prepared; runs of fairseq as a subprocess."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
# English word for word Chinese, so that a tiny model learns it in a few dozen updates.
WORDS = {
    "I": "我",
    "you": "你",
    "we": "我们",
    "he": "他",
    "like": "喜欢",
    "see": "看见",
    "buy": "买",
    "eat": "吃",
    "red": "红的",
    "big": "大的",
    "new": "新的",
    "cold": "冷的",
    "apples": "苹果",
    "houses": "房子",
    "books": "书",
    "fish": "鱼",
}
RARE = {"smile 😀": "笑😀", "gold 鑫": "鑫", "dragon 龘": "龘", "family 👨‍👩‍👧": "家👨‍👩‍👧"}


def toy_pairs(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Different sentence pairs of the toy languages; every tenth ends in a rare character."""
    draw = random.Random(seed)
    who, does, how, what = (list(WORDS)[i : i + 4] for i in range(0, 16, 4))
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        words = [draw.choice(who), draw.choice(does), draw.choice(how), draw.choice(what)]
        words += [draw.choice(how + what) for _ in range(draw.randrange(4))]
        source, target = " ".join(words), "".join(WORDS[word] for word in words)
        if len(pairs) % 10 == 0:
            rare = draw.choice(list(RARE))
            source, target = f"{source} {rare}", target + RARE[rare]
        pairs[source + "."] = target + "。"
    return list(pairs.items())


def fairseq(command: str, *arguments, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run fairseq-train, -generate, …; asserts that it ended well unless `check` is False."""
    call = [Path(sys.executable).with_name(f"fairseq-{command}"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = processes.run(call, capture_output=True, text=True, env=env, **options)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train_flags(data, save_dir, *more) -> list[str]:
    """A tiny Transformer for `fairseq-train`, 10 updates unless `more` says otherwise."""
    flags = f"""{data} --user-dir {ROOT}/fairseq_ext --task translation_spm --arch transformer
        --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32
        --encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2
        --decoder-attention-heads 2 --encoder-normalize-before --decoder-normalize-before
        --share-all-embeddings --dropout 0 --optimizer adam --lr 1e-2
        --lr-scheduler inverse_sqrt --warmup-updates 10 --criterion label_smoothed_cross_entropy
        --label-smoothing 0.1 --max-tokens 1000 --num-workers 0 --cpu --no-progress-bar
        --log-format json --save-dir {save_dir}"""
    more = [str(flag) for flag in more]
    default = [] if "--max-update" in more else ["--max-update", "10"]
    return [*flags.split(), *default, *more]


@pytest.fixture(scope="session")
def toy_tsv(tmp_path_factory) -> Path:
    """700 pairs, English and Chinese, tab-separated."""
    path = tmp_path_factory.mktemp("toy") / "toy.tsv"
    rows = [f"{source}\t{target}\n" for source, target in toy_pairs(700)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_data(toy_tsv) -> Path:
    """The toy pairs as `translation.prepare` writes them: 601 train, 43 valid, 56 test pairs."""
    data = toy_tsv.parent / "data"
    write_data(data, toy_pairs(700))
    return data


@pytest.fixture(scope="session")
def toy_codec(toy_data):
    from fairseq_ext.translation.text.spm import Codec

    return Codec.from_file(toy_data / "spm.en.model", ["<BT>"])


@pytest.fixture(scope="session")
def toy_checkpoint(toy_data, tmp_path_factory) -> Path:
    """A tiny Transformer after 60 updates on the toy pairs, with its training log beside it."""
    folder = tmp_path_factory.mktemp("toy_model")
    done = fairseq(
        "train",
        *train_flags(toy_data, folder, "--max-update", 60, "--no-epoch-checkpoints"),
    )
    (folder / "train.log").write_text(done.stdout + done.stderr)
    return folder / "checkpoint_best.pt"


def write_data(data: Path, pairs, languages=("en", "zh"), size=700, kind="unigram", joint=True):
    """A prepared folder, made by hand."""
    import hashlib
    import json

    import torch
    from fairseq.data import indexed_dataset

    from fairseq_ext.translation.text.spm import Codec, train_model

    (data / "text").mkdir(parents=True)
    cuts = {"train": slice(0, 601), "valid": slice(601, 644), "test": slice(644, None)}
    for split, cut in cuts.items():
        for side, lang in enumerate(languages):
            lines = [pair[side] + "\n" for pair in pairs[cut]]
            (data / "text" / f"{split}.{lang}").write_text("".join(lines), encoding="utf-8")
    texts = [data / "text" / f"train.{lang}" for lang in languages]
    models = {}
    for lang, text in zip(languages, texts, strict=True):
        models[lang] = train_model(texts if joint else [text], size=size, kind=kind)
        (data / f"spm.{lang}.model").write_bytes(models[lang])
        codec = Codec(models[lang], ["<BT>"])
        pieces = codec.pieces(range(4, codec.size))
        (data / f"dict.{lang}.txt").write_text("".join(f"{p} 1\n" for p in pieces), "utf-8")
        for split in cuts:
            stem = data / f"{split}.{languages[0]}-{languages[1]}.{lang}"
            builder = indexed_dataset.make_builder(f"{stem}.bin", "mmap", codec.size)
            for line in (data / "text" / f"{split}.{lang}").read_text("utf-8").split("\n")[:-1]:
                builder.add_item(torch.IntTensor([*codec.encode(line), 2]))
            builder.finalize(f"{stem}.idx")
    state = {
        "kind": "translation",
        "version": 1,
        "languages": list(languages),
        "normalise": "standard",
        "joint": joint,
        "extra_symbols": ["<BT>"],
        "spm": {
            lang: {"file": f"spm.{lang}.model", "sha256": hashlib.sha256(model).hexdigest()}
            for lang, model in models.items()
        },
        "splits": {split: len(pairs[cut]) for split, cut in cuts.items()},
        "split_sha256": "",
        "opencc": None,
    }
    (data / "corpus.json").write_text(json.dumps(state))

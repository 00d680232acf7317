"""A tiny but real Marian model with its tokenizer, as a folder that Hugging Face's classes wrote."""

import json
import random
import warnings
from pathlib import Path

WORDS = {
    "我": "I",
    "你": "you",
    "我们": "we",
    "他": "he",
    "喜欢": "like",
    "看见": "see",
    "买": "buy",
    "吃": "eat",
    "红的": "red",
    "大的": "big",
    "新的": "new",
    "冷的": "cold",
    "苹果": "apples",
    "房子": "houses",
    "书": "books",
    "鱼": "fish",
}
LENGTH = 48


def toy_pairs(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Different sentence pairs, Chinese and word for word English."""
    draw = random.Random(seed)
    who, does, how, what = (list(WORDS)[i : i + 4] for i in range(0, 16, 4))
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        words = [draw.choice(who), draw.choice(does), draw.choice(how), draw.choice(what)]
        words += [draw.choice(how + what) for _ in range(draw.randrange(4))]
        pairs["".join(words) + "。"] = " ".join(WORDS[word] for word in words) + "."
    return list(pairs.items())


def make_marian(
    folder: Path,
    updates: int = 0,
    languages: tuple[str, ...] = (),
    seed: int = 1,
    source_lang: str | None = "zho",
    target_lang: str | None = "eng",
    pieces: int = 90,
) -> Path:
    """Write config, weights (random, or after so many updates on toy pairs) and tokenizer.

    languages: target languages whose `>>xxx<<` the vocabulary has. The card's decoding defaults are
    those of opus-mt: num_beams 4, max_length 512, bad_words_ids, forced_eos_token_id.
    """
    import torch
    from transformers import GenerationConfig, MarianConfig, MarianMTModel, MarianTokenizer
    from transformers.utils import logging

    # a pip install that is recommended, bars for files of a few kilobytes
    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    pairs = toy_pairs(400)
    found: list[str] = []
    for side, texts in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
        found += _train_pieces(list(texts), folder / f"{side}.spm", pieces)
    codes = [f">>{code}<<" for code in languages]
    names = list(dict.fromkeys(["</s>", "<unk>", *codes, *found, "<pad>"]))
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    tokenizer = MarianTokenizer(
        str(folder / "source.spm"),
        str(folder / "target.spm"),
        str(folder / "vocab.json"),
        source_lang=source_lang,
        target_lang=target_lang,
        model_max_length=512,
    )
    pad = len(names) - 1
    torch.manual_seed(seed)
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(names),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=LENGTH,
            activation_function="swish",
            scale_embedding=True,
            static_position_embeddings=True,
            pad_token_id=pad,
            eos_token_id=0,
            decoder_start_token_id=pad,
            forced_eos_token_id=None,
            # random weights of the usual 0.02 give all pieces the same odds
            init_std=0.02 if updates else 0.3,
            dropout=0.0,
        )
    )
    if updates:
        _train(model, tokenizer, pairs, updates, codes)
    with torch.no_grad():
        # Marian decodes from a zero vector, which is what CTranslate2 begins with
        model.model.shared.weight[pad] = 0
    model.generation_config = GenerationConfig(
        num_beams=4,
        max_length=512,
        bad_words_ids=[[pad]],
        forced_eos_token_id=0,
        eos_token_id=0,
        pad_token_id=pad,
        decoder_start_token_id=pad,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train_pieces(texts: list[str], path: Path, size: int) -> list[str]:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.with_suffix(".model").rename(path)
    path.with_suffix(".vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [
        processor.id_to_piece(i)
        for i in range(len(processor))
        if not processor.is_control(i) and not processor.is_unknown(i)
    ]


def _train(model, tokenizer, pairs, updates: int, codes: list[str]) -> None:
    import torch

    pad = model.config.pad_token_id
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    draw = random.Random(2)
    model.train()
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (update + 1) / 20)
        chosen = draw.sample(pairs, 64)
        prefix = f"{draw.choice(codes)} " if codes else ""
        batch = tokenizer(
            [prefix + source for source, _ in chosen],
            text_target=[target for _, target in chosen],
            padding=True,
            return_tensors="pt",
        )
        labels = batch.pop("labels")
        loss = model(**batch, labels=labels.masked_fill(labels == pad, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.model.shared.weight[pad] = 0
    model.eval()

"""The ways to translate lines that `benchmarks.backtranslation` times, each a function from lines to lines.

The peer from Hugging Face is what course notes and model cards show: tokenizer, `generate`, `batch_decode`;
gradients are off, and none of the card's bans, which cost time, is in force.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.translation.speed import PEER, generate

ONE = "one generate call a line"
BATCHED = "batched generate, file order"
BEAM = 4
# ours → backend, compute type, and what of the case it opens
OURS = {
    "ours, fairseq float32": ("fairseq", "float32", "data/model.pt"),
    "ours, huggingface float32": ("huggingface", "float32", "marian"),
    "ours, ctranslate2 float32": ("ctranslate2", "float32", "marian"),
    "ours, ctranslate2 int8": ("ctranslate2", "int8", "marian"),
    "ours, ctranslate2 int8, shortlist": ("ctranslate2", "int8", "marian"),
}
SIDES = (ONE, BATCHED, PEER, *OURS)
Side = Callable[[Sequence[str]], list[str]]


def open_side(name: str, folder: Path, threads: int, batch: int) -> Side:
    """A side with its model loaded; batch: lines a call of BATCHED."""
    if name in (ONE, BATCHED):
        return partial(HuggingFace(folder, threads), batch=1 if name == ONE else batch)
    return ours(name, folder, threads)


def length_of(folder: Path) -> int:
    """Pieces of every output."""
    return json.loads((folder / "case.json").read_text(encoding="utf-8"))["target_pieces"]


class HuggingFace:
    """Hugging Face's `generate` for lines in their order, `batch` of them at a time."""

    def __init__(self, folder: Path, threads: int):
        import torch
        import transformers

        from fairseq_ext.backtranslation.models.huggingface import quiet

        torch.set_num_threads(threads)
        self.length = length_of(folder)
        with quiet(transformers):
            self.tokenizer, self.model = (
                kind.from_pretrained(folder / "marian", local_files_only=True)
                for kind in (transformers.AutoTokenizer, transformers.AutoModelForSeq2SeqLM)
            )
        self.model.eval()
        # what it is told here rules, not how long the card says that outputs are
        self.model.generation_config.max_length = None

    def __call__(self, lines: Sequence[str], batch: int) -> list[str]:
        import torch

        found = []
        for start in range(0, len(lines), batch):
            some = list(lines[start : start + batch])
            inputs = self.tokenizer(some, return_tensors="pt", padding=True)
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs,
                    num_beams=BEAM,
                    min_new_tokens=self.length,
                    max_new_tokens=self.length,
                )
            if ids.shape[1] != self.length + 1:
                raise RuntimeError(f"outputs have {ids.shape[1] - 1} pieces, not {self.length}")
            found += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found


def ours(name: str, folder: Path, threads: int) -> Side:
    """One of our back ends, with its own batches."""
    from fairseq_ext.backtranslation.models.backends import ModelOptions, open_model
    from fairseq_ext.translation.decode.options import DecodeOptions

    backend, compute_type, path = OURS[name]
    options = ModelOptions(
        backend=backend,
        compute_type=compute_type,
        device="cpu",
        threads=threads,
        shortlist=str(folder / "data") if "shortlist" in name else None,
    )
    translator = open_model(str(folder / path), options).translator
    length = length_of(folder)
    decode = DecodeOptions(beam=BEAM, min_len=length, max_len_a=0, max_len_b=length)

    def translate(lines: Sequence[str]) -> list[str]:
        return [found.text for found in translator.translate_window(lines, decode)]

    return translate


class FairseqGenerate:
    """fairseq-generate on `data`, with the fastest of some --max-tokens; tried: their rates."""

    def __init__(self, folder: Path, options, candidates: Sequence[int]):
        self.folder, self.options = folder, options
        self.tried = {tokens: self._rate(tokens) for tokens in candidates}
        self.best = max(self.tried, key=self.tried.get)

    def units(self) -> float:
        """Run once; its own rate times the seconds it took, which `alternate` divides by."""
        began = time.perf_counter()
        rate = self._rate(self.best)
        return rate * (time.perf_counter() - began)

    def _rate(self, max_tokens: int) -> float:
        return fairseq_generate(self.folder, max_tokens, self.options)["rate"]


def fairseq_generate(folder: Path, max_tokens: int, options) -> dict:
    """What `translation.generate` says of one run.

    Its peak memory is right only where this process is smaller: a child begins with its parent's peak.
    """
    length = length_of(folder)
    decode = dict(beam=BEAM, min_len=length, max_len_a=0, max_len_b=length)
    data = folder / "data"
    return generate(data, data / "model.pt", {**decode, "max_tokens": max_tokens}, options)

"""The ways to translate lines that `benchmarks.backtranslation` times, each a function from lines to lines.

The peers from Hugging Face are what course notes and model cards show: tokenizer, `generate`, `batch_decode`;
gradients are off, and none of the card's bans, which cost time, is in force.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import status

ONE = "one generate call a line"
BATCHED = "batched generate, file order"
BEAM = 4
# ours → backend, compute type, and what of the case it opens
OURS = {
    "ours, fairseq float32": ("fairseq", "float32", "data/model.pt"),
    "ours, huggingface float32": ("huggingface", "float32", "marian"),
    "ours, ctranslate2 float32": ("ctranslate2", "float32", "marian"),
    "ours, ctranslate2 int8": ("ctranslate2", "int8", "marian"),
}
Side = Callable[[Sequence[str]], list[str]]


def open_side(name: str, folder: Path, length: int, threads: int, batch: int | None) -> Side:
    """A side with its model loaded; batch: lines a call of BATCHED."""
    if name == ONE:
        return generate_of(folder / "marian", length, threads, 1)
    if name == BATCHED:
        return generate_of(folder / "marian", length, threads, batch or 32)
    return ours(name, folder, length, threads)


def generate_of(model: Path, length: int, threads: int, batch: int) -> Side:
    """Hugging Face's ``generate`` for so many lines at a time; every output has ``length`` pieces."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    network = AutoModelForSeq2SeqLM.from_pretrained(model, local_files_only=True).eval()

    def translate(lines: Sequence[str]) -> list[str]:
        found = []
        for start in range(0, len(lines), batch):
            inputs = tokenizer(
                list(lines[start : start + batch]), return_tensors="pt", padding=True
            )
            with torch.inference_mode():
                ids = network.generate(
                    **inputs, num_beams=BEAM, min_new_tokens=length, max_new_tokens=length
                )
            if ids.shape[1] != length + 1:
                raise RuntimeError(f"outputs have {ids.shape[1] - 1} pieces, not {length}")
            found += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return found

    return translate


def ours(name: str, folder: Path, length: int, threads: int) -> Side:
    """One of our back ends, with its own batches."""
    from fairseq_ext.backtranslation.backends import ModelOptions, open_model
    from fairseq_ext.translation.decoding import DecodeOptions

    backend, compute_type, path = OURS[name]
    options = ModelOptions(
        backend=backend, compute_type=compute_type, device="cpu", threads=threads
    )
    translator = open_model(str(folder / path), options).translator
    decode = DecodeOptions(beam=BEAM, min_len=length, max_len_a=0, max_len_b=length)

    def translate(lines: Sequence[str]) -> list[str]:
        return [found.text for found in translator.translate_window(lines, decode)]

    return translate


def peak_mb() -> float:
    """The largest resident memory that this process has had, in MB."""
    return status()["VmHWM"] / 1024

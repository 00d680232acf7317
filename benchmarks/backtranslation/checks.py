"""What speed must not cost: memory that grows with the corpus, and quality that int8 and a shortlist lose."""

import json
import shutil
import time
from pathlib import Path

from benchmarks.backtranslation.cases import corpus_of, endless
from benchmarks.common import in_fresh_process
from benchmarks.recorded import ROOT
from benchmarks.translation.speed import quiet_imports, read, say

STUB = Path(__file__).resolve().parent / "stub_reverse"
GENERATE, MONO, SYNTHETIC = "generate", "mono.en", "synthetic"
QUALITY = (
    "fairseq float32",
    "ctranslate2 float32",
    "ctranslate2 int8",
    "ctranslate2 int8, shortlist",
)
GOAL_BLEU = 0.3


def measure_memory(folder: Path, options) -> dict:
    """Peak memory and lines per second of `generate`, for each of --lines."""
    corpus, pairs = corpus_of(options)
    found = []
    for count in options.lines:
        say(f"memory of {count:,} lines")
        mono, dest = folder / MONO, folder / SYNTHETIC
        supply = endless(pairs)
        with open(mono, "w", encoding="utf-8", newline="") as file:
            file.writelines(f"{next(supply)}\n" for _ in range(count))
        flags = ["-m", "benchmarks.backtranslation", "--side", GENERATE, "--folder", str(folder)]
        began = time.perf_counter()
        peak = in_fresh_process(flags, ROOT)["peak_mb"]
        seconds = time.perf_counter() - began
        out = json.loads((dest / "manifest.json").read_text(encoding="utf-8"))["counts"]["out"]
        if out != count:
            raise RuntimeError(f"{out:,} of {count:,} lines came out")
        found.append(
            {
                "lines": count,
                "peak_mb": peak,
                "seconds": seconds,
                "rate": count / seconds,
                "input_mb": mono.stat().st_size / 1e6,
            }
        )
        shutil.rmtree(dest)
    return {"corpus": corpus, "runs": found}


def run_generate(folder: Path) -> None:
    """The command, in this process, with a stub for a model."""
    from fairseq_ext.backtranslation.generate import __main__ as generate

    flags = [
        "--model",
        "stub",
        "--backend",
        "stub",
        "--user-dir",
        str(STUB),
        "--mode",
        "beam",
        "--no-sanity-check",
    ]
    generate.main([str(folder / MONO), str(folder / SYNTHETIC), *flags])


def measure_quality(folder: Path, options) -> dict:
    """BLEU of the test split of --data by each back end, and the differences to fairseq's."""
    from fairseq_ext.backtranslation.models.backends import ModelOptions, open_model
    from fairseq_ext.translation.corpus import Corpus
    from fairseq_ext.translation.decode.options import DecodeOptions
    from fairseq_ext.translation.score.scoring import ScoringOptions, score

    quiet_imports()
    corpus = Corpus.open(options.data)
    # of its own, so that nothing is written beside the user's checkpoint
    checkpoint = folder / "model.pt"
    shutil.copyfile(options.path, checkpoint)
    found = {}
    for name in QUALITY:
        say(f"quality of {name}")
        backend, compute_type = name.partition(",")[0].split()
        how = ModelOptions(
            backend=backend,
            compute_type=compute_type,
            device="cpu",
            threads=options.threads,
            shortlist=options.data if "shortlist" in name else None,
        )
        translator = open_model(str(checkpoint), how).translator
        source, target = translator.vocabulary.source_lang, translator.vocabulary.target_lang
        lines, references = (read(corpus.text("test", lang)) for lang in (source, target))
        began = time.perf_counter()
        texts = [t.text for t in translator.translate(lines, DecodeOptions(beam=options.beam))]
        found[name] = (texts, len(lines) / (time.perf_counter() - began))
    first, _ = found[QUALITY[0]]
    results = {}
    for name, (texts, rate) in found.items():
        bleu = score(texts, references, target, options=ScoringOptions(metrics=["bleu"])).bleu
        results[name] = {
            "bleu": bleu,
            "difference": bleu - results[QUALITY[0]]["bleu"] if results else 0.0,
            "same_lines": sum(a == b for a, b in zip(texts, first, strict=True)) / len(texts),
            "rate": rate,
        }
    return {
        "sentences": len(lines),
        "source": source,
        "target": target,
        "beam": options.beam,
        "goal": GOAL_BLEU,
        "sides": results,
    }

"""The table of README.md: our figure beside that of the peer, from what is recorded."""

from collections.abc import Callable
from statistics import mean

from benchmarks.backtranslation.report import BITEXT, OURS, by_name
from benchmarks.diffusion.report import spread as loose
from benchmarks.pages import latest_first, markdown, spread
from benchmarks.speaker.report import AS_IS, SHIFTED, top1s
from benchmarks.translation.report import systems_of

Records = Callable[[str], list[dict]]


def headline(recorded: Records) -> str:
    """recorded: the records of a table by its name."""
    rows = [*speaker(recorded), *translation(recorded), *backtranslation(recorded)]
    rows += diffusion(recorded)
    return markdown(["", "here", "beside", "what stands beside it"], rows)


def speaker(recorded: Records) -> list[list[str]]:
    runs = {
        who: [r for r in recorded("speaker_tables") if r["run"].startswith(f"main-{who}-")]
        for who in ("ours", "baseline")
    }
    speed, *_ = latest_first(recorded("speaker_speed"))
    cells = [top1s(runs[who], f"{AS_IS}/test") + " %" for who in runs]
    shifted = [top1s(runs[who], f"{SHIFTED}/test") + " %" for who in runs]
    training = speed["cases"][0]
    return [
        [
            "251 speakers, 1 s of speech, 7 minutes on one core",
            *cells,
            "the course's model, same time",
        ],
        [
            "the same with loudness and tone changed, as by another microphone",
            *shifted,
            "the course's model, same time",
        ],
        [
            "training a Conformer of equal size",
            *rates(training, "ours", "torchaudio"),
            "torchaudio's Conformer",
        ],
    ]


def translation(recorded: Records) -> list[list[str]]:
    systems = systems_of(recorded("translation_tables"))["same CPU time"]
    transformer, lstm = (spread([r["test"]["bleu"] for r in runs]) for runs in systems.values())
    shortest = [r for r in recorded("shortest") if r["run"].startswith("translation-")]
    ours = spread([r["figure"] for r in shortest if "figure" in r])
    speeds = [f for f in recorded("translation_speed") if f["run"].startswith("speed")]
    speed, *_ = latest_first(speeds)
    sides = speed["speed"]["results"][0]["sides"]
    fast = f"{sides['ctranslate2 int8']['median']:.0f} sentences/s"
    peer = f"{sides['fairseq-generate']['median']:.0f}"
    return [
        [
            "English to Chinese, 27,835 pairs, 8 minutes on one core",
            f"{ours} BLEU",
            lstm,
            f"fairseq's LSTM, same time; its Transformer has {transformer}",
        ],
        [
            "translating, beam 5, int8 (extra `ctranslate2`) on 2 CPUs",
            fast,
            peer,
            "`fairseq-generate`",
        ],
    ]


def backtranslation(recorded: Records) -> list[list[str]]:
    names = (f"beam_untagged{OURS}", f"{BITEXT}{OURS}")
    runs = by_name(recorded("backtranslation_tables"))
    ours, alone = (spread([r["test"]["bleu"] for r in runs[n]]) for n in names)
    speed = next(f for f in recorded("backtranslation_speed") if f["run"] == "speed")["sides"]
    fast = f"{speed['ours, ctranslate2 int8, shortlist']['median']:.0f} lines/s"
    peer = f"{speed['one generate call a line']['median']:.1f}"
    return [
        [
            "8,000 pairs and 16,817 lines more, 9 minutes on one core",
            f"{ours} BLEU",
            alone,
            "the 8,000 pairs alone",
        ],
        [
            "writing synthetic text, int8 and `--shortlist`",
            fast,
            peer,
            "Hugging Face, a call a line",
        ],
    ]


def diffusion(recorded: Records) -> list[list[str]]:
    # the objective of the shortest command
    runs = [r for r in recorded("diffusion_tables") if r["run"].startswith("flow-")]
    metrics = [run["evaluation"]["metrics"]["frechet"] for run in runs]
    floor = f"{mean(m['floor']['mean'] for m in metrics):.1f}"
    ours = loose([m["value"] for m in metrics])
    speed, *_ = latest_first(recorded("diffusion_speed"))
    training = speed["cases"][0]
    what = "half of the real digits, from the other half"
    peer = "denoising-diffusion-pytorch, float32"
    return [
        ["Fréchet distance of digits, 5 minutes on one core", ours, floor, what],
        [
            "training a U-Net at 32 × 32, bfloat16",
            *rates(training, speed["default"], "theirs, float32"),
            peer,
        ],
    ]


def rates(case: dict, ours: str, theirs: str) -> list[str]:
    here, beside = (case["sides"][side]["median"] for side in (ours, theirs))
    return [f"{here:.0f} {case['unit']}", f"{beside:.0f}"]

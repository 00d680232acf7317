"""The arithmetic of `benchmarks.scale`, its large store, and that a recorded run is not made again."""

import numpy as np
import pytest

from benchmarks import scale
from fairseq_ext.speaker.corpus import Corpus


def record(run, **figures):
    return {"run": run, "date": "2026-11-28", "machine": "A, 2 CPUs", "command": "it", **figures}


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_are_of_medians_and_of_what_was_run():
    assert scale.report([]) == ""
    sides = {"single": [90, 100, 400], "together": [81, 95, 320, 1]}
    text = scale.report(
        [
            record(f"two speaker {side} {n}", per_second=rate)
            for side, rates in sides.items()
            for n, rate in enumerate(rates)
        ]
    )
    assert text.startswith("## Two processes") and "## Random" not in text
    # the last round is not whole, and the others' ratios are 0.9, 0.95 and 0.8
    assert cells(text, "speaker")[1:] == ["100 utterances/s", "88", "0.90", "0.80 to 0.95"]
    drawn = {"batch": 64, "before_ms": 1.0, "philox_ms": 3.0, "update_ms": 600.0}
    text = scale.report([record("random digits 28", **drawn)])
    assert cells(text, "digits 28")[2:] == ["1.0 ms", "3.0 ms", "600 ms", "0.50%"]
    rates = {"as it is": (100, 5), "compiled": (150, 60), "compiled, any lengths": (90, 70)}
    records = [
        record(f"compile translation {way}", steady_per_second=rate, first_seconds=first)
        for way, (rate, first) in rates.items()
    ]
    text = scale.report(records)
    found = [line.split(" | ")[2:] for line in text.splitlines() if line.startswith("| trans")]
    assert found[0][0] == "100 tokens/s"
    # in 180 s the compiled one does (180 − 60) · 150, as many as the other one in 180 · 100
    assert found[1] == ["150 tokens/s", "1.50 ×", "60 s", "3.0 minutes |"]
    assert found[2][-1] == "never |"


def test_images_are_in_the_order_of_their_number_and_size():
    figures = dict(update_s=0.5, batch=32, first_s=9.0, later_s=6.0, first_mb=1500, later_mb=600)
    text = scale.report(
        [
            record(f"images {count} of {side}", images=count, side=side, **figures)
            for count, side in ((71_000, 64), (1000, 128), (1000, 16))
        ]
    )
    found = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| 1", "| 7"))]
    assert found == [["| 1,000", "16 × 16"], ["| 1,000", "128 × 128"], ["| 71,000", "64 × 64"]]
    assert cells(text, "71,000")[2:] == [
        "0.50 s of 32 images",
        "9.0 s",
        "6.0 s",
        "1,500 MB",
        "600 MB",
        "A",
    ]


def test_a_large_store_takes_no_room(tmp_path):
    assert scale.sparse(tmp_path / "data", 1.0) == 1250
    corpus = Corpus.open(tmp_path / "data")
    assert len(corpus) == 1250 and corpus.features.nbytes == 10**9
    assert not np.any(corpus.read(1249, 4990, 10))
    assert sum(512 * path.stat().st_blocks for path in (tmp_path / "data").iterdir()) < 10**6


def test_a_run_that_is_recorded_is_not_made_again(tmp_path, monkeypatch, capsys):
    made, kills = [], [True]

    def part(folder, options):
        for name in ("a 1", "b 1"):
            yield name, lambda name=name: made.append(name) or {"per_second": 1.0}
            if kills and kills.pop():
                raise KeyboardInterrupt

    monkeypatch.setitem(scale.PARTS, "two", part)
    words = ["two", "--output", str(tmp_path / "scale.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        scale.main(words)
    scale.main(words)
    assert made == ["a 1", "b 1"]
    scale.main([*words, "--updates", "8"])
    assert made == ["a 1", "b 1"] * 2

"""The benchmark compares like with like, and one command runs each of its parts."""

import json
import random
import sys
from types import SimpleNamespace

import pytest

from tests import processes

pytest.importorskip("fairseq")
pytest.importorskip("ctranslate2")
pytest.importorskip("transformers")

from benchmarks.backtranslation import cases, checks, figures, sides
from benchmarks.backtranslation import speed as benchmark
from ext_common.cli import UsageError
from fairseq_ext.translation.text.spm import Codec, train_model


def test_lines_have_the_mean_length_and_are_different():
    draw = random.Random(3)
    sentences = [" ".join(["x"] * draw.randint(1, 14)) + f" {n}" for n in range(50)]
    # all sentences are used twice and more
    lines = cases.joined(sentences, lambda line: len(line.split()), 20, 80)
    lengths = [len(line.split()) for line in lines]
    assert len(set(lines)) == len(lines) == 80
    assert sum(lengths) / len(lengths) == pytest.approx(20, abs=0.5)
    assert min(lengths) < 16 < 24 < max(lengths)


def test_unused_pieces_change_no_text(tmp_path):
    text = tmp_path / "text"
    corpus = cases.read_corpus(None)
    text.write_text("".join(f"{a}\n{b}\n" for a, b in corpus))
    model = train_model([text], 700)
    before = Codec(model, ["<BT>"])
    after = Codec(cases.with_unused_pieces(model, 300), ["<BT>"])
    assert after.size == before.size + 300
    assert len({*after.pieces(range(after.size))}) == after.size
    lines = [*(source for source, _ in corpus[:50]), "<unused0> <unused299>", "好 ☃"]
    assert [after.encode(line) for line in lines] == [before.encode(line) for line in lines]
    with pytest.raises(ValueError, match="too many"):
        cases.with_unused_pieces(model, -1)


def test_ratios_are_those_to_each_peer():
    rates = {sides.ONE: [1.0, 2.0, 1.0], sides.BATCHED: [10.0, 5.0, 8.0]}
    rates |= {benchmark.PEER: [4.0, 4.0, 4.0], "ours": [20.0, 40.0, 30.0]}
    found = benchmark.side_of("ours", rates, {"ours": 64}, {"ours": 500.0})
    assert (found["median"], found["lines"], found["peak_mb"]) == (30.0, 64, 500.0)
    ratios = {peer: one["ratio"] for peer, one in found["over"].items()}
    assert ratios == {sides.ONE: 30.0, sides.BATCHED: 3.75, benchmark.PEER: 7.5}
    assert found["over"][sides.ONE]["ratio_min"] == 20.0


def test_goals_are_judged_by_the_figures():
    rates = {sides.ONE: [1.0], sides.BATCHED: [10.0], benchmark.PEER: [8.0]}
    rates |= {"ours, slow": [15.0], "ours, fast": [25.0]}
    ones = dict.fromkeys(rates, 1)
    found = {
        "source_pieces": 20.0,
        "source_pieces_deviation": 5.0,
        "target_pieces": 25,
        "beam": 4,
        "parameters": {"marian": 1},
        "vocabulary": 32_000,
        "vocabulary_learned": 3_900,
        "threads": 2,
        "rounds": 1,
        "goals": benchmark.GOALS,
        "rates_of_batches": {16: 9.0, 32: 10.0},
        "rates_of_max_tokens": {700: 8.0},
        "sides": {name: benchmark.side_of(name, rates, ones, ones) for name in rates},
    }
    text = figures.table("speed", found)
    assert "goal 20 × (a): reached, 25.00 ×" in text and "1 of 2 back ends" in text
    assert "goal 4 × (b): missed, 2.50 ×" in text and "0 of 2 back ends" in text


@pytest.mark.parametrize(
    "flags",
    (["--quality"], ["--path", "a.pt", "--data", "b"], ["--lines", "0"], ["--rounds", "0"]),
)
def test_bad_usage(flags):
    with pytest.raises(UsageError):
        benchmark.main(flags)


def test_memory_is_of_the_command_on_as_many_lines(tmp_path):
    options = SimpleNamespace(corpus=None, tiny=True, lines=[30, 2_500])
    found = checks.measure_memory(tmp_path, options)
    few, many = found["runs"]
    assert (few["lines"], many["lines"]) == (30, 2_500)
    assert many["input_mb"] > 50 * few["input_mb"]
    assert all(one["rate"] > 0 and 10 < one["peak_mb"] < 500 for one in found["runs"])
    # only what is left of the last file
    assert [path.name for path in tmp_path.iterdir()] == [checks.MONO]


@pytest.fixture(scope="module")
def tiny_case(tmp_path_factory):
    benchmark.quiet_imports()
    folder = tmp_path_factory.mktemp("tiny") / "case"
    size = cases.Size.tiny()
    return folder, size, cases.write_case(folder, cases.read_corpus(None), size, 12, 6)


@pytest.mark.slow
def test_every_side_reads_the_same_pieces_and_writes_as_many(tiny_case):
    from fairseq_ext.translation.decode.options import DecodeOptions, Source
    from fairseq_ext.translation.decode.translator import Translator

    folder, size, case = tiny_case
    lines = benchmark.read(folder / "lines")
    assert case["vocabulary"] == size.vocabulary > case["vocabulary_learned"] == size.trained
    peer = sides.HuggingFace(folder, 1)
    ours = Translator.from_checkpoint(folder / "data" / "model.pt", threads=1)
    lengths = [len(ours.parts(line, DecodeOptions())[0]) for line in lines]
    assert [len(ids) for ids in peer.tokenizer(lines)["input_ids"]] == lengths
    assert case["source_pieces"] == sum(lengths) / len(lengths)
    # padding and batches change nothing of what Hugging Face finds
    one_by_one = peer(lines, batch=1)
    assert peer(lines, batch=5) == one_by_one and len(one_by_one) == len(lines)
    decode = DecodeOptions(beam=sides.BEAM, min_len=size.length, max_len_a=0, max_len_b=size.length)
    sources = [[Source(ids) for ids in ours.parts(line, decode)] for line in lines]
    for ((best,),) in ours.decode_window(sources, decode):
        assert len(best.ids) == size.length


@pytest.mark.slow
def test_the_command(repo_root, tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.backtranslation", "--tiny", "--threads", "1"]
    command += ["--sentences", "6", "--rounds", "1", "--folder", str(tmp_path)]
    command += ["--record", "--output", str(output)]
    done = processes.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert set(found["sides"]) == set(sides.SIDES)
    for name, side in found["sides"].items():
        assert side["median"] > 0 and side["peak_mb"] > 10
        assert side["lines"] == benchmark.lines_of(name, 6)
    assert found["sides"][sides.BATCHED]["over"][sides.BATCHED]["ratio"] == 1
    assert "goal 20 × (a)" in done.stdout
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.slow
def test_quality_of_the_command(repo_root, tmp_path, tiny_case):
    folder, _, _ = tiny_case
    output = tmp_path / "figures.json"
    data = folder / "data"
    command = [sys.executable, "-m", "benchmarks.backtranslation", "--quality", "--threads", "1"]
    command += ["--path", str(data / "model.pt"), "--data", str(data), "--folder", str(tmp_path)]
    command += ["--record", "--output", str(output)]
    done = processes.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["sentences"] == 6 and set(found["sides"]) == set(checks.QUALITY)
    # random weights: what fairseq finds, but for ties
    assert found["sides"]["ctranslate2 float32"]["same_lines"] >= 5 / 6
    for name in ("int8", "int8, shortlist"):
        assert f"goal ctranslate2 {name} within 0.3 BLEU" in done.stdout

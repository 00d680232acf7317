"""The benchmark compares like with like, and one command runs all of it."""

import json
import sys

import pytest

from tests import processes

pytest.importorskip("fairseq")
pytest.importorskip("ctranslate2")

from benchmarks.translation import speed as benchmark


def test_share_of_equal_lines():
    assert benchmark.same(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.75


def test_ratio_and_memory_of_a_side():
    made = [dict(rate=rate, peak_mb=mb) for rate, mb in ((10.0, 5), (30.0, 9), (20.0, 7))]
    peer = [dict(rate=rate, peak_mb=1) for rate in (5.0, 5.0, 2.0)]
    found = benchmark.side_of(made, peer)
    assert found["median"] == 20.0 and found["ratio"] == 4.0 and found["peak_mb"] == 9
    assert (found["ratio_min"], found["ratio_max"]) == (2.0, 10.0)


def test_bleu_is_that_of_the_target_language():
    text = "我喜欢红的苹果和新的房子。"
    assert benchmark.bleu([text], [text], "zh") == pytest.approx(100)
    # a single word for a tokenizer that looks for spaces
    assert benchmark.bleu([text], ["我喜欢红的苹果和新的书。"], "zh") > 50


def test_what_ctranslate2_cannot_run_is_translated_by_ours(monkeypatch):
    from fairseq_ext.translation.decode import checkpoint

    monkeypatch.setattr(checkpoint, "read_state", lambda path: {})
    monkeypatch.setattr(checkpoint, "build_model", lambda state, path: object())
    sides = benchmark.sides_of("a.pt")
    assert {backend for backend, _ in sides.values()} == {"fairseq"}
    assert {kind for _, kind in sides.values()} == {"float32", "bfloat16"}


@pytest.mark.slow
def test_the_command(repo_root, tmp_path, toy_benchmark_model):
    checkpoint, data = toy_benchmark_model
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.translation", "--quick", "--threads", "1"]
    command += ["--rounds", "1", "--output", str(output), "--folder", str(tmp_path)]
    command += ["--path", str(checkpoint), "--bitext", str(data)]
    done = processes.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    sides = {benchmark.PEER, *benchmark.SIDES}
    assert [result["beam"] for result in figures["speed"]["results"]] == [5, 1]
    for result in figures["speed"]["results"]:
        assert set(result["sides"]) == sides
        for side in result["sides"].values():
            assert side["median"] > 0 and side["ratio"] > 0 and side["peak_mb"] > 10
        assert result["sides"][benchmark.PEER]["ratio"] == 1
    quality = figures["quality"]
    assert quality["sentences"] == figures["speed"]["sentences"] == 24
    (greedy,) = quality["results"]
    assert set(greedy["sides"]) == sides
    for name, side in greedy["sides"].items():
        # random weights: what fairseq finds, but for ties
        assert side["same_lines"] >= (0.9 if "int8" not in name else 0)
    assert "sentences/s" in done.stdout and "BLEU" in done.stdout
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture(scope="module")
def toy_benchmark_model(tmp_path_factory):
    """The model and data of the quick speed part stand in for trained ones."""
    from benchmarks.translation.cases import Size, read_corpus, write_case

    benchmark.quiet_imports()
    folder = tmp_path_factory.mktemp("toy") / "data"
    write_case(folder, read_corpus(None), Size.quick())
    return folder / "model.pt", folder

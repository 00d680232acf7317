"""python -m fairseq_ext.speaker.identify: the prediction file, the accuracy, and refusals."""

import csv
import io
import json
import os
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch

from ext_common.cli import UsageError, UserError
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.features import FeatureSpec, resample
from fairseq_ext.speaker.identify import main
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.metrics import wilson_interval
from fairseq_ext.speaker.prepare.__main__ import PrepareOptions, prepare
from tests import processes


@pytest.fixture
def identify(tiny_checkpoint, tmp_path, monkeypatch):
    """Run the command in an empty folder with the tiny checkpoint."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*args, path=tiny_checkpoint):
        return main([*map(str, args), "--path", str(path), "--device", "cpu"])

    return run


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def expected_names(data, checkpoint, split):
    """(ids, names by argmax of the scores, true names), computed without the command."""
    corpus, model = Corpus.open(data), SpeakerModel.from_checkpoint(checkpoint)
    rows = corpus.rows(split)
    scores = np.concatenate([model.scores([corpus.read(row)]) for row in rows])
    names = [model.speakers[c] for c in scores.argmax(1)]
    return [corpus.ids[r] for r in rows], names, [corpus.speakers[corpus.labels[r]] for r in rows]


def test_predictions_of_a_split(identify, tiny_data, save_checkpoint, capsys):
    def never_carl(state):
        state["model"]["network.head.weight"][2] *= -1

    checkpoint = save_checkpoint(never_carl)
    assert identify(tiny_data, "--subset", "train", path=checkpoint) == 0
    ids, names, truth = expected_names(tiny_data, checkpoint, "train")
    head, *rows = read_csv("predictions.csv")
    assert head == ["Id", "Category"]
    assert rows == [[i, n] for i, n in zip(ids, names, strict=True)]

    metrics = json.load(open("predictions.metrics.json"))
    right = sum(n == t for n, t in zip(names, truth, strict=True))
    assert 0 < right < len(truth) and metrics["top1"]["correct"] == right
    assert metrics["top1"]["total"] == len(truth)
    assert metrics["top1"]["accuracy"] == right / len(truth)
    assert metrics["top1"]["interval95"] == pytest.approx(wilson_interval(right, len(truth)))
    # four speakers: one of the five best is always right
    assert metrics["top5"]["correct"] == len(truth)
    for name, found in metrics["speakers"].items():
        of_name = [n == t for n, t in zip(names, truth, strict=True) if t == name]
        assert (found["correct"], found["utterances"]) == (sum(of_name), len(of_name))
    assert set(metrics["speakers"]) == set(truth)
    assert sum(p["count"] for p in metrics["most_confused"]) == len(truth) - right

    shown = capsys.readouterr().out
    assert "lowest: carl 0/" in shown and "carl → " in shown
    assert f"top-1 accuracy {100 * right / len(truth):.1f} % ({right} of {len(truth)}" in shown
    assert "top-5 accuracy 100.0 %" in shown and "95 % interval" in shown
    assert open("predictions.confusion.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    manifest = json.load(open("predictions.manifest.json"))
    assert manifest["counts"]["in"] == manifest["counts"]["out"] == len(truth)
    assert set(manifest["inputs"]) == {str(checkpoint), str(tiny_data / "corpus.json")}
    assert sorted(os.listdir()) == [
        "predictions.confusion.png",
        "predictions.csv",
        "predictions.manifest.json",
        "predictions.metrics.json",
    ]


def test_two_runs_in_one_folder_keep_what_is_theirs(identify, tiny_data):
    for split in ("valid", "test"):
        identify(tiny_data, "--subset", split, "--output", f"{split}.csv")
    for split in ("valid", "test"):
        assert json.load(open(f"{split}.metrics.json"))["output"] == f"{split}.csv"
        assert os.path.exists(f"{split}.confusion.png")
        assert json.load(open(f"{split}.manifest.json"))["options"]["subset"] == split
    assert len(os.listdir()) == 8


def test_without_matplotlib_a_sentence_comes_before_the_work(identify, tiny_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "ext_common.plots", raising=False)
    with pytest.raises(UserError, match="pip install 'matplotlib"):
        identify(tiny_data)
    assert os.listdir() == []


def test_nothing_is_written_beside_what_is_no_file(identify, tiny_data, tmp_path):
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    reader = threading.Thread(target=pipe.read_bytes)
    reader.start()
    assert identify(tiny_data, "--output", pipe) == 0
    reader.join()
    assert [path.name for path in tmp_path.iterdir() if "pipe" in path.name] == ["pipe.csv"]


def test_the_output_is_the_same_every_time_and_for_every_batch_size(identify, tiny_data, tmp_path):
    identify(tiny_data, "--output", "a.csv", "--top-k", 2)
    identify(tiny_data, "--output", "b.csv", "--top-k", 2)
    identify(tiny_data, "--output", "new/c.csv", "--top-k", 2, "--batch-size", 1)
    identify(tiny_data, "--output", "d.csv", "--top-k", 2, "--max-frames", 130)
    assert open("a.csv").read() == open("b.csv").read()
    for other in ("new/c.csv", "d.csv"):
        for one, two in zip(read_csv("a.csv"), read_csv(other), strict=True):
            assert one[:2] + one[3:4] == two[:2] + two[3:4]
            if one[0] != "Id":
                np.testing.assert_allclose(
                    [float(one[2]), float(one[4])], [float(two[2]), float(two[4])], atol=2e-4
                )


def test_top_k_has_its_scores_best_first(identify, tiny_data, tiny_checkpoint):
    # more than there are speakers: all of them
    identify(tiny_data, "--top-k", 9)
    head, *rows = read_csv("predictions.csv")
    assert head == [
        *("Id", "Category", "Score1", "Category2", "Score2"),
        *("Category3", "Score3", "Category4", "Score4"),
    ]
    corpus, model = Corpus.open(tiny_data), SpeakerModel.from_checkpoint(tiny_checkpoint)
    for row, number in zip(rows, corpus.rows("test"), strict=True):
        scores = model.scores([corpus.read(number)])[0]
        assert [float(s) for s in row[2::2]] == pytest.approx(
            sorted(scores, reverse=True), abs=1e-4
        )
        assert {n: float(s) for n, s in zip(row[1::2], row[2::2], strict=True)} == pytest.approx(
            dict(zip(model.speakers, scores.tolist(), strict=True)), abs=1e-4
        )


def test_speakers_are_matched_by_name_not_by_number(identify, tiny_data, save_checkpoint):
    def turned(state):
        order = [2, 0, 3, 1]
        state["task_state"]["speakers"] = [state["task_state"]["speakers"][i] for i in order]
        weight = state["model"]["network.head.weight"]
        state["model"]["network.head.weight"] = weight[order]

    identify(tiny_data, "--output", "a/p.csv")
    identify(tiny_data, "--output", "b/p.csv", path=save_checkpoint(turned))
    assert open("a/p.csv").read() == open("b/p.csv").read()
    a, b = (json.load(open(f"{x}/p.metrics.json")) for x in "ab")
    assert a["top1"] == b["top1"] and a["speakers"] == b["speakers"]


def test_unknown_speakers_are_predicted_but_not_counted_as_errors(
    identify, tiny_data, save_checkpoint, capsys
):
    def renamed(state):
        state["task_state"]["speakers"][2] = "someone else"

    identify(tiny_data, path=save_checkpoint(renamed))
    corpus = Corpus.open(tiny_data)
    rows = corpus.rows("test")
    carls = int(sum(corpus.speakers[corpus.labels[row]] == "carl" for row in rows))
    assert carls and len(read_csv("predictions.csv")) == 1 + len(rows)
    metrics = json.load(open("predictions.metrics.json"))
    assert metrics["of_unknown_speakers"] == carls
    assert metrics["unknown_speakers"] == ["carl"]
    assert metrics["top1"]["total"] == len(rows) - carls
    assert f"{carls} utterances of 1 speakers that the model does not know (carl)" in (
        capsys.readouterr().out
    )


def test_where_no_speaker_is_known_there_is_no_accuracy(
    identify, tiny_data, save_checkpoint, capsys
):
    def renamed(state):
        state["task_state"]["speakers"] = ["w", "x", "y", "z"]

    assert identify(tiny_data, path=save_checkpoint(renamed)) == 0
    assert "no accuracy" in capsys.readouterr().out
    assert {row[1] for row in read_csv("predictions.csv")[1:]} <= {"w", "x", "y", "z"}
    assert not os.path.exists("predictions.metrics.json")


def test_the_unlabelled_test_split_of_the_course_data(identify, tmp_path, capsys):
    source, rng = tmp_path / "hw4", np.random.default_rng(3)
    source.mkdir()

    def features(name, length):
        x = torch.from_numpy(rng.normal(-6, 2, (length, 40)).astype(np.float32))
        torch.save(x, source / name)
        return {"feature_path": name, "mel_len": length}

    people = {f"id{n}": [features(f"uttr-{n}{k}.pt", 95 + k) for k in range(3)] for n in range(2)}
    tests = [
        features(f"uttr-{name}.pt", length)
        for name, length in zip("zaqb", (300, 91, 200, 91), strict=True)
    ]
    names = {f"id{n}": n for n in range(2)}
    mapping = {"speaker2id": names, "id2speaker": {str(n): name for name, n in names.items()}}
    (source / "mapping.json").write_text(json.dumps(mapping))
    (source / "metadata.json").write_text(json.dumps({"n_mels": 40, "speakers": people}))
    (source / "testdata.json").write_text(json.dumps({"n_mels": 40, "utterances": tests}))
    prepare(source, tmp_path / "data", PrepareOptions(layout="hw4", workers=1))

    assert identify(tmp_path / "data", "--subset", "test") == 0
    head, *rows = read_csv("predictions.csv")
    assert head == ["Id", "Category"]
    assert [row[0] for row in rows] == ["uttr-z.pt", "uttr-a.pt", "uttr-q.pt", "uttr-b.pt"]
    assert "accuracy" not in capsys.readouterr().out
    assert not os.path.exists("predictions.metrics.json")
    counts = json.load(open("predictions.manifest.json"))["counts"]
    assert (counts["out"], counts["unlabelled"]) == (4, 4)


def test_audio_files_print_a_table_and_leave_nothing_behind(identify, tiny_recordings, capsys):
    files = [tiny_recordings / "dora" / "9.wav", tiny_recordings / "anna" / "9.wav"]
    assert identify(*files) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["Id", "Category"], [str(files[0]), "dora"], [str(files[1]), "anna"]]
    assert os.listdir() == []


def test_a_folder_a_list_and_standard_input(
    identify, tiny_recordings, tmp_path, monkeypatch, capsys
):
    assert identify(tiny_recordings) == 0
    rows = read_csv("predictions.csv")[1:]
    assert len(rows) == 40 and ["anna/9.wav", "anna"] in rows
    # the folders are names that the model knows
    assert json.load(open("predictions.metrics.json"))["top1"]["total"] == 40

    (tiny_recordings / "few.txt").write_text("dora/9.wav\n\nanna/9.wav\n")
    (tiny_recordings / "few.scp").write_text("utt-1 ben/9.wav\n")
    capsys.readouterr()
    for name, expected in (
        ("few.txt", [["dora/9.wav", "dora"], ["anna/9.wav", "anna"]]),
        ("few.scp", [["utt-1", "ben"]]),
    ):
        assert identify(tiny_recordings / name) == 0
        assert [x.split() for x in capsys.readouterr().out.splitlines()[1:]] == expected
    (tiny_recordings / "few.txt").write_text("dora/9.wav\nnobody.wav\n")
    with pytest.raises(UserError, match="few.txt line 2: .*nobody.wav does not exist"):
        identify(tiny_recordings / "few.txt")
    for name in ("few.txt", "few.scp"):
        (tiny_recordings / name).unlink()

    with open(tiny_recordings / "carl" / "9.wav", "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        assert identify("-") == 0
    assert capsys.readouterr().out.split()[-2:] == ["-", "carl"]


def test_channels_and_bandwidth_are_said(identify, tiny_recordings, tmp_path, capsys):
    samples, rate = soundfile.read(tiny_recordings / "dora" / "9.wav", dtype="float32")
    soundfile.write(tmp_path / "turned.wav", np.stack([samples, -samples], 1), rate)
    narrow = resample(resample(samples, rate, 8000), 8000, rate)
    soundfile.write(tmp_path / "narrow.wav", narrow, rate)
    assert identify(tmp_path / "turned.wav", tmp_path / "narrow.wav") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].endswith("dora")
    assert "turned.wav: its channels cancel (one is inverted): the left was taken" in shown.err
    assert "recordings hold nothing above" in shown.err
    assert identify(tmp_path / "turned.wav", "--channel", "mean") == 0
    assert "cancel in their mean" in capsys.readouterr().err


def test_a_broken_audio_file_is_left_out_and_told(identify, tiny_recordings, tmp_path, capsys):
    good, bad = tiny_recordings / "ben" / "9.wav", tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF nonsense")
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(8000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    assert identify(bad, good, nan, "--output", "out.csv") == 1
    assert read_csv("out.csv") == [["Id", "Category"], [str(good), "ben"]]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and str(bad) in told[0] and str(nan) in told[1]
    manifest = json.load(open("out.manifest.json"))
    assert manifest["bad"] == [str(bad), str(nan)]
    assert manifest["counts"] | {"in": 3, "out": 1, "bad": 2} == manifest["counts"]


def test_nothing_readable_writes_nothing(identify, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"")
    with pytest.raises(UserError, match="none of the audio files"):
        identify(tmp_path / "bad.wav", "--output", "out.csv")
    assert os.listdir() == []


def test_data_with_other_features_is_refused(identify, tiny_recordings, tmp_path, capsys):
    spec = FeatureSpec(loudness_db=-27.0)
    prepare(tiny_recordings, tmp_path / "loud", PrepareOptions(workers=1), spec)
    with pytest.raises(UserError, match="loudness_db -27.0, but .* loudness_db None") as caught:
        identify(tmp_path / "loud")
    assert "\n" not in str(caught.value) and os.listdir() == []


def test_refusals_before_the_model_is_loaded(identify, tiny_data, tiny_recordings, tmp_path):
    wav = tiny_recordings / "ben" / "9.wav"
    nowhere = tmp_path / "no.pt"
    with pytest.raises(UserError, match="no split 'tset'; it has: train, valid, test|has: .*test"):
        identify(tiny_data, "--subset", "tset", path=nowhere)
    with pytest.raises(UserError, match="absent.wav does not exist"):
        identify(wav, tmp_path / "absent.wav", path=nowhere)
    with pytest.raises(UserError, match="not a prepared folder"):
        identify(tmp_path / "work", path=nowhere)
    with pytest.raises(UsageError, match="is a folder: give one folder, or audio files"):
        identify(tiny_data, wav, path=nowhere)
    with pytest.raises(UsageError, match="is a folder: give the file"):
        identify(tiny_data, "--output", tmp_path, path=nowhere)
    for output in (wav, tmp_path / "work" / ".." / "work" / "x.wav"):
        (tmp_path / "work" / "x.wav").write_bytes(wav.read_bytes())
        with pytest.raises(UsageError, match="would replace an input"):
            identify(wav, tmp_path / "work" / "x.wav", "--output", output, path=nowhere)
    with pytest.raises(UsageError, match="would replace an input"):
        identify(tiny_data, "--output", tiny_data / "manifest.json", path=nowhere)
    for flag in ("--top-k", "--batch-size", "--max-frames"):
        with pytest.raises(UsageError, match=f"{flag} must be at least 1"):
            identify(tiny_data, flag, 0, path=nowhere)
    with pytest.raises(UserError, match="no.pt does not exist"):
        identify(tiny_data, path=nowhere)


def test_help_and_mistakes_on_the_command_line(tiny_data, tmp_path):
    def command(*args):
        line = [sys.executable, "-m", "fairseq_ext.speaker.identify", *map(str, args)]
        return processes.run(line, capture_output=True, text=True, cwd=tmp_path)

    done = command("--help")
    assert done.returncode == 0 and "Id,Category,Score1,Category2,Score2" in done.stdout
    done = command(tiny_data)
    assert done.returncode == 2 and "--path" in done.stderr and done.stderr.count("\n") == 1
    done = command(tiny_data, "--path", "nowhere.pt")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere.pt does not exist")
    assert done.stderr.count("\n") == 1 and done.stdout == ""

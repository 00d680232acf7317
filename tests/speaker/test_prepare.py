import csv
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import soundfile

from ext_common.cli import UsageError, UserError
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.features import FeatureSpec, audio_features
from fairseq_ext.speaker.prepare import __main__ as command
from fairseq_ext.speaker.prepare.__main__ import PrepareOptions, main, prepare
from tests import processes

RATE = 16000
PRODUCTS = ("features.bin", "features.json", "utterances.csv", "corpus.json")


def noise(seconds, seed):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))


def recordings(folder, speakers=3, each=5, seconds=0.3):
    """SRC/<speaker>/<n>.wav, all different."""
    for s in range(speakers):
        (folder / f"s{s}").mkdir(parents=True)
        for n in range(each):
            path = folder / f"s{s}" / f"{n}.wav"
            soundfile.write(path, noise(seconds + 0.02 * n, 100 * s + n), RATE)
    return folder


def products(folder):
    return {name: (folder / name).read_bytes() for name in PRODUCTS}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def one(**options):
    return PrepareOptions(**({"workers": 1} | options))


def run(*args, **kwargs):
    full = [sys.executable, "-m", "fairseq_ext.speaker.prepare", *map(str, args)]
    return processes.run(full, capture_output=True, text=True, **kwargs)


@pytest.fixture
def source(tmp_path):
    return recordings(tmp_path / "source")


# --- the whole way ----------------------------------------------------------------------------


def test_a_folder_becomes_a_corpus(tmp_path, source, capsys):
    corpus = prepare(source, tmp_path / "data", one())
    assert corpus.ids == [f"s{s}/{n}.wav" for s in range(3) for n in range(5)]
    assert corpus.speakers == ["s0", "s1", "s2"]
    assert corpus.labels.tolist() == [s for s in range(3) for _ in range(5)]
    for row, name in enumerate(corpus.ids):
        np.testing.assert_array_equal(
            corpus.read(row), audio_features(source / name, FeatureSpec())
        )
    for s in range(3):
        assert Counter(corpus.splits[corpus.labels == s]) == {"train": 3, "valid": 1, "test": 1}
    frames = np.concatenate([corpus.read(r) for r in corpus.rows("train")]).astype(np.float64)
    np.testing.assert_allclose(corpus.mean, frames.mean(0), rtol=1e-5)
    np.testing.assert_allclose(corpus.std, frames.std(0), rtol=1e-5)
    counts = manifest(tmp_path / "data")["counts"]
    assert counts == {"in": 15, "out": 15, "bad": {}, "duplicates": 0}
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(
        [*PRODUCTS, "sources.csv", "manifest.json"]
    )
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:3] for line in out.splitlines() if line}
    assert rows["train"] == ["3", "9"] and rows["all"] == ["3", "15"]
    assert "0.30 s" in out and "0.34 s" in out and "0.38 s" in out


@pytest.fixture
def small_batches(monkeypatch):
    """So that a few files are several batches, for which workers are started."""
    monkeypatch.setattr("fairseq_ext.speaker.prepare.extract.CALL_BYTES", 1)


def test_the_number_of_workers_does_not_show(tmp_path, source, small_batches):
    (source / "s1" / "odd.wav").write_text("no audio")
    prepare(source, tmp_path / "one", one(max_bad=0.1))
    prepare(source, tmp_path / "three", one(max_bad=0.1, workers=3))
    assert products(tmp_path / "one") == products(tmp_path / "three")


def test_features_follow_the_specification(tmp_path, source):
    spec = FeatureSpec(n_mels=80, n_fft=512, loudness_db=-27.0, trim_silence=True)
    corpus = prepare(source, tmp_path / "data", one(), spec)
    assert corpus.spec == spec and corpus.features.shape[1] == 80
    np.testing.assert_array_equal(corpus.read(4), audio_features(source / "s0/4.wav", spec))


@pytest.mark.slow
def test_the_command_ends_with_the_right_codes(tmp_path, source):
    done = run(source, tmp_path / "data", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, ""), done
    done = run(source, tmp_path / "data", "--workers", "1")
    assert done.returncode == 0 and "already prepared" in done.stdout
    done = run(tmp_path / "nothing", tmp_path / "data2")
    assert done.returncode == 1 and "is not a folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = run(source, tmp_path / "data2", "--layout", "fodler")
    assert done.returncode == 2 and "did you mean 'folder'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data2").exists()


def test_help_shows_defaults_layouts_and_the_digits(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "(default: 0.01)" in text and "(?P<test>[0-4])" in text
    for name in ("hw4", "folder", "kaldi", "csv"):
        assert f"  {name}: " in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--valid-fraction", "1.5"], "valid fraction 1.5"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--max-bad", "2"], "max_bad 2.0"),
        (["--layout", "csv", "--pattern", "x"], "--pattern belongs to --layout folder"),
        (["--csv", "x"], "--csv belongs to --layout csv"),
        (["--f-min", "9000"], "f_min 9000.0"),
        (["--group-by", "group"], "names no groups"),
    ],
)
def test_bad_usage(tmp_path, source, options, message):
    with pytest.raises(UsageError, match=message):
        main([str(source), str(tmp_path / "data"), *options])
    assert not (tmp_path / "data").exists()


def test_strange_folders_are_left_alone(tmp_path, source):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="thesis.tex"):
            prepare(source, tmp_path / "data", one(overwrite=overwrite))
    with pytest.raises(UsageError, match="same folder"):
        prepare(source, source, one())
    with pytest.raises(UserError, match="is a file"):
        prepare(source, tmp_path / "data" / "thesis.tex", one())
    assert (tmp_path / "data" / "thesis.tex").read_text() == "x"


# --- bad records and duplicates ---------------------------------------------------------------


def spoil(source):
    soundfile.write(source / "s0" / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(source / "s0" / "short.wav", noise(0.05, 9), RATE)
    (source / "s1" / "text.flac").write_text("no audio")
    (source / "s2" / "zero.ogg").write_bytes(b"")


def test_bad_files_are_reported_and_left_out(tmp_path, source, capsys):
    spoil(source)
    corpus = prepare(source, tmp_path / "data", one(max_bad=0.3))
    assert len(corpus) == 15
    bad = {item["path"]: item for item in manifest(tmp_path / "data")["bad"]}
    assert {path: item["reason"] for path, item in bad.items()} == {
        "s0/silent.wav": "silent",
        "s0/short.wav": "too short",
        "s1/text.flac": "corrupt",
        "s2/zero.ogg": "empty",
    }
    assert "0.050 s, at least 0.1 s" in bad["s0/short.wav"]["detail"]
    printed = capsys.readouterr().err
    assert "4 of 19 utterances cannot be used" in printed and "s1/text.flac" in printed


def test_too_many_bad_files_fail_and_a_higher_limit_continues(
    tmp_path, source, capsys, monkeypatch
):
    spoil(source)
    with pytest.raises(UserError, match="4 of 19 utterances cannot be used.*--max-bad"):
        prepare(source, tmp_path / "data", one())
    record = manifest(tmp_path / "data")
    assert record["status"] == "failed" and len(record["bad"]) == 4
    with pytest.raises(UserError, match="prepare"):
        Corpus.open(tmp_path / "data")
    monkeypatch.setattr(command, "extract_all", None)  # nothing is decoded a second time
    assert len(prepare(source, tmp_path / "data", one(max_bad=0.3))) == 15
    assert manifest(tmp_path / "data")["status"] == "done"


def test_the_limit_itself_is_allowed(tmp_path, source):
    (source / "s0" / "text.wav").write_text("no audio")
    with pytest.raises(UserError, match="1 of 16"):
        prepare(source, tmp_path / "data", one(max_bad=0.0624))
    prepare(source, tmp_path / "data", one(max_bad=0.0625))


def test_nothing_usable_fails_whatever_is_allowed(tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "x.wav").write_text("no audio")
    with pytest.raises(UserError, match="1 of 1"):
        prepare(tmp_path / "source", tmp_path / "data", one(max_bad=1.0))


def test_exact_duplicates_the_first_is_kept(tmp_path, source, capsys):
    shutil.copy(source / "s0" / "0.wav", source / "s0" / "same.wav")
    shutil.copy(source / "s0" / "1.wav", source / "s2" / "other.wav")
    content, rate = soundfile.read(source / "s1" / "2.wav", dtype="int16")
    soundfile.write(source / "s1" / "again.flac", content, rate)
    corpus = prepare(source, tmp_path / "data", one())
    assert len(corpus) == 15 and "s0/same.wav" not in corpus.ids
    found = manifest(tmp_path / "data")["duplicates"]
    assert [(d["path"], d["of"], d["speaker"], d["of_speaker"]) for d in found] == [
        ("s0/same.wav", "s0/0.wav", "s0", "s0"),
        ("s1/again.flac", "s1/2.wav", "s1", "s1"),
        ("s2/other.wav", "s0/1.wav", "s2", "s0"),
    ]
    assert "1 of them under another speaker" in capsys.readouterr().err


# --- csv --------------------------------------------------------------------------------------


def cuts(tmp_path, lines, seconds=4):
    source = tmp_path / "cuts"
    source.mkdir(exist_ok=True)
    for i, name in enumerate(("a.flac", "b.flac")):
        soundfile.write(source / name, noise(seconds, i), RATE)
    text = "path,speaker,split,start,end,group\n" + "".join(line + "\n" for line in lines)
    (source / "metadata.csv").write_text(text)
    return source


def test_cuts_in_any_order_keep_the_order_of_the_table(tmp_path, capsys, monkeypatch):
    lines = ["a.flac,x,train,0.0,1.0,", "b.flac,y,train,0,2,", "a.flac,x,test,2.50,3.5,"]
    source = cuts(tmp_path, [*lines, "b.flac,,valid,2,4,"])
    opened = []
    monkeypatch.setattr(
        "fairseq_ext.speaker.prepare.extract.Recording", counting_opener(opened), raising=True
    )
    corpus = prepare(source, tmp_path / "data", one(layout="csv"))
    assert corpus.ids == ["a.flac#0.0-1.0", "b.flac#0-2", "a.flac#2.50-3.5", "b.flac#2-4"]
    assert corpus.labels.tolist() == [0, 1, 0, -1]
    assert corpus.splits.tolist() == ["train", "train", "test", "valid"]
    for row, (name, start, end) in enumerate(
        [("a.flac", 0, 1), ("b.flac", 0, 2), ("a.flac", 2.5, 3.5), ("b.flac", 2, 4)]
    ):
        expected = audio_features(source / name, FeatureSpec(), start, end)
        np.testing.assert_array_equal(corpus.read(row), expected)
    assert sorted(opened) == ["a.flac", "b.flac"]
    assert "2 recordings have cuts in more than one split, e.g. a.flac" in capsys.readouterr().err


def counting_opener(opened):
    from fairseq_ext.speaker.features import Recording

    def opener(path, *args):
        opened.append(path.name)
        return Recording(path, *args)

    return opener


@pytest.mark.parametrize(
    "lines",
    [
        ["a.flac,x,train,0,2,", "a.flac,x,test,1.99,3,"],
        ["a.flac,x,train,,,", "b.flac,x,train,,,", "a.flac,x,test,1,2,"],
        ["a.flac,x,valid,0,2,", "a.flac,x,valid,3,4,", "a.flac,x,test,0,2,"],
    ],
)
def test_overlap_between_splits_is_an_error_naming_both_rows(tmp_path, lines):
    with pytest.raises(
        UserError, match=r"metadata.csv line 2 .* and .*metadata.csv line \d .*overlap"
    ):
        prepare(cuts(tmp_path, lines), tmp_path / "data", one(layout="csv"))
    assert not (tmp_path / "data").exists()


def test_only_valid_and_test_rows(tmp_path):
    source = cuts(tmp_path, ["a.flac,x,valid,0,1,", "b.flac,y,test,0,1,"])
    corpus = prepare(source, tmp_path / "data", one(layout="csv"))
    assert corpus.splits.tolist() == ["valid", "test"] and corpus.std.min() > 0
    with pytest.raises(UserError, match="it has: valid, test"):
        corpus.rows("train")


def test_rows_without_speaker_outside_train_only(tmp_path):
    lines = ["a.flac,x,train,0,1,", "a.flac,,train,1,2,", "b.flac,,,0,1,", "b.flac,,test,1,2,"]
    source = cuts(tmp_path, lines)
    corpus = prepare(source, tmp_path / "data", one(layout="csv", max_bad=0.5))
    assert corpus.ids == ["a.flac#0-1", "b.flac#1-2"]
    assert Counter(item["reason"] for item in manifest(tmp_path / "data")["bad"]) == {
        "no speaker": 2
    }


def test_missing_files_and_cuts_beyond_the_end_are_bad_records(tmp_path):
    lines = ["a.flac,x,,0,1,", "a.flac,x,,3.5,4.5,", "absent.flac,x,,,,", "b.flac,x,,,,"]
    source = cuts(tmp_path, lines)
    prepare(source, tmp_path / "data", one(layout="csv", max_bad=0.5))
    reasons = {item["path"]: item["reason"] for item in manifest(tmp_path / "data")["bad"]}
    assert reasons == {"a.flac#3.5-4.5": "cut", "absent.flac": "missing"}


def test_overlapping_cuts_are_drawn_into_one_split(tmp_path):
    lines = [
        f"{name}.flac,{name},,{n / 10:.1f},{n / 10 + 1:.1f}," for name in "ab" for n in range(9)
    ]
    source = cuts(tmp_path, [*lines, "a.flac,a,,2,3,", "a.flac,a,,3,4,"])
    corpus = prepare(source, tmp_path / "data", one(layout="csv"))
    assert set(corpus.splits[:9]) == {"train"} and len(set(corpus.splits[9:18])) == 1
    assert sorted(corpus.splits[18:]) == ["test", "valid"]


@pytest.mark.parametrize(
    "group_by, key",
    [
        ("auto", lambda row: row["group"]),
        ("group", lambda row: row["group"]),
        ("recording", lambda row: row["id"].split("#")[0]),
        ("directory", lambda row: os.path.dirname(row["id"])),
    ],
)
def test_group_by_keeps_groups_on_one_side(tmp_path, group_by, key):
    source = tmp_path / "source"
    lines = ["path,speaker,start,end,group"]
    for number in range(12):
        folder = source / f"d{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{number}.wav", noise(1, number), RATE)
        for start in range(3):
            group = f"g{(number * 3 + start) % 5}"
            times = f"{start * 0.3:.1f},{start * 0.3 + 0.3:.1f}"
            lines.append(f"d{number // 2}/{number}.wav,x,{times},{group}")
    (source / "metadata.csv").write_text("\n".join(lines))
    prepare(source, tmp_path / "data", one(layout="csv", group_by=group_by))
    with open(tmp_path / "data" / "utterances.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sides = {}
    for row in rows:
        sides.setdefault(key(row), set()).add(row["split"])
        assert row["group"] == key(row)
    assert all(len(side) == 1 for side in sides.values())
    assert {row["split"] for row in rows} == {"train", "valid", "test"}


# --- hw4 --------------------------------------------------------------------------------------


def hw4(folder, speakers=4, each=5, test=6, n_mels=40):
    import torch

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def utterance(name, frames):
        torch.save(torch.randn(frames, n_mels, generator=generator), folder / name)
        return {"feature_path": name, "mel_len": frames}

    names = [f"id{n}" for n in (30, 10, 20, 40)[:speakers]]
    listed = {
        name: [utterance(f"uttr-{name}-{n}.pt", 91 + 7 * n) for n in range(each)]
        for name in reversed(names)
    }
    tests = [utterance(f"uttr-t{n}.pt", 214 + n) for n in (3, 1, 2, 0, 5, 4)[:test]]
    ids = {name: n for n, name in enumerate(names)}
    write = {
        "mapping": {"speaker2id": ids, "id2speaker": {str(n): name for name, n in ids.items()}},
        "metadata": {"n_mels": n_mels, "speakers": listed},
        "testdata": {"n_mels": n_mels, "utterances": tests},
    }
    for name, content in write.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_hw4(tmp_path):
    import torch

    source = hw4(tmp_path / "source")
    corpus = prepare(source, tmp_path / "data", one(layout="hw4"))
    assert corpus.speakers == ["id30", "id10", "id20", "id40"]
    assert corpus.ids[:2] == ["uttr-id40-0.pt", "uttr-id40-1.pt"]
    assert corpus.labels[:5].tolist() == [3] * 5 and corpus.labels[15:20].tolist() == [0] * 5
    rows = corpus.rows("test")
    assert [corpus.ids[r] for r in rows] == [f"uttr-t{n}.pt" for n in (3, 1, 2, 0, 5, 4)]
    assert (corpus.labels[rows] == -1).all()
    for label in range(4):
        assert Counter(corpus.splits[corpus.labels == label]) == {"train": 4, "valid": 1}
    for row, name in enumerate(corpus.ids):
        tensor = torch.load(source / name, weights_only=True)
        np.testing.assert_array_equal(corpus.read(row), tensor.numpy())
    assert corpus.spec == FeatureSpec()


def test_hw4_has_the_sizes_of_its_metadata(tmp_path):
    source = hw4(tmp_path / "source", n_mels=80)
    corpus = prepare(source, tmp_path / "data", one(layout="hw4"))
    assert corpus.spec == FeatureSpec(n_mels=80) and corpus.features.shape[1] == 80
    with pytest.raises(UsageError, match="--trim-silence has no effect"):
        prepare(source, tmp_path / "d", one(layout="hw4"), FeatureSpec(trim_silence=True))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_hw4_bad_files(tmp_path):
    import torch

    source = hw4(tmp_path / "source")
    good = torch.randn(91, 40)
    contents = {
        "id10-0": good[:, :39],
        "id10-1": good.double(),
        "id10-2": good[0],
        "id10-3": {"mel": good},
        "id20-0": torch.randn(90, 40),
        "id20-1": torch.full((98, 40), -20.7233),
        "id20-2": torch.where(torch.arange(105 * 40).view(105, 40) == 7, torch.nan, 1.0),
        "id20-3": torch.zeros(0, 40),
    }
    for name, content in contents.items():
        torch.save(content, source / f"uttr-{name}.pt")
    torch.save(Attack(tmp_path / "pwned"), source / "uttr-id30-0.pt")
    (source / "uttr-id30-1.pt").write_bytes(pickle.dumps(Attack(tmp_path / "pwned")))
    (source / "uttr-id30-2.pt").write_text("no tensor")
    data = (source / "uttr-id30-3.pt").read_bytes()
    (source / "uttr-id30-3.pt").write_bytes(data[: len(data) // 2])
    (source / "uttr-id40-0.pt").unlink()
    (source / "uttr-id40-1.pt").write_bytes(b"")
    prepare(source, tmp_path / "data", one(layout="hw4", max_bad=0.6))
    reasons = {item["path"][5:-3]: item["reason"] for item in manifest(tmp_path / "data")["bad"]}
    assert reasons == {
        "id10-0": "feature size",
        "id10-1": "dtype",
        "id10-2": "shape",
        "id10-3": "shape",
        "id20-0": "mel_len",
        "id20-1": "silent",
        "id20-2": "nan",
        "id20-3": "empty",
        "id30-0": "refused",
        "id30-1": "corrupt",
        "id30-2": "corrupt",
        "id30-3": "corrupt",
        "id40-0": "missing",
        "id40-1": "empty",
    }
    assert not (tmp_path / "pwned").exists()


def test_hw4_rows_to_predict_are_never_dropped_as_duplicates(tmp_path):
    source = hw4(tmp_path / "source")
    tests = json.loads((source / "testdata.json").read_text())
    shutil.copy(source / "uttr-t3.pt", source / "uttr-t1.pt")
    shutil.copy(source / "uttr-id10-4.pt", source / "uttr-t0.pt")
    tests["utterances"][1]["mel_len"] = 217
    tests["utterances"][3]["mel_len"] = 119
    (source / "testdata.json").write_text(json.dumps(tests))
    corpus = prepare(source, tmp_path / "data", one(layout="hw4"))
    rows = corpus.rows("test")
    assert [corpus.ids[r] for r in rows] == [f"uttr-t{n}.pt" for n in (3, 1, 2, 0, 5, 4)]
    np.testing.assert_array_equal(corpus.read(rows[0]), corpus.read(rows[1]))
    found = manifest(tmp_path / "data")["duplicates"]
    assert [(d["path"], d["kept"]) for d in found] == [("uttr-t1.pt", True), ("uttr-t0.pt", True)]


# --- kaldi ------------------------------------------------------------------------------------


def test_kaldi(tmp_path):
    source = recordings(tmp_path / "source", speakers=2, each=3, seconds=0.6)
    names = [f"s{s}/{n}.wav" for s in range(2) for n in range(3)]
    (source / "wav.scp").write_text("".join(f"r{i} {name}\n" for i, name in enumerate(names)))
    segments = [f"u{i} r{i} 0.1 0.4\n" for i in range(6)]
    (source / "segments").write_text("".join(segments))
    (source / "utt2spk").write_text("".join(f"u{i} spk{i // 3}\n" for i in range(6)))
    corpus = prepare(source, tmp_path / "data", one(layout="kaldi"))
    assert corpus.ids == [f"u{i}" for i in range(6)]
    assert corpus.speakers == ["spk0", "spk1"]
    expected = audio_features(source / names[4], FeatureSpec(), 0.1, 0.4)
    np.testing.assert_array_equal(corpus.read(4), expected)


# --- interruption, repetition -----------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Recordings that several rows cut, not in order: the hardest case to continue."""
    folder = tmp_path_factory.mktemp("many")
    lines = ["path,speaker,start,end"]
    for number in range(24):
        soundfile.write(folder / f"{number}.flac", noise(20, number), RATE)
    for start in range(0, 20, 2):
        for number in range(24):
            lines.append(f"{number}.flac,s{number % 4},{start},{start + 1.5}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def start_and_kill(args, dest, after_lines):
    process = subprocess.Popen(
        [sys.executable, "-m", "fairseq_ext.speaker.prepare", *map(str, args)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = dest / "features.journal"
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > after_lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    return process.wait()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_started_again_it_continues_and_ends_with_the_same_bytes(
    tmp_path, many, workers, monkeypatch
):
    args = [many, tmp_path / "b", "--layout", "csv", "--workers", workers]
    whole = prepare(many, tmp_path / "a", one(layout="csv"))
    assert start_and_kill(args, tmp_path / "b", after_lines=17) == -signal.SIGKILL
    with pytest.raises(UserError, match="run the same prepare command again"):
        Corpus.open(tmp_path / "b")
    there = (tmp_path / "b" / "features.journal").read_bytes().count(b"\n") - 1
    assert 17 <= there < len(whole)
    decoded = []
    original = command.extract_all

    def counting(tasks, *rest):
        decoded.extend(number for task in tasks for number, _ in task)
        return original(tasks, *rest)

    monkeypatch.setattr(command, "extract_all", counting)
    prepare(many, tmp_path / "b", one(layout="csv"))
    assert 0 < len(decoded) <= len(whole) - there + 1
    assert products(tmp_path / "a") == products(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(
        [*PRODUCTS, "sources.csv", "manifest.json"]
    )


@pytest.mark.parametrize("step", ["write_corpus", "save_manifest", "finish", "unlink"])
def test_stopped_between_the_last_steps_it_ends_with_the_same_bytes(
    tmp_path, source, step, monkeypatch
):
    prepare(source, tmp_path / "a", one())

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if step == "finish":
            patch.setattr(command.StoreWriter, "finish", die)
        elif step == "unlink":
            patch.setattr("pathlib.Path.unlink", die)
        else:
            patch.setattr(command, step, die)
        with pytest.raises(Killed):
            prepare(source, tmp_path / "b", one())
    prepare(source, tmp_path / "b", one())
    assert products(tmp_path / "a") == products(tmp_path / "b")
    assert not (tmp_path / "b" / "features.journal").exists()


@pytest.mark.parametrize("count", [2, 10, pytest.param(50, marks=pytest.mark.slow)])
def test_many_at_once_killed_at_random(tmp_path, source, count, capfd):
    """Who ends well leaves a whole corpus, whatever comes after it; who loses says so in a sentence."""
    prepare(source, tmp_path / "whole", one())
    draw = random.Random(count)

    def run():
        try:
            prepare(source, tmp_path / "data", one())
        except UserError as error:
            lost = "is being written by another process" in str(error)
            os._exit(3 if lost and "\n" not in str(error) else 4)
        os._exit(0)

    ended = set()
    while 0 not in ended:
        context = multiprocessing.get_context("fork")
        runs = [context.Process(target=run) for _ in range(count)]
        for process in runs:
            process.start()
        for process in draw.sample(runs, count // 2):
            time.sleep(draw.uniform(0, 0.03))
            process.kill()
        for process in runs:
            process.join()
        ended = {process.exitcode for process in runs}
        assert ended <= {0, 3, -signal.SIGKILL}
    assert products(tmp_path / "data") == products(tmp_path / "whole")
    capfd.readouterr()
    prepare(source, tmp_path / "data", one())
    assert "nothing to do" in capfd.readouterr().out


def test_a_finished_run_is_left_alone(tmp_path, source, capsys):
    prepare(source, tmp_path / "data", one())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    corpus = prepare(source, tmp_path / "data", one(workers=2, max_bad=0.5))
    assert "nothing to do" in capsys.readouterr().out and len(corpus) == 15
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()} == before


def test_other_options_or_recordings_are_refused_without_overwrite(tmp_path, source):
    prepare(source, tmp_path / "data", one())
    before = products(tmp_path / "data")
    with pytest.raises(UserError, match="prepared with --seed 1, not 2: use --overwrite"):
        prepare(source, tmp_path / "data", one(seed=2))
    with pytest.raises(UserError, match="prepared with --n-mels 40, not 30"):
        prepare(source, tmp_path / "data", one(), FeatureSpec(n_mels=30))
    soundfile.write(source / "s0" / "0.wav", noise(0.3, 999), RATE)
    with pytest.raises(UserError, match="other recordings, or they have changed"):
        prepare(source, tmp_path / "data", one())
    assert products(tmp_path / "data") == before
    prepare(source, tmp_path / "data", one(overwrite=True))
    prepare(source, tmp_path / "fresh", one())
    assert products(tmp_path / "data") == products(tmp_path / "fresh") != before


def test_a_folder_whose_manifest_is_lost_can_be_replaced(tmp_path, source):
    prepare(source, tmp_path / "data", one())
    before = products(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds other files"):
        prepare(source, tmp_path / "data", one())
    prepare(source, tmp_path / "data", one(overwrite=True))
    assert products(tmp_path / "data") == before


def test_the_place_of_the_recordings_does_not_show(tmp_path, source):
    prepare(source, tmp_path / "a", one())
    shutil.copytree(source, tmp_path / "moved")
    prepare(tmp_path / "moved", tmp_path / "b", one())
    assert products(tmp_path / "a") == products(tmp_path / "b")


def test_a_worker_that_dies_is_named(tmp_path, source, monkeypatch, small_batches):
    monkeypatch.setattr("fairseq_ext.speaker.prepare.extract.start_worker", partial(os._exit, 3))
    with pytest.raises(UserError, match=r"worker process died.*s0/0\.wav"):
        prepare(source, tmp_path / "data", one(workers=2))


# --- real recordings --------------------------------------------------------------------------


@pytest.mark.slow
def test_libri251(tmp_path, shared_data):
    folder = shared_data / "libri251"
    options = one(layout="csv", csv=str(folder / "protocol.csv"), workers=2)
    corpus = prepare(folder, tmp_path / "data", options)
    assert Counter(corpus.splits.tolist()) == {"train": 251, "valid": 435, "test": 435}
    assert len(corpus.speakers) == 251
    with open(folder / "protocol.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert corpus.ids == [f"{r['path']}#{r['start']}-{r['end']}" for r in rows]
    assert [corpus.speakers[label] for label in corpus.labels] == [r["speaker"] for r in rows]
    assert (corpus.lengths[corpus.splits == "test"] == 101).all()


@pytest.mark.slow
def test_fsdd_with_the_command_of_the_help(tmp_path, shared_data):
    pattern = next(
        line.split("'")[1] for line in command.EXAMPLE_TEXT.splitlines() if "--pattern '" in line
    )
    corpus = prepare(shared_data / "fsdd", tmp_path / "data", one(pattern=pattern, workers=2))
    assert len(corpus) == 3000 and len(corpus.speakers) == 6
    test = {corpus.ids[row] for row in corpus.rows("test")}
    assert test == {n for n in corpus.ids if int(n[:-4].split("_")[2]) <= 4} and len(test) == 300
    assert len(corpus.rows("valid")) == 270


@pytest.mark.slow
def test_the_shape_of_the_course_data(tmp_path):
    """600 speakers with few utterances each, lengths as in the course, a list to predict."""
    from benchmarks.speaker import prepare as scale

    shape = scale.generate(tmp_path / "source", 1500, seed=1)
    assert (shape["speakers"], shape["frames_min"], shape["frames_max"]) == (600, 91, 7193)
    corpus = prepare(tmp_path / "source", tmp_path / "data", one(layout="hw4", workers=2))
    assert len(corpus) == 1500 + shape["unlabelled"] and len(corpus.speakers) == 600
    mapping = json.loads((tmp_path / "source" / "mapping.json").read_text())
    assert corpus.speakers == [mapping["id2speaker"][str(label)] for label in range(600)]
    for split in ("train", "valid"):
        assert set(corpus.labels[corpus.rows(split)]) == set(range(600))
    listed = json.loads((tmp_path / "source" / "testdata.json").read_text())["utterances"]
    rows = corpus.rows("test")
    assert [corpus.ids[row] for row in rows] == [entry["feature_path"] for entry in listed]
    assert corpus.lengths[rows].tolist() == [entry["mel_len"] for entry in listed]


# --- how much there is of each -----------------------------------------------------------------


def test_uneven_speakers_are_said_and_trained_on_evenly(tmp_path, capsys):
    from ext_common.presets import Machine
    from fairseq_ext.speaker import presets

    source = recordings(tmp_path / "source", speakers=3, each=3)
    long = source / "s2" / "long.wav"
    soundfile.write(long, noise(12.0, 1), RATE)
    (source / "S2").mkdir()
    for n in range(3):
        soundfile.write(source / "S2" / f"{n}.wav", noise(0.4, 70 + n), RATE)
    prepare(source, tmp_path / "data", one(valid_fraction=0.0, test_fraction=0.0))
    shown = capsys.readouterr()
    assert "'S2' and 's2' are taken for 2 speakers" in shown.err
    assert "(s2) in train" in shown.out and "as many crops of each" in shown.out
    facts = presets.read(str(tmp_path / "data"), {})
    flags = {}
    for choice in presets.choose(facts, Machine(), {}):
        flags |= choice.flags
    assert flags["--balance"] == "speaker"
    assert flags["--best-checkpoint-metric"] == "speaker_accuracy"


def test_one_speaker_is_nobody_to_tell_apart(tmp_path, capsys):
    source = recordings(tmp_path / "source", speakers=1, each=3)
    prepare(source, tmp_path / "data", one())
    assert "one speaker in train" in capsys.readouterr().err


# --- adding -----------------------------------------------------------------------------------


def test_adding_reads_only_what_is_new_and_leaves_all_in_its_split(tmp_path, monkeypatch, capsys):
    from fairseq_ext.speaker.prepare import extract

    source = recordings(tmp_path / "source", speakers=2, each=4)
    first = prepare(source, tmp_path / "data", one())
    splits = dict(zip(first.ids, first.splits.tolist(), strict=True))
    (source / "new").mkdir()
    for n in range(3):
        soundfile.write(source / "new" / f"{n}.wav", noise(0.4, 900 + n), RATE)
    (source / "s0" / "1.wav").unlink()
    soundfile.write(source / "s1" / "2.wav", noise(0.7, 950), RATE)
    opened = []
    monkeypatch.setattr(extract, "Recording", counting_opener(opened))
    with pytest.raises(UserError, match="use --overwrite"):
        prepare(source, tmp_path / "data", one())
    corpus = prepare(source, tmp_path / "data", one(add=True))
    assert sorted(opened) == ["0.wav", "1.wav", "2.wav", "2.wav"]
    assert "6 of 10 utterances are as they were" in capsys.readouterr().out
    assert "s0/1.wav" not in corpus.ids and "new/2.wav" in corpus.ids and len(corpus) == 10
    assert corpus.speakers == ["new", "s0", "s1"]
    fresh = prepare(source, tmp_path / "fresh", one())
    for row, name in enumerate(corpus.ids):
        np.testing.assert_array_equal(corpus.read(row), fresh.read(fresh.ids.index(name)))
        if name in splits:
            assert corpus.splits[row] == splits[name]
    new = [corpus.splits[row] for row, name in enumerate(corpus.ids) if name.startswith("new/")]
    assert sorted(new) == ["test", "train", "valid"]
    assert not (tmp_path / "data" / ".before").exists()
    prepare(source, tmp_path / "data", one(add=True))
    assert "already prepared" in capsys.readouterr().out and len(opened) == 4 + 10


def test_adding_that_was_killed_continues(tmp_path, monkeypatch):
    from fairseq_ext.speaker.prepare import __main__ as command

    source = recordings(tmp_path / "source", speakers=2, each=4)
    prepare(source, tmp_path / "data", one())
    soundfile.write(source / "s0" / "9.wav", noise(0.4, 900), RATE)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_corpus", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "data", one(add=True))
    corpus = prepare(source, tmp_path / "data", one(add=True))
    assert len(corpus) == 9 and not (tmp_path / "data" / ".before").exists()

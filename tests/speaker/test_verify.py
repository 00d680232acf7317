"""python -m fairseq_ext.speaker.verify: lists of trials, what is fitted, and what is refused."""

import json
import os

import numpy as np
import pytest

from ext_common.cli import UsageError, UserError
from fairseq_ext.speaker.embed import main as embed
from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.prepare.__main__ import PrepareOptions, prepare
from fairseq_ext.speaker.verify.__main__ import main
from fairseq_ext.speaker.verify.metrics import Ladder, equal_error_rate
from fairseq_ext.speaker.verify.trials import make_trials, read_trials

INDEX = {"a/1.wav": 0, "a/2.wav": 1, "b/1.wav": 2}


@pytest.fixture
def verify(tiny_checkpoint, tmp_path, monkeypatch):
    """Run the command in an empty folder with the tiny checkpoint."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*args, path=tiny_checkpoint):
        where = ["--path", str(path), "--device", "cpu"] if path else []
        return main([*map(str, args), *where])

    return run


def cosines(model, root, pairs):
    x = {name: model.embed([root / name])[0] for pair in pairs for name in pair}
    unit = {name: row / np.linalg.norm(row) for name, row in x.items()}
    return [float(unit[a] @ unit[b]) for a, b in pairs]


def test_scores_and_metrics_of_a_list(verify, tiny_recordings, tiny_checkpoint, capsys):
    pairs = [
        ("anna/8.wav", "anna/9.wav"),
        ("ben/9.wav", "anna/9.wav"),
        ("dora/8.wav", "carl/9.wav"),
    ]
    pairs += [("ben/9.wav", "ben/8.wav")]
    same = [1, 0, 0, 1]
    with open("t.txt", "w") as file:
        file.writelines(f"{s} {a} {b}\n" for s, (a, b) in zip(same, pairs, strict=True))
    assert verify(tiny_recordings, "t.txt", "--draws", 20) == 0
    rows = [line.split() for line in open("scores.txt")]
    assert [(a, b, label) for a, b, _, label in rows] == [
        (*pair, str(s)) for pair, s in zip(pairs, same, strict=True)
    ]
    found = np.array([float(row[2]) for row in rows])
    expected = cosines(SpeakerModel.from_checkpoint(tiny_checkpoint), tiny_recordings, pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    record = json.load(open("scores.txt.metrics.json"))
    assert (record["trials"], record["targets"], record["speakers"]) == (4, 2, 4)
    eer = equal_error_rate(Ladder.of(found, np.array(same, bool)))
    assert record["metrics"]["eer"] == pytest.approx(eer)
    # a cosine is no log-likelihood ratio
    assert not {"cllr", "act_dcf_0.01"} & set(record["metrics"])
    for picture in ("det", "histogram"):
        assert open(f"scores.txt.{picture}.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    assert "4 trials, 2 of one person, 4 speakers" in capsys.readouterr().out
    # the same with Kaldi's form, from embeddings, without a model
    embed(
        [str(tiny_recordings / "anna" / "9.wav"), str(tiny_recordings / "ben" / "9.wav"), "--path"]
        + [str(tiny_checkpoint), "--output", "e.npz", "--device", "cpu"]
    )
    with open("k.txt", "w") as file:
        file.write(f"{tiny_recordings}/ben/9.wav {tiny_recordings}/anna/9.wav nontarget\n")
    with pytest.raises(UserError, match="of one kind only"):
        verify("e.npz", "k.txt", "--output", "k.out", path=None)
    assert float(open("k.out").read().split()[2]) == pytest.approx(found[1], abs=1e-5)


def test_fitted_then_calibrated_on_others_then_used(verify, tiny_data, tiny_recordings, capsys):
    # the tiny corpus split by people: a backend on two, trials of the two others
    for who, names in (("fit", ("anna", "ben")), ("test", ("carl", "dora"))):
        for name in names:
            os.makedirs(who, exist_ok=True)
            os.symlink(tiny_recordings / name, f"{who}/{name}")
    flags = ["--score", "plda", "--norm", "as_norm:top=2", "--output", "b.npz"]
    assert verify("--fit", "fit", *flags, "--cohort", "test") == 0
    with np.load("b.npz") as file:
        assert json.loads(str(file["meta"]))["cohort_speakers"] == ["carl", "dora"]
    assert verify("--fit", "fit", *flags) == 0
    assert verify("test", "--make-trials", "t.txt", path=None) == 0
    assert len(open("t.txt").readlines()) == 20 * 19 // 2
    assert verify("test", "t.txt", "--backend", "b.npz", "--output", "raw.txt", "--draws", 0) == 0
    assert verify("test", "--calibrate", "t.txt", "--backend", "b.npz", "--threshold", "fa=0.1",
                  "--quality", "duration,bandwidth,norm,cohort", "--output", "c.npz") == 0  # fmt: skip
    with pytest.raises(
        UserError, match="2 of the speakers of t.txt are those of the backend's calib"
    ):
        verify("test", "t.txt", "--backend", "c.npz")
    with pytest.raises(UserError, match="backend's cohort"):
        verify(tiny_recordings, "--calibrate", all_of(tiny_recordings), "--backend", "b.npz")
    raw = json.load(open("raw.txt.metrics.json"))
    assert raw["score"] == "plda" and raw["norm"] == "as_norm:top=2" and not raw["interval95"]
    capsys.readouterr()
    files = [tiny_recordings / "ben" / f"{n}.wav" for n in (8, 9)]
    assert verify(*files, "--backend", "c.npz") == 0
    shown = capsys.readouterr().out
    assert "log-likelihood ratio" in shown and "the same person, at the threshold" in shown
    with pytest.raises(UserError, match="is fitted first"):
        verify(*files, "--score", "plda")


def all_of(recordings):
    with open("all.txt", "w") as file:
        file.write("1 anna/1.wav anna/2.wav\n0 anna/1.wav carl/1.wav\n")
    return "all.txt"


def test_people_of_several_recordings(verify, tiny_recordings, tiny_checkpoint):
    with open("people.txt", "w") as file:
        file.write("A anna/7.wav anna/8.wav\nB ben/9.wav\n")
    with open("t.txt", "w") as file:
        file.write("A anna/9.wav\nB anna/9.wav\n")
    assert verify(tiny_recordings, "t.txt", "--enrol", "people.txt") == 0
    rows = [line.split() for line in open("scores.txt")]
    assert [row[:2] for row in rows] == [["A", "anna/9.wav"], ["B", "anna/9.wav"]]
    model = SpeakerModel.from_checkpoint(tiny_checkpoint)
    one, two, test = (model.embed([tiny_recordings / "anna" / f"{n}.wav"])[0] for n in (7, 8, 9))
    mean = one / np.linalg.norm(one) + two / np.linalg.norm(two)
    expected = mean @ test / np.linalg.norm(mean) / np.linalg.norm(test)
    assert float(rows[0][2]) == pytest.approx(float(expected), abs=1e-5)
    # without answers nothing is measured
    assert not os.path.exists("scores.txt.metrics.json")


@pytest.mark.parametrize(
    "lines, said",
    [
        ("1 a/1.wav a/2.wav\n0 a/1.wav b/2.wav\n", "line 2: 'b/2.wav' is not among the 3 recordings: did"),
        ("1 a/1.wav a/2.wav\na/1.wav b/1.wav nontarget\n", "line 2: .* is not like the first line"),
        ("a/1.wav a/2.wav target\n\na/1.wav b/1.wav no\n", "line 3: .* is not like the first line"),
        ("1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n1 a/1.wav a/2.wav\n", "line 3: .* in line 1 already"),
        ("1 a/1.wav a/1.wav\n", "line 1: a recording is compared with itself"),
        ("maybe a/1.wav a/2.wav\n", "line 1: a trial is"),
        ("\n", "holds no trials"),
        ("1 a/1.wav a/2.wav 7\n", "line 1: a trial is"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told(tmp_path, lines, said):
    (tmp_path / "t").write_text(lines)
    with pytest.raises(UserError, match=said):
        read_trials(tmp_path / "t", INDEX)


@pytest.mark.parametrize("form", ["1 {a} {b}\n", "{a} {b} target\n"])
def test_both_forms_and_a_mark_of_the_order_of_bytes(tmp_path, form):
    (tmp_path / "t").write_text("\ufeff" + form.format(a="a/1.wav", b="a/2.wav"), "utf-8")
    found = read_trials(tmp_path / "t", INDEX)
    assert (found.first.tolist(), found.second.tolist()) == ([0], [1])
    assert found.targets.tolist() == [True]


def test_pairs_of_one_recording_are_left_out_and_a_sample_has_both_kinds():
    speakers = ["a", "a", "a", "b", "b", "c"]
    recordings = ["a1", "a1", "a2", "b1", "b2", "c1"]
    found = make_trials(speakers, recordings, None, 1)
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert (0, 1) not in pairs and len(pairs) == 14 and all(a < b for a, b in pairs)
    assert [p for p, t in zip(pairs, found.targets, strict=True) if t] == [(0, 2), (1, 2), (3, 4)]
    some = make_trials(speakers, recordings, 6, 1)
    assert (len(some), some.targets.sum()) == (6, 3)
    again = make_trials(speakers, recordings, 6, 1)
    assert some.first.tolist() == again.first.tolist()


def test_cuts_of_one_recording_are_known_whatever_their_ids(
    verify, tiny_recordings, tiny_checkpoint, tmp_path
):
    source = tmp_path / "kaldi"
    source.mkdir()
    lines = [
        (f"{name}{n}-{cut}", f"{name}{n}", name, cut)
        for name in ("anna", "ben")
        for n in (8, 9)
        for cut in (0, 1)
    ]
    table = {
        "wav.scp": {f"{r} {tiny_recordings}/{who}/{r[-1]}.wav\n" for _, r, who, _ in lines},
        "utt2spk": [f"{u} {who}\n" for u, _, who, _ in lines],
        "segments": [f"{u} {r} {0.4 * cut} {0.4 * cut + 0.3}\n" for u, r, _, cut in lines],
    }
    for name, rows in table.items():
        (source / name).write_text("".join(sorted(rows)))
    options = PrepareOptions(layout="kaldi", workers=1, valid_fraction=0.0, test_fraction=0.0)
    prepare(source, tmp_path / "data", options)
    embed([str(tmp_path / "data"), "--path", str(tiny_checkpoint), "--device", "cpu"])
    for data in (tmp_path / "data", "embeddings.npz"):
        assert verify(data, "--make-trials", "t.txt") == 0
        pairs = [line.split()[1:] for line in open("t.txt")]
        assert len(pairs) == 28 - 4 and all(a[:-2] != b[:-2] for a, b in pairs)


def test_a_list_of_files_is_compared(verify, tiny_recordings, tiny_checkpoint):
    names = ["anna/8.wav", "anna/9.wav", "ben/9.wav"]
    with open("few.scp", "w") as file:
        file.writelines(f"u{i} {tiny_recordings}/{name}\n" for i, name in enumerate(names))
    open("t.txt", "w").write("1 u0 u1\n0 u2 u1\n")
    assert verify("few.scp", "t.txt", "--draws", 0) == 0
    pairs = [(names[0], names[1]), (names[2], names[1])]
    expected = cosines(SpeakerModel.from_checkpoint(tiny_checkpoint), tiny_recordings, pairs)
    found = [float(line.split()[2]) for line in open("scores.txt")]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_contradicts_the_speakers_and_bad_usage(verify, tiny_recordings):
    with open("t.txt", "w") as file:
        file.write("1 anna/1.wav anna/2.wav\n1 anna/1.wav carl/1.wav\n")
    with pytest.raises(UserError, match="anna/1.wav and carl/1.wav are two speakers"):
        verify(tiny_recordings, "t.txt")
    with pytest.raises(UsageError, match="give DATA and TRIALS"):
        verify(tiny_recordings)
    with pytest.raises(UsageError, match="needs a cohort"):
        verify(tiny_recordings, "t.txt", "--norm", "s_norm")
    with pytest.raises(UsageError, match="--path is missing"):
        verify(tiny_recordings, all_of(tiny_recordings), path=None)
    with pytest.raises(UserError, match="did you mean 'duration'"):
        verify(tiny_recordings, "t.txt", "--quality", "durations")
    with pytest.raises(UsageError, match="fa=RATE"):
        verify(tiny_recordings, all_of(tiny_recordings), "--threshold", "far=1")


def test_pieces_of_a_backend_leave_silence_out(verify, tmp_path):
    import soundfile

    rng = np.random.default_rng(1)
    for name in ("x", "y"):
        (tmp_path / "r" / name).mkdir(parents=True)
        loud = rng.normal(0, 0.1, 3 * 16000)
        loud[16000:32000] *= 1e-3
        soundfile.write(tmp_path / "r" / name / "1.wav", loud, 16000, subtype="FLOAT")
    assert (
        verify("--fit", tmp_path / "r", "--score", "plda", "--piece", 1, "--output", "b.npz") == 0
    )
    with np.load("b.npz") as file:
        assert json.loads(str(file["meta"]))["notes"]["embeddings"] == 4
    assert json.load(open("b.manifest.json"))["counts"]["piece"] == 1

import json
import os
from types import SimpleNamespace

import pytest

from ext_common.cli import UsageError, UserError
from fairseq_ext.speaker.prepare.layouts import LAYOUTS, Bad

MAPPING = {"speaker2id": {"id2": 0, "id1": 1}, "id2speaker": {"0": "id2", "1": "id1"}}


def read(name, source, **options):
    options = SimpleNamespace(**({"csv": None, "pattern": None} | options))
    return LAYOUTS.get(name)(source, options)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def brief(found):
    return [(r.record_id, r.speaker, r.split, r.group) for r in found.records]


def test_four_layouts_are_known():
    assert LAYOUTS.names() == ("csv", "folder", "hw4", "kaldi")


# --- folder -----------------------------------------------------------------------------------


def test_folder_takes_the_first_directory_as_speaker(tmp_path):
    touch(tmp_path, "bob/b.WAV", "bob/x/y/a.mp3", "al/z.flac", "al/notes.txt", "al/._z.flac")
    touch(tmp_path, ".cache/al/q.wav", "al/o.ogg", "direct.wav")
    found = read("folder", tmp_path)
    assert brief(found) == [
        ("al/o.ogg", "al", None, None),
        ("al/z.flac", "al", None, None),
        ("bob/b.WAV", "bob", None, None),
        ("bob/x/y/a.mp3", "bob", None, None),
    ]
    assert [(bad.path, bad.reason) for bad in found.bad] == [("direct.wav", "no speaker")]
    assert found.records[0].path == tmp_path / "al/o.ogg"


def test_folder_says_what_it_passes_over_and_how_to_have_it(tmp_path):
    touch(tmp_path, "al/a.opus", "al/b.AIFF", "al/c.caf", "al/d.M4A", "al/e.m4a", "al/f.txt")
    found = read("folder", tmp_path)
    assert [r.record_id for r in found.records] == ["al/a.opus", "al/b.AIFF", "al/c.caf"]
    (said,) = found.warnings
    assert said.startswith("3 files") and "2 .m4a, 1 .txt" in said and "ffmpeg -i d.M4A" in said
    touch(tmp_path / "phone", "al/a.m4a")
    with pytest.raises(UserError, match="holds no audio.*convert audio first"):
        read("folder", tmp_path / "phone")


def test_folder_follows_links_and_survives_a_circle(tmp_path):
    touch(tmp_path, "elsewhere/bob/a.wav")
    source = tmp_path / "source"
    source.mkdir()
    os.symlink(tmp_path / "elsewhere" / "bob", source / "bob")
    os.symlink(source, tmp_path / "elsewhere" / "bob" / "round")
    assert [r.record_id for r in read("folder", source).records] == ["bob/a.wav"]


def test_folder_pattern_with_group_and_split(tmp_path):
    touch(tmp_path, "s1_ann_dev_3.wav", "s2_ann_tr_4.wav", "odd.wav")
    found = read(
        "folder", tmp_path, pattern=r"(?P<group>s\d)_(?P<speaker>\w+?)_(?P<split>\w+)_\d.wav"
    )
    assert brief(found) == [
        ("s1_ann_dev_3.wav", "ann", "dev", "s1"),
        ("s2_ann_tr_4.wav", "ann", "tr", "s2"),
    ]
    assert found.bad == [Bad("odd.wav", "no match", "does not match --pattern")]


def test_folder_pattern_whose_group_is_a_split(tmp_path):
    touch(tmp_path, "7_jackson_4.wav", "7_jackson_5.wav", "7_jackson_44.wav")
    pattern = r"\d_(?P<speaker>[a-z]+)_(?:(?P<test>[0-4])|\d+)\.wav"
    assert brief(read("folder", tmp_path, pattern=pattern)) == [
        ("7_jackson_4.wav", "jackson", "test", None),
        ("7_jackson_44.wav", "jackson", None, None),
        ("7_jackson_5.wav", "jackson", None, None),
    ]


def test_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="holds no audio"):
        read("folder", tmp_path)
    with pytest.raises(UsageError, match="no group named speaker"):
        read("folder", tmp_path, pattern="(.*)")
    with pytest.raises(UsageError, match="not a regular expression"):
        read("folder", tmp_path, pattern="(")


def test_folder_reports_names_that_are_not_utf_8(tmp_path):
    touch(tmp_path, "bob/a.wav")
    try:
        (tmp_path / "bob" / os.fsdecode(b"\xff.wav")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = read("folder", tmp_path)
    assert [bad.reason for bad in found.bad] == ["file name"]
    json.dumps(found.bad[0]).encode()
    assert len(found.records) == 1


# --- csv --------------------------------------------------------------------------------------


def table(folder, text, name="metadata.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_csv_keeps_order_splits_and_the_text_of_times(tmp_path):
    table(
        tmp_path,
        "\ufeffspeaker, path ,split,start,end,group\n"
        "b,x.wav,train,0.00,8.45,g1\n"
        'a,"y, z.wav",,,,\n'
        ",x.wav,test,8.5,,\n",
    )
    found = read("csv", tmp_path)
    assert brief(found) == [
        ("x.wav#0.00-8.45", "b", "train", "g1"),
        ("y, z.wav", "a", None, None),
        ("x.wav#8.5-", None, "test", None),
    ]
    assert (found.records[0].start, found.records[0].end) == (0.0, 8.45)
    assert found.records[2].path == tmp_path / "x.wav" and found.records[2].end is None


def test_csv_may_lie_anywhere(tmp_path):
    other = table(tmp_path, "path,speaker\na.wav,x\n", "other.csv")
    found = read("csv", tmp_path / "recordings", csv=other)
    assert found.records[0].path == tmp_path / "recordings" / "a.wav"
    assert [str(path) for path in found.inputs] == [other]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: no column 'path'.*found: nothing"),
        ("file,speaker\na,b\n", "line 1: no column 'path'.*found: file, speaker"),
        ("path,speaker\n", "no rows"),
        ("path,speaker\na.wav,x,train\n", "line 2: 3 fields, the header has 2"),
        ("path,speaker\n,x\n", "line 2: the path is empty"),
        ("path,speaker,start,end\na,x,1,0.5\n", "line 2: start 1.0 is not before end 0.5"),
        ("path,speaker,start,end\na,x,,\na,x,1,1\n", "line 3: start 1.0 is not before"),
        ("path,speaker,start,end\na,x,1s,2\n", "line 2: start is '1s'"),
        ("path,speaker,start,end\na,x,-1,2\n", "line 2: start is '-1'"),
        ("path,speaker,start,end\na,x,nan,2\n", "line 2: start is 'nan'"),
        ('path,speaker\n"a.wav,x\n', "cannot be read"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    table(tmp_path, text)
    with pytest.raises(UserError, match=message):
        read("csv", tmp_path)


def test_csv_that_is_absent_or_no_text(tmp_path):
    with pytest.raises(UserError, match="metadata.csv: no such file: name the table with --csv"):
        read("csv", tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"path,speaker\n\xff\xfe,a\n")
    with pytest.raises(UserError, match="UTF-8"):
        read("csv", tmp_path)


AS_EXCEL_WRITES = (
    "Path;SPEAKER;Split;Start;End\r\nsub\\a.wav;Jörg;Train;0,5;1,25\r\nb.wav;x;dev;;\r\n;;;;\r\n"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_as_excel_writes_it(tmp_path, encoding, delimiter):
    touch(tmp_path, "sub/a.wav", "b.wav")
    text = AS_EXCEL_WRITES.replace(";", delimiter)
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    found = read("csv", tmp_path)
    assert brief(found) == [
        ("sub/a.wav#0,5-1,25", "Jörg", "train", None),
        ("b.wav", "x", "valid", None),
    ]
    assert (found.records[0].start, found.records[0].end) == (0.5, 1.25)
    assert found.records[0].path == tmp_path / "sub" / "a.wav"


def test_csv_finds_a_name_however_its_letters_are_composed(tmp_path):
    composed, apart = "J\u00f6rg.wav", "Jo\u0308rg.wav"
    touch(tmp_path, apart)
    table(tmp_path, f"path,speaker\n{composed},x\n")
    assert read("csv", tmp_path).records[0].path == tmp_path / apart


def test_csv_that_could_mean_two_things(tmp_path):
    table(tmp_path, "path,speaker,split\na,x,dev\nb,x,valid\nc,x,VAL\nd,x,train\n")
    splits = [record.split for record in read("csv", tmp_path).records]
    assert splits == ["dev", "valid", "VAL", "train"]
    table(tmp_path, 'path,speaker,start,end\na,x,"1,234.5",\n')
    with pytest.raises(UserError, match="line 2: start is '1,234.5'"):
        read("csv", tmp_path)
    table(tmp_path, "path,speaker,Path\na,x,b\n")
    with pytest.raises(UserError, match="'path' is there twice"):
        read("csv", tmp_path)


# --- kaldi ------------------------------------------------------------------------------------


def kaldi(folder, wav, spk, segments=None):
    (folder / "wav.scp").write_text(wav)
    (folder / "utt2spk").write_text(spk)
    if segments is not None:
        (folder / "segments").write_text(segments)


def test_kaldi_whole_recordings(tmp_path):
    kaldi(tmp_path, "u1 a b.wav\nu2 /abs/c.wav\nu3 d.wav\n", "u1 ann\nu2 bob\n")
    found = read("kaldi", tmp_path)
    assert brief(found) == [("u1", "ann", None, None), ("u2", "bob", None, None)]
    assert [str(r.path) for r in found.records] == [str(tmp_path / "a b.wav"), "/abs/c.wav"]
    assert [(bad.path, bad.reason) for bad in found.bad] == [("u3", "no speaker")]


def test_kaldi_segments(tmp_path):
    kaldi(tmp_path, "r a.wav\n", "u1 ann\nu2 ann\n", "u2 r 1.50 2.5\nu1 r 3 -1\n")
    found = read("kaldi", tmp_path)
    assert [r.record_id for r in found.records] == ["u2", "u1"]
    assert {r.recording for r in found.records} == {"a.wav"}
    assert [(r.start, r.end) for r in found.records] == [(1.5, 2.5), (3.0, None)]


@pytest.mark.parametrize(
    "tables, message",
    [
        (
            ("u touch PWNED; cat a.wav |\n", "u ann\n"),
            r"wav.scp line 1: u is the command.*never run",
        ),
        (("u a.wav\nu b.wav\n", "u ann\n"), "wav.scp line 2: u is there twice"),
        (("u\n", "u ann\n"), "wav.scp line 1: 1 columns, expected 2"),
        (("u a.wav\n", "u ann x\n"), "utt2spk line 1: 3 columns, expected 2"),
        (("r a.wav\n", "u ann\n", "u other 0 1\n"), "segments line 1: the recording other"),
        (("r a.wav\n", "u ann\n", "u r 2 1\n"), "segments line 1: start 2.0 is not before"),
        (("r a.wav\n", "u ann\n", "u r 0 x\n"), "segments line 1: time is 'x'"),
        (("\n", "u ann\n"), "no lines"),
    ],
)
def test_kaldi_errors_name_the_line(tmp_path, tables, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kaldi(tmp_path, *tables)
    with pytest.raises(UserError, match=message):
        read("kaldi", tmp_path)
    assert not (tmp_path / "PWNED").exists()


def test_kaldi_without_its_tables(tmp_path):
    with pytest.raises(UserError, match="wav.scp: cannot be read"):
        read("kaldi", tmp_path)


# --- hw4 --------------------------------------------------------------------------------------


def hw4(folder, mapping=MAPPING, speakers=None, test=None, n_mels=40):
    speakers = {"id1": [entry("a", 5)], "id2": [entry("b", 6)]} if speakers is None else speakers
    contents = {"mapping": mapping, "metadata": {"n_mels": n_mels, "speakers": speakers}}
    if test is not None:
        contents["testdata"] = {"n_mels": 40, "utterances": test}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def entry(name, frames):
    return {"feature_path": f"uttr-{name}.pt", "mel_len": frames}


def test_hw4_labels_come_from_the_mapping_and_test_has_its_order(tmp_path):
    hw4(tmp_path, test=[entry("z", 7), entry("y", 8)])
    found = read("hw4", tmp_path)
    assert found.speakers == ["id2", "id1"] and found.n_mels == 40
    assert brief(found) == [
        ("uttr-a.pt", "id1", None, None),
        ("uttr-b.pt", "id2", None, None),
        ("uttr-z.pt", None, "test", None),
        ("uttr-y.pt", None, "test", None),
    ]
    assert [r.frames for r in found.records] == [5, 6, 7, 8]
    assert [path.name for path in found.inputs] == [
        "mapping.json",
        "metadata.json",
        "testdata.json",
    ]


def test_hw4_reports_unknown_speakers_and_missing_keys(tmp_path):
    odd = [{"feature_path": "uttr-c.pt"}, {"mel_len": 3}, "text", {"feature_path": 1, "mel_len": 2}]
    hw4(tmp_path, speakers={"id1": [entry("a", 5), *odd], "id9": [entry("b", 6)]})
    found = read("hw4", tmp_path)
    assert [r.record_id for r in found.records] == ["uttr-a.pt"]
    assert [(bad.path, bad.reason) for bad in found.bad] == [
        ("uttr-c.pt", "json key"),
        ("metadata.json speaker id1 utterance 2", "json key"),
        ("metadata.json speaker id1 utterance 3", "json key"),
        ("metadata.json speaker id1 utterance 4", "json key"),
        ("uttr-b.pt", "unknown speaker"),
    ]
    assert "id2" in found.warnings[0]


@pytest.mark.parametrize(
    "forward, backward, message",
    [
        ({"a": 0, "b": 2}, {"0": "a", "1": "b"}, "gives b the id 2"),
        ({"a": 0, "b": 0}, {"0": "a", "1": "b"}, "gives b the id 0"),
        ({"a": 0, "b": 1}, {"0": "b", "1": "a"}, "id2speaker has 'b' for 0"),
        ({"a": 0, "b": 1}, {"0": "a"}, "id2speaker has None for 1"),
        ({"a": 0}, {"0": "a", "1": "b"}, "id2speaker has 2 speakers"),
        ({}, {}, "not empty"),
        ([], {}, "must be objects"),
    ],
)
def test_hw4_mapping_must_be_one_numbering(tmp_path, forward, backward, message):
    hw4(tmp_path, mapping={"speaker2id": forward, "id2speaker": backward})
    with pytest.raises(UserError, match=message):
        read("hw4", tmp_path)


def test_hw4_tables_as_a_whole(tmp_path):
    with pytest.raises(UserError, match="mapping.json: cannot be read as JSON"):
        read("hw4", tmp_path)
    hw4(tmp_path, mapping={"speaker2id": {}})
    with pytest.raises(UserError, match="mapping.json: no key 'id2speaker'"):
        read("hw4", tmp_path)
    hw4(tmp_path, n_mels="40")
    with pytest.raises(UserError, match="n_mels is '40'"):
        read("hw4", tmp_path)
    hw4(tmp_path, n_mels=80, test=[])
    with pytest.raises(UserError, match="testdata.json: n_mels is 40, metadata.json says 80"):
        read("hw4", tmp_path)
    hw4(tmp_path, speakers={"id1": {}})
    with pytest.raises(UserError, match="speaker id1 is not a list"):
        read("hw4", tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json: cannot be read as JSON"):
        read("hw4", tmp_path)

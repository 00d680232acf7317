"""The command with a stub of a model: N lines in, N accounted for, whoever is killed."""

import errno
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ext_common.cli import UsageError, UserError
from ext_common.cli import run as run_command
from fairseq_ext.backtranslation.generate import __main__ as command
from fairseq_ext.backtranslation.generate import claims as claiming
from fairseq_ext.backtranslation.generate import mono as monolingual
from fairseq_ext.backtranslation.generate.__main__ import GenerateOptions, generate
from fairseq_ext.backtranslation.generate.chunks import Chunks
from fairseq_ext.backtranslation.generate.claims import Owner, device_of_rank
from fairseq_ext.backtranslation.generate.merge import checked
from fairseq_ext.backtranslation.models.backends import Line
from fairseq_ext.translation.text.normalise import read_lines

PLUGIN = Path(__file__).with_name("stub_plugin")
TEXT = "你好。\n\n我们 see\u2028that\x85\nuntranslatable 7\n  \n最后一行\r\n再见"


@pytest.fixture(autouse=True)
def plugin():
    command.load_plugin(str(PLUGIN))
    return sys.modules["stub_plugin"]


def options(**more):
    flags = {"model": "x", "backend": "stub", "chunk_lines": 2, "user_dir": str(PLUGIN)}
    # most texts here are of no language
    flags["sanity_check"] = False
    return GenerateOptions(**{**flags, **more})


@pytest.fixture
def mono(tmp_path):
    path = tmp_path / "mono.zh"
    path.write_bytes(TEXT.encode())
    return path


def contents(dest):
    """File → bytes, all but the manifest."""
    files = {path.name: path.read_bytes() for path in dest.iterdir() if path.is_file()}
    files.pop("manifest.json", None)
    return files


def rows(path):
    return [json.loads(row) for row in path.read_text("utf-8").split("\n")[:-1]]


def check_complete(dest, data, nbest=1):
    """Every line of `data` is accounted for at its place."""
    (dest / "again").write_bytes(data)
    lines = list(read_lines(dest / "again"))
    (dest / "again").unlink()
    assert (dest / "real.zh").read_bytes() == data
    provenance = rows(dest / "provenance.jsonl")
    assert [row["line"] for row in provenance] == list(range(1, len(lines) + 1))
    rejects = {(row["line"], row.get("rank", 1)) for row in rows(dest / "rejects.jsonl")}
    for rank in range(1, nbest + 1):
        name = "synthetic.en" if rank == 1 else f"synthetic.{rank}.en"
        synthetic = (dest / name).read_text("utf-8").split("\n")
        assert synthetic.pop() == "" and len(synthetic) == len(lines)
        for number, text in enumerate(synthetic, 1):
            assert ((number, rank) in rejects) is (text == "")
            assert bool(text) is (
                lines[number - 1].strip() != "" and "untr" not in lines[number - 1]
            )
    assert sorted(os.listdir(dest)) == sorted([*contents(dest), "manifest.json"])
    return json.loads((dest / "manifest.json").read_text("utf-8"))


def test_what_was_begun_before_streams_had_a_name_goes_on_with_its_own(
    mono, tmp_path, plugin, monkeypatch
):
    """The rest of its lines is drawn as those before; a new folder is not begun so."""
    streams, translate = [], plugin.StubModel.translate

    def watched(model, encoded, numbers, mode, *rest):
        streams.append(mode.stream)
        if len(streams) == 2:
            raise KeyboardInterrupt
        return translate(model, encoded, numbers, mode, *rest)

    monkeypatch.setattr(plugin.StubModel, "translate", watched)
    dest = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        generate(str(mono), dest, options(mode="topk"))
    path = dest / ".work" / "plan.json"
    work = json.loads(path.read_text("utf-8"))
    assert work["plan"].pop("stream") == "philox4x32-10"
    path.write_text(json.dumps(work), "utf-8")
    _, manifest = generate(str(mono), dest, options(mode="topk"))
    assert "stream" not in manifest["plan"]
    assert streams[:2] == ["philox4x32-10"] * 2 and set(streams[2:]) == {None}
    assert generate(str(mono), dest, options(mode="topk"))[0] is False


def test_what_is_written(mono, tmp_path):
    dest = tmp_path / "deep" / "out"
    fresh, manifest = generate(str(mono), dest, options(round=3, mode="topk"))
    assert fresh and manifest == check_complete(dest, TEXT.encode())
    digest = hashlib.blake2b(b"x", digest_size=32).hexdigest()
    first, second = rows(dest / "provenance.jsonl")[:2]
    score = first.pop("score")
    assert first == {"line": 1, "model": digest[:16], "mode": "topk", "round": 3}
    assert score == round(score, 6) < 0 and second["score"] is None
    assert rows(dest / "rejects.jsonl") == [
        {"line": 2, "reason": "the line is empty"},
        {"line": 4, "reason": "the line has 16 pieces, the model holds 3"},
        {"line": 5, "reason": "the line is empty"},
    ]
    assert manifest["counts"] == {
        "in": 7,
        "out": 4,
        "unusable": {"the line has … pieces, the model holds …": 1, "the line is empty": 2},
    }
    assert manifest["real_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert manifest["model"]["path"] == "x" and manifest["model"]["sha256"] == digest
    assert manifest["mode"] == {"name": "topk", "temperature": 1.0, "k": 10}
    expected = {"kind": "synthetic", "real_lang": "zh", "synthetic_lang": "en", "lines": 7}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["round"] == 3 and manifest["nbest"] == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_do_not_matter(mono, tmp_path, size):
    generate(str(mono), tmp_path / "one", options(chunk_lines=4))
    generate(str(mono), tmp_path / "other", options(chunk_lines=size))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize("more", [{"seed": 2}, {"round": 2}])
def test_other_draws(mono, tmp_path, more):
    generate(str(mono), tmp_path / "one", options())
    generate(str(mono), tmp_path / "other", options(**more))
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one["synthetic.en"] != other["synthetic.en"]
    assert one["rejects.jsonl"] == other["rejects.jsonl"] and one["real.zh"] == other["real.zh"]


def test_several_for_each_line(mono, tmp_path):
    generate(str(mono), tmp_path / "one", options())
    generate(str(mono), tmp_path / "three", options(nbest=3))
    manifest = check_complete(tmp_path / "three", TEXT.encode(), 3)
    assert manifest["nbest"] == 3 and manifest["counts"]["out"] == 4
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one["synthetic.en"] == three["synthetic.en"]
    assert len({three[f"synthetic{rank}.en"] for rank in ("", ".2", ".3")}) == 3
    scores = [row["score"] for row in rows(tmp_path / "three" / "provenance.jsonl")]
    assert scores[0][0] == rows(tmp_path / "one" / "provenance.jsonl")[0]["score"]
    assert len(set(scores[0])) == 3 and scores[1] == [None] * 3
    reject = rows(tmp_path / "three" / "rejects.jsonl")[1]
    assert reject == {"line": 2, "rank": 2, "reason": "the line is empty"}


def test_a_line_with_one_usable_text_is_usable(mono, tmp_path, plugin, monkeypatch):
    found = [Line("", None, "the output is empty"), Line("a", -1.0)]
    monkeypatch.setattr(
        plugin.StubModel, "translate", lambda self, encoded, *rest: [found for _ in encoded]
    )
    _, manifest = generate(str(mono), tmp_path / "out", options(nbest=2))
    assert manifest["counts"] == {"in": 7, "out": 7, "unusable": {}}
    assert len(rows(tmp_path / "out" / "rejects.jsonl")) == 7


def test_a_model_that_writes_garbage_is_stopped_before_it_begins(
    mono, tmp_path, plugin, monkeypatch
):
    garbage = [Line("\u2581the <unk>", -1.0)]
    monkeypatch.setattr(
        plugin.StubModel, "translate", lambda self, encoded, *rest: [garbage for _ in encoded]
    )
    with pytest.raises(UserError, match="x writes garbage: .*pieces or tags left in"):
        generate(str(mono), tmp_path / "out", options(sanity_check=True))
    assert not list((tmp_path / "out" / ".work" / "done").iterdir())
    monkeypatch.undo()
    generate(str(mono), tmp_path / "out", options(sanity_check=True))
    check_complete(tmp_path / "out", TEXT.encode())


def test_text_in_another_script_is_refused(tmp_path):
    path = tmp_path / "mono.zh"
    path.write_text("I like red apples.\nShe bought 3 new houses.\n12 34\n", "utf-8")
    with pytest.raises(
        UserError, match="mono.zh is not zh, which the model reads: 0% of the letters"
    ):
        generate(str(path), tmp_path / "out", options(sanity_check=True))
    generate(str(path), tmp_path / "out", options())
    # a product's name in each line is no other language, and lines of numbers say nothing
    path.write_text("我喜欢iPhone Pro Max\n12 34\n他买了MacBook Air\n", "utf-8")
    generate(str(path), tmp_path / "mixed", options(sanity_check=True))


def test_a_finished_run_is_left_alone(mono, tmp_path, plugin, monkeypatch):
    dest = tmp_path / "out"
    generate(str(mono), dest, options())
    before = {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    monkeypatch.setattr(plugin.Stub, "open", lambda *_: pytest.fail("the model was opened"))
    fresh, manifest = generate(str(mono), dest, options(threads=1, max_tokens=5))
    assert not fresh and manifest["counts"]["in"] == 7
    assert before == {path: path.stat().st_mtime_ns for path in dest.iterdir()}
    (dest / "rejects.jsonl").unlink()
    with pytest.raises(UserError, match=r"rejects\.jsonl is missing"):
        generate(str(mono), dest, options())


@pytest.mark.parametrize(
    "more, named",
    [
        ({"mode": "topp"}, "--mode beam, not topp"),
        ({"mode_options": "beam=3"}, "beam 5, not 3"),
        ({"model": "y"}, "another model"),
        ({"seed": 2}, "seed 1, not 2"),
        ({"round": 2}, "round 1, not 2"),
        ({"nbest": 2}, "nbest 1, not 2"),
        ({"chunk_lines": 3}, "chunk-lines 2, not 3"),
        ({"max_len_b": 9}, "max-len-b 50, not 9"),
        ({"prefix": ">>eng<<"}, "prefix none, not >>eng<<"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(mono, tmp_path, plugin, monkeypatch, more, named, finished):
    if not finished:
        monkeypatch.setattr(plugin.StubModel, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt) if not finished else no_error():
        generate(str(mono), tmp_path / "out", options())
    with pytest.raises(UserError, match=named):
        generate(str(mono), tmp_path / "out", options(**more))


def interrupt(*_):
    raise KeyboardInterrupt


def no_error():
    import contextlib

    return contextlib.nullcontext()


def test_another_text_is_refused(mono, tmp_path):
    generate(str(mono), tmp_path / "out", options())
    mono.write_bytes(TEXT.encode() + b"\n")
    with pytest.raises(UserError, match="other content of MONO"):
        generate(str(mono), tmp_path / "out", options())


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json", "real.zh", ".work"])
def test_a_folder_of_others_is_refused(mono, tmp_path, name):
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / name).write_text("{}")
    with pytest.raises(UserError, match=f"holds other files .{name}"):
        generate(str(mono), dest, options())
    assert os.listdir(dest) == [name]
    with pytest.raises(UserError, match="is a file"):
        generate(str(mono), dest / name, options())


# --- what may be given as MONO ------------------------------------------------------------------

BYTES = [
    TEXT.encode(),
    TEXT.encode() + b"\n",
    b"\n",
    b"\n\n\n",
    b"a",
    b"\xef\xbb\xbfa\r\nb\r\r\n\r",
    b"\xef\xbb\xbf",
]


@pytest.mark.parametrize("data", BYTES)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst", "frames.zst", "-"])
def test_bytes_stay_as_they_are(tmp_path, monkeypatch, data, packed):
    path = tmp_path / f"mono{packed}"
    half = len(data) // 2
    frames = [zstandard.compress(data[:half]), zstandard.compress(data[half:])]
    written = {".gz": gzip.compress(data), ".zst": zstandard.compress(data)}
    path.write_bytes({**written, "frames.zst": b"".join(frames)}.get(packed, data))
    if packed == "-":
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    generate("-" if packed == "-" else str(path), tmp_path / "out", options())
    check_complete(tmp_path / "out", data)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=6), min_size=1, max_size=12), st.integers(1, 5))
def test_any_text(tmp_path_factory, lines, size):
    data = "\n".join(lines).encode("utf-8", "ignore")
    if not data:
        return
    folder = tmp_path_factory.mktemp("any")
    (folder / "mono").write_bytes(data)
    generate(str(folder / "mono"), folder / "out", options(chunk_lines=size))
    check_complete(folder / "out", data)


def test_thousands_of_nasty_lines(tmp_path):
    draw = random.Random(5)
    alphabet = "ab .,!?我，。😀\t\u2028\x85\u200b\ufeff▁<BT>é龘\u0301\u202eא\0\r\x1c"
    lines = ["".join(draw.choices(alphabet, k=draw.randrange(90))) for _ in range(20_000)]
    lines[7] = "长" * 10_000
    data = "\n".join(lines).encode()
    (tmp_path / "mono").write_bytes(data)
    generate(str(tmp_path / "mono"), tmp_path / "out", options(chunk_lines=1000))
    assert check_complete(tmp_path / "out", data)["counts"]["in"] == 20_000


@pytest.mark.parametrize(
    "data, said",
    [
        (b"a\nb\nc\xffd\ne\n", r"line 3 is not UTF-8 \(byte 2: 0xff\)"),
        ("你".encode()[:2], "line 1 is not UTF-8"),
        ("你好".encode("utf-16"), "line 1 is UTF-16"),
        (b"a\n\xed\xa0\x80\n", "line 2 is not UTF-8"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_bytes_that_cannot_be_used(tmp_path, monkeypatch, plugin, data, said, piped):
    (tmp_path / "mono").write_bytes(data)
    source = "-" if piped else str(tmp_path / "mono")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    monkeypatch.setattr(plugin.Stub, "open", lambda *_: pytest.fail("work was begun"))
    name = "the standard input" if piped else "mono"
    with pytest.raises(UserError, match=f"{name}.*{said}"):
        generate(source, tmp_path / "out", options())
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["mono.gz", "mono.zst"])
def test_a_truncated_archive(tmp_path, name):
    data = os.urandom(9000).hex().encode()
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        generate(str(tmp_path / name), tmp_path / "out", options())


def test_no_text_at_all(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        generate(str(tmp_path / "none"), tmp_path / "out", options())
    with pytest.raises(UsageError, match="is a folder"):
        generate(str(tmp_path), tmp_path / "out", options())


# --- languages, models, devices -----------------------------------------------------------------


def test_the_language_of_the_text(mono, tmp_path, plugin, monkeypatch):
    with pytest.raises(UsageError, match="x reads zh and writes en, and the text is en"):
        generate(str(mono), tmp_path / "out", options(lang="en"))
    assert not (tmp_path / "out").exists()
    generate(str(mono), tmp_path / "out", options(lang="zh-Hans"))
    assert (tmp_path / "out" / "real.zh-Hans").exists()
    said = {"sha256": "1" * 64, "backend": "stub", "source_lang": None, "target_lang": "en"}
    monkeypatch.setattr(plugin.Stub, "describe", lambda *_: said)
    with pytest.raises(UserError, match="--model-source"):
        generate(str(mono), tmp_path / "other", options())
    said["target_lang"] = None
    with pytest.raises(UserError, match="--model-target"):
        generate(str(mono), tmp_path / "other", options(lang="zh"))


@pytest.mark.parametrize(
    "line, kept",
    [
        (Line("a b", -0.12345678), Line("a b", -0.123457)),
        (Line("a", None), Line("a", None)),
        (Line("a", float("nan")), Line("a", None)),
        (Line("a", -float("inf")), Line("a", None)),
        (Line(" ", -1.0), Line("", None, "the output is empty")),
        (Line("a\nb", -1.0), Line("", None, "the output has a line break or a lone surrogate")),
        (Line("a\ud800", -1.0), Line("", None, "the output has a line break or a lone surrogate")),
        (Line("left over", -1.0, "cut"), Line("", None, "cut")),
    ],
)
def test_what_any_model_writes_fits_a_line(line, kept):
    assert checked(line) == kept


def test_a_model_that_writes_too_few_is_an_error(mono, tmp_path, plugin, monkeypatch):
    monkeypatch.setattr(plugin.StubModel, "translate", lambda *_: [])
    with pytest.raises(ValueError):
        generate(str(mono), tmp_path / "out", options())
    assert len(os.listdir(tmp_path / "out" / ".work" / "todo")) == 4


@pytest.mark.parametrize(
    "device, environ, gpus, expected",
    [
        ("auto", {"LOCAL_RANK": "1"}, 4, "cuda:1"),
        ("auto", {"SLURM_LOCALID": "3"}, 4, "cuda:3"),
        ("auto", {"SLURM_LOCALID": "3"}, 1, "cuda:0"),  # SLURM shows each process its own
        ("auto", {"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, 4, "cuda:2"),
        ("auto", {"LOCAL_RANK": "1"}, 0, "auto"),
        ("auto", {}, 4, "auto"),
        ("cpu", {"LOCAL_RANK": "1"}, 4, "cpu"),
        ("cuda:3", {"LOCAL_RANK": "1"}, 4, "cuda:3"),
    ],
)
def test_each_rank_has_its_gpu(monkeypatch, device, environ, gpus, expected):
    cuda = SimpleNamespace(is_available=lambda: gpus > 0, device_count=lambda: gpus)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert device_of_rank(device, environ) == expected


def write_bitext(folder, valid, test):
    """As much of a prepared bitext as a guard reads."""
    (folder / "text").mkdir(parents=True)
    spm = {}
    for lang in ("en", "zh"):
        (folder / f"spm.{lang}.model").write_bytes(b"model")
        (folder / f"dict.{lang}.txt").touch()
        spm[lang] = {"file": f"spm.{lang}.model", "sha256": hashlib.sha256(b"model").hexdigest()}
        for split, lines in (("train", ["训练"]), ("valid", valid), ("test", test)):
            for end in ("bin", "idx"):
                (folder / f"{split}.en-zh.{lang}.{end}").touch()
            text = lines if lang == "zh" else ["english"] * len(lines)
            (folder / "text" / f"{split}.{lang}").write_text("".join(f"{t}\n" for t in text))
    described = {
        "kind": "translation",
        "version": 1,
        "languages": ["en", "zh"],
        "normalise": "standard",
        "joint": True,
        "extra_symbols": [],
        "spm": spm,
        "splits": {"train": 1, "valid": len(valid), "test": len(test)},
        "split_sha256": "",
    }
    (folder / "corpus.json").write_text(json.dumps(described))


def test_held_out_lines_are_not_translated(tmp_path, monkeypatch):
    long = "这是一个很长的测试句子，谁也不应该在训练里看到它。"
    write_bitext(tmp_path / "data", ["你好。"], [long])
    lines = ["你好", "训练", f"前面，{long}", "english", "", "你好 ！", "再见"]
    data = "".join(f"{line}\n" for line in lines)
    (tmp_path / "mono").write_text(data, "utf-8")
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    guarded = options(guard=str(tmp_path / "data"))
    _, manifest = generate(str(tmp_path / "mono"), tmp_path / "out", guarded)
    assert sorted((tmp_path / "log").read_text().split()) == ["2", "4", "5", "7"]
    reasons = {row["line"]: row["reason"] for row in rows(tmp_path / "out" / "rejects.jsonl")}
    assert set(reasons) == {1, 3, 5, 6}
    assert reasons[1] == reasons[6] == "leak: it is a line of valid or test"
    assert reasons[3].startswith("leak: it shares ")
    assert manifest["counts"]["out"] == 3 and len(manifest["counts"]["unusable"]) == 3
    kept = (tmp_path / "out" / "synthetic.en").read_text().split("\n")
    assert [bool(line) for line in kept] == [False, True, False, True, False, False, True, False]
    with pytest.raises(UserError, match="--guard"):
        generate(str(tmp_path / "mono"), tmp_path / "out", options())
    with pytest.raises(UserError, match="is of en and zh, and the text is"):
        command.Guard(tmp_path / "data", "de")


# --- interruptions and company ------------------------------------------------------------------


def numbered(tmp_path, count):
    path = tmp_path / "mono.zh"
    path.write_text("".join(f"第{number}行\n" for number in range(count)), "utf-8")
    return path


def test_ctrl_c_gives_claims_back_and_the_rest_is_done_later(tmp_path, plugin, monkeypatch, capsys):
    mono, dest, log = numbered(tmp_path, 40), tmp_path / "out", tmp_path / "log"
    monkeypatch.setenv("STUB_LOG", str(log))
    line = plugin.StubModel.line
    calls = iter(range(1000))

    def interrupted(self, text, seed):
        return interrupt() if next(calls) == 17 else line(self, text, seed)

    monkeypatch.setattr(plugin.StubModel, "line", interrupted)
    argv = f"{mono} {dest} --model x --backend stub --chunk-lines 4 --no-sanity-check".split()
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, argv)
    assert stopped.value.code == 130 and "same command continues" in capsys.readouterr().err
    work = dest / ".work"
    assert os.listdir(work / "claimed") == []
    assert len(os.listdir(work / "done")) == 4 and len(os.listdir(work / "todo")) == 6
    log.unlink()
    with pytest.raises(SystemExit) as ended:
        run_command(command.main, argv)
    assert ended.value.code == 0
    assert sorted(map(int, log.read_text().split())) == list(range(17, 41))
    out = capsys.readouterr().out
    assert "usable               40  100.00 %" in out and "backtranslation.assemble DATA" in out
    monkeypatch.undo()
    generate(str(mono), tmp_path / "undisturbed", options())
    assert contents(dest) == contents(tmp_path / "undisturbed")


def test_the_next_chunk_is_encoded_beside_decoding(tmp_path, plugin, monkeypatch):
    encoded = threading.Semaphore(0)
    translate = plugin.StubModel.translate
    together = []

    def encode(self, lines):
        encoded.release()
        return lines

    def decode(self, lines, numbers, *rest):
        # the semaphore's first release is of this chunk, the second of the next
        waited = encoded.acquire(timeout=20)
        if numbers[-1] < 12:
            together.append(encoded.acquire(timeout=20))
            encoded.release()
        assert waited
        return translate(self, lines, numbers, *rest)

    monkeypatch.setattr(plugin.StubModel, "encode", encode)
    monkeypatch.setattr(plugin.StubModel, "translate", decode)
    generate(str(numbered(tmp_path, 12)), tmp_path / "out", options(chunk_lines=4))
    assert together == [True, True]


def test_who_was_paused_finds_all_done_and_does_no_harm(tmp_path, plugin, monkeypatch):
    """In the middle of its chunk a process stops; another on another machine does everything."""
    mono, dest = numbered(tmp_path, 20), tmp_path / "out"
    translate, me = plugin.StubModel.translate, Owner.this()
    finished = []

    def paused(self, *rest):
        monkeypatch.setattr(plugin.StubModel, "translate", translate)
        until = time.monotonic() + 20
        claimed = dest / ".work" / "claimed"
        while len(os.listdir(claimed)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        for path in claimed.iterdir():
            os.utime(path, (1, 1))
        monkeypatch.setattr(Owner, "this", lambda: replace(me, host="elsewhere"))
        assert generate(str(mono), dest, options())[0]
        finished.append({path: path.stat().st_mtime_ns for path in dest.iterdir()})
        return translate(self, *rest)

    monkeypatch.setattr(plugin.StubModel, "translate", paused)
    fresh, manifest = generate(str(mono), dest, options())
    assert fresh and manifest["counts"] == {"in": 20, "out": 20, "unusable": {}}
    assert finished == [{path: path.stat().st_mtime_ns for path in dest.iterdir()}]
    check_complete(dest, mono.read_bytes())


def test_progress_counts_what_others_do(tmp_path, plugin, monkeypatch):
    mono, dest = numbered(tmp_path, 21), tmp_path / "out"
    translate = plugin.StubModel.translate
    shown, calls = [], []
    show = command.Meter.show

    def watched(self, done):
        shown.append(done)
        show(self, done)

    def with_company(self, encoded, numbers, *rest):
        if not calls:
            calls.append(1)
            # another process kept the last two chunks, and was killed before it let go of them
            chunks = Chunks(dest / ".work")
            claim = SimpleNamespace(path=Path("other"))
            for chunk in (9, 10):
                lines = chunks.read(chunk)
                found = translate(self, lines, list(chunks.numbers(chunk)), *rest)
                chunks.write(chunk, found, claim)
            shown.clear()
        return translate(self, encoded, numbers, *rest)

    monkeypatch.setattr(plugin.StubModel, "translate", with_company)
    monkeypatch.setattr(command.Meter, "show", watched)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    generate(str(mono), dest, options())
    assert 5 in shown and max(shown) == shown[-1] == 21
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(1, 22))
    check_complete(dest, mono.read_bytes())


def test_who_comes_to_the_merge_waits_for_it(tmp_path, monkeypatch):
    mono, dest = numbered(tmp_path, 6), tmp_path / "out"
    merge, me = command.merge, Owner.this()
    second = []

    def slow(*rest):
        monkeypatch.setattr(command, "merge", lambda *_: pytest.fail("merged twice"))
        monkeypatch.setattr(Owner, "this", lambda: replace(me, host="elsewhere"))
        other = threading.Thread(target=lambda: second.append(generate(str(mono), dest, options())))
        other.start()
        time.sleep(0.5)
        assert other.is_alive() and not second
        merge(*rest)
        other.join(30)

    monkeypatch.setattr(command, "merge", slow)
    first = generate(str(mono), dest, options())
    assert second == [first]


def in_company(monkeypatch, host, call):
    """`call()` by a process on another machine."""
    owner = replace(Owner.this(), host=host)
    with monkeypatch.context() as patched:
        patched.setattr(Owner, "this", lambda: owner)
        return call()


def test_who_is_still_copying_when_others_are_done_leaves_nothing(tmp_path, monkeypatch):
    mono, dest = numbered(tmp_path, 6), tmp_path / "out"
    copy = monolingual.copy

    def slow(*rest):
        monkeypatch.setattr(monolingual, "copy", copy)
        # a name that comes before every other, or it would wait for the copy
        assert in_company(monkeypatch, "!", lambda: generate(str(mono), dest, options()))[0]
        return copy(*rest)

    monkeypatch.setattr(monolingual, "copy", slow)
    fresh, manifest = generate(str(mono), dest, options())
    assert not fresh and manifest == check_complete(dest, mono.read_bytes())


def test_not_all_who_start_at_once_copy_the_text(tmp_path, monkeypatch):
    mono, dest = numbered(tmp_path, 6), tmp_path / "out"
    copy, copies, second = monolingual.copy, [], []

    def slow(*rest):
        copies.append(rest)
        if len(copies) == 1:
            other = threading.Thread(
                target=lambda: second.append(generate(str(mono), dest, options()))
            )
            in_company(monkeypatch, "~", lambda: (other.start(), time.sleep(0.5)))
            assert other.is_alive()
        return copy(*rest)

    monkeypatch.setattr(monolingual, "copy", slow)
    generate(str(mono), dest, options())
    until = time.monotonic() + 30
    while not second and time.monotonic() < until:
        time.sleep(0.01)
    assert len(copies) == len(second) == 1
    check_complete(dest, mono.read_bytes())


def test_who_takes_the_merge_of_one_who_had_just_finished_it_does_nothing(tmp_path, monkeypatch):
    mono, dest = numbered(tmp_path, 6), tmp_path / "out"
    merge, take, merged = command.merge, command.Claims.take, []

    def late(self):
        claim = take(self)
        if claim and claim.name == "merge":
            monkeypatch.setattr(command, "merge", lambda *rest: merged.append(rest))
            merge(dest, Chunks(dest / ".work"), claim, str(mono), options())
        return claim

    monkeypatch.setattr(command.Claims, "take", late)
    generate(str(mono), dest, options())
    assert merged == []
    check_complete(dest, mono.read_bytes())


def test_a_copy_that_changed_is_noticed(tmp_path, plugin, monkeypatch):
    mono, dest = numbered(tmp_path, 6), tmp_path / "out"
    translate = plugin.StubModel.translate

    def meddle(self, *rest):
        with open(dest / ".work" / "real", "ab") as file:
            file.write(b"\n")
        return translate(self, *rest)

    monkeypatch.setattr(plugin.StubModel, "translate", meddle)
    with pytest.raises(UserError, match="no longer what"):
        generate(str(mono), dest, options())
    assert os.listdir(dest) == [".work"]


def test_a_folder_that_is_removed_meanwhile(tmp_path, plugin, monkeypatch):
    mono, dest = numbered(tmp_path, 6), tmp_path / "out"
    translate = plugin.StubModel.translate

    def meddle(self, *rest):
        shutil.rmtree(dest)
        return translate(self, *rest)

    monkeypatch.setattr(plugin.StubModel, "translate", meddle)
    with pytest.raises(UserError, match="was removed while"):
        generate(str(mono), dest, options())


def test_without_hard_links(mono, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    generate(str(mono), tmp_path / "out", options())
    check_complete(tmp_path / "out", TEXT.encode())


# What changes a file system; a process can be killed before each.
CALLS = ("rename", "mkdir", "unlink", "rmdir", "utime", "fsync", "link")


def die_at(count):
    """Kill this process before its `count`-th change of the file system."""
    left = [count]

    def wrap(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def in_a_child(mono, dest, count=None):
    """Exit code of `generate` in another process, negative where it was killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            if count is not None:
                die_at(count)
            generate(str(mono), dest, options(nbest=2, chunk_lines=3))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_killed_before_any_change_and_run_again(tmp_path):
    mono = numbered(tmp_path, 7)
    assert in_a_child(mono, tmp_path / "undisturbed") == 0
    expected = contents(tmp_path / "undisturbed")
    count, code, states = 0, None, set()
    while code != 0:
        dest = tmp_path / f"out{count}"
        code = in_a_child(mono, dest, count)
        assert code in (0, -signal.SIGKILL)
        states.add(state_of(dest))
        assert in_a_child(mono, dest) == 0
        assert contents(dest) == expected, count
        assert sorted(os.listdir(dest)) == sorted([*expected, "manifest.json"]), count
        count += 1
    assert count > 60
    assert states == {"nothing", "set up", "chunks", "merge", "cleaning", "finished"}


@pytest.mark.slow
def test_killed_again_where_the_next_one_repairs(tmp_path):
    mono = numbered(tmp_path, 7)
    assert in_a_child(mono, tmp_path / "undisturbed") == 0
    draw = random.Random(3)
    for number in range(8):
        dest, kills = tmp_path / f"out{number}", 0
        while in_a_child(mono, dest, draw.randrange(5, 40)) != 0 and kills < 50:
            kills += 1
        assert kills and in_a_child(mono, dest) == 0
        assert contents(dest) == contents(tmp_path / "undisturbed")
        assert not list(dest.glob(".*"))


def state_of(dest):
    """How far a run has come."""
    names = os.listdir(dest) if dest.exists() else []
    work = dest / ".work"
    if "manifest.json" in names:
        return "cleaning" if any(name.startswith(".work") for name in names) else "finished"
    if work.exists():
        try:
            return "merge" if os.listdir(work / "merge" / "claimed") else "chunks"
        except FileNotFoundError:
            return state_of(dest)
    return "set up" if names else "nothing"


def test_heartbeats_and_polls_are_as_documented():
    assert (claiming.HEARTBEAT, claiming.PATIENCE) == (10, 60)
    pauses = claiming.pauses()
    waits = [next(pauses) for _ in range(20)]
    assert waits == sorted(waits) and waits[0] <= 0.1 and waits[-1] <= 2

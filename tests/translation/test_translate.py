"""The command: N lines in, N lines out, whole or not at all."""

import gzip
import io
import json
import os
import random
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_common.cli import UsageError, UserError
from fairseq_ext.translation import translate as command
from fairseq_ext.translation.decode.translator import Candidate, Translator

confident = runpy.run_path(str(Path(__file__).with_name("confident.py")))["confident"]


@pytest.fixture(scope="session")
def checkpoint(toy_checkpoint, toy_tsv):
    rows = toy_tsv.read_text(encoding="utf-8").splitlines()
    return confident(toy_checkpoint, [tuple(row.split("\t")) for row in rows])


@pytest.fixture(scope="session")
def loaded(checkpoint):
    return Translator.from_checkpoint(checkpoint, threads=1)


@pytest.fixture
def run(checkpoint, loaded, monkeypatch, tmp_path):
    """`translate` in this process, with the model loaded once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Translator, "from_checkpoint", lambda *args: loaded)

    def run(text, *flags, output="out.txt"):
        if text is not None:
            data = text if isinstance(text, bytes) else text.encode()
            Path("in.txt").write_bytes(data)
        code = command.main(["in.txt", output, "--path", str(checkpoint), *map(str, flags)])
        return code, Path(output).read_text(encoding="utf-8") if output != "-" else None

    return run


def echo():
    """A translator whose output is its input, for order at scale."""

    class Letters:
        extra_symbols = ()

        def encode(self, text):
            return [ord(c) + 4 for c in text]

        def decode(self, ids):
            return "".join(chr(i - 4) for i in ids)

    from fairseq_ext.translation.decode.checkpoint import Vocabulary

    def decode(batch, options, limit):
        return [[Candidate(list(ids[:-1]), 0.0, False)] * options.nbest for ids in batch]

    backend = SimpleNamespace(
        name="echo", max_source=60, max_target=60, max_tokens=1024, workers=1, decode=decode
    )
    return Translator(backend, Vocabulary(Letters(), Letters(), "en", "en", "standard"))


def test_lines_and_their_translations(run, loaded):
    lines = ["I like red apples.", "", "we see big houses.", "   ", "gold 鑫 😀"]
    code, text = run("\n".join(lines) + "\n")
    assert code == 0
    assert text.split("\n") == [*loaded(lines), ""]
    assert text.split("\n")[1] == text.split("\n")[3] == ""


@pytest.mark.parametrize(
    "data, count",
    [
        (b"", 0),
        (b"\n", 1),
        (b"I like\n", 1),
        (b"I like", 1),
        (b"\xef\xbb\xbfI like\r\nyou\r\n", 2),
        ("a\u2028b\x85c\x0bd\x0ce\x1cf\n".encode(), 1),
        (b"a\tb\n\tc\n", 2),
        (b"\n\n\n", 3),
    ],
)
def test_only_a_newline_ends_a_line(run, data, count):
    _, text = run(data)
    assert text.count("\n") == count and (not count or text.endswith("\n"))
    assert not set(text) & set("\r\u2028\x85\x0b\x0c\x1c\t")


def test_thousands_of_nasty_lines(run, monkeypatch):
    """Every line is found at its place, whatever the others are."""
    draw = random.Random(7)
    alphabet = "ab .,!?我，。😀\t\u2028\x85\u200b\ufeff▁<BT>é龘\u0301-0"
    lines = ["".join(draw.choices(alphabet, k=draw.randrange(150))) for _ in range(12_000)]
    translator = echo()
    monkeypatch.setattr(Translator, "from_checkpoint", lambda *args: translator)
    _, text = run("\n".join(lines) + "\n")
    out = text.split("\n")[:-1]
    assert len(out) == len(lines)
    for line, found in zip(lines, out, strict=True):
        assert "".join(found.split()) == "".join(translator.vocabulary.clean(line).split())
    counts = json.loads(Path("out.txt.manifest.json").read_text())["counts"]
    assert counts["in"] == counts["out"] == len(lines) and counts["split"] > 0


def test_a_table_with_nbest_and_scores(run, loaded):
    _, text = run("I like red apples.\n\nyou see\n", "--nbest", 2, "--beam", 3)
    rows = [row.split("\t") for row in text.split("\n")[:-1]]
    assert [row[0] for row in rows] == ["1", "1", "2", "3", "3"]
    assert all(len(row) == 3 for row in rows) and rows[2][2] == ""
    assert float(rows[0][1]) >= float(rows[1][1])
    _, text = run(None, "--scores")
    rows = [row.split("\t") for row in text.split("\n")[:-1]]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[2] for row in rows] == loaded(["I like red apples.", "", "you see"])


def test_packed_input(run, loaded):
    Path("in.txt.gz").write_bytes(gzip.compress(b"I like\nyou see\n"))
    Path("x.pt").touch()
    code = command.main(["in.txt.gz", "o.txt", "--path", "x.pt"])
    assert code == 0 and Path("o.txt").read_text().split("\n")[:-1] == loaded(["I like", "you see"])


def test_what_happened_is_told(run, capsys):
    line = "I like red apples. " * 400
    run(f"{line}\nyou see\n", "--max-len-a", 0, "--max-len-b", 2, "--beam", 1)
    told = capsys.readouterr().err
    assert "1 of 2 lines were translated in parts" in told
    assert "2 of 2 outputs reached the longest length" in told


def test_the_manifest_says_what_was_done(run, checkpoint):
    run("I like\n\n", "--beam", 2)
    manifest = json.loads(Path("out.txt.manifest.json").read_text())
    assert set(manifest["inputs"]) == {"in.txt", str(checkpoint)}
    assert manifest["options"]["beam"] == 2 and manifest["counts"]["empty"] == 1


def test_a_failure_leaves_no_output(run):
    Path("out.txt").write_text("before")
    with pytest.raises(UserError, match="in.txt, line 2 is not UTF-8"):
        run(b"I like\n\xff\n")
    assert Path("out.txt").read_text() == "before"
    assert sorted(os.listdir()) == ["in.txt", "out.txt"]


@pytest.mark.parametrize(
    "source, output, text",
    [
        ("in.txt", "in.txt", "would replace in.txt"),
        ("in.txt", "./link.txt", "would replace in.txt"),
        ("in.txt", "model.pt", "would replace model.pt"),
        ("in.txt", "folder", "is a folder: give the file to write"),
        ("folder", "out.txt", "is a folder: give a text file"),
        ("log.manifest.json", "log", "would replace log.manifest.json"),
    ],
)
def test_nothing_precious_is_overwritten(tmp_path, monkeypatch, source, output, text):
    monkeypatch.chdir(tmp_path)
    for name in ("in.txt", "model.pt", "log.manifest.json"):
        Path(name).write_text("precious")
    Path("link.txt").symlink_to("in.txt")
    Path("folder").mkdir()
    with pytest.raises(UsageError, match=text):
        command.main([source, output, "--path", "model.pt"])
    assert Path("in.txt").read_text() == Path("model.pt").read_text() == "precious"


@pytest.mark.parametrize(
    "flags, text",
    [
        ([], "--path is missing"),
        (["--path", "x.pt", "--nbest", "9"], "--nbest 9 needs a --beam"),
        (["--path", "x.pt", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_usage(flags, text):
    with pytest.raises(UsageError, match=text):
        command.main(["in.txt", "out.txt", *flags])


def test_missing_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing.txt does not exist"):
        command.main(["nothing.txt", "out.txt", "--path", "x.pt"])


# --- windows -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.text(max_size=3), max_size=40), st.integers(1, 9))
def test_windows_hold_every_line_in_order(lines, size):
    for windows in (command.whole_windows(lines, size), command.available(iter(lines), size)):
        found = list(windows)
        assert [line for window in found for line in window] == lines
        assert all(0 < len(window) <= size for window in found)


def test_a_line_that_is_typed_does_not_wait_for_the_next():
    answered = threading.Event()

    def typed():
        yield "first"
        assert answered.wait(20)
        yield "second"

    windows = command.available(typed())
    assert next(windows) == ["first"]
    answered.set()
    assert list(windows) == [["second"]]


def test_an_error_of_the_input_comes_after_its_good_lines():
    def lines():
        yield "good"
        raise UserError("line 2 is bad")

    windows = command.available(lines())
    assert next(windows) == ["good"]
    with pytest.raises(UserError, match="line 2"):
        next(windows)


@given(st.text("ab\n\r", max_size=30))
@settings(max_examples=50)
def test_lines_are_counted_as_they_are_read(tmp_path_factory, text):
    from fairseq_ext.translation.text.normalise import read_lines

    path = tmp_path_factory.mktemp("count") / "x.txt"
    path.write_bytes(text.encode())
    assert command.count_lines(str(path)) == len(list(read_lines(path)))


def test_standard_streams(run, monkeypatch, loaded):
    out = SimpleNamespace(buffer=io.BytesIO())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"I like\n\nyou see\n")))
    monkeypatch.setattr(sys, "stdout", out)
    assert command.main(["-", "-", "--path", "x.pt"]) == 0
    assert out.buffer.getvalue().decode().split("\n")[:-1] == loaded(["I like", "", "you see"])


@pytest.mark.slow
def test_the_command_answers_each_typed_line(checkpoint, loaded, repo_root, tmp_path):
    """A real process, another folder: the answer to one line is there before the next is typed."""
    call = [sys.executable, "-m", "fairseq_ext.translation.translate", "-", "-"]
    call += ["--path", str(checkpoint), "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(call, cwd=tmp_path, env=env, **pipes) as process:
        for line in ("I like red apples.", "", "you see fish 😀"):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            assert process.stdout.readline().decode() == loaded([line])[0] + "\n"
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.stderr.read().decode() == ""
    assert process.returncode == 0 and not any(tmp_path.iterdir())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("flags", [[], ["--nbest", 2]])
def test_killed_and_started_again_it_goes_on(flags, run, monkeypatch):
    """25 lines, 10 at a time: the third ten are never reached, and the first twenty not done again."""
    translator = echo()
    monkeypatch.setattr(Translator, "from_checkpoint", lambda *args: translator)
    monkeypatch.setattr(command, "KEPT", 10)
    lines = [f"line {'abcdefghij'[i % 10] * (i // 3)}" for i in range(25)]
    text = "\n".join(lines)
    whole = run(text, *flags, output="whole.txt")[1]
    assert len(whole.splitlines()) == 25 * (2 if flags else 1)
    seen = []
    translate_window = translator.translate_window

    def window(lines, *more):
        if len(seen) == 20:
            raise Killed
        seen.extend(lines)
        return translate_window(lines, *more)

    monkeypatch.setattr(translator, "translate_window", window)
    with pytest.raises(Killed):
        run(text, *flags)
    assert not Path("out.txt").exists() and Path(".out.txt.partial").is_dir()
    # what was written after the last state is written again
    with open(".out.txt.partial/text", "ab") as file:
        file.write(b"half a li")
    seen.clear()
    assert run(text, *flags)[1] == whole
    assert seen == lines[20:]
    assert not list(Path().glob(".out*"))
    assert json.loads(Path("out.txt.manifest.json").read_text())["counts"]["in"] == 25


def test_another_input_or_other_options_begin_anew(run, monkeypatch):
    translator = echo()
    monkeypatch.setattr(Translator, "from_checkpoint", lambda *args: translator)
    monkeypatch.setattr(command, "KEPT", 1)
    for text, flags in (("a\nb", []), ("b\nc", []), ("b\nc", ["--beam", 2])):
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(command.Counts, "sentences", lambda self: (_ for _ in ()).throw(Killed))
            patch.setattr(command, "atomic_write", lambda *args: (_ for _ in ()).throw(Killed))
            run(text, *flags)
        assert run(text, *flags)[1] == text + "\n"


def test_averaged_weights_translate_where_they_are_asked_for(checkpoint, tmp_path, loaded):
    import torch

    from tests.trainings import read

    state = read(checkpoint)
    own = {"averaged.pt": {"ema": state["model"]}, "without.pt": {}}
    blank = {key: torch.zeros_like(value) for key, value in state["model"].items()}
    for name, extra in own.items():
        extra_state = {**state["extra_state"], **extra}
        torch.save({**state, "model": blank, "extra_state": extra_state}, tmp_path / name)
    lines = ["I like red apples.", "we see big houses."]
    found = Translator.from_checkpoint(tmp_path / "averaged.pt", threads=1, ema=True)
    assert found(lines) == loaded(lines)
    assert Translator.from_checkpoint(tmp_path / "averaged.pt", threads=1)(lines) != loaded(lines)
    with pytest.raises(UserError, match="holds no averaged weights .*leave --ema out"):
        Translator.from_checkpoint(tmp_path / "without.pt", ema=True)

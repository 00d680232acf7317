import errno
import io
import subprocess
import sys
from dataclasses import dataclass, field
from typing import List, Optional

import pytest

from ext_common import cli


def outcome(main, capsys, argv=()):
    with pytest.raises(SystemExit) as caught:
        cli.run(main, list(argv))
    return caught.value.code, capsys.readouterr().err


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (cli.UserError("a.wav is empty: remove it"), 1, "error: a.wav is empty: remove it\n"),
        (cli.UsageError("no such subset"), 2, "error: no such subset\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            1,
            "error: /data/x cannot be written (No space left on device): what was finished before it is"
            " whole; make room, and run the same command again\n",
        ),
    ],
)
def test_run_maps_errors_to_one_line_and_a_code(capsys, error, code, said):
    assert outcome(raising(error), capsys) == (code, said)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_run_exits_with_what_main_returns(capsys, returned, code):
    seen = []

    def main(argv):
        seen.append(argv)
        return returned

    assert outcome(main, capsys, ["a", "--b"]) == (code, "")
    assert seen == [["a", "--b"]]


@pytest.mark.parametrize("bug", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "gone")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        cli.run(raising(bug), [])


def test_a_closed_pipe_is_quiet():
    code = (
        "from ext_common.cli import run\n"
        "def main(argv):\n"
        "    for i in range(100000): print(i)\n"
        "run(main)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@dataclass
class Options:
    max_bad: float = field(default=0.01, metadata={"help": "share of bad files, at most 100 %"})
    mels: int = field(default=40, metadata={"help": "mel bands", "choices": [40, 80]})
    name: str = field(default="x", metadata={"help": "a name"})
    trim: bool = field(default=False, metadata={"help": "trim silence"})
    loudness: Optional[float] = field(default=None, metadata={"help": "loudness in dB"})
    noise: List[str] = field(default_factory=list, metadata={"help": "folders"})


def parse(argv, cls=Options, **kwargs):
    parser = cli.Parser(prog="tool")
    cli.add_dataclass(parser, cls, **kwargs)
    return cli.from_args(cls, parser.parse_args(argv))


def refused(argv, capsys, cls=Options):
    with pytest.raises(SystemExit) as caught:
        parse(argv, cls)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    return said


def test_flags_from_a_dataclass():
    assert parse([]) == Options()
    argv = "--max-bad 0.5 --mels 80 --name y --trim --loudness -23 --noise a,b".split()
    assert parse(argv) == Options(0.5, 80, "y", True, -23.0, ["a", "b"])
    assert parse(["--no-trim", "--loudness", "none", "--noise", ""]) == Options()
    assert parse(["--noise", "a"]).noise == ["a"] and parse([]).noise == []


def test_skipped_fields_have_no_flag(capsys):
    assert parse([], skip=["mels"]) == Options()
    with pytest.raises(SystemExit):
        parse(["--mels", "80"], skip=["mels"])


def test_help_has_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "share of bad files, at most 100 % (default: 0.01)" in text
    assert "{40,80}" in text and "loudness in dB (default: none)" in text
    assert text.count("trim silence (default: false)") == 1
    assert "folders (default: empty)" in text


def test_usage_errors_are_one_sentence_with_the_nearest(capsys):
    said = refused(["--max-bda", "1"], capsys)
    assert "unknown argument '--max-bda': did you mean '--max-bad'?" in said
    # An abbreviation is not guessed.
    assert "did you mean '--loudness'" in refused(["--loudn", "3"], capsys)
    assert "bad value 'many' for max_bad: expected float" in refused(["--max-bad", "many"], capsys)
    assert "bad value 41 for mels" in refused(["--mels", "41"], capsys)


def test_required_field_and_refused_value(capsys):
    @dataclass
    class Needs:
        count: int = field(metadata={"help": "how many"})

        def __post_init__(self):
            if self.count < 0:
                raise ValueError("--count must not be negative")

    assert "--count" in refused([], capsys, Needs)
    with pytest.raises(cli.UsageError, match="must not be negative"):
        parse(["--count", "-1"], Needs)


def test_field_without_help_is_a_bug():
    @dataclass
    class Silent:
        x: int = 1

    with pytest.raises(ValueError, match="Silent.x has no help"):
        parse([], Silent)


# --- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Each reading is `step` seconds after the last."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_short_work_is_silent():
    stream = io.StringIO()
    done = list(cli.progress([1, 2, 3], "x", "files", stream=stream, clock=Clock(0.1)))
    assert (done, stream.getvalue()) == ([1, 2, 3], "")


def test_long_work_prints_lines_with_rate_and_time_left():
    stream = io.StringIO()
    # The clock is read once at the start, and once an item while nothing is printed.
    list(cli.progress(range(10), "prepare", "files", stream=stream, clock=Clock(1.0)))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "prepare: 3/10 files (30 %), 0.75 files/s, 0:09 left"
    assert lines[-1].startswith("prepare: 10 files in 0:")
    assert len(lines) < 6  # every few seconds, not every item


def test_counting_by_hand_and_unknown_total():
    stream = io.StringIO()
    with cli.progress(200, "count", "rows", stream=stream, clock=Clock(10.0)) as bar:
        bar.update(50)
    assert stream.getvalue().startswith("count: 50/200 rows (25 %), 2.5 rows/s, 1:00 left\n")
    stream = io.StringIO()
    list(cli.progress(iter("ab"), "", "rows", stream=stream, clock=Clock(10.0)))
    assert stream.getvalue().startswith("1 rows, ")


def test_an_error_inside_passes_through():
    with pytest.raises(ZeroDivisionError):
        for item in cli.progress([1, 0], stream=io.StringIO()):
            1 / item


def test_terminal_gets_a_bar():
    stream = Terminal()
    assert list(cli.progress([1, 2], "prepare", "files", stream=stream, after=0.0)) == [1, 2]
    assert "prepare: 100%" in stream.getvalue() and "2/2" in stream.getvalue()
    stream = Terminal()
    list(cli.progress([1, 2], "prepare", stream=stream, after=60.0))
    assert stream.getvalue() == ""

"""scripts/quickstart.sh: its steps, what it refuses, and the whole way on synthetic voices."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


def load(name):
    path = SCRIPTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # they import each other by name, as scripts of one folder
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


steps, training = load("quickstart/steps"), load("quickstart/training")
speaker, translation = load("quickstart/speaker"), load("quickstart/translation")
download = load("download_fsdd")
UserError = steps.UserError
JOB = {"quickstart": "test", "data": None}


def python(*args, **kwargs):
    return processes.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=900, **kwargs
    )


def one_sentence(done, code):
    assert done.returncode == code
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# --- the steps ---------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A step that copies one file to another and counts its runs."""
    source, target, count = (tmp_path / name for name in ("source", "target", "count"))
    source.write_text("one")
    code = "import shutil, sys; s, t, c = sys.argv[1:]; shutil.copy(s, t); open(c, 'a').write('x')"
    command = ["python", "-c", code, source, target, count]
    return {"name": "copy", "command": command, "inputs": [source], "outputs": [target]}, count


def test_a_step_runs_again_only_when_something_has_changed(tmp_path, copy, capfd):
    step, count = copy

    def go(**change):
        with steps.Steps(tmp_path / "out", JOB, ["data"]) as run:
            return run.do(**{**step, **change})

    assert go() is True and count.read_text() == "x"
    assert go() is False and count.read_text() == "x"
    step["inputs"][0].write_text("two")
    assert go() is True and go() is False
    step["outputs"][0].unlink()
    assert go() is True and step["outputs"][0].read_text() == "two"
    assert go(always=True) is True
    assert go(command=[*step["command"][:-1], tmp_path / "elsewhere"]) is True
    assert (tmp_path / "elsewhere").read_text() == "x"
    assert "$ python -c " in capfd.readouterr().out


def test_a_step_that_failed_is_not_done(tmp_path):
    fail = ["python", "-c", "raise SystemExit(3)"]
    for _ in range(2):
        with steps.Steps(tmp_path / "out", JOB, []) as run:
            with pytest.raises(UserError, match="exit code 3"):
                run.do("fail", fail)


def test_folders_with_something_else_are_refused(tmp_path):
    with steps.Steps(tmp_path / "out", JOB, []):
        pass
    with pytest.raises(UserError, match="holds a run of test.*--fresh"):
        steps.Steps(tmp_path / "out", {**JOB, "data": "other"}, []).__enter__()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            steps.Steps(tmp_path / "mine", JOB, ["thesis.tex"], fresh).__enter__()
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_fresh_removes_what_is_its_own(tmp_path):
    out = tmp_path / "out"
    with steps.Steps(out, JOB, ["data", "log"]) as run:
        run.do("nothing", ["python", "-c", ""])
    (out / "data").mkdir()
    (out / "data" / "x").write_text("x")
    (out / "log").write_text("x")
    (out / "notes").write_text("mine")
    with steps.Steps(out, {**JOB, "data": "other"}, ["data", "log"], fresh=True) as run:
        assert run.record["steps"] == {}
    assert sorted(os.listdir(out)) == ["notes", "quickstart.json"]


def test_one_at_a_time_in_a_folder(tmp_path):
    with steps.Steps(tmp_path / "out", JOB, []):
        with pytest.raises(UserError, match="another quickstart"):
            steps.Steps(tmp_path / "out", JOB, []).__enter__()
    with steps.Steps(tmp_path / "out", JOB, []):
        pass


def test_a_command_dies_with_the_quickstart(tmp_path):
    """A training that outlived a killed quickstart would write beside the next one's."""
    pid_file = tmp_path / "pid"
    write = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
    child = f"import os, time; {write}; time.sleep(600)"
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS / 'quickstart')!r}); import steps; "
        f"steps.run_command(['python', '-c', {child!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
    finally:
        parent.kill()
        parent.wait()
    pid = int(pid_file.read_text())
    wait_for(lambda: not is_running(pid))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- what training shows ------------------------------------------------------------------------

LOG = """\
{prefix} | train_inner | epoch 001:     25 / 25 loss=9.06, accuracy=7.3, num_updates=25, lr=0.0005
{prefix} | valid | epoch 001 | valid on 'valid' subset | loss 8.9 | accuracy 14.6 | num_updates 25
{prefix} | train_inner | epoch 002:     25 / 25 loss=7.39, accuracy=7.3, num_updates=50, lr=0.0005
{prefix} | valid | epoch 002 | valid on 'valid' subset | loss 6.9 | accuracy 40.6 | num_updates 50
{prefix} | train | epoch 002 | loss 8.9 | accuracy 14.6 | num_updates 50
""".format(prefix="2026-11-23 02:42:23 | INFO")


def test_training_display():
    clock = iter(range(0, 1000, 10))
    log, screen = io.StringIO(), io.StringIO()
    display = training.TrainingDisplay(100, log, screen, lambda: next(clock))
    for line in LOG.splitlines(keepends=True):
        display.line(line)
    assert log.getvalue() == LOG
    first, second = screen.getvalue().splitlines()
    assert first == "update    25/100   training loss  9.060   accuracy on valid  14.6 %"
    # the clock stood at 0 for update 25 and at 10 for update 50: 20 s for the other 50
    assert second.endswith("training loss  7.390   accuracy on valid  40.6 %   0:20 left")


def test_training_display_of_another_metric():
    log = LOG.replace("accuracy 14.6", "bleu 14.6").replace("accuracy 40.6", "bleu 40.6")
    screen = io.StringIO()
    display = training.TrainingDisplay(100, io.StringIO(), screen, metric="bleu", unit="")
    for line in log.splitlines(keepends=True):
        display.line(line)
    first, second = screen.getvalue().splitlines()
    assert first.endswith("   bleu on valid  14.6") and "bleu on valid  40.6" in second


def test_failed_training_is_told_in_its_own_words(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("INFO | begins\nerror: data is not a prepared folder\nlast words\n")
    text = training.explain_failure(UserError("code 1"), log)
    assert text == f"training failed: data is not a prepared folder ({log} has all of it)"
    log.write_text("Traceback\nValueError: broken\n")
    assert "ValueError: broken" in training.explain_failure(UserError("code 1"), log)


# --- bad usage -----------------------------------------------------------------------------------


def test_unknown_quickstart():
    done = processes.run(
        ["bash", SCRIPTS / "quickstart.sh", "spaeker"], capture_output=True, text=True
    )
    assert "spaeker" in one_sentence(done, 2) and "speaker" in done.stderr


@pytest.mark.parametrize(
    "args, code",
    [
        (["--data", "/nowhere"], 1),
        (["--pattern", "x"], 2),
        (["--updates", "0"], 2),
        (["--udpates", "5"], 2),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, args, code):
    one_sentence(processes.call(speaker.main, *args, cwd=tmp_path), code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, code, said",
    [
        (["--data", "/nowhere.tsv"], 1, "/nowhere.tsv is not a file"),
        (["--data", "a", "b", "c"], 2, "one file or two"),
        (["--target-lang", "de"], 2, "belong to --data"),
        (["--mono", "x.zh"], 2, "--mono belongs to --data"),
        (["--data", "a", "--mono", "b", "--no-back-translation"], 2, "--mono is for back"),
        (["--updates", "0"], 2, "at least 1"),
    ],
)
def test_mistakes_of_translation_are_one_sentence(tmp_path, args, code, said):
    done = processes.call(translation.main, *args, cwd=tmp_path)
    assert said in one_sentence(done, code)
    assert not list(tmp_path.iterdir())


# --- the digits ----------------------------------------------------------------------------------


def archive(path, names):
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            file.addfile(info, io.BytesIO(b"RIFF"))
    return path


def test_digits_from_an_archive(tmp_path):
    top = "free-spoken-digit-dataset-1.0.10"
    wanted = ["0_george_0.wav", "9_yweweler_49.wav"]
    strangers = ["README.md", f"{top}/recordings/../../evil_x_1.wav", "/recordings/1_a_1.wav"]
    path = archive(tmp_path / "a.tgz", [f"{top}/recordings/{n}" for n in wanted] + strangers)
    for number, how in enumerate((["--archive", path], ["--url", path.as_uri()])):
        dest = tmp_path / f"digits{number}"
        done = processes.call(download.main, dest, *how)
        assert done.returncode == 0, done.stderr
        assert sorted(os.listdir(dest)) == wanted
        assert "nothing to do" in processes.call(download.main, dest, *how).stdout
    assert sorted(os.listdir(tmp_path)) == ["a.tgz", "digits0", "digits1"]


def test_digits_that_do_not_come_leave_nothing(tmp_path):
    whole = archive(tmp_path / "a.tgz", [f"t/recordings/0_x_{n}.wav" for n in range(300)])
    torn = tmp_path / "torn.tgz"
    torn.write_bytes(whole.read_bytes()[:-200])
    other = archive(tmp_path / "other.tgz", ["t/readme.wav"])
    before = sorted(os.listdir(tmp_path))
    assert "not a whole" in one_sentence(
        processes.call(download.main, tmp_path / "d", "--archive", torn), 1
    )
    assert "not FSDD" in one_sentence(
        processes.call(download.main, tmp_path / "d", "--archive", other), 1
    )
    done = processes.call(download.main, tmp_path / "d", "--url", "http://127.0.0.1:9/a.tgz")
    assert "--archive" in one_sentence(done, 1)
    assert sorted(os.listdir(tmp_path)) == before


# --- the whole way -------------------------------------------------------------------------------


def quickstart(out, *args, job="speaker"):
    return python(SCRIPTS / "quickstart" / f"{job}.py", "--out", out, *args, cwd=out.parent)


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "quickstart.json"}


def commands(done):
    return re.findall(r"^\$ (.*)", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_speaker_quickstart(tmp_path):
    out = tmp_path / "out"
    done = quickstart(out, "--updates", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(out / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    with open(out / "recordings" / "metadata.csv", newline="") as file:
        test = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert [row["Id"] for row in predictions] == [row["path"] for row in test]
    speakers = {row["speaker"] for row in test}
    assert len(speakers) >= 20 and {row["Category"] for row in predictions} <= speakers
    right = sum(p["Category"] == t["speaker"] for p, t in zip(predictions, test, strict=True))
    measured = json.loads((out / "predictions.metrics.json").read_text())["top1"]
    assert (measured["correct"], measured["total"]) == (right, len(test))
    for name in ("learning_curve.png", "predictions.confusion.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert f"{right} of {len(test)} recordings of test" in done.stdout
    assert "synthetic voices" in done.stdout and "nothing about real speech" in done.stdout
    programs = [line.split()[0:3] for line in commands(done)]
    assert ["fairseq-train", "out/data", "--user-dir"] in programs

    # Again: nothing is run, nothing is touched, the same figure.
    before = times(out)
    again = quickstart(out, "--updates", 4)
    assert again.returncode == 0 and commands(again) == []
    assert times(out) == before
    assert again.stdout.partition("== result")[2] == done.stdout.partition("== result")[2]

    # More updates from another working folder, stopped on the way; the same once more.
    args = [sys.executable, SCRIPTS / "quickstart" / "speaker.py", "--out", out, "--updates", "40"]
    stopped = subprocess.Popen(
        args,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
        # a suite started in the background of a shell inherits that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "train.log"
    saved = re.compile("Saved checkpoint .* @ 25 updates")
    wait_for(lambda: saved.search(log.read_text()) or stopped.poll() is not None)
    stopped.send_signal(signal.SIGINT)
    assert stopped.communicate(timeout=100)[1] == "stopped: the same command continues\n"
    assert stopped.returncode == 130
    last = quickstart(out, "--updates", 40)
    assert last.returncode == 0, last.stdout + last.stderr
    loaded = re.findall(r"Loaded checkpoint .* @ (\d+) updates", log.read_text())
    assert loaded[0] == "4" and int(loaded[-1]) >= 25
    started = [line.split()[0:3] for line in commands(last)]
    assert [line[0] for line in started] == ["fairseq-train", "python", "python"]


@pytest.mark.slow
def test_own_recordings_in_a_folder_for_each_speaker(tmp_path):
    voices = tmp_path / "voices"
    assert python(SCRIPTS / "espeak_voices.py", voices, "--speakers", 2).returncode == 0
    for name in ("metadata.csv", "manifest.json", "plan.json"):
        (voices / name).unlink()
    out = tmp_path / "quickstart-speaker-voices"
    args = ["--data", voices, "--updates", 2]
    done = python(SCRIPTS / "quickstart" / "speaker.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "predictions.csv").exists() and "synthetic" not in done.stdout
    # A recording that is new is not passed over in silence.
    first = next(voices.rglob("*.wav"))
    (first.parent / "new.wav").write_bytes(first.read_bytes()[:-2])
    done = python(SCRIPTS / "quickstart" / "speaker.py", *args, cwd=tmp_path)
    assert done.returncode == 1 and "--fresh" in done.stderr


def translation_quickstart(out, *args, **kwargs):
    script = SCRIPTS / "quickstart" / "translation.py"
    return python(script, "--out", out, *args, cwd=out.parent, **kwargs)


@pytest.mark.slow
def test_translation_quickstart(tmp_path):
    pytest.importorskip("babel")
    out = tmp_path / "out"
    # a model of fewer updates writes longer lines, which takes longer than the updates
    done = translation_quickstart(out, "--updates", 30, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    test = (out / "corpus" / "test.tsv").read_text(encoding="utf-8").splitlines()
    output = (out / "test.out").read_text(encoding="utf-8").split("\n")[:-1]
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert len(output) == scores["lines"] == len(test)
    assert scores["tokenizer"] == "zh"
    bleu = scores["metrics"]["bleu"]["value"]
    assert f"BLEU {bleu:.1f} (95 % interval" in done.stdout
    assert "This is generated text" in done.stdout and "nothing about real text" in done.stdout
    names = sum(line.endswith("\tname") for line in test)
    counts = re.findall(r"(\d+) of (\d+) (sentences|with names)", done.stdout)
    assert {what: int(total) for _, total, what in counts} == {
        "sentences": len(test) - names,
        "with names": names,
    }
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "attention.svg").read_text(encoding="utf-8")
    mono = (out / "corpus" / "mono.zh").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(mono) >= 1000 and set(mono).isdisjoint(line.split("\t")[1] for line in test)
    assert "left out: a reverse model needs" in done.stdout
    assert not (out / "backtranslation").exists()
    # Nobody can type here: the command is told, and nothing waits.
    assert "translation.translate - - --path out/checkpoints/checkpoint_best.pt" in done.stdout
    programs = [line.split()[0:3] for line in commands(done)]
    assert ["fairseq-train", "out/data", "--user-dir"] in programs

    before = times(out)
    again = translation_quickstart(out, "--updates", 30, stdin=subprocess.DEVNULL)
    assert again.returncode == 0 and commands(again) == []
    assert times(out) == before
    assert again.stdout.partition("== result")[2] == done.stdout.partition("== result")[2]

    other = translation_quickstart(out, "--data", out / "corpus" / "train.tsv")
    assert other.returncode == 1 and "holds a run of translation" in other.stderr


@pytest.mark.slow
def test_translation_quickstart_on_own_files_typed_to(tmp_path):
    """Two files of other languages, more text of one for back-translation, a terminal to type at."""
    words = "ein rotes Haus steht neben dem alten Vögelbaum".split()
    english = "a red house stands beside the old birdtree".split()
    rng = random.Random(1)
    lines = [[rng.randrange(len(words)) for _ in range(rng.randint(3, 6))] for _ in range(560)]
    chosen, more = lines[:500], lines[500:]
    files = {"my.de": (words, chosen), "my.en": (english, chosen), "more.en": (english, more)}
    for name, (vocabulary, numbers) in files.items():
        text = (" ".join(vocabulary[i] for i in line) + ".\n" for line in numbers)
        (tmp_path / name).write_text("".join(text), encoding="utf-8")
    script = SCRIPTS / "quickstart" / "translation.py"
    args = ["--data", "my.de", "my.en", "--source-lang", "de", "--target-lang", "en"]
    reader, typed = pty.openpty()
    command = [sys.executable, script, *args, "--mono", "more.en", "--updates", "100"]
    errors = tmp_path / "stderr"
    streams = [os.ttyname(typed), os.ttyname(typed), str(errors)]
    pool = ThreadPoolExecutor(1)
    ended = pool.submit(processes.run_on, streams, command, tmp_path)
    ended.add_done_callback(lambda _: os.close(typed))
    said, answers = b"", [b"ein rotes Haus\n", b"\x04"]
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(reader, 65536):
            said += part
            # At a prompt only: what is typed before it goes through another mode of the terminal.
            if answers and said.count(b"de> ") == 3 - len(answers):
                os.write(reader, answers.pop(0))
    assert ended.result() == 0, errors.read_text()
    said = said.decode(errors="replace")
    assert "== result" in said and "generated text" not in said
    assert "type a line of de" in said and "en> " in said
    out = tmp_path / "quickstart-translation-my"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["tokenizer"] == "13a"
    # The second model: both scores beside each other, from the files that the steps wrote.
    place = out / "backtranslation" / "100"
    second = json.loads((place / "scores.json").read_text())
    report = json.loads((place / "data" / "manifest.json").read_text())["report"]
    assert report["languages"] == ["de", "en"] and report["effective"]["synthetic"] > 0
    real = (place / "synthetic" / "real.en").read_bytes()
    assert real == (tmp_path / "more.en").read_bytes()
    table = said.partition("== with back-translation")[2]
    for name, one in (("bitext", scores), ("and back-translated", second)):
        bleu = one["metrics"]["bleu"]["value"]
        assert re.search(rf"{name} +{bleu:.1f} ", table)
    difference = second["comparisons"]["bleu"]["difference"]
    assert f"BLEU {difference:+.1f} (p = " in table and "is not promised" in table

    # Nothing is done again; without --mono there is no back-translation.
    before = times(out)
    again = python(script, *args, "--mono", "more.en", "--updates", 100, cwd=tmp_path)
    # prepare finds out itself whether files of others have changed
    assert again.returncode == 0 and len(commands(again)) == 1 and times(out) == before
    again = python(script, *args, "--updates", 100, cwd=tmp_path)
    assert again.returncode == 0 and "== with back-translation" not in again.stdout


# --- diffusion ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_diffusion_quickstart(tmp_path):
    """On the digits, then nothing left to do, then on a folder of images of one's own."""
    out = tmp_path / "out"
    done = quickstart(out, "--updates", 4, job="diffusion")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((out / "samples").glob("*.png"))) == 500
    for name in ("samples.grid.png", "samples.strip.png", "learning_curve.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "metrics.json").read_text())
    assert f"{found['metrics']['frechet']['ratio']:.2f} times that between real" in done.stdout
    assert found["metrics"]["frechet"]["n"] == 500 and len(found["classes"]["names"]) == 10
    before = times(out)
    again = quickstart(out, "--updates", 4, job="diffusion")
    assert again.returncode == 0 and commands(again) == []
    assert times(out) == before


@pytest.mark.slow
def test_diffusion_quickstart_on_own_images(tmp_path):
    from PIL import Image

    own = tmp_path / "own"
    own.mkdir()
    for k in range(40):
        Image.new("RGB", (20, 16), (6 * k, 255 - 6 * k, 40)).save(own / f"{k}.jpg")
    flags = ["--data", own, "--image-size", 8, "--updates", 2]
    done = quickstart(tmp_path / "out", *flags, job="diffusion")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["size"] == "8x8 colour"
    for k in range(7, 40):
        (own / f"{k}.jpg").unlink()
    few = quickstart(tmp_path / "y", *flags, job="diffusion")
    assert "holds 7 usable images: at least 8" in one_sentence(few, 1)
    missing = quickstart(tmp_path / "x", "--data", tmp_path / "none", job="diffusion")
    assert "is not a folder" in one_sentence(missing, 1)

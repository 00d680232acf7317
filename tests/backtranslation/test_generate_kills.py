"""Several workers at once, killed at random moments and started again: the bytes of an undisturbed run."""

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
helpers = runpy.run_path(str(Path(__file__).with_name("test_generate.py")))
contents, state_of, check_complete = (
    helpers[name] for name in ("contents", "state_of", "check_complete")
)
WORKERS = 3


def start(mono, dest, chunk_lines=20, **environ):
    call = [sys.executable, "-m", "fairseq_ext.backtranslation.generate", str(mono), str(dest)]
    call += ["--model", "x", "--backend", "stub", "--nbest", "2", "--chunk-lines", str(chunk_lines)]
    call += ["--user-dir", str(Path(__file__).with_name("stub_plugin"))]
    environ = {**os.environ, **environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(call, env=environ, preexec_fn=hear_ctrl_c, **pipes)


def fork(mono, dest, chunk_lines=20, **environ):
    """The same in a fork of this process, which has imported everything; `exitcode` as Popen's returncode."""
    from fairseq_ext.backtranslation.generate import __main__ as generate

    call = [str(mono), str(dest), "--model", "x", "--backend", "stub", "--nbest", "2"]
    call += ["--chunk-lines", str(chunk_lines)]
    plugin = str(Path(__file__).with_name("stub_plugin"))
    generate.load_plugin(plugin)

    def become():
        os.environ.update(environ)
        fsync, pause = os.fsync, float(environ.get("STUB_SYNC", 0))
        os.fsync = lambda descriptor: (time.sleep(pause), fsync(descriptor))
        generate.main([*call, "--user-dir", plugin])

    process = multiprocessing.get_context("fork").Process(target=become)
    process.start()
    return process


def hear_ctrl_c():
    """Tests that run in the background of a shell inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_mono(path, count):
    draw = random.Random(1)
    lines = ["".join(draw.choices("我你 a😀\u2028，", k=draw.randrange(20))) for _ in range(count)]
    data = "\n".join(lines).encode()
    path.write_bytes(data)
    return data


def test_several_processes_write_what_one_writes(tmp_path):
    data = write_mono(tmp_path / "mono", 240)
    alone = start(tmp_path / "mono", tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()
    log = tmp_path / "log"
    slow = {"STUB_SLEEP": "0.005", "STUB_LOG": str(log)}
    workers = [start(tmp_path / "mono", tmp_path / "out", 7, **slow) for _ in range(WORKERS)]
    for worker in workers:
        out, err = worker.communicate()
        assert worker.returncode == 0, err
        assert "lines                 240" in out and "next: python -m" in out
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    check_complete(tmp_path / "out", data, 2)
    # nobody was killed: no line is translated twice
    assert sorted(map(int, log.read_text().split())) == list(range(1, 241))


@pytest.mark.slow
def test_ctrl_c_of_a_process_leaves_its_work_to_others(tmp_path):
    data = write_mono(tmp_path / "mono", 200)
    # 20 s of work, so that it is far from done when it is interrupted
    dest, slow = tmp_path / "out", {"STUB_SLEEP": "0.1"}
    first = start(tmp_path / "mono", dest, **slow)
    until = time.monotonic() + 60
    while not list(dest.glob(".work/done/*")) and time.monotonic() < until:
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate()
    assert first.returncode == 130
    assert "the same command continues" in err and "Traceback" not in err
    assert os.listdir(dest / ".work" / "claimed") == []
    second = start(tmp_path / "mono", dest)
    out, err = second.communicate()
    assert second.returncode == 0 and "lines are there already" in err
    check_complete(dest, data, 2)


def test_only_the_first_rank_speaks(tmp_path):
    write_mono(tmp_path / "mono", 50)
    ranks = [start(tmp_path / "mono", tmp_path / "out", 5, RANK=str(rank)) for rank in range(2)]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0].count("usable") >= 1 and said[1] == ""


@pytest.fixture
def alone(tmp_path):
    """A text of so many lines, and where one undisturbed process wrote: alone(lines) → (text, folder)."""

    def alone(lines):
        data = write_mono(tmp_path / "mono", lines)
        process = fork(tmp_path / "mono", tmp_path / "alone")
        process.join()
        assert process.exitcode == 0
        return data, tmp_path / "alone"

    return alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments(tmp_path, alone, seed):
    """Three workers, over 20 kills in every state of the run, all started again at once."""
    data, undisturbed = alone(1000)
    dest, log, draw = tmp_path / "out", tmp_path / "log", random.Random(seed)
    # set-up and merge are slow enough to be met
    slow = {"STUB_SLEEP": "0.004", "STUB_SYNC": "0.15", "STUB_LOG": str(log)}
    workers, kills, redone = [], Counter(), 0
    wanted = {"set up": 5, "chunks": 14, "merge": 5}
    until = time.monotonic() + 400
    finished = 0
    while finished < WORKERS and time.monotonic() < until:
        for worker in [w for w in workers if not w.is_alive()]:
            workers.remove(worker)
            assert worker.exitcode in (0, -signal.SIGKILL)
            finished += worker.exitcode == 0
        while len(workers) + finished < WORKERS:
            workers.append(fork(tmp_path / "mono", dest, **slow))
        state = state_of(dest)
        if kills[state] < wanted.get(state, 0):
            # in the short states whoever it is that works, all at once
            several = workers if state != "chunks" else [draw.choice(workers)]
            time.sleep(draw.random() * {"set up": 0.3, "chunks": 0.4, "merge": 0.3}[state])
            state = state_of(dest)
            done = set(os.listdir(dest / ".work" / "done")) if state == "chunks" else set()
            for worker in list(several):
                if worker.is_alive():
                    worker.kill()
                    kills[state] += 1
            if state == "chunks":
                assert done <= set(os.listdir(dest / ".work" / "done")) or state_of(dest) != state
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
        worker.join()
    assert finished >= WORKERS, f"not done in time after {kills}"
    print(f"kills: {dict(kills)}")
    assert sum(kills.values()) >= 20 and set(wanted) <= set(kills)
    assert contents(dest) == contents(undisturbed)
    check_complete(dest, data, 2)
    # a kill costs the two chunks that a worker holds, and nothing that was done
    times = Counter(map(int, log.read_text().split()))
    assert sorted(times) == list(range(1, 1001))
    redone = sum(times.values()) - 1000
    assert redone <= 20 * (kills["chunks"] + 2)
    manifest = json.loads((dest / "manifest.json").read_text("utf-8"))
    assert manifest["counts"]["in"] == 1000


@pytest.mark.slow
def test_64_tasks_of_an_array_killed_at_random(tmp_path, alone):
    """As a cluster runs them: in any order, eight at a time here; two thirds are killed and never come back.

    Another task may come at any time, and the last of all ends it.
    """
    data, undisturbed = alone(1200)
    dest, draw = tmp_path / "out", random.Random(64)
    ends = {task: draw.uniform(0.1, 2) if draw.random() < 2 / 3 else 600 for task in range(64)}
    waiting, running, codes = list(ends), {}, Counter()
    while waiting or running:
        while waiting and len(running) < 8:
            task = waiting.pop(draw.randrange(len(waiting)))
            environ = {"STUB_SLEEP": "0.05", "SLURM_ARRAY_TASK_ID": str(task)}
            worker = fork(tmp_path / "mono", dest, 5, **environ)
            running[task] = (worker, time.monotonic() + ends[task])
        for task, (worker, until) in list(running.items()):
            if worker.is_alive() and time.monotonic() > until:
                worker.kill()
            if not worker.is_alive():
                del running[task]
                assert worker.exitcode in (0, -signal.SIGKILL)
                codes[worker.exitcode] += 1
        time.sleep(0.02)
    assert codes[-signal.SIGKILL] >= 20 and sum(codes.values()) == 64
    assert contents(dest) == contents(undisturbed)
    check_complete(dest, data, 2)

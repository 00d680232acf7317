"""Claims and chunks: one owner for a piece of work, whoever dies; every line in exactly one chunk."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_common.cli import UserError
from fairseq_ext.backtranslation.generate import claims as claiming
from fairseq_ext.backtranslation.generate import mono as monolingual
from fairseq_ext.backtranslation.generate.chunks import Chunks, Offsets, sweep
from fairseq_ext.backtranslation.generate.claims import Claims, Heart, Owner, start_time
from fairseq_ext.backtranslation.models.backends import Line
from fairseq_ext.translation.text.normalise import read_lines

ROOT = Path(__file__).resolve().parents[2]
ME = Owner.this()
ELSEWHERE = replace(ME, host="elsewhere", pid=7)


@pytest.fixture
def folder(tmp_path):
    Claims.set_up(tmp_path / "work", ["000000", "000001", "000002"])
    return tmp_path / "work"


def claims(folder, owner=ME):
    return Claims(folder, owner, Heart())


def age(claim, seconds):
    then = time.time() - seconds
    os.utime(claim.path, (then, then))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_pieces_are_taken_in_order_and_once(folder):
    mine, other = claims(folder), claims(folder, ELSEWHERE)
    taken = [mine.take(), other.take(), mine.take()]
    assert [claim.name for claim in taken] == ["000000", "000001", "000002"]
    assert mine.take() is None and other.take() is None
    assert not os.listdir(folder / "todo") and len(os.listdir(folder / "claimed")) == 3


def test_order_is_that_of_numbers_beyond_six_digits(tmp_path):
    Claims.set_up(tmp_path / "work", ["1000000", "999999"])
    assert claims(tmp_path / "work").take().name == "999999"


def test_put_back_and_drop(folder):
    mine = claims(folder)
    first, second = mine.take(), mine.take()
    mine.put_back(first)
    assert sorted(os.listdir(folder / "todo")) == ["000000", "000002"]
    mine.drop(second)
    assert not mine.taken and not os.listdir(folder / "claimed")
    assert [mine.take().name, mine.take().name, mine.take()] == ["000000", "000002", None]
    mine.put_back_all()
    assert sorted(os.listdir(folder / "todo")) == ["000000", "000002"] and not mine.taken


@pytest.mark.parametrize(
    "owner, dead",
    [
        (ME, False),
        (replace(ME, pid=os.getppid(), started=start_time(os.getppid())), False),
        (replace(ME, started="1"), True),  # the pid is used again
        (replace(ME, pid=dead_pid()), True),
        (replace(ME, boot="an earlier start"), True),
        (replace(ME, boot="an earlier start", namespace="8"), True),
        (replace(ME, namespace="8", pid=dead_pid()), False),  # a container: its pids are its own
        (replace(ELSEWHERE, pid=dead_pid()), False),
    ],
)
def test_who_is_dead_beyond_doubt(folder, owner, dead):
    assert ME.knows_dead(owner) is dead
    claim = claims(folder, owner).take()
    mine = claims(folder)
    expected = claim.name if dead else "000001"
    assert mine.take().name == expected
    assert claim.path.exists() is not dead


def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = replace(ME, pid=process.pid, started=start_time(process.pid))
    assert not ME.knows_dead(owner)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{process.pid}").exists() and ME.knows_dead(owner)
    process.wait()


@pytest.mark.parametrize("host", ["a@b/c%40", "节点", "x"])
def test_an_owner_reads_back(host):
    owner = replace(ME, host=host)
    assert Owner.parse(str(owner)) == owner and "/" not in str(owner)


def test_an_owner_where_the_system_hides_its_own_names(monkeypatch):
    """Some sandboxes: no id of the start, no namespace."""

    def hidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "readlink", hidden)
    monkeypatch.setattr(claiming, "Path", lambda path: Path(path.replace("random", "hidden")))
    owner = Owner.this()
    assert owner == replace(ME, boot="0", namespace="0") and not owner.knows_dead(owner)


@pytest.mark.parametrize("owner", [ELSEWHERE, replace(ME, pid=1, started=start_time(1))])
@pytest.mark.parametrize("seconds, taken", [(0, False), (50, False), (70, True)])
def test_without_heartbeat_for_a_minute_a_claim_is_free(folder, monkeypatch, owner, seconds, taken):
    theirs = claims(folder, owner)
    claim = theirs.take()
    age(claim, seconds)
    # the clock of this machine is wrong by a day: it must not matter
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 86400)
    mine = claims(folder)
    assert (mine.take().name == claim.name) is taken
    assert claim.path.exists() is not taken


def test_a_claim_that_is_just_taken_looks_alive(folder):
    for name in os.listdir(folder / "todo"):
        os.utime(folder / "todo" / name, (1, 1))
    claim = claims(folder, ELSEWHERE).take()
    assert claims(folder).take().name != claim.name
    age(claim, 1000)
    again = claims(folder).take()
    assert again.name == claim.name
    assert claims(folder, ELSEWHERE).take().name != claim.name


def test_who_loses_a_claim_does_no_harm(folder):
    theirs, mine = claims(folder, ELSEWHERE), claims(folder)
    lost = [theirs.take(), theirs.take()]
    for claim in lost:
        age(claim, 100)
    won = [mine.take(), mine.take()]
    assert [claim.name for claim in won] == [claim.name for claim in lost]
    theirs.drop(lost[0])
    theirs.put_back(lost[1])
    assert os.listdir(folder / "todo") == ["000002"] and not theirs.taken
    assert sorted(os.listdir(folder / "claimed")) == sorted(claim.path.name for claim in won)


def test_heartbeats_are_for_what_is_held(folder):
    with Heart(interval=0.01) as heart:
        mine = Claims(folder, ME, heart)
        kept, dropped = mine.take(), mine.take()
        mine.drop(dropped)
        dropped.path.touch()
        for claim in (kept, dropped):
            age(claim, 1000)
        until = time.monotonic() + 20
        while time.time() - kept.path.stat().st_mtime > 500 and time.monotonic() < until:
            time.sleep(0.01)
        assert time.time() - kept.path.stat().st_mtime < 500
        assert time.time() - dropped.path.stat().st_mtime > 500
        kept.path.unlink()
        time.sleep(0.05)
    assert not kept.path.exists()


def race(folder, workers):
    """Everything that `workers` threads, each another process to the others, take at once."""
    found, barrier = [], threading.Barrier(workers)

    def take(number):
        mine = claims(folder, replace(ELSEWHERE, host=f"node{number}"))
        barrier.wait()
        while claim := mine.take():
            found.append(claim.name)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def test_a_race_has_one_winner_for_each_piece(tmp_path):
    names = [f"{number:06d}" for number in range(200)]
    Claims.set_up(tmp_path / "work", names)
    assert race(tmp_path / "work", 6) == names


def test_a_race_for_the_claims_of_a_dead_process_has_one_winner_each(tmp_path):
    names = [f"{number:06d}" for number in range(100)]
    Claims.set_up(tmp_path / "work", names)
    dead = claims(tmp_path / "work", replace(ELSEWHERE, host="dead"))
    while claim := dead.take():
        age(claim, 100)
    assert race(tmp_path / "work", 6) == names


def test_processes_race(tmp_path):
    names = [f"{number:06d}" for number in range(300)]
    Claims.set_up(tmp_path / "work", names)
    script = (
        "import sys; from pathlib import Path\n"
        "from fairseq_ext.backtranslation.generate.claims import *\n"
        "mine = Claims(Path(sys.argv[1]), Owner.this(), Heart())\n"
        "sys.stdin.read()\n"
        "while claim := mine.take(): print(claim.name)\n"
        "sys.stdout.flush(); sys.stdin.close(); import time; time.sleep(60)\n"
    )
    call = [sys.executable, "-c", script, str(tmp_path / "work")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    workers = [subprocess.Popen(call, **pipes) for _ in range(3)]
    found = []
    try:
        for worker in workers:
            worker.stdin.close()
        # all stay alive until everything is taken: a dead one's claims would be taken again
        while len(found) < len(names):
            for worker in workers:
                os.set_blocking(worker.stdout.fileno(), False)
                with_text = os.read(worker.stdout.fileno(), 1 << 16) if readable(worker) else b""
                found += with_text.decode().split()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            worker.stdout.close()
    assert sorted(found) == names


def readable(process):
    import select

    return select.select([process.stdout], [], [], 0.05)[0]


# --- chunks -------------------------------------------------------------------------------------


def cut(folder, data, size):
    """Chunks of a file with `data`."""
    folder.mkdir(parents=True)
    source = folder / "source"
    source.write_bytes(data)
    offsets = Offsets(folder / "offsets", size)
    digest = monolingual.copy(str(source), folder / "real", offsets.add)
    count = offsets.close()
    (folder / "done").mkdir()
    Claims.set_up(folder, [])
    described = {"plan": {"mono": digest, "chunk_lines": size}, "lines": offsets.lines}
    (folder / "plan.json").write_text(json.dumps(described))
    chunks = Chunks(folder)
    assert chunks.count == count
    return chunks


texts = st.lists(
    st.text(alphabet="ab我。😀\r\t\u2028\x85\x0c\ufeff\x1e ", max_size=8), min_size=1, max_size=40
)


@settings(max_examples=200)
@given(texts, st.booleans(), st.booleans(), st.integers(1, 12))
def test_chunks_cover_every_line_once(tmp_path_factory, lines, newline, bom, size):
    data = b"\xef\xbb\xbf" * bom + "\n".join(lines).encode() + b"\n" * newline
    if not data:
        return
    folder = tmp_path_factory.mktemp("cut") / "work"
    chunks = cut(folder, data, size)
    read = [chunks.read(chunk) for chunk in range(chunks.count)]
    assert sum(read, []) == list(read_lines(folder / "source"))
    assert [len(part) for part in read] == [len(chunks.numbers(n)) for n in range(chunks.count)]
    numbers = [number for chunk in range(chunks.count) for number in chunks.numbers(chunk)]
    assert numbers == list(range(1, chunks.lines + 1))
    assert all(len(part) == size for part in read[:-1])
    assert chunks.real.read_bytes() == data


def test_results_come_back_in_order(tmp_path):
    chunks = cut(tmp_path / "work", b"a\nb\nc\nd\ne", 2)
    claim = claiming.Claim("", tmp_path / "x@me@1")
    kept = {
        0: [[Line("一\u2028\x85", -0.1, None)], [Line("", None, "because")]],
        2: [[Line("e", None, None)]],
        1: [[Line("c", -1 / 3, None)], [Line('d"\\', 0.0, None)]],
    }
    done = []
    for chunk, found in kept.items():
        assert not chunks.is_done(chunk)
        chunks.write(chunk, found, claim)
        assert chunks.is_done(chunk)
        done.append(chunks.done_lines())
    assert done == [2, 3, 5]
    expected = [several for chunk in sorted(kept) for several in kept[chunk]]
    assert list(chunks.results()) == list(enumerate(expected, 1))
    assert os.listdir(chunks.folder / "scratch") == []


@pytest.mark.parametrize(
    "data", ["", '[["a", 1, null]]\n', '[["a", 1, null]]\n' * 3, "[[[\n[[\n", "7\n7\n", "[[1]]\n"]
)
def test_a_damaged_chunk_is_named(tmp_path, data):
    chunks = cut(tmp_path / "work", b"a\nb\n", 2)
    (chunks.done / "000000.jsonl").write_text(data)
    with pytest.raises(UserError, match=r"000000\.jsonl is damaged"):
        list(chunks.results())


def test_who_writes_where_all_is_swept_away_makes_nothing_anew(tmp_path):
    chunks = cut(tmp_path / ".work", b"a\n", 1)
    sweep(chunks.folder)
    with pytest.raises(FileNotFoundError):
        chunks.write(0, [[Line("a", 0.0)]], claiming.Claim("", tmp_path / "x@me@1"))
    sweep(chunks.folder)
    assert os.listdir(tmp_path) == []

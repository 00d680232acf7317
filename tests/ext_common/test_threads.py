"""Threads and how they wait are settled before torch loads OpenMP, and what the user set stays."""

import os
import subprocess
import sys

import pytest
import torch

from ext_common import doctor, threads

VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*VARIABLES, "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    threads.settle_fairseq.cache_clear()
    monkeypatch.setattr(threads, "settled", [])
    monkeypatch.setattr(threads, "cores", lambda: 3)


@pytest.mark.parametrize(
    "given, settled",
    [
        ({}, {"OMP_NUM_THREADS": "3", **threads.WAITING}),
        ({"OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7", **threads.WAITING}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "9"}, {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "9"}),
        ({"KMP_BLOCKTIME": "0"}, {"OMP_NUM_THREADS": "3", "KMP_BLOCKTIME": "0"}),
    ],
)
def test_what_the_user_set_stays(given, settled):
    environ = dict(given)
    threads.settle(environ)
    assert environ == settled


WATCH = """
import os, sys

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
            print("torch meets", *(os.environ.get(n) for n in names), file=sys.stderr)
            sys.meta_path.remove(Watch)

sys.meta_path.insert(0, Watch)
"""


@pytest.mark.parametrize(
    "command, meets",
    [
        # both import torch at the top of their file
        (["-m", "diffusion_ext.export", "--help"], True),
        pytest.param(["-m", "fairseq_ext.average", "--help"], True, marks=pytest.mark.slow),
        (["-c", "import fairseq_ext.average"], False),
    ],
)
def test_a_command_settles_them_before_torch_and_an_import_does_not(
    command, meets, tmp_path, repo_root
):
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(tmp_path), str(repo_root)])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, *waiting = done.stderr.split()[-3:]
    assert (waiting == [*threads.WAITING.values()], count.isdigit()) == (meets, meets)


def test_for_gnu_the_spins_count_more_than_the_policy():
    """As it says itself, so that threads wait for a while and then sleep."""
    environ = {**os.environ, **threads.WAITING, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environ, capture_output=True, text=True
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("torch's OpenMP is not GNU's")
    assert f"GOMP_SPINCOUNT = '{threads.WAITING['GOMP_SPINCOUNT']}'" in done.stderr


@pytest.mark.parametrize(
    "program, environ, active, said",
    [
        ("/x/bin/fairseq-train", {}, 4, True),
        ("/x/fairseq_cli/train.py", {"RANK": "0"}, 4, True),
        ("/x/bin/fairseq-train", {"RANK": "1"}, 4, False),
        ("/x/bin/fairseq-train", {"OMP_WAIT_POLICY": "active"}, 4, False),
        ("/x/bin/fairseq-train", {"OMP_NUM_THREADS": "1"}, 1, False),
        ("/x/bin/pytest", {}, 4, False),
    ],
)
def test_under_fairseq_threads_are_set_and_the_variable_is_named(
    program, environ, active, said, monkeypatch, capsys
):
    count = [active]
    monkeypatch.setattr(sys, "argv", [program, "DATA"])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: count.__setitem__(0, n))
    threads.settle_fairseq()
    threads.settle_fairseq()
    printed = capsys.readouterr().err
    assert (f"export {threads.assignments(threads.WAITING)} before" in printed) == said
    assert printed.count("\n") == said
    # 4 are more than there are cores; what the user said and another program are left alone
    fits = "OMP_NUM_THREADS" not in environ and "pytest" not in program
    assert count == [3 if fits else active]


def test_limited_gives_the_threads_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads.limited(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with threads.limited(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "files, processors",
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(files, processors, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(str(tmp_path)) == processors


@pytest.mark.parametrize(
    "siblings, limit, cores",
    [
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, None, 2),
        ({0: "0", 1: "1", 2: "2"}, None, 3),
        ({0: "0", 1: "1", 2: "2"}, 2, 2),
        ({5: None, 6: None}, None, 2),
        ({0: "0"}, 8, 1),
    ],
)
def test_cores_are_counted_and_not_their_threads(siblings, limit, cores, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(siblings))
    monkeypatch.setattr(threads, "_read", lambda path: siblings[int(path.split("/cpu")[2][0])])
    monkeypatch.setattr(threads, "quota", lambda: limit)
    assert threads.cores() == cores


def test_the_doctor_says_what_the_user_set_and_what_commands_take(monkeypatch):
    (found,) = doctor.openmp()
    assert found.level == "note" and f"export {threads.assignments(threads.WAITING)}" in found.text
    threads.settle()
    # what this process set for itself is not what the user said
    (same,) = doctor.openmp()
    assert (
        same == found and f"OMP_NUM_THREADS=3 {threads.assignments(threads.WAITING)}" in found.text
    )
    monkeypatch.setattr(threads, "settled", [])
    (found,) = doctor.openmp()
    assert found == ("ok", f"OMP_NUM_THREADS 3, {threads.assignments(threads.WAITING)}")

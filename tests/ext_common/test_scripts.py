"""scripts/setup.sh with a stand-in for pip: what it installs, and when; gpu_check.sh without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Answers for `python`, and writes down what pip would have been asked to do.
STUB = """#!/usr/bin/env bash
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") exit 0 ;;
    "-m pip install"*) echo "$*" >> pip.log; exit "${PIP_EXIT:-0}" ;;
    "-m ext_common.doctor"*) exit 0 ;;
    *) exec %s "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path, repo_root):
    (tmp_path / "scripts").mkdir()
    shutil.copy(repo_root / "scripts" / "setup.sh", tmp_path / "scripts")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(repo_root / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB % sys.executable)
    python.chmod(0o755)
    return tmp_path


def setup(checkout, *extras, **env):
    done = subprocess.run(
        ["bash", "scripts/setup.sh", *extras],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    log = checkout / "pip.log"
    calls = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return done, [call.split("-e ")[1] for call in calls]


def test_installs_once_and_again_when_setup_cfg_changes(checkout):
    assert setup(checkout, "test")[1] == [".[test]"]
    done, calls = setup(checkout, "test")
    assert (done.returncode, done.stdout, calls) == (0, "", [])
    assert setup(checkout)[1] == []  # without extras there is nothing left to do
    assert setup(checkout, "test", "demo")[1] == [".[test,demo]"]
    assert setup(checkout, "demo")[1] == []
    with open(checkout / "setup.cfg", "a") as file:
        file.write("# changed\n")
    assert setup(checkout, "demo")[1] == [".[demo]"]


def test_failed_installation_is_tried_again(checkout):
    done, calls = setup(checkout, "test", PIP_EXIT="1")
    assert done.returncode == 1 and "error: installation failed" in done.stderr
    assert calls == [".[test]"]
    assert setup(checkout, "test")[1] == [".[test]"]


def test_python_that_does_not_run_is_refused_in_words(checkout):
    shutil.rmtree(checkout / ".venv")
    shim = checkout / "shim"
    shim.write_text('#!/bin/sh\necho "pyenv: python3.11: command not found" >&2\nexit 127\n')
    shim.chmod(0o755)
    done, calls = setup(checkout, PYTHON=str(shim))
    assert done.returncode == 1 and calls == []
    assert done.stderr == f"error: PYTHON={shim} is not a working Python 3.11 or 3.12\n"


@pytest.mark.slow
def test_a_shim_that_fails_is_passed_over(checkout):
    """pyenv puts a python3.11 on the path that only says which versions exist."""
    shutil.rmtree(checkout / ".venv")
    shims, good = checkout / "shims", checkout / "good"
    for folder, code in (
        (shims, "exit 127"),
        (good, f'echo "$*" >>{good}/calls; exec {sys.executable} "$@"'),
    ):
        folder.mkdir()
        for name in ("python3.11", "python3.12") if folder is shims else ("python3",):
            (folder / name).write_text(f"#!/bin/sh\n{code}\n")
            (folder / name).chmod(0o755)
    # Stops at once after the environment is made: the stand-in for pip is not in a real one.
    path = f"{shims}:{good}:/usr/bin:/bin"
    done, _ = setup(checkout, PATH=path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(shims))
    assert (checkout / ".venv" / "bin" / "python").exists(), done.stderr
    assert (good / "calls").read_text().splitlines()[-1] == "-m venv .venv"
    assert "setup: making .venv with Python 3.1" in done.stdout


# A Python later than 3.12: it can make an environment, into which pip brings uv where there is a network.
LATER = """#!/usr/bin/env bash
case "$*" in
    *"(3, 11)"*) exit 1 ;;
    *"(3, 8)"* | *ensurepip*) exit 0 ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install -q uv") [ -n "$ONLINE" ] || { echo "no such host" >&2; exit 1; }
        cp "$ASIDE/uv" "$(dirname "$0")" ;;
    *) exit 1 ;;
esac
"""
UV = """#!/usr/bin/env bash
case "$*" in
    --version) exit 0 ;;
    "python install 3.12") [ -n "$ONLINE" ] || { printf 'failed\\n  cause: no such host\\n' >&2; exit 1; }
        place=$UV_PYTHON_INSTALL_DIR/cpython-3.12.9-linux/bin
        mkdir -p "$place" && cp "$ASIDE/python3" "$place" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def later(checkout):
    """setup.sh on a machine with no Python but a later one: `later(*programs, online)`."""
    shutil.rmtree(checkout / ".venv")
    script = checkout / "scripts" / "setup.sh"
    script.write_text(script.read_text().replace("/usr/", "/nowhere/"))
    here, aside, scratch = (checkout / name for name in ("here", "aside", "scratch"))
    for folder in (here, aside, scratch):
        folder.mkdir()
    for name in ("bash", "cat", "cp", "dirname", "env", "mkdir", "mktemp", "rm", "sed"):
        (here / name).symlink_to(shutil.which(name))
    for file, text in (
        (checkout / "later", LATER),
        (aside / "uv", UV),
        (aside / "python3", STUB % sys.executable),
    ):
        file.write_text(text)
        file.chmod(0o755)

    def run(*programs, online=False):
        shutil.rmtree(checkout / ".venv", ignore_errors=True)
        for name, source in (("python3", checkout / "later"), ("uv", aside / "uv")):
            (here / name).unlink(missing_ok=True)
            if name in programs:
                shutil.copy(source, here / name)
        env = dict.fromkeys(("PYTHON", "PYENV_ROOT", "UV_PYTHON_INSTALL_DIR", "XDG_DATA_HOME"), "")
        env |= {"PATH": str(here), "HOME": str(checkout / "home"), "TMPDIR": str(scratch)}
        done, calls = setup(checkout, **env, ASIDE=str(aside), ONLINE="yes" if online else "")
        assert not list(scratch.iterdir())
        return done, calls

    return run


@pytest.mark.parametrize("programs", [("uv",), ("python3",), ("python3", "uv")])
def test_where_there_are_later_pythons_only_one_is_fetched_once(later, programs):
    done, calls = later(*programs, online=True)
    assert (done.returncode, calls) == (0, ["."]), done.stderr
    assert done.stderr == "setup: there is no Python 3.11 or 3.12 here, fetching 3.12 with uv\n"
    again, calls = later()
    assert (again.returncode, again.stderr, calls) == (0, "", ["."])


@pytest.mark.parametrize("programs", [("uv",), ("python3",), ()])
def test_where_nothing_can_be_fetched_one_sentence_says_so(later, programs):
    done, calls = later(*programs)
    reason = "no such host" if programs else "uv is not installed"
    *_, error = lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 2 and calls == []
    assert error.startswith(
        "error: no working Python 3.11 or 3.12 found, and fetching one needs the network"
    )
    assert reason in error and error.endswith("or set PYTHON to its path")


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_set_up_and_one_sentence_says_so(tmp_path, repo_root):
    (tmp_path / "scripts").mkdir()
    shutil.copy(repo_root / "scripts" / "gpu_check.sh", tmp_path / "scripts")
    command = ["bash", tmp_path / "scripts" / "gpu_check.sh", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = "error: this machine has no GPU: nothing is set up, nothing is checked\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]

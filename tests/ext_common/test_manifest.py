import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ext_common import manifest


@pytest.mark.parametrize(("mode", "content"), [("w", "grüße\r\n1\n"), ("wb", b"\x00\xff\n")])
def test_atomic_write_appears_whole(tmp_path, mode, content):
    path = tmp_path / "new" / "out"
    with manifest.atomic_write(path, mode) as file:
        file.write(content)
        file.flush()
        assert not path.exists()
    expected = content if mode == "wb" else content.encode("utf-8")
    assert path.read_bytes() == expected
    assert [p.name for p in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_failing_keeps_the_old_file_and_no_litter(tmp_path, error):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(error):
        with manifest.atomic_write(path) as file:
            file.write("half")
            raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    code = (
        "import os, signal, sys\n"
        "from ext_common.manifest import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write('half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_atomic_write_follows_links_and_honours_umask(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with manifest.atomic_write(link) as file:
        file.write("new")
    assert link.is_symlink() and target.read_text() == "new"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


def test_atomic_write_to_a_pipe_writes_into_it(tmp_path):
    code = (
        "from ext_common.manifest import atomic_write\n"
        "with atomic_write('/dev/stdout') as file: file.write('rows')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"rows"
    with pytest.raises(IsADirectoryError):
        with manifest.atomic_write(tmp_path):
            pass


@dataclass
class Spec:
    mels: int = 40
    floor: float = 1e-9


def test_atomic_json_writes_strict_json(tmp_path):
    obj = {
        "spec": Spec(),
        "path": Path("a/b"),
        "array": np.arange(3, dtype=np.int64),
        "scalar": np.float32(0.5),
        "nan": [float("nan"), np.float64("inf")],
        "set": {"b", "a"},
        "tuple": (1, None, True),
        5: "key",
        "ü": "ü",
    }
    manifest.atomic_json(tmp_path / "x.json", obj)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text and text.endswith("\n")
    assert json.loads(text) == {
        "spec": {"mels": 40, "floor": 1e-9},
        "path": "a/b",
        "array": [0, 1, 2],
        "scalar": 0.5,
        "nan": [None, None],
        "set": ["a", "b"],
        "tuple": [1, None, True],
        "5": "key",
        "ü": "ü",
    }
    with pytest.raises(TypeError, match="object cannot be written"):
        manifest.atomic_json(tmp_path / "y.json", object())
    assert not (tmp_path / "y.json").exists()


def test_sha256_of_a_file(tmp_path):
    data = os.urandom(1 << 20) + b"tail"
    (tmp_path / "x").write_bytes(data)
    assert manifest.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """The files that were hashed; the user's cache is empty, every file is large and long unchanged."""
    found, digest = [], manifest.sha256_file
    monkeypatch.setattr(manifest, "sha256_file", lambda p: found.append(p) or digest(p))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(manifest, "_DIGESTS", {})
    monkeypatch.setattr(manifest, "_LARGE", 0)
    monkeypatch.setattr(manifest, "_SETTLED", -1)
    return found


def test_a_file_that_has_not_changed_is_hashed_once_for_all_programs(tmp_path, hashed):
    path = tmp_path / "x"
    path.write_bytes(b"first")
    first = hashlib.sha256(b"first").hexdigest()
    for _ in range(2):
        assert [manifest.known_sha256(path) for _ in range(2)] == [first, first]
        # as another process: nothing is remembered but the note
        manifest._DIGESTS.clear()
    assert len(hashed) == 1
    # of the same size and time of change, in the same inode
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    time.sleep(0.02)
    with open(path, "r+b") as file:
        file.write(b"other")
    os.utime(path, ns=times)
    assert manifest.known_sha256(path) == hashlib.sha256(b"other").hexdigest()
    # a note that is damaged
    for note in (tmp_path / "cache" / "fairseq_ext" / "sha256").iterdir():
        note.write_text("damaged")
    manifest._DIGESTS.clear()
    assert manifest.known_sha256(path) == hashlib.sha256(b"other").hexdigest()
    assert len(hashed) == 3


@pytest.mark.parametrize("name, value", [("_LARGE", 1 << 20), ("_SETTLED", 10**12)])
def test_small_and_fresh_files_leave_no_note(tmp_path, hashed, monkeypatch, name, value):
    monkeypatch.setattr(manifest, name, value)
    (tmp_path / "x").write_bytes(b"text")
    assert manifest.known_sha256(tmp_path / "x") == hashlib.sha256(b"text").hexdigest()
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError):
        manifest.known_sha256(tmp_path / "y")


def test_versions_name_what_is_installed():
    import torch

    found = manifest.versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"].startswith("3.") and "ve-fairseq" in found


def test_manifest_is_the_same_for_equal_runs(tmp_path):
    source = tmp_path / "in.txt"
    source.write_bytes(b"abc")

    def write(folder):
        path = manifest.write_manifest(
            folder,
            inputs=[source],
            counts={"in": 3, "out": 2, "empty": 1},
            options=Spec(mels=80),
            seed=7,
            skipped=[{"path": "x.wav", "reason": "empty"}],
        )
        assert path == folder / "manifest.json"
        return path.read_bytes()

    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first == second
    record = json.loads(first)
    # NIST's test vector for "abc"
    vector = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert record["inputs"] == {str(source): vector}
    assert record["counts"] == {"in": 3, "out": 2, "empty": 1}
    assert record["options"]["mels"] == 80 and record["seed"] == 7
    assert record["skipped"] == [{"path": "x.wav", "reason": "empty"}]
    assert set(record["versions"]) >= {"python", "torch", "numpy"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("out/predictions.csv", "out/predictions.metrics.json"),
        ("embeddings.npz", "embeddings.metrics.json"),
        ("embeddings.ark", "embeddings.ark.metrics.json"),
        ("test.zh", "test.zh.metrics.json"),
        ("of.v2", "of.v2.metrics.json"),
        ("samples", "samples.metrics.json"),
    ],
)
def test_what_lies_beside_an_output_has_its_name(output, expected):
    assert manifest.beside(output, "metrics.json") == Path(expected)

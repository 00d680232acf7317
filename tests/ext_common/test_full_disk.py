"""A disk that is full: one sentence with the path and what is whole. On small file systems of their own."""

import errno
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ext_common.cli import UserError, run, why_full, writing
from ext_common.folders import making
from ext_common.manifest import atomic_json
from ext_common.presets.save_dirs import peek
from ext_common.store import StoreWriter

KB = 1024


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes): the root of a file system that has no more room than that."""
    mounted = []

    def make(kilobytes):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no small file system can be mounted here (that takes root)")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_what_a_full_disk_is():
    """Behind other errors too, and as torch and safetensors tell it; nothing else is one."""
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("could not")
    wrapped.__cause__ = full
    for error in (full, wrapped, RuntimeError("[enforce fail] . unexpected pos 64 vs 0")):
        assert why_full(error) == "No space left on device"
    for error in (OSError(errno.EACCES, "no"), ValueError("unexpected pos"), RuntimeError("x")):
        assert why_full(error) is None
    with pytest.raises(ValueError), writing("x"):
        raise ValueError


def test_files_and_folders(disk, capsys):
    place = disk(64)
    (place / "old.json").write_text("old")
    with pytest.raises(OSError) as caught:
        atomic_json(place / "old.json", "x" * 100 * KB)
    assert caught.value.filename == str(place / "old.json")
    assert (place / "old.json").read_text() == "old", "what was there is whole"
    with pytest.raises(
        UserError, match="out cannot be written .No space left.*nothing of it is kept"
    ):
        with making(place / "out") as folder:
            (folder / "a.bin").write_bytes(b"x" * 100 * KB)
    assert sorted(path.name for path in place.iterdir()) == ["old.json"]

    def command(argv):
        atomic_json(place / "new.json", "x" * 100 * KB)

    with pytest.raises(SystemExit) as ended:
        run(command, [])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1
    assert f"error: {place / 'new.json'} cannot be written (No space left on device)" in said


def test_a_store_goes_on_when_there_is_room(disk):
    place = disk(64)
    rows = np.zeros((10, 256), np.float32)  # 10 kB
    with pytest.raises(UserError, match="disk0 cannot be written.*run the same command again"):
        with StoreWriter(place, (256,)) as writer:
            for number in range(10):
                writer.append(str(number), rows)
    with StoreWriter(place, (256,)) as writer:
        assert 2 <= len(writer.done) < 10


@pytest.mark.parametrize("kilobytes", [4, 12, 24])
def test_a_training_keeps_the_checkpoint_before(train_here, disk, kilobytes):
    """Of a file that does not fit at all, at its end, or beside what is there."""
    place = disk(kilobytes)
    (train_here.folder / "link").symlink_to(place)
    with pytest.raises(
        UserError, match="cannot write .*No space left on device; make room and start"
    ):
        train_here("link", "--batch-size", 3, "--max-epoch", 5)
    for path in place.glob("*.pt"):
        assert peek(path) is not None, path


def test_samples_and_exports(disk):
    """What is drawn before is whole, and the same command goes on; of an export nothing is left."""
    pytest.importorskip("safetensors")
    from diffusion_ext.export.exported import write_exported
    from diffusion_ext.pictures import save_png
    from diffusion_ext.schedules import build_schedule
    from diffusion_ext.unet import UNet, UNetOptions

    place, random = disk(64), np.random.default_rng(0)
    with pytest.raises(OSError, match=".png") as caught:
        for number in range(99):
            image = random.integers(0, 256, (3, 32, 32), dtype=np.uint8)
            save_png(place / f"{number:03}.png", image, durable=False)
    assert why_full(caught.value)
    for path in place.iterdir():
        Image.open(path).load()
    place = disk(64)
    spec = {"height": 8, "width": 8, "channels": 1, "classes": []}
    net = UNet(UNetOptions(32, [1, 2], 1), 1, 1, 8)
    with pytest.raises(UserError, match="out cannot be written .No space left on device"):
        with making(place / "out") as folder:
            write_exported(folder, net, spec, build_schedule("cosine", 50), "v")
    assert not list(place.iterdir())

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from diffusion_ext.prepare import __main__ as prepare
from diffusion_ext.prepare import images
from diffusion_ext.prepare import known as image_datasets
from diffusion_ext.prepare.__main__ import PrepareOptions, main
from diffusion_ext.prepare.images import decode_image
from diffusion_ext.prepare.known import IMAGE_DATASETS, Labelled
from diffusion_ext.prepare.options import ImageOptions
from diffusion_ext.store import Images, open_images
from ext_common.cli import UsageError, UserError
from ext_common.folders import partial_folder
from tests import processes

FILES = {"images.bin", "images.json", "images.meta.json", "manifest.json"}


def write(folder, count=4, side=10):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        rng = np.random.default_rng(n)
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:03}.png")
    return folder


def run(*args):
    command = [sys.executable, "-m", "diffusion_ext.prepare", *map(str, args)]
    return processes.run(command, capture_output=True, text=True)


class TestFolder:
    def test_summary(self, tmp_path, capsys):
        source = write(tmp_path / "data")
        (source / "copy.png").write_bytes((source / "000.png").read_bytes())
        (source / "bad.png").write_text("a text")
        (source / "half.png").write_bytes((source / "001.png").read_bytes()[:200])
        args = [str(source), str(tmp_path / "out"), "--image-size", "8,6", "--max-bad", "0.5"]
        main(args)
        out = capsys.readouterr().out.splitlines()
        assert out[0] == (
            "5 images of 8x6 pixels in colour, 2 skipped (1 not an image, 1 truncated), "
            "1 duplicates, no classes"
        )
        assert re.fullmatch(rf"{tmp_path}/out written in \d+ s", out[1])
        assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
        images = open_images(tmp_path / "out", ImageOptions())
        expected = decode_image(source / "000.png", 8, 6, 3)
        np.testing.assert_array_equal(images.pixels[0], expected)
        main(args)
        assert "out is up to date" in capsys.readouterr().out
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["content_hash"] == images.content_hash
        assert manifest["decoder"] == {"pillow": Image.__version__, "policy": 1}

    def test_same_bytes_wherever_it_is_written(self, tmp_path, capsys):
        source = write(tmp_path / "data")
        for name in ("a", "b"):
            main([str(source), str(tmp_path / name), "--image-size", "8"])
        for name in FILES:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_other_options_replace_only_when_told(self, tmp_path, capsys):
        source, out = write(tmp_path / "data"), tmp_path / "out"
        main([str(source), str(out), "--image-size", "8"])
        other = [str(source), str(out), "--image-size", "6", "--channels", "1"]
        with pytest.raises(UserError, match="8x8 pixels in colour, not from .* 6x6 pixels in gray"):
            main(other)
        assert Images.open(out).height == 8
        main([*other, "--overwrite"])
        assert Images.open(out).pixels.shape == (4, 1, 6, 6)
        write(source, 5)
        with pytest.raises(UserError, match="held other files: use --overwrite"):
            main(other)

    def test_folders_of_others_are_left_alone(self, tmp_path):
        source, out = write(tmp_path / "data"), tmp_path / "out"
        out.mkdir()
        (out / "notes.txt").touch()
        for extra in ([], ["--overwrite"]):
            with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
                main([str(source), str(out), "--image-size", "8", *extra])
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="file is a file"):
            main([str(source), str(tmp_path / "file"), "--image-size", "8"])
        for inside in (source, source / "out"):
            with pytest.raises(UserError, match="DATA .* lies in the folder of images"):
                main([str(source), str(inside), "--image-size", "8"])

    def test_an_empty_folder_is_used(self, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        main([str(write(tmp_path / "data")), str(tmp_path / "out"), "--image-size", "8"])
        assert len(Images.open(tmp_path / "out")) == 4

    @pytest.mark.parametrize(
        "args", [["a"], ["a", "b", "c"], ["a", "b", "--image-dataset", "digits"]]
    )
    def test_number_of_paths(self, args):
        with pytest.raises(UsageError, match=r"paths given: name IMAGES and DATA, or DATA alone"):
            main(args)

    def test_killed_and_started_again_it_continues(self, tmp_path):
        source, out = write(tmp_path / "data", 600, 120), tmp_path / "b"
        args = [source, out, "--image-size", "16", "--workers", "1"]
        assert run(source, tmp_path / "a", *args[2:]).returncode == 0
        command = [sys.executable, "-m", "diffusion_ext.prepare", *map(str, args)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        journal = partial_folder(out) / "images.journal"
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > 40:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        assert process.wait() == -signal.SIGKILL and not out.exists()
        there = journal.read_bytes().count(b"\n")
        assert 40 < there < 600
        done = run(*args)
        assert done.returncode == 0, done.stderr
        for name in FILES:
            assert (tmp_path / "a" / name).read_bytes() == (out / name).read_bytes(), name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "data"]


class TestCommand:
    @pytest.mark.slow
    def test_exit_codes(self, tmp_path):
        (tmp_path / "empty").mkdir()
        failed = run(tmp_path / "empty", tmp_path / "out", "--image-size", "8")
        assert failed.returncode == 1 and failed.stdout == ""
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
        wrong = run(tmp_path / "out", "--image-dataset", "digit")
        assert wrong.returncode == 2 and "did you mean 'digits'" in wrong.stderr
        wrong = run(tmp_path / "empty", tmp_path / "out", "--image-size", "big")
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
        shown = run("--help")
        assert shown.returncode == 0
        for word in ("--max-bad", "cifar10", "digits", "--dataset-root", "IMAGES DATA"):
            assert word in shown.stdout


class TestDigits:
    def test_same_store_as_a_folder(self, tmp_path, capsys):
        from sklearn.datasets import load_digits

        pytest.importorskip("sklearn")
        main([str(tmp_path), "--image-dataset", "digits", "--image-size", "16"])
        assert "1797 images of 16x16 pixels in gray, 0 skipped, 0 duplicates, 10 classes" in (
            capsys.readouterr().out
        )
        images = open_images(tmp_path, ImageOptions(class_labels=True))
        data = load_digits()
        assert images.classes == [str(n) for n in range(10)]
        assert np.array_equal(images.labels, data.target)
        small = np.rint(data.images * 255 / 16).astype(np.uint8)
        assert small.max() == 255
        for n in (0, 777, 1796):
            expected = Image.fromarray(small[n]).resize((16, 16), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(images.pixels[n, 0], np.asarray(expected))

    def test_own_size_and_asked_for_channels(self, tmp_path, capsys):
        pytest.importorskip("sklearn")
        main([str(tmp_path / "a"), "--image-dataset", "digits"])
        assert Images.open(tmp_path / "a").pixels.shape == (1797, 1, 8, 8)
        main([str(tmp_path / "b"), "--image-dataset", "digits", "--channels", "3"])
        colour = Images.open(tmp_path / "b").pixels
        assert colour.shape == (1797, 3, 8, 8) and (colour == colour[:, :1]).all()
        assert Images.open(tmp_path / "a").content_hash != Images.open(tmp_path / "b").content_hash

    def test_without_scikit_learn(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(UserError, match=r"pip install 'fairseq-ext\[digits\]'"):
            main([str(tmp_path), "--image-dataset", "digits"])


class TestTorchvision:
    @pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
    def test_absent_files(self, tmp_path, name):
        with pytest.raises(UserError, match=f"{name}.* is not in .*root.*: --download fetches it"):
            main(
                [str(tmp_path / "out"), "--image-dataset", name, f"--dataset-root={tmp_path}/root"]
            )

    def test_without_torchvision(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(UserError, match="'mnist' needs torchvision"):
            main([str(tmp_path / "out"), "--image-dataset", "mnist"])

    def test_a_failed_download(self, tmp_path, monkeypatch):
        def fail(self):
            raise OSError("no\nnetwork")

        monkeypatch.setattr(datasets.MNIST, "download", fail)
        args = [
            str(tmp_path),
            "--image-dataset",
            "mnist",
            "--download",
            f"--dataset-root={tmp_path}",
        ]
        with pytest.raises(UserError, match=r"could not be fetched .*\(no network\): try again"):
            main(args)

    @pytest.mark.parametrize(
        "name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
    )
    def test_gray_files(self, tmp_path, name, folder, capsys):
        raw = tmp_path / folder / "raw"
        raw.mkdir(parents=True)
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
        labels = np.arange(12, dtype=np.uint8) % 10
        for split in ("train", "t10k"):
            head = np.array([0x803, 12, 28, 28], dtype=">i4").tobytes()
            (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
            head = np.array([0x801, 12], dtype=">i4").tobytes()
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        main([str(tmp_path / "out"), "--image-dataset", name, "--dataset-root", str(tmp_path)])
        images = Images.open(tmp_path / "out")
        np.testing.assert_array_equal(images.pixels[:, 0], pixels)
        assert np.array_equal(images.labels, labels) and len(images.classes) == 10

    def test_colour(self, tmp_path, monkeypatch, capsys):
        class Stub:
            classes = ["cat", "dog"]

            def __init__(self, root, train, download):
                assert train and not download
                self.data = np.random.default_rng(0).integers(
                    0, 256, (3, 32, 32, 3), dtype=np.uint8
                )
                self.targets = [1, 0, 1]

        monkeypatch.setattr(datasets, "CIFAR10", Stub)
        main([str(tmp_path / "out"), "--image-dataset", "cifar10"])
        images = Images.open(tmp_path / "out")
        expected = Stub(None, True, False).data.transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(images.pixels, expected)
        assert images.labels.tolist() == [1, 0, 1] and images.classes == ["cat", "dog"]


def test_somebody_adds_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(IMAGE_DATASETS, "_entries", dict(IMAGE_DATASETS._entries))
    monkeypatch.setattr(IMAGE_DATASETS, "_options", dict(IMAGE_DATASETS._options))

    @image_datasets.IMAGE_DATASETS.register("ramps")
    def ramps(root, download):
        """Two."""
        pixels = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)
        return Labelled(pixels, np.array([0, 1]), ["low", "high"])

    images = prepare.prepare(None, tmp_path / "out", None, PrepareOptions(image_dataset="ramps"))
    assert images.pixels.ravel().tolist() == list(range(32))


class TestWhatComesIn:
    """Other formats, archives and arrays: pixels as of PNGs in a folder, and nothing left out unsaid."""

    def pixels(self, tmp_path, source, *flags):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        main([str(source), str(out), "--image-size", "8", *flags])
        return Images.open(out)

    def test_files_that_are_no_images_are_counted(self, tmp_path, capsys, monkeypatch):
        source = write(tmp_path / "data")
        for name in ("a.txt", "b.txt", "noise.heic", "README", ".hidden"):
            (source / name).touch()
        without = images.extensions() - images.HEIF
        monkeypatch.setattr(images, "extensions", lambda: without)
        assert len(self.pixels(tmp_path, source)) == 4
        said = capsys.readouterr().out
        assert "4 files left out by their ending: 2 .txt" in said
        assert "1 .heic (pip install 'fairseq-ext[heif]')" in said and "1 without" in said

    @pytest.mark.parametrize(
        "name, kind, exact",
        [
            ("a.jfif", "JPEG", False),
            ("a.jp2", "JPEG2000", True),
            ("a.ppm", "PPM", True),
            ("a.tga", "TGA", True),
            ("a.avif", "AVIF", False),
            ("a.heic", "HEIF", False),
        ],
    )
    def test_what_pillow_can_decode(self, tmp_path, name, kind, exact):
        if kind not in images.formats():
            pytest.skip(f"nothing here decodes {kind}")
        smooth = np.linspace(0, 250, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
        Image.fromarray(smooth).save(tmp_path / name, kind)
        assert images.find_images(tmp_path) == [name]
        found = images.decode_image(tmp_path / name, 32, 32, 3).transpose(1, 2, 0).astype(int)
        assert np.abs(found - smooth).max() <= (0 if exact else 24)

    def test_a_zip_is_read_by_several_processes(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("diffusion_ext.prepare.build.BLOCK", 1)
        pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
        (tmp_path / "data").mkdir()
        for n, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / "data" / f"{n:03}.png")
        shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
        found = self.pixels(tmp_path, tmp_path / "data.zip", "--workers", "4")
        assert np.array_equal(found.pixels, pixels.transpose(0, 3, 1, 2))

    def test_a_zip_is_the_folder_that_was_packed(self, tmp_path, capsys):
        source = write(tmp_path / "data")
        for n, name in enumerate(sorted(source.glob("*.png"))):
            (source / ("ant", "bee")[n % 2]).mkdir(exist_ok=True)
            name.rename(source / ("ant", "bee")[n % 2] / name.name)
        shutil.make_archive(str(tmp_path / "flat"), "zip", source)
        shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "data")
        expected = self.pixels(tmp_path, source, "--class-labels")
        for name in ("flat.zip", "packed.zip"):
            found = self.pixels(tmp_path, tmp_path / name, "--class-labels")
            assert found.content_hash == expected.content_hash
            assert found.classes == ["ant", "bee"]
        (tmp_path / "no.zip").write_text("no zip")
        with pytest.raises(UserError, match="no.zip is no readable zip"):
            self.pixels(tmp_path, tmp_path / "no.zip")

    def test_arrays(self, tmp_path):
        random = np.random.default_rng(0)
        colour = random.integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
        np.save(tmp_path / "first.npy", colour)
        np.save(tmp_path / "last.npy", colour.transpose(0, 2, 3, 1))
        np.savez(tmp_path / "gray.npz", images=colour[:, 0], labels=[0, 1, 0, 2, 1])
        for name in ("first.npy", "last.npy"):
            assert np.array_equal(self.pixels(tmp_path, tmp_path / name).pixels, colour)
        out = tmp_path / "own size"
        main([str(tmp_path / "gray.npz"), str(out), "--class-labels"])
        found = Images.open(out)
        assert np.array_equal(found.pixels, colour[:, :1])
        assert found.labels.tolist() == [0, 1, 0, 2, 1] and found.classes == ["0", "1", "2"]
        np.save(tmp_path / "float.npy", colour / 255.0)
        with pytest.raises(UserError, match=r"float.npy is float64 \(5, 3, 8, 8\): give .* uint8"):
            self.pixels(tmp_path, tmp_path / "float.npy")

    def test_gray_images_stored_as_colour_are_told(self, tmp_path, capsys):
        source = tmp_path / "gray"
        source.mkdir()
        for n in range(4):
            Image.new("L", (8, 8), 40 * n).convert("RGB").save(source / f"{n}.png")
        assert "all images are gray" in self.pixels(tmp_path, source).remark
        assert "--channels 1 keeps and draws one" in capsys.readouterr().out
        assert not self.pixels(tmp_path, source, "--channels", "1").remark
        Image.new("RGB", (8, 8), (1, 2, 3)).save(source / "9.png")
        assert not self.pixels(tmp_path, source).remark

    def test_prune(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        here, gone = write(tmp_path / "here"), write(tmp_path / "gone", 3)
        cache = tmp_path / "cache" / "diffusion_ext"
        for source, size in ((here, 8), (here, 4), (gone, 8)):
            open_images(source, ImageOptions(image_size=[size]))
        (cache / "statistics").mkdir()
        shutil.rmtree(gone)
        main(["--prune"])
        said = capsys.readouterr().out
        assert said.count("removed") == 1 and f"{gone} is gone" in said
        assert len(list(cache.glob("here-*"))) == 2
        main(["--prune", str(here)])
        assert [path.name for path in cache.iterdir()] == ["statistics"]
        main(["--prune", str(here)])
        assert "holds nothing decoded of" in capsys.readouterr().out

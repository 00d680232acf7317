import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_ext import store as image_store
from diffusion_ext.prepare import build as image_build
from diffusion_ext.prepare.build import build, content_hash, image_hash
from diffusion_ext.prepare.images import decode_image
from diffusion_ext.prepare.options import ImageOptions, SplitOptions
from diffusion_ext.store import Images, folder_recipe, held_out, open_images
from ext_common.cli import UserError
from ext_common.folders import partial_folder

FILES = {"images.bin", "images.json", "images.meta.json", "manifest.json"}


def write(path, seed=0, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffusion_ext"


@pytest.fixture
def folder(tmp_path):
    for n in range(6):
        write(tmp_path / "faces" / f"{n}.png", n)
    return tmp_path / "faces"


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded."""
    seen = []

    def counting(path, *args):
        seen.append(os.path.basename(path))
        return decode_image(path, *args)

    monkeypatch.setattr(image_store, "decode_image", counting)
    return seen


def options(**given):
    return ImageOptions(**{"image_size": [8], **given})


class TestOpen:
    def test_pixels_names_and_hashes(self, folder):
        images = open_images(folder, options())
        assert images.pixels.shape == (6, 3, 8, 8) and images.pixels.dtype == np.uint8
        assert not images.pixels.flags.writeable
        assert (images.channels, images.height, images.width, len(images)) == (3, 8, 8, 6)
        assert images.names == [f"{n}.png" for n in range(6)]
        for n in range(6):
            expected = decode_image(folder / f"{n}.png", 8, 8, 3)
            np.testing.assert_array_equal(images.pixels[n], expected)
            assert images.hashes[n] == image_hash(expected)
        assert images.labels.tolist() == [-1] * 6 and images.classes == []

    def test_decoded_once(self, folder, decoded, cache):
        first = open_images(folder, options())
        assert len(decoded) == 6
        again = open_images(str(folder), options())
        assert len(decoded) == 6 and again.content_hash == first.content_hash
        (store,) = cache.iterdir()
        assert store.name.startswith("faces-") and {p.name for p in store.iterdir()} == FILES
        assert {p.suffix for p in folder.iterdir()} == {".png"}, "the images' folder is left alone"

    def test_each_size_has_its_store(self, folder, decoded, cache):
        wide = open_images(folder, options(image_size=[8, 12]))
        gray = open_images(folder, options(channels=1))
        assert (wide.height, wide.width) == (8, 12) and gray.pixels.shape[1:] == (1, 8, 8)
        open_images(folder, options())
        before = len(decoded)
        open_images(folder, options(image_size=[8, 12]))
        open_images(folder, options(image_size=[8, 8]))
        assert len(decoded) == before == 18 and len(list(cache.iterdir())) == 3

    @pytest.mark.parametrize("change", ["new", "gone", "other", "time", "name"])
    def test_changed_files_are_decoded_anew(self, folder, decoded, change, cache):
        first = open_images(folder, options())
        path = folder / "3.png"
        if change == "new":
            write(folder / "9.png", 9)
        elif change == "gone":
            path.unlink()
        elif change == "other":
            write(path, 33)
        elif change == "time":
            os.utime(path, ns=(0, 0))
        else:
            path.rename(folder / "33.png")
        second = open_images(folder, options())
        assert len(decoded) == 6 + len(second)
        assert second.names == sorted(p.name for p in folder.iterdir())
        same = change in ("time", "name")
        assert (second.content_hash == first.content_hash) == same
        assert len(list(cache.iterdir())) == 1, "the old store is gone"
        np.testing.assert_array_equal(first.pixels[0], second.pixels[0])

    def test_another_policy_is_decoded_anew(self, folder, decoded, monkeypatch):
        open_images(folder, options())
        monkeypatch.setattr(image_build, "POLICY", image_build.POLICY + 1)
        open_images(folder, options())
        assert len(decoded) == 12

    def test_the_store_may_be_kept_elsewhere(self, folder, tmp_path, cache):
        images = open_images(folder, options(image_store=str(tmp_path / "here")))
        assert images.path.parent == tmp_path / "here" and not cache.exists()
        with pytest.raises(UserError, match="--image-store .* lies in the folder of images"):
            open_images(folder, options(image_store=str(folder / "store")))

    def test_a_configuration_of_fairseq_will_do(self, folder):
        omegaconf = pytest.importorskip("omegaconf")
        cfg = omegaconf.OmegaConf.structured(options())
        assert len(open_images(folder, cfg)) == 6
        with pytest.raises(UserError, match="image_size 1,2,3"):
            open_images(folder, SimpleNamespace(**{**vars(options()), "image_size": [1, 2, 3]}))

    def test_a_file_name_that_is_no_utf8(self, tmp_path):
        raw = os.fsencode(tmp_path) + b"/odd/"
        os.mkdir(raw)
        for n in range(2):
            write(tmp_path / "a.png", n)
            os.rename(tmp_path / "a.png", raw + b"\xff%d.png" % n)
        images = open_images(tmp_path / "odd", options())
        assert images.names == ["\\udcff0.png", "\\udcff1.png"]

    def test_workers_do_not_matter(self, folder, tmp_path):
        recipe = folder_recipe(folder, options())
        for workers in (1, 3):
            build(tmp_path / str(workers), recipe, 0.0, workers)
        for name in FILES:
            one, three = ((tmp_path / w / name).read_bytes() for w in "13")
            assert one == three, name

    def test_content_hash_is_over_pixels_labels_and_order(self):
        a, b = (np.full((1, 2, 2), n, dtype=np.uint8) for n in (1, 2))
        hashes, shape = [image_hash(a), image_hash(b)], (1, 2, 2)
        seen = {
            content_hash(shape, hashes, [0, 1]),
            content_hash(shape, hashes, [1, 0]),
            content_hash(shape, hashes[::-1], [0, 1]),
            content_hash((1, 1, 4), hashes, [0, 1]),
        }
        assert len(seen) == 4
        assert image_hash(a) != image_hash(a.reshape(1, 1, 4))

    def test_pickled_without_pixels(self, folder):
        images = open_images(folder, options())
        data = pickle.dumps(images)
        assert len(data) < 3000
        np.testing.assert_array_equal(pickle.loads(data).pixels, images.pixels)
        write(folder / "9.png", 9)
        open_images(folder, options())
        with pytest.raises(UserError, match="was replaced while it was in use"):
            pickle.loads(data)


class TestClasses:
    @pytest.fixture
    def zoo(self, tmp_path):
        for n, name in enumerate(["dog/1.png", "cat/deep/2.png", "cat/3.png", "eel/4.png"]):
            write(tmp_path / "zoo" / name, n)
        return tmp_path / "zoo"

    def test_sub_folders_are_classes(self, zoo, decoded):
        images = open_images(zoo, options(class_labels=True))
        assert images.classes == ["cat", "dog", "eel"]
        assert dict(zip(images.names, images.labels.tolist(), strict=True)) == {
            "cat/3.png": 0,
            "cat/deep/2.png": 0,
            "dog/1.png": 1,
            "eel/4.png": 2,
        }
        plain = open_images(zoo, options())
        assert plain.classes == [] and (plain.labels == -1).all() and plain.labels.dtype == np.int64
        assert len(decoded) == 4, "one store serves both"

    def test_labels_stay_with_their_images_when_some_are_skipped(self, zoo, capsys):
        (zoo / "cat" / "0.png").write_text("no image")
        (zoo / "dog" / "0.png").write_text("no image")
        images = open_images(zoo, options(class_labels=True, max_bad=0.5))
        assert [images.classes[n] for n in images.labels] == ["cat", "cat", "dog", "eel"]
        assert [n.split("/")[0] for n in images.names] == ["cat", "cat", "dog", "eel"]

    def test_an_image_at_the_top(self, zoo):
        write(zoo / "5.png")
        with pytest.raises(UserError, match=r"--class-labels: 5\.png lies directly in .*zoo"):
            open_images(zoo, options(class_labels=True))
        assert open_images(zoo, options()).classes == []


class TestFinishedStore:
    @pytest.fixture
    def store(self, folder, tmp_path):
        build(tmp_path / "store", folder_recipe(folder, options()), 0.0)
        return tmp_path / "store"

    def test_opened_as_data(self, store, decoded):
        images = open_images(store, ImageOptions())
        assert len(images) == 6 and not decoded and images.path == store
        assert len(open_images(store, options(channels=3))) == 6
        assert len(open_images(store, ImageOptions(image_size=[0]))) == 6

    def test_moved(self, store, tmp_path):
        store.rename(tmp_path / "moved")
        assert len(open_images(tmp_path / "moved", ImageOptions())) == 6

    @pytest.mark.parametrize(
        "asked, message",
        [
            ({"image_size": [16]}, "holds images of 8x8 pixels, --image-size asks for 16x16"),
            ({"image_size": [8, 4]}, "asks for 8x4"),
            ({"channels": 1}, "holds images of 3 channels, --channels asks for 1"),
            ({"class_labels": True}, "prepared without classes: leave --class-labels out"),
        ],
    )
    def test_other_images_asked_for(self, store, asked, message):
        with pytest.raises(UserError, match=message):
            open_images(store, ImageOptions(**asked))

    def test_damage(self, store):
        bin_file, meta = store / "images.bin", store / "images.meta.json"
        whole, text = bin_file.read_bytes(), meta.read_text()
        bin_file.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=r"images\.bin has \d+ bytes"):
            open_images(store, ImageOptions())
        bin_file.write_bytes(whole)
        meta.write_text(text[:100])
        with pytest.raises(UserError, match="is damaged"):
            open_images(store, ImageOptions())
        meta.write_text(json.dumps({**json.loads(text), "images": 5}))
        with pytest.raises(UserError, match="is damaged"):
            open_images(store, ImageOptions())
        meta.write_text(json.dumps({**json.loads(text), "format": 99}))
        with pytest.raises(UserError, match="format 1"):
            open_images(store, ImageOptions())
        with pytest.raises(UserError, match="is not a prepared folder"):
            Images.open(store.parent)


class TestBadFiles:
    def test_skipped_up_to_a_share_and_reported(self, folder, capsys):
        (folder / "bad.png").write_text("a text")
        (folder / "empty.JPG").touch()
        images = open_images(folder, options(max_bad=0.25))
        assert len(images) == 6
        assert images.skipped == [("bad.png", "not an image"), ("empty.JPG", "empty file")]
        error = capsys.readouterr().err
        assert "skipped bad.png: not an image" in error
        assert "skipped empty.JPG: empty file" in error
        manifest = json.loads((images.path / "manifest.json").read_text())
        assert manifest["counts"] == {
            "in": 8,
            "out": 6,
            "skipped": {"not an image": 1, "empty file": 1},
            "duplicates": 0,
        }
        # also of a store that is there already
        with pytest.raises(UserError, match="--max-bad 0.1 allows"):
            open_images(folder, options(max_bad=0.1))

    def test_too_many(self, folder, decoded, capsys):
        (folder / "bad.png").write_text("a text")
        with pytest.raises(UserError) as error:
            open_images(folder, options())
        assert str(error.value) == (
            f"{folder}: 1 of 7 files cannot be used (bad.png: not an image), more than --max-bad "
            "0.01 allows: repair or delete them, or raise it"
        )
        assert len(open_images(folder, options(max_bad=0.2))) == 6
        assert len(decoded) == 7, "what was decoded before is kept"

    def test_many_are_not_all_listed(self, folder, capsys):
        for n in range(30):
            (folder / f"bad{n}.png").write_text("a text")
        open_images(folder, options(max_bad=1.0))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 21 and lines[-1] == "skipped 10 more"

    def test_nothing_usable(self, tmp_path):
        for n in range(3):
            write(tmp_path / "data" / f"{n}.png")
            (tmp_path / "data" / f"{n}.png").write_text("a text")
        with pytest.raises(UserError, match=r"3 of 3 files cannot be used \(0.png: not an image\)"):
            open_images(tmp_path / "data", options(max_bad=1.0))

    def test_too_few(self, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        with pytest.raises(UserError, match="holds no images"):
            open_images(data, options())
        write(data / "a.png")
        with pytest.raises(UserError, match="a single image, a.png: at least 2"):
            open_images(data, options())
        (data / "b.png").write_text("a text")
        with pytest.raises(UserError, match="holds 1 image, at least 2"):
            open_images(data, options(max_bad=0.5))

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            open_images(tmp_path / "nothing", options())
        write(tmp_path / "a.png")
        with pytest.raises(UserError, match="is a file"):
            open_images(tmp_path / "a.png", options())

    def test_no_size(self, folder):
        with pytest.raises(UserError, match="give --image-size"):
            open_images(folder, ImageOptions())

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"image_size": [8, 8, 8]}, "image_size 8,8,8"),
            ({"image_size": [-8]}, "image_size -8"),
            ({"image_size": [0, 8]}, "image_size 0,8"),
            ({"channels": 4}, "channels 4"),
            ({"max_bad": 2.0}, "max_bad 2.0"),
        ],
    )
    def test_options(self, given, message):
        with pytest.raises(UserError, match=message):
            ImageOptions(**given)

    def test_a_place_that_cannot_be_written(self, folder, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be written .*: name another place"):
            open_images(folder, options(image_store=str(tmp_path / "file" / "x")))

    def test_files_of_somebody_are_never_replaced(self, folder, cache):
        store = open_images(folder, options()).path
        (store / "notes.txt").write_text("mine")
        write(folder / "9.png", 9)
        with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
            open_images(folder, options())
        assert (store / "notes.txt").read_text() == "mine"


class Killed(BaseException):
    """What SIGKILL is to the files: nothing after it happens."""


class TestKilled:
    @pytest.fixture
    def recipe(self, tmp_path, monkeypatch):
        for n in range(40):
            write(tmp_path / "data" / f"{n:02}.png", n)
        (tmp_path / "data" / "05.png").write_text("a text")
        monkeypatch.setattr(image_build, "BLOCK", 4)
        return folder_recipe(tmp_path / "data", options())

    @pytest.mark.parametrize("at", [0, 1, 3, 17, 39])
    def test_continues_with_the_same_bytes(self, recipe, tmp_path, at, capsys):
        build(tmp_path / "whole", recipe, 0.1)
        load, calls = recipe.load, []

        def dying(number):
            if number == at:
                raise Killed
            return load(number)

        recipe.load = dying
        with pytest.raises(Killed):
            build(tmp_path / "store", recipe, 0.1, 1)
        assert not (tmp_path / "store").exists()
        with pytest.raises(UserError, match="interrupted: run the same prepare command again"):
            open_images(tmp_path / "store", ImageOptions())
        recipe.load = lambda number: calls.append(number) or load(number)
        build(tmp_path / "store", recipe, 0.1, 1)
        assert calls and min(calls) >= at - 4
        for name in FILES:
            whole, again = ((tmp_path / w / name).read_bytes() for w in ("whole", "store"))
            assert whole == again, name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "store", "whole"]

    @pytest.mark.parametrize("where", ["rename", "unlink", "after"])
    def test_killed_while_it_is_put_in_place(self, recipe, tmp_path, where, monkeypatch):
        build(tmp_path / "whole", recipe, 0.1)
        (tmp_path / "store").mkdir()

        def die(*_):
            raise Killed

        with monkeypatch.context() as patch:
            if where == "after":
                patch.setattr("ext_common.folders._put", die)
            elif where == "rename":
                patch.setattr("ext_common.folders.make_durable", lambda folder: None)
                patch.setattr("ext_common.folders.sync_folder", die)
            else:
                patch.setattr("ext_common.store.sync_folder", die)
            with pytest.raises(Killed):
                build(tmp_path / "store", recipe, 0.1)
        build(tmp_path / "store", recipe, 0.1)
        for name in FILES:
            whole, again = ((tmp_path / w / name).read_bytes() for w in ("whole", "store"))
            assert whole == again, name
        assert not partial_folder(tmp_path / "store").exists()

    def test_other_files_in_between_start_over(self, recipe, tmp_path):
        load = recipe.load

        def dying(number):
            if number == 20:
                raise Killed
            return load(number)

        recipe.load = dying
        with pytest.raises(Killed):
            build(tmp_path / "store", recipe, 0.1, 1)
        write(tmp_path / "data" / "00.png", 99)
        build(tmp_path / "store", folder_recipe(tmp_path / "data", options()), 0.1)
        images = Images.open(tmp_path / "store")
        expected = decode_image(tmp_path / "data" / "00.png", 8, 8, 3)
        np.testing.assert_array_equal(images.pixels[0], expected)

    def test_processes_that_start_at_once_decode_once(self, tmp_path, cache):
        """As the ranks of one training do."""
        for n in range(60):
            write(tmp_path / "data" / f"{n}.png", n, (200, 200))
        code = (
            "import sys, time; from diffusion_ext.store import *\n"
            "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
            "images = open_images(sys.argv[1], ImageOptions(image_size=[8]))\n"
            "print(images.content_hash, images.path.stat().st_ino)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "data"), str(time.time() + 1)]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        found = {run.communicate()[0] for run in runs}
        assert len(found) == 1 and all(run.returncode == 0 for run in runs)
        assert len(list(cache.iterdir())) == 1


class TestSplit:
    def images(self, hashes):
        return held_out(hashes, 0.05, 1000)

    @pytest.mark.parametrize("n, expected", [(2, 1), (3, 1), (29, 1), (100, 5), (30000, 1000)])
    def test_sizes(self, n, expected):
        hashes = [f"{k:016x}" for k in range(n)]
        random.Random(0).shuffle(hashes)
        valid = self.images(hashes)
        assert valid.sum() == expected
        assert max(np.array(hashes)[valid]) < min(np.array(hashes)[~valid])

    @given(
        st.lists(st.integers(0, 30), min_size=2, max_size=60),
        st.floats(0.01, 0.99),
        st.integers(1, 20),
        st.randoms(),
    )
    def test_independent_of_order_and_never_apart(self, kinds, fraction, most, rng):
        hashes = [f"{k:016x}" for k in kinds]
        valid = held_out(hashes, fraction, most)
        sides = {(h, bool(v)) for h, v in zip(hashes, valid, strict=True)}
        assert len(sides) == len(set(hashes)), "identical images are on the same side"
        order = list(range(len(hashes)))
        rng.shuffle(order)
        again = held_out([hashes[n] for n in order], fraction, most)
        assert np.array_equal(again, valid[order])
        assert valid.any()
        if len(set(hashes)) > 1:
            assert not valid.all()
            room = min(most, max(1, round(fraction * len(hashes))), len(hashes) - 1)
            assert valid.sum() <= max(room, min(Counter(hashes).values()))

    def test_frequent_images_are_passed_over(self):
        hashes = ["0" * 16] * 50 + [f"{k:016x}" for k in range(1, 51)]
        valid = self.images(hashes)
        assert np.array_equal(np.array(hashes)[valid], [f"{k:016x}" for k in range(1, 6)])

    def test_rows(self, folder):
        images = open_images(folder, options())
        split = vars(SplitOptions())
        train, valid = images.rows("train", **split), images.rows("valid", **split)
        assert train.dtype == valid.dtype == np.int64
        assert sorted([*train, *valid]) == list(range(6)) and len(valid) == 1
        assert images.hashes[valid[0]] == min(images.hashes)
        assert len(images.rows("valid", 0.0, 1000)) == 0
        assert len(images.rows("valid", 0.5, 2)) == 2
        for bad, message in [(("test", 0.1, 1), "no split 'test'"), (("valid", 1.0, 1), "valid_f")]:
            with pytest.raises(UserError, match=message):
                images.rows(*bad)

    def test_all_the_same(self, tmp_path):
        for n in range(3):
            write(tmp_path / "data" / f"{n}.png")
        images = open_images(tmp_path / "data", options())
        with pytest.raises(UserError, match="all 3 images of .* are the same"):
            images.rows("train", 0.05, 1000)

    def test_options(self):
        for bad in ({"valid_fraction": 1.0}, {"valid_fraction": -0.1}, {"max_valid": 0}):
            with pytest.raises(UserError, match=next(iter(bad))):
                SplitOptions(**bad)


def test_real_images(shared_data, tmp_path):
    images = open_images(shared_data / "emoji64", options(image_size=[32]))
    assert len(images) == 3786 and not images.skipped
    assert len(set(images.hashes)) == len({p.tobytes() for p in images.pixels})
    corners = images.pixels[:, :, 0, 0]
    assert (corners == 255).all(1).mean() > 0.9, "transparent corners are white"
    valid = images.rows("valid", 0.05, 1000)
    train = images.rows("train", 0.05, 1000)
    assert len(valid) == 189 and not {images.hashes[n] for n in valid} & {
        images.hashes[n] for n in train
    }
    began = time.monotonic()
    open_images(shared_data / "emoji64", options(image_size=[32]))
    assert time.monotonic() - began < 1


# --- several as one ----------------------------------------------------------------------------------


def test_several_folders_are_one(tmp_path):
    """One behind the other, prepared or not; classes of one name are one; a worker gets the same."""
    for place, names in (("a", ("ant", "bee")), ("b", ("bee", "cat"))):
        for number, name in enumerate(names):
            write(tmp_path / place / name / f"{number}.png", number + 10 * (place == "b"))
    options = ImageOptions(image_size=[8], class_labels=True)
    a, b = (open_images(tmp_path / place, options) for place in "ab")
    both = open_images(f"{tmp_path / 'a'}:{b.path}", options)
    again = pickle.loads(pickle.dumps(both))
    for one in (both, again):
        found = [one.pixels[row] for row in range(4)]
        assert np.array_equal(found, [*a.pixels, *b.pixels]) and one.pixels.shape == (4, 3, 8, 8)
    assert both.classes == ["ant", "bee", "cat"] and both.labels.tolist() == [0, 1, 1, 2]
    assert both.content_hash not in (a.content_hash, b.content_hash)
    unasked = open_images(f"{b.path}:{b.path}", ImageOptions(image_size=[8]))
    assert "their 2 classes are not learnt: --class-labels does" in unasked.remark
    assert unasked.classes == [] and "classes" not in both.remark
    rows = [both.rows(split, 0.25, 10).tolist() for split in ("train", "valid")]
    assert sorted(rows[0] + rows[1]) == [0, 1, 2, 3] and len(rows[1]) == 1
    with pytest.raises(UserError, match="3×8×8.*3×16×16|3×16×16.*3×8×8"):
        other = open_images(tmp_path / "b", ImageOptions(image_size=[16], class_labels=True))
        image_store.joined([a, other])

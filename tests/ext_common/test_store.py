import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_common import store
from ext_common.cli import UserError
from ext_common.store import StoreWriter, discard, interrupted_key, open_store, store_paths


def records(count=6, row_shape=(3,), dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [
        (f"r{i}", (rng.standard_normal((int(rng.integers(0, 5)), *row_shape)) * 50).astype(dtype))
        for i in range(count)
    ]


def write(folder, items, start=0, finish=True, **kwargs):
    kwargs = {"row_shape": (3,)} | kwargs
    with StoreWriter(folder, **kwargs) as writer:
        for name, array in items[len(writer.done) if start is None else start :]:
            if name == "r2":
                writer.skip(name, {"bad": "r2 is left out"})
            else:
                writer.append(name, array, {"n": name})
        if finish:
            writer.finish()


def finished_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_reads_back_what_was_written_as_raw_little_endian(tmp_path):
    items = records()
    write(tmp_path, items)
    kept = [array for name, array in items if name != "r2"]
    store = open_store(tmp_path)
    assert len(store) == 5
    for i, array in enumerate(kept):
        np.testing.assert_array_equal(store[i], array)
    raw = b"".join(array.astype("<f4").tobytes() for array in kept)
    assert (tmp_path / "features.bin").read_bytes() == raw
    assert store.offsets.dtype == store.lengths.dtype == np.int64
    assert store.lengths.tolist() == [len(array) for array in kept]
    assert store.offsets.tolist() == np.cumsum([0, *store.lengths[:-1]]).tolist()
    assert sorted(finished_bytes(tmp_path)) == ["features.bin", "features.json"]


def test_data_cannot_be_changed_through_the_store(tmp_path):
    write(tmp_path, records())
    with pytest.raises(ValueError, match="read-only"):
        open_store(tmp_path).data[0, 0] = 1


def test_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    with StoreWriter(tmp_path, (8, 8, 3), "uint8", name="images") as writer:
        for i, image in enumerate(images):
            assert writer.append(str(i), image[None]) == i
        writer.finish()
    np.testing.assert_array_equal(open_store(tmp_path, "images").data, images)


def test_an_empty_store(tmp_path):
    write(tmp_path, [])
    assert open_store(tmp_path).data.shape == (0, 3)


@settings(max_examples=60)
@given(st.integers(0, 6), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_killed_anywhere_it_ends_with_the_same_bytes(
    tmp_path_factory, written, journal_left, data_left, synced
):
    """A kill may leave any prefix of the journal and, unsynced, any prefix of the data."""
    items = records()
    expected, folder = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    write(expected, items)
    with StoreWriter(folder, (3,)) as writer:
        for i, (name, array) in enumerate(items[:written]):
            if name == "r2":
                writer.skip(name, {"bad": "r2 is left out"})
            else:
                writer.append(name, array, {"n": name})
            if synced and i == 2:
                writer.sync()
    part, _, _, journal = store_paths(folder)
    for path, left in ((journal, journal_left), (part, data_left)):
        content = path.read_bytes()
        path.write_bytes(content[: round(left * len(content))])
    write(folder, items, start=None)
    assert finished_bytes(folder) == finished_bytes(expected)


def test_nothing_whole_is_written_again(tmp_path):
    items = records()
    write(tmp_path, items[:4], finish=False)
    with StoreWriter(tmp_path, (3,)) as writer:
        assert [entry.record_id for entry in writer.done] == ["r0", "r1", "r2", "r3"]
        assert [entry.rows for entry in writer.done] == [
            None if name == "r2" else len(array) for name, array in items[:4]
        ]
        assert writer.done[2].note == {"bad": "r2 is left out"}


def test_a_file_name_that_is_no_text_is_an_id(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")
    write(tmp_path, [(name, np.zeros((2, 3), "float32"))], finish=False)
    with StoreWriter(tmp_path, (3,)) as writer:
        assert [entry.record_id for entry in writer.done] == [name]


def test_data_damaged_behind_the_last_sync_is_written_again(tmp_path):
    items = [(f"r{i}", np.full((2, 3), i, "float32")) for i in (0, 1, 3, 4)]
    write(tmp_path, items, finish=False)
    part = store_paths(tmp_path)[0]
    content = bytearray(part.read_bytes())
    content[50] ^= 1  # in the third record: each has 24 bytes
    part.write_bytes(content)
    with StoreWriter(tmp_path, (3,)) as writer:
        assert [entry.record_id for entry in writer.done] == ["r0", "r1"]


def test_killed_between_the_renames_of_finish(tmp_path):
    items = records()
    write(tmp_path / "a", items)
    write(tmp_path / "b", items, finish=False)
    journal = store_paths(tmp_path / "b")[3]
    saved = journal.read_bytes()
    write(tmp_path / "b", items, start=None)
    journal.write_bytes(saved)
    write(tmp_path / "b", items, start=None)
    assert finished_bytes(tmp_path / "b") == finished_bytes(tmp_path / "a")


def test_other_data_is_refused_and_kept(tmp_path):
    write(tmp_path, records(), finish=False, key="one")
    assert interrupted_key(tmp_path) == "one"
    before = finished_bytes(tmp_path)
    with pytest.raises(UserError, match="other data or options"):
        StoreWriter(tmp_path, (3,), key="two")
    assert finished_bytes(tmp_path) == before


def test_a_writer_that_wrote_nothing_leaves_no_claim(tmp_path):
    StoreWriter(tmp_path, (3,), key="one").close()
    assert interrupted_key(tmp_path) is None
    StoreWriter(tmp_path, (3,), key="two").close()


def test_two_writers_at_once_are_refused(tmp_path):
    with StoreWriter(tmp_path, (3,)):
        with pytest.raises(UserError, match="another process"):
            StoreWriter(tmp_path, (3,))
        with pytest.raises(UserError, match="another process"):
            discard(tmp_path)
    StoreWriter(tmp_path, (3,)).close()


@pytest.mark.parametrize("moment", ["asked", "opened"])
def test_another_finishes_between_looking_and_locking(tmp_path, monkeypatch, moment):
    """After the question whether it is finished, and after the journal was opened that is then removed."""
    items = records()
    module, name = (store, "lock") if moment == "asked" else (fcntl, "flock")
    locking = getattr(module, name)

    def late(*args):
        monkeypatch.undo()
        first.finish()
        return locking(*args)

    first = StoreWriter(tmp_path, (3,))
    for name_, array in items:
        first.append(name_, array)
    monkeypatch.setattr(module, name, late)
    with pytest.raises(
        UserError, match="is already finished: write to another folder or delete it"
    ):
        StoreWriter(tmp_path, (3,))
    assert len(open_store(tmp_path)) == len(items)
    assert sorted(finished_bytes(tmp_path)) == ["features.bin", "features.json"]


@pytest.mark.parametrize("count", [2, 10, pytest.param(50, marks=pytest.mark.slow)])
def test_many_at_once_killed_at_random(tmp_path, count):
    """Who ends well leaves the store whole, whatever comes after it; who loses says so in a sentence."""
    draw, items = random.Random(count), records(60)
    write(tmp_path / "whole", items)

    def prepare():
        try:
            write(tmp_path / "store", items, start=None)
        except UserError as error:
            lost = re.search("being written by another|already finished", str(error))
            os._exit(3 if lost and "\n" not in str(error) else 4)
        os._exit(0)

    done = False
    while not done:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=prepare) for _ in range(count)]
        for process in processes:
            process.start()
        for process in draw.sample(processes, count // 2 + 1):
            time.sleep(draw.uniform(0, 0.01))
            process.kill()
        for process in processes:
            process.join()
        codes = {process.exitcode for process in processes}
        assert codes <= {0, 3, -signal.SIGKILL}
        _, final, _, journal = store_paths(tmp_path / "store")
        done = final.exists() and not journal.exists()
        assert done or 0 not in codes
    assert finished_bytes(tmp_path / "store") == finished_bytes(tmp_path / "whole")


def test_a_store_that_is_being_written_is_not_discarded(tmp_path):
    with StoreWriter(tmp_path, (3,)) as writer:
        writer.append(*records()[0])
        with pytest.raises(UserError, match="being written by another process"):
            discard(tmp_path)
        writer.finish()
    assert len(open_store(tmp_path)) == 1
    discard(tmp_path)
    discard(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_store_is_not_overwritten(tmp_path):
    write(tmp_path, records())
    before = finished_bytes(tmp_path)
    with pytest.raises(UserError, match="already finished"):
        StoreWriter(tmp_path, (3,))
    assert finished_bytes(tmp_path) == before
    discard(tmp_path)
    assert finished_bytes(tmp_path) == {}


def test_wrong_arrays_and_ids_are_refused(tmp_path):
    with StoreWriter(tmp_path, (3,)) as writer:
        writer.append("a", np.zeros((2, 3), "float32"))
        for array in (np.zeros((2, 4), "f4"), np.zeros(3, "f4"), np.zeros((2, 3), "f8")):
            with pytest.raises(ValueError, match="b: (shape|dtype)"):
                writer.append("b", array)
        with pytest.raises(ValueError, match="a is already"):
            writer.append("a", np.zeros((2, 3), "float32"))
        with pytest.raises(ValueError, match="a is already"):
            writer.skip("a", {})
        writer.finish()
    assert open_store(tmp_path).data.shape == (2, 3)


def test_unfinished_missing_and_damaged_stores_are_named(tmp_path):
    with pytest.raises(UserError, match="not a prepared folder"):
        open_store(tmp_path)
    write(tmp_path, records(), finish=False)
    with pytest.raises(UserError, match="not finished"):
        open_store(tmp_path)
    write(tmp_path, records(), start=None)
    shutil.copy(tmp_path / "features.bin", tmp_path / "whole")
    (tmp_path / "features.bin").write_bytes((tmp_path / "whole").read_bytes()[:-4])
    with pytest.raises(UserError, match="bytes, its index says"):
        open_store(tmp_path)
    index = json.loads((tmp_path / "features.json").read_text())
    (tmp_path / "features.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        open_store(tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_store(tmp_path)

"""A pack is the checkpoint that it was made of, or is refused."""

import argparse
import json
import math
import random
import zipfile

import pytest
import torch

from ext_common import packed
from ext_common.checkpoints import read_state
from ext_common.cli import UsageError, UserError
from ext_common.pack import PackOptions, pack, unpack


def state():
    """A checkpoint with everything that fairseq's hold."""
    weights = torch.arange(12.0).reshape(3, 4)
    return {
        "args": argparse.Namespace(arch="toy", lr=[0.1]),
        "cfg": {
            "task": {
                "_name": "toy",
                "pair": (1, "two"),
                "none": None,
                "nested": [{"a": -math.inf}],
            },
            "model": {"_name": "toy"},
            "common": {"user_dir": "/home/me/my_plugin"},
            "checkpoint": {"best_checkpoint_metric": "accuracy"},
        },
        # a tied weight, a view of it, a number, half precision and an empty one
        "model": {
            "a": weights,
            "tied": weights,
            "turned": weights.t(),
            "n": torch.tensor(3),
            "half": torch.ones(2, dtype=torch.bfloat16),
            "empty": torch.zeros(0, 5),
        },
        "task_state": {
            "model": torch.arange(5, dtype=torch.uint8),
            "by_number": {3: "c", None: 0.5},
        },
        "optimizer_history": [{"num_updates": 1234}],
        "extra_state": {"best": 0.75, "nan": math.nan, "$": "a key"},
        "last_optimizer_state": {"exp_avg": torch.ones(1000)},
    }


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(state(), path)
    return path


@pytest.fixture
def made(checkpoint, tmp_path):
    path = tmp_path / "model.zip"
    pack(str(checkpoint), str(path), PackOptions())
    return path


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, argparse.Namespace):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_reading_a_pack_is_reading_its_checkpoint(made):
    expected = state()
    del expected["last_optimizer_state"]
    assert same(read_state(made), expected)
    # tied weights are stored once
    tensors = packed.import_safetensors().load(packed.Pack(made).read(packed.WEIGHTS))
    assert "model.tied" not in tensors and "model.turned" in tensors


def test_packing_again_gives_the_same_bytes(made, checkpoint, tmp_path):
    again = tmp_path / "again" / made.name
    pack(str(checkpoint), str(again), PackOptions())
    assert again.read_bytes() == made.read_bytes()


def test_damage_is_refused_or_harmless(made):
    """A flipped byte anywhere, and a file that is cut anywhere."""
    whole, expected = made.read_bytes(), read_state(made)
    draw = random.Random(1)
    refused = 0
    for _ in range(150):
        place = draw.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        made.write_bytes(damaged)
        try:
            assert same(read_state(made), expected), place
        except UserError:
            refused += 1
    assert refused > 50
    for _ in range(20):
        made.write_bytes(whole[: draw.randrange(40, len(whole))])
        with pytest.raises(UserError, match="is damaged"):
            read_state(made)


def test_a_part_that_was_replaced_is_refused(made, tmp_path):
    with zipfile.ZipFile(made) as archive, zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        for name in archive.namelist():
            data = archive.read(name)
            other.writestr(name, data.replace(b"1234", b"9999") if name == packed.STATE else data)
    with pytest.raises(UserError, match=r"its part state\.json is not what was packed"):
        read_state(tmp_path / "other.zip")


def test_unpacking_gives_the_parts_and_writes_nothing_outside(made, tmp_path):
    unpack(str(made), str(tmp_path / "parts"))
    found = packed.Pack(made)
    for name in found.files:
        assert (tmp_path / "parts" / name).read_bytes() == found.read(name)
    with pytest.raises(UserError, match="not empty"):
        unpack(str(made), str(tmp_path / "parts"))
    packed.write(tmp_path / "evil.zip", {}, state(), {"../outside": b"x"})
    with pytest.raises(UserError, match="outside of"):
        unpack(str(tmp_path / "evil.zip"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists() and not (tmp_path / "outside").exists()


def test_the_card_says_what_is_known_and_what_is_not(checkpoint, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text(
        json.dumps({"counts": {"in": 7, "out": 6, "bad": {"empty": 1}}})
    )
    (tmp_path / "m.json").write_text(
        json.dumps({"top1": {"accuracy": 0.5, "total": 8}, "name": "x"})
    )
    (tmp_path / "gallery.bin").write_bytes(b"people")
    options = PackOptions(
        data=str(data),
        licence="CC BY 4.0",
        figures=[str(tmp_path / "m.json")],
        not_for="juries",
        include=[str(tmp_path / "gallery.bin")],
    )
    pack(str(checkpoint), str(tmp_path / "full.zip"), options)
    found = packed.Pack(tmp_path / "full.zip")
    card = found.read(packed.CARD).decode()
    for text in (
        "CC BY 4.0",
        "bad empty 1",
        "top1 accuracy 0.5",
        "juries",
        "1,234 updates",
        "accuracy on valid while it trained: 0.75",
    ):
        assert text in card
    assert found.read("gallery.bin") == b"people"
    pack(str(checkpoint), str(tmp_path / "bare.zip"), PackOptions())
    bare = packed.Pack(tmp_path / "bare.zip").read(packed.CARD).decode()
    assert bare.count("not stated") == 2 and "nothing is registered for task toy" in bare


def test_what_cannot_be_packed_or_unpacked(made, checkpoint, tmp_path):
    out = str(tmp_path / "out.zip")
    with pytest.raises(UserError, match="is a pack"):
        pack(str(made), out, PackOptions())
    with pytest.raises(UsageError, match=r"\*\.zip"):
        pack(str(checkpoint), str(tmp_path / "out.pt"), PackOptions())
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UsageError, match="its own part of that name"):
        pack(str(checkpoint), out, PackOptions(include=[str(tmp_path / "README.md")]))
    with pytest.raises(UserError, match="is not a pack"):
        unpack(str(checkpoint), None)
    torch.save({"model": {}, "cfg": {"task": {"_name": "x", "s": b"bytes"}}}, checkpoint)
    with pytest.raises(UserError, match=r"cfg\.task\.s is a bytes"):
        pack(str(checkpoint), out, PackOptions())
    assert not (tmp_path / "out.zip").exists()

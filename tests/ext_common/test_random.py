"""Philox beside the vectors of its authors, and draws as a property of their address alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from ext_common.random import STREAM, Stream, philox, uniforms

# philox4x32, 10 rounds, of the known answers that Random123 comes with: counter, key, words
KNOWN = [
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (" ".join(["ffffffff"] * 4), "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def numbers(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_known_answers(make):
    counters = [make(list(words)) for words in zip(*(numbers(c) for c, _, _ in KNOWN), strict=True)]
    for row, (_, key, words) in enumerate(KNOWN):
        found = philox(tuple(counters), tuple(numbers(key)))
        assert [int(each[row]) for each in found] == numbers(words)


def test_the_words_of_an_id_are_by_the_definition():
    """Counter (block, update, id low, id high), key of seed and purpose; never to change."""
    stream, number = Stream("noise", 7, 3), 2**40 + 5
    found = stream.bits(torch.tensor([number]), 7)[0].tolist()
    one = [torch.tensor([word]) for word in (0, 3, 5, 2**8)]
    expected = [*philox(tuple(one), stream.key)]
    one[0] += 1
    expected += philox(tuple(one), stream.key)
    assert found == [int(word) for word in expected][:7]
    assert (STREAM, stream.key) == ("philox4x32-10", (2342657084, 1180164720))


ids_of_batches = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9, unique=True)


@given(ids=ids_of_batches, seed=st.integers(), update=st.integers(0, 2**32 - 1), data=st.data())
def test_a_draw_depends_on_its_address_alone(ids, seed, update, data):
    """Not on the batch, its order, or how many are drawn: to the last bit."""
    stream, together = Stream("noise", seed, update), torch.tensor(ids)
    order = data.draw(st.permutations(range(len(ids))))[: data.draw(st.integers(1, len(ids)))]
    part = together[order]
    assert torch.equal(stream.normals(part, (3, 5)), stream.normals(together, (3, 5))[order])
    assert torch.equal(stream.uniforms(part, 2), stream.uniforms(together, 9)[order, :2])
    assert torch.equal(stream.integers(part, 1000), stream.integers(together, 1000)[order])


def test_large_batches_are_made_in_parts_that_do_not_show():
    """More than is worked on at once, with places that no vector instruction is full with."""
    stream, ids = Stream("noise", 1, 2), torch.arange(37)
    whole = stream.normals(ids, (1001,))
    assert torch.equal(whole, torch.cat([stream.normals(ids[k : k + 1], (1001,)) for k in ids]))
    assert torch.equal(
        stream.normals(ids, (60_000,))[:, :1000], stream.normals(ids, (60_000,))[:, :1000]
    )


def test_every_part_of_the_address_makes_another_stream():
    ids = torch.arange(4)
    streams = [Stream("a"), Stream("b"), Stream("a", 1), Stream("a", 0, 1), Stream("a", -1)]
    drawn = torch.cat([stream.bits(ids, 50).flatten() for stream in streams])
    assert len(drawn.unique()) == len(drawn) == 1000
    with pytest.raises(ValueError, match="more than 32 bits"):
        Stream("a", 1, 2**32).bits(ids, 1)


def test_uniforms_and_integers_are_of_the_upper_bits():
    stream, ids = Stream("a", 3), torch.arange(200)
    bits = stream.bits(ids, 40)
    assert bits.min() >= 0 and bits.max() < 2**32
    assert torch.equal(stream.uniforms(ids, 40).double() * 2**24, (bits // 2**8).double())
    for high in (1, 2, 1000, 2**31):
        expected = [int(word) * high // 2**32 for word in bits[:, 0]]
        assert stream.integers(ids, high).tolist() == expected


def test_normals_are_box_and_mullers_of_the_words():
    """In Python's own arithmetic; and a distribution that no test of 40,000 tells from the normal one."""
    stream, ids = Stream("noise", 5), torch.arange(10)
    found = stream.normals(ids, (4, 1000))
    assert found.dtype == torch.float32 and found.shape == (10, 4, 1000)
    words = stream.bits(ids, 4000).view(10, 1000, 4).double().numpy()
    radius = [np.sqrt(-2 * np.log((words[..., k] + 0.5) / 2**32)) for k in (0, 2)]
    angle = [2 * math.pi * (words[..., k] + 0.5) / 2**32 for k in (1, 3)]
    cosine = [r * np.cos(t) for r, t in zip(radius, angle, strict=True)]
    sine = [r * np.sin(t) for r, t in zip(radius, angle, strict=True)]
    expected = np.stack([*cosine, *sine], 1).astype(np.float32)
    np.testing.assert_array_max_ulp(found.numpy(), expected, 2)
    assert kstest(found.flatten().numpy(), "norm").pvalue > 1e-3
    together = np.corrcoef(found.numpy().reshape(40, 1000))
    assert np.abs(together - np.eye(40)).max() < 5 / 1000**0.5


def test_extreme_words_are_finite(monkeypatch):
    ends = torch.tensor([[0, 2**32 - 1]])
    monkeypatch.setattr(Stream, "words", lambda *_: (ends, ends, ends.flip(1), ends.flip(1)))
    found = Stream("a").normals(torch.tensor([0]), (8,))
    assert torch.isfinite(found).all() and 6 < found.abs().max() < 7


def test_uniforms_of_lines_have_53_bits_of_their_seed():
    seeds = [0, 7, 2**64 - 1]
    found = uniforms(seeds, 5)
    signed = torch.tensor(np.array(seeds, dtype=np.uint64).astype(np.int64))
    words = Stream("line").bits(signed, 12).tolist()
    for row, bits in zip(found, words, strict=True):
        high = [bits[k] for k in (0, 2, 4, 6, 8)]
        low = [bits[k] for k in (1, 3, 5, 7, 9)]
        expected = [(a // 2**5 * 2**26 + b // 2**6) / 2**53 for a, b in zip(high, low, strict=True)]
        assert row.tolist() == expected
    old = np.random.Generator(np.random.Philox(key=7)).random(5)
    assert np.array_equal(uniforms([7], 5, None)[0], old)


def test_words_are_the_same_on_another_device():
    """As far as it shows without one: no step asks a device for a number, and none is made elsewhere."""
    ids = torch.arange(3, device="meta")
    stream = Stream("noise", 1, 2)
    for drawn in (stream.normals(ids, (2, 3)), stream.uniforms(ids, 7), stream.integers(ids, 9)):
        assert drawn.device.type == "meta" and len(drawn) == 3

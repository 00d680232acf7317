"""What a distance on features does not see: waves, steps and tones of samples beside those of real images."""

import numpy as np
import pytest

from diffusion_ext.evaluate.texture import (
    Metric,
    features_of,
    gradients,
    judged,
    spectrum,
    texture,
    tones,
)
from diffusion_ext.prepare.images import decode_image, find_images
from tests.diffusion.damage import STRENGTHS, damaged


def test_a_wave_is_in_the_ring_of_its_length():
    """16 × 16: an even field is in none, a checkerboard in the last of 8, two waves across in ring 2."""
    x = np.zeros((3, 1, 16, 16))
    x[1] = np.indices((16, 16)).sum(0) % 2
    x[2] = np.sin(2 * np.pi * 2 * np.arange(16) / 16)
    power = np.exp(spectrum(x)) - 1e-7
    assert power.shape == (3, 9) and np.abs(power[0]).max() < 1e-9
    assert power[1].argmax() == 8 and power[1][:8].max() < 1e-9
    assert power[2].argmax() == 2 and np.delete(power[2], 2).max() < 1e-9
    # Parseval: the mean power is the mean square without the mean
    noise = np.random.default_rng(0).standard_normal((2, 3, 16, 16))
    gray = noise.mean(1)
    rings = (np.exp(spectrum(noise)) - 1e-7) @ ring_sizes(16)
    squares = ((gray - gray.mean((1, 2), keepdims=True)) ** 2).sum((1, 2))
    np.testing.assert_allclose(rings, squares, rtol=1e-6)


def ring_sizes(side):
    along = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None]) * 2
    return np.bincount(np.minimum((along * side / 2).astype(int), side // 2).ravel())


def test_steps_and_tones_by_hand():
    """A ramp down of 0.1 a row: its steps are 0.1 down and 0 across."""
    x = np.zeros((1, 1, 5, 4)) + 0.1 * np.arange(5)[:, None]
    (down_mean, down_root, down_bend, *down), across = (
        gradients(x)[0][:6],
        gradients(x)[0][6:],
    )
    assert np.exp(down_mean) == pytest.approx(0.101) == np.exp(down_root)
    assert np.exp(down_bend) == pytest.approx(0.001) and down == [0, 0, 0]
    assert np.exp(across[0]) == pytest.approx(0.001) and across[3:].tolist() == [1, 1, 0]
    colour = np.stack([np.zeros((2, 2)), np.full((2, 2), 0.5), np.ones((2, 2))])[None]
    assert tones(colour)[0].tolist() == [0, 0.5, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0.5, 1]


def test_t_squared_is_the_number_of_features_for_sets_of_one_population():
    random = np.random.default_rng(1)
    mix = random.standard_normal((6, 6))
    a = random.standard_normal((4000, 6)) @ mix
    metric = Metric.of(a)
    found = [metric(a[k : k + 100], a[2000 + k : 2300 + k]) for k in range(0, 1500, 25)]
    assert np.mean(found) == pytest.approx(6, rel=0.2)
    # moved by a deviation: 6 + 100 · 300 / 400
    shifted = a[:100] + np.array([1, 0, 0, 0, 0, 0]) @ mix
    assert metric(shifted, a[2000:2300]) == pytest.approx(6 + 75, rel=0.35)


def test_a_line_of_the_verdict():
    assert judged("x", 3.0, 2.0, 0.2) == {
        "label": "x",
        "value": 3.0,
        "floor": 2.0,
        "std": 0.2,
        "z": 5.0,
        "passed": True,
    }
    assert not judged("x", 3.0, 2.0, 0.19)["passed"]
    assert judged("x", 3.0, 2.0, 0.0, least=0.25)["z"] == 2.0


@pytest.fixture(scope="module")
def emoji(shared_data):
    """The emoji at 32 × 32, uint8 (3786, 3, 32, 32)."""
    folder = shared_data / "emoji64"
    if not folder.is_dir():
        pytest.skip(f"no emoji64 in {shared_data}")
    return np.stack([decode_image(folder / name, 32, 32, 3) for name in find_images(folder)])


@pytest.mark.slow
def test_every_damage_is_told_and_of_twenty_halves_at_most_one(emoji):
    known = features_of(emoji)

    def verdict(ours, rows, seed):
        theirs = {name: value[rows] for name, value in known.items()}
        return [line["label"] for line in texture(ours, theirs, seed) if not line["passed"]]

    failed = 0
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(emoji))
        half = len(emoji) // 2
        ours = {name: value[order[:half]] for name, value in known.items()}
        failed += bool(verdict(ours, order[half:], seed))
    assert failed <= 1
    images, rest = emoji[order[:500]], order[half:]
    passed = [
        (kind, strength)
        for kind, strengths in STRENGTHS.items()
        for strength in strengths
        if not verdict(features_of(damaged(images, kind, strength)), rest, 1)
    ]
    assert not passed


@pytest.mark.parametrize("kind", ["noise", "checkerboard", "blocks"])
def test_damages_that_the_distance_did_not_see(kind):
    """The three of them on smooth random images: no data needed."""
    random = np.random.default_rng(2)
    coarse = random.integers(0, 256, (300, 3, 4, 4)).astype(np.uint8)
    images = damaged(coarse.repeat(4, 2).repeat(4, 3), "blur", 1.0)
    real = features_of(images[:200])
    assert all(line["passed"] for line in texture(features_of(images[200:]), real, 1))
    found = texture(features_of(damaged(images[200:], kind, STRENGTHS[kind][1])), real, 1)
    assert not all(line["passed"] for line in found)

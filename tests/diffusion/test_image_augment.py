import itertools
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from diffusion_ext.augment import (
    AUGMENTATIONS,
    ORDERS,
    Augmentation,
    ColorJitter,
    HorizontalFlip,
    adjust_hue,
    build_augmentations,
)
from ext_common.cli import UserError

ORACLE = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
FULL = "hflip;color_jitter"


def batch(n=16, channels=3, height=9, width=7, seed=0):
    """8-bit images as floats in [-1, 1]; some plain, some gray, black and white among them."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, channels, height, width))
    pixels[1::8] = pixels[1::8, :, :1, :1]
    pixels[2::8] = pixels[2::8, :1]
    pixels[3::8], pixels[4::8] = 0, 255
    pixels[5::8, 0] = pixels[5::8, -1]
    return torch.tensor(pixels, dtype=torch.float32) / 127.5 - 1


def uniforms(n, augmentations, seed=1):
    return torch.tensor(np.random.default_rng(seed).random((n, augmentations.n_uniforms))).float()


def jitter_by_torchvision(image, params):
    """One image in [-1, 1], with the parameters of ColorJitter, through torchvision's functions."""
    y = (image + 1) / 2
    for op in ORDERS[int(params[4])]:
        y = ORACLE[op](y, float(params[op]))
    return y * 2 - 1


class TestFlip:
    def test_as_torchvision(self):
        x, flip = batch(), HorizontalFlip(p=0.5)
        params = flip.draw(uniforms(16, flip), x.shape[1:])
        found = flip.apply(x, params)
        assert 0 < params.sum() < 16
        for image, got, flipped in zip(x, found, params[:, 0], strict=True):
            assert torch.equal(got, F.horizontal_flip(image) if flipped else image)
        assert torch.equal(flip.condition(params), params)

    def test_share(self):
        flip = HorizontalFlip(p=0.3)
        assert abs(flip.draw(torch.rand(20000, 1), (3, 4, 4)).mean() - 0.3) < 0.02
        low, high = torch.zeros(1, 1), torch.full((1, 1), 1 - 2**-24)
        assert HorizontalFlip(p=0).draw(low, (3, 4, 4)) == 0
        assert HorizontalFlip(p=1).draw(high, (3, 4, 4)) == 1


class TestColorJitter:
    @pytest.mark.parametrize("channels", [3, 1])
    @pytest.mark.parametrize(
        "strengths", [(0.5, 0.5, 0.5, 0.1), (1.5, 2, 3, 0.5), (0, 0.5, 0, 0.2)]
    )
    def test_as_torchvision_image_by_image(self, channels, strengths):
        """Same factors, same order; all orders are met."""
        names = ("brightness", "contrast", "saturation", "hue")
        jitter = ColorJitter(**dict(zip(names, strengths, strict=True)))
        x = batch(24 * 8, channels)
        u = uniforms(len(x), jitter)
        u[:, 4] = (torch.arange(len(x)) // 8 + 0.5) / 24
        params = jitter.draw(u, x.shape[1:])
        assert len(set(params[:, 4].tolist())) == 24
        found = jitter.apply(x, params)
        expected = torch.stack(
            [jitter_by_torchvision(i, p) for i, p in zip(x, params, strict=True)]
        )
        # 1e-5 of torchvision's [0, 1]; strong contrast multiplies what hue has rounded
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert found.min() >= -1 and found.max() <= 1

    def test_as_torchvisions_own_transform(self):
        """The class, drawing for itself: its parameters given to ours give its images."""
        x = batch(32)
        for n, image in enumerate(x):
            torch.manual_seed(n)
            drawn = v2.ColorJitter(0.5, 0.5, 0.5, 0.1).make_params([image])
            torch.manual_seed(n)
            expected = v2.ColorJitter(0.5, 0.5, 0.5, 0.1)((image + 1) / 2) * 2 - 1
            names = ("brightness", "contrast", "saturation", "hue")
            order = ORDERS.index(tuple(drawn["fn_idx"].tolist()))
            params = torch.tensor([*(drawn[f"{k}_factor"] for k in names), order])
            found = ColorJitter().apply(image[None], params[None].float())[0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_float64(self):
        x = batch().double()
        jitter = ColorJitter(hue=0.3)
        params = jitter.draw(uniforms(16, jitter).double(), x.shape[1:])
        found = jitter.apply(x, params)
        assert found.dtype == torch.float64
        brightness = ORDERS.index((0, 1, 2, 3))
        params[:, 4] = brightness
        single = jitter.apply(x.float(), params.float())
        torch.testing.assert_close(jitter.apply(x, params).float(), single, atol=1e-5, rtol=0)

    def test_draws(self):
        """Uniform within torchvision's bounds; every order about equally often."""
        jitter = ColorJitter(brightness=0.5, contrast=2.0, saturation=0.0, hue=0.1)
        params = jitter.draw(uniforms(24000, jitter), (3, 4, 4))
        bounds = [(0.5, 1.5), (0.0, 3.0), (1.0, 1.0), (-0.1, 0.1)]
        for column, (low, high) in zip(params.T, bounds, strict=False):
            assert column.min() >= low - 1e-6 and column.max() <= high + 1e-6
            assert abs(column.mean() - (low + high) / 2) <= 0.02 * (high - low) + 1e-6
            assert abs(column.std() - (high - low) / 12**0.5) <= 0.02 * (high - low) + 1e-6
        counts = torch.bincount(params[:, 4].long(), minlength=24)
        assert len(counts) == 24 and counts.min() > 850 and counts.max() < 1150
        assert sorted(ORDERS) == sorted(itertools.permutations(range(4)))

    def test_ends_of_the_uniforms(self):
        jitter = ColorJitter()
        u = torch.stack([torch.zeros(6), torch.full((6,), 1 - 2**-24), torch.ones(6)])
        params = jitter.draw(u, (3, 4, 4))
        assert torch.isfinite(params).all() and params[:, 4].tolist() == [0, 23, 23]

    @pytest.mark.parametrize("channels", [1, 3])
    def test_share_that_is_left_alone(self, channels):
        jitter, x = ColorJitter(p=0.4), batch(400, channels)
        params = jitter.draw(uniforms(400, jitter), x.shape[1:])
        condition, found = jitter.condition(params), jitter.apply(x, params)
        alone = (condition == 0).all(1)
        assert 0.5 < alone.float().mean() < 0.7
        assert torch.equal(found[alone], x[alone])
        plain = (x.flatten(1) == x.flatten(1)[:, :1]).all(1)
        changed = (found != x).flatten(1).any(1)
        assert changed[~alone & ~plain].all()

    @pytest.mark.parametrize("strength", ["brightness", "contrast", "saturation", "hue"])
    def test_one_operation_alone(self, strength):
        names = ["brightness", "contrast", "saturation", "hue"]
        jitter = ColorJitter(**{name: 0.3 if name == strength else 0 for name in names})
        x = batch(64)
        params = jitter.draw(uniforms(64, jitter), x.shape[1:])
        condition = jitter.condition(params)
        column = names.index(strength)
        assert (condition[:, [k for k in range(4) if k != column]] == 0).all()
        assert (condition[:, column] != 0).all() and condition.abs().max() <= 1 + 1e-5
        expected = torch.stack(
            [
                ORACLE[column]((i + 1) / 2, float(p)) * 2 - 1
                for i, p in zip(x, params[:, column], strict=True)
            ]
        )
        torch.testing.assert_close(jitter.apply(x, params), expected, atol=1e-5, rtol=0)

    def test_gray_images_know_neither_saturation_nor_hue(self):
        jitter, x = ColorJitter(brightness=0, contrast=0), batch(channels=1)
        params = jitter.draw(uniforms(16, jitter), x.shape[1:])
        assert torch.equal(jitter.apply(x, params), x)
        assert (jitter.condition(params) == 0).all()
        both = ColorJitter()
        condition = both.condition(both.draw(uniforms(16, both), x.shape[1:]))
        assert (condition[:, 2:] == 0).all() and (condition[:, :2] != 0).all()

    @given(st.tuples(*[st.floats(0, 1, width=32)] * 3), st.floats(-0.5, 0.5, width=32))
    def test_hue_keeps_value_and_chroma(self, colour, shift):
        """What a turn of hue leaves: largest and smallest channel; a whole turn is nothing."""
        y = torch.tensor(colour)[None, :, None, None]
        found = adjust_hue(y, torch.tensor([shift], dtype=torch.float32))
        for extreme in (torch.amin, torch.amax):
            torch.testing.assert_close(extreme(found, 1), extreme(y, 1), atol=1e-5, rtol=0)
        back = adjust_hue(found, torch.tensor([1 - shift], dtype=torch.float32))
        # where chroma is tiny, so is what rounding of it turns
        torch.testing.assert_close(back, y, atol=1e-4, rtol=0)

    def test_thirds_of_a_turn_permute_the_channels(self):
        y = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        found = adjust_hue(y, torch.full((4,), 1 / 3))
        torch.testing.assert_close(found, y[:, [2, 0, 1]], atol=1e-5, rtol=0)


class TestPipeline:
    @pytest.mark.parametrize(
        "pipeline",
        [
            "",
            None,
            " ; ",
            "hflip:p=0",
            "color_jitter:brightness=0,contrast=0,saturation=0,hue=0",
            "color_jitter:p=0;hflip:p=0",
        ],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_nothing_is_bit_identical(self, pipeline, channels):
        augmentations, x = build_augmentations(pipeline), batch(channels=channels)
        found, condition = augmentations(x, uniforms(16, augmentations))
        assert torch.equal(found, x)
        assert condition.shape == (16, augmentations.condition_size)
        assert (condition == 0).all() and condition.dtype == torch.float32

    def test_steps_in_their_order_with_their_own_uniforms(self):
        x = batch()
        augmentations = build_augmentations(" hflip:p=0.4 ; color_jitter:brightness=0.2,hue=0 ;")
        assert augmentations.n_uniforms == 7 and augmentations.condition_size == 5
        u = uniforms(16, augmentations)
        found, condition = augmentations(x, u)
        flip, jitter = HorizontalFlip(p=0.4), ColorJitter(brightness=0.2, hue=0.0)
        flipped, factors = flip.draw(u[:, :1], x.shape[1:]), jitter.draw(u[:, 1:], x.shape[1:])
        assert torch.equal(found, jitter.apply(flip.apply(x, flipped), factors))
        assert torch.equal(condition[:, :1], flip.condition(flipped))
        assert torch.equal(condition[:, 1:], jitter.condition(factors))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_zero_condition_is_the_image_itself(self, channels):
        augmentations = build_augmentations("hflip:p=0.5;color_jitter:p=0.5")
        x = batch(400, channels)
        found, condition = augmentations(x, uniforms(400, augmentations))
        zero = (condition == 0).all(1)
        assert 60 < zero.sum() < 140 and torch.isfinite(condition).all()
        assert torch.equal(found[zero], x[zero])
        assert condition.abs().max() <= 1

    def test_an_image_does_not_depend_on_its_batch(self):
        augmentations, x = build_augmentations(FULL), batch(32)
        u = uniforms(32, augmentations)
        found, condition = augmentations(x, u)
        order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
        for rows in (order, order[:5], order[:1]):
            again, conditions = augmentations(x[rows], u[rows])
            torch.testing.assert_close(again, found[rows], atol=1e-6, rtol=0)
            assert torch.equal(conditions, condition[rows])

    def test_arguments_and_generators_are_left_alone(self):
        augmentations, x = build_augmentations(FULL), batch()
        u = uniforms(16, augmentations)
        torch.manual_seed(0)
        before = x.clone(), u.clone(), torch.get_rng_state()
        augmentations(x, u)
        assert torch.equal(x, before[0]) and torch.equal(u, before[1])
        assert torch.equal(torch.get_rng_state(), before[2])

    def test_empty_batch_and_other_layouts(self):
        augmentations = build_augmentations(FULL)
        found, condition = augmentations(torch.zeros(0, 3, 4, 4), torch.zeros(0, 7))
        assert found.shape == (0, 3, 4, 4) and condition.shape == (0, 5)
        x = batch().to(memory_format=torch.channels_last)
        u = uniforms(16, augmentations)
        expected = augmentations(x.contiguous(), u)[0]
        torch.testing.assert_close(augmentations(x, u)[0], expected, atol=1e-6, rtol=0)

    def test_number_of_uniforms(self):
        with pytest.raises(ValueError, match=r"\(16, 6\), expected \(16, 7\)"):
            build_augmentations(FULL)(batch(), torch.zeros(16, 6))

    @pytest.mark.parametrize(
        "pipeline, message",
        [
            ("hflp", "did you mean 'hflip'.*color_jitter, hflip"),
            ("xyzzy", "known: color_jitter, hflip"),
            ("hflip:q=1", "unknown option 'q'"),
            ("hflip:p=1.5", "p 1.5 is not between 0 and 1"),
            ("hflip,color_jitter", "unknown augmentation"),
            ("color_jitter:hue=0.6", "hue 0.6 is not between 0 and 0.5"),
            ("color_jitter:brightness=-1", "brightness"),
            ("color_jitter:brightness=much", "brightness"),
            ("color_jitter:contrast", "key=value"),
        ],
    )
    def test_mistakes_are_told_in_words(self, pipeline, message):
        with pytest.raises(UserError, match=message):
            build_augmentations(pipeline)

    def test_listed_with_their_options(self):
        text = AUGMENTATIONS.describe()
        assert "hflip: Left becomes right" in text and "hue: shift, uniform in ± this" in text

    def test_travels_to_another_process(self):
        augmentations, x = build_augmentations("color_jitter:hue=0.2"), batch()
        u = uniforms(16, augmentations)
        again = pickle.loads(pickle.dumps(augmentations))
        assert torch.equal(again(x, u)[0], augmentations(x, u)[0])

    def test_somebody_adds_an_augmentation(self, monkeypatch):
        monkeypatch.setattr(AUGMENTATIONS, "_entries", dict(AUGMENTATIONS._entries))
        monkeypatch.setattr(AUGMENTATIONS, "_options", dict(AUGMENTATIONS._options))

        @AUGMENTATIONS.register("negative")
        class Negative(Augmentation):
            n_uniforms = condition_size = 1

            def draw(self, u, shape):
                return (u < 0.5).float()

            def apply(self, x, params):
                return torch.where(params[:, :, None, None] > 0, -x, x)

            def condition(self, params):
                return params

        augmentations, x = build_augmentations("hflip:p=0;negative"), batch(2)
        found, condition = augmentations(x, torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
        assert torch.equal(found, torch.stack([-x[0], x[1]]))
        assert condition.tolist() == [[0, 1], [0, 0]]


def test_faster_than_image_by_image():
    """A hundred images at once cost no more than torchvision one after the other."""
    x, augmentations = batch(128, 3, 16, 16), build_augmentations(FULL)
    u = uniforms(128, augmentations)
    transform = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.5, 0.5, 0.5, 0.1)])

    def best(call):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return min(times)

    single = best(lambda: [transform((image + 1) / 2) * 2 - 1 for image in x])
    assert best(lambda: augmentations(x, u)) < single

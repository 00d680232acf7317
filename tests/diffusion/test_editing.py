"""Between two images, and where a mask says so: exact for Gaussian data, and with a real network."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fairseq")

from diffusion_ext.inference import DiffusionModel
from diffusion_ext.objectives import Prediction
from diffusion_ext.pictures import to_float, to_uint8
from diffusion_ext.randomness import ImageNoise
from diffusion_ext.sample import SampleOptions, main
from diffusion_ext.sample.editing import (
    inpainting,
    interpolation,
    invert,
    read,
    read_mask,
    repaint,
    slerp,
    variation,
)
from diffusion_ext.samplers import ddim, ddpm, trajectory
from diffusion_ext.schedules import NoiseSchedule, build_schedule
from ext_common.checkpoints import untouched_logging
from ext_common.cli import UserError

MEAN, STD = 0.2, 0.5


def gaussian(schedule):
    """The exact denoiser of pixels that are N(MEAN, STD²): anchor of section 6."""
    levels = schedule.alphas_cumprod.tolist()

    def denoise(x, timestep):
        ac = levels[timestep]
        a, s = math.sqrt(ac), math.sqrt(1 - ac)
        eps = s * (x - a * MEAN) / (ac * STD**2 + 1 - ac)
        return Prediction((x - s * eps) / a, eps)

    return denoise


@pytest.fixture
def model(build):
    """A colour model of three classes with random weights and self-conditioning, which has a memory."""
    made = build({"class_labels": True}, model={"self_condition": True})
    return DiffusionModel(made.model, made.task.cfg, made.task.spec)


@pytest.fixture
def pictures(tmp_path):
    """a.png and b.png of random colours, mask.png: its left half and pixel (5, 7) are white."""
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels[0, :2] = [[0, 128, 255], [127, 1, 254]]
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :4] = 255
    mask[5, 7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def pixels_of(path):
    return np.asarray(Image.open(path)).transpose(2, 0, 1)


def options_of(folder, **changes):
    own = dict(path="x", steps=6, batch_size=4)
    if "interpolate" in changes:
        changes["interpolate"] = [str(folder / name) for name in changes["interpolate"]]
    for key in ("image", "inpaint", "mask"):
        if key in changes:
            changes[key] = str(folder / changes[key])
    return SampleOptions(**{**own, **changes})


def drawn(draw, numbers):
    parts = list(draw(numbers))
    assert [k for chosen, _ in parts for k in chosen] == list(numbers)
    return np.concatenate([images for _, images in parts])


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "cosine", "linear"])
@pytest.mark.parametrize("top", [300, 500])
def test_inversion_comes_back_to_the_image(name, top):
    """From the latent of `invert`, DDIM leads to the image: the error falls with the steps, to nothing."""
    schedule = build_schedule(name, 1000)
    denoise = gaussian(schedule)
    image = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)
    errors, guesses = [], []
    for steps in (10, 20, 40, 80):
        path = trajectory(NoiseSchedule(schedule.alphas_cumprod[:top]), steps)
        for tries, found in ((3, errors), (1, guesses)):
            latent = invert(denoise, image, path, tries)
            found.append(float((ddim(denoise, latent, path, None) - image).abs().max()))
    assert errors[0] < 0.02 and errors[-1] < 1e-4
    assert all(fine < coarse / 3 for coarse, fine in zip(errors, errors[1:], strict=False))
    # taken once, ε is that of another level: of first order
    assert all(1.6 < a / b < 2.4 for a, b in zip(guesses, guesses[1:], strict=False))
    assert all(e < g / 10 for e, g in zip(errors, guesses, strict=True))


def test_the_latent_is_that_of_the_flow():
    """x_t = √ᾱ μ + √(ᾱ s² + 1 − ᾱ) (x_0 − μ) / s, to which DDIM's steps are of first order."""
    schedule = build_schedule("cosine", 1000)
    image = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 2, 2)
    errors = []
    for steps in (25, 50, 100):
        path = trajectory(NoiseSchedule(schedule.alphas_cumprod[:500]), steps)
        a, s = path.levels[0].alpha, path.levels[0].sigma
        exact = a * MEAN + (image - MEAN) * math.sqrt(a**2 * STD**2 + s**2) / STD
        errors.append(float((invert(gaussian(schedule), image, path) - exact).abs().max()))
    assert errors[-1] < 0.02 and all(
        1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:], strict=False)
    )


def test_pure_noise_is_reached_without_a_division():
    schedule = build_schedule("cosine", 1000, zero_terminal_snr=True)
    path = trajectory(schedule, 5)

    def denoise(x, timestep):
        a, s = schedule.alpha[timestep], schedule.sigma[timestep]
        return Prediction(a * x, s * x)  # v = 0

    assert torch.isfinite(invert(denoise, torch.ones(1, 1, 2, 2), path)).all()


class TestSlerp:
    def pair(self, length=3.0):
        draw = torch.Generator().manual_seed(1)
        a, b = (torch.randn(1, 3, 4, 4, generator=draw, dtype=torch.float64) for _ in range(2))
        return a * length / a.norm(), b * length / b.norm()

    def test_ends_are_exact(self):
        a, b = self.pair()
        torch.testing.assert_close(slerp(a, b, 0.0), a, rtol=0, atol=1e-15)
        torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=0, atol=1e-15)

    def test_length_and_angle(self):
        """Between two of the same length: of that length, at a share of the angle between them."""
        a, b = self.pair()
        whole = torch.acos((a * b).sum() / 9)
        for share in (0.1, 0.5, 0.9):
            between = slerp(a, b, share)
            assert float(between.norm()) == pytest.approx(3.0, rel=1e-12)
            angle = torch.acos((a * between).sum() / 9)
            assert float(angle / whole) == pytest.approx(share, rel=1e-6)

    def test_of_an_image_and_itself(self):
        a, _ = self.pair()
        for other in (a.clone(), a * (1 + 1e-9)):
            torch.testing.assert_close(slerp(a, other, 0.3), a, rtol=1e-6, atol=0)


# --- interpolation -------------------------------------------------------------------------------


class TestInterpolation:
    def test_ends_are_the_images_as_they_come_back(self, model, pictures):
        options = options_of(
            pictures, interpolate=["a.png", "b.png"], num=5, noise_level=0.3, steps=30
        )
        images = drawn(interpolation(model, options, range(5)), range(5))
        assert images.dtype == np.uint8 and images.shape == (5, 3, 8, 8)
        path = trajectory(NoiseSchedule(model.schedule.alphas_cumprod[:30]), 30)
        for end, name in ((0, "a"), (-1, "b")):
            image = read(pictures / f"{name}.png", model.shape, "cpu")[None]
            with torch.no_grad():
                back = ddim(model.denoiser(), invert(model.denoiser(), image, path), path, None)
            assert np.array_equal(images[end], to_uint8(back)[0])
            # which are nearly the images; a net with random weights is no smooth flow
            assert np.abs(images[end].astype(int) - pixels_of(pictures / f"{name}.png")).mean() < 12
        assert len({image.tobytes() for image in images}) == 5

    def test_batches_change_nothing(self, model, pictures):
        """Nor does what was drawn before: the memory of self-conditioning ends with its batch."""

        def draw(numbers, batch_size):
            options = options_of(pictures, interpolate=["a.png", "b.png"], batch_size=batch_size)
            return drawn(interpolation(model, options, range(5)), numbers)

        whole = draw(range(5), 5)
        for numbers, size in ((range(5), 1), (range(5), 2), ([3], 4), ([4, 2], 2)):
            part = draw(numbers, size)
            assert np.abs(part.astype(int) - whole[list(numbers)]).max() <= 1

    def test_a_single_image_is_the_first(self, model, pictures):
        options = options_of(pictures, interpolate=["a.png", "b.png"], num=1)
        one = drawn(interpolation(model, options, [0]), [0])
        five = drawn(interpolation(model, options, range(5)), range(5))
        assert np.abs(one[0].astype(int) - five[0]).max() <= 1

    def test_the_class_matters(self, model, pictures):
        found = [
            drawn(interpolation(model, options_of(pictures, **flags), range(2)), range(2)).tobytes()
            for label in (None, "ant", "cat")
            for flags in [{"interpolate": ["a.png", "b.png"], "label": label}]
        ]
        assert len(set(found)) == 3

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"noise_level": 0.01}, "--noise-level is too small"),
            ({"steps": 101}, "--steps 101 is not possible"),
            ({"label": "dog"}, "--label dog is no class of the model; known: ant, bee, cat"),
            (
                {"interpolate": ["a.png", "text.png"]},
                "text.png cannot be used .not an image.: give",
            ),
        ],
    )
    def test_mistakes(self, model, pictures, changes, words):
        (pictures / "text.png").write_text("no image")
        options = options_of(pictures, **{"interpolate": ["a.png", "b.png"], **changes})
        with pytest.raises(UserError, match=words) as caught:
            interpolation(model, options, range(2))
        assert "\n" not in str(caught.value)


# --- inpainting ----------------------------------------------------------------------------------


def filled(schedule, image, mask, steps=10, seed=1, times=2, denoise=None, numbers=(0, 1)):
    shape = tuple(image.shape)
    noise = ImageNoise(seed, list(numbers), shape)
    path = trajectory(schedule, steps)
    return repaint(denoise or gaussian(schedule), image, mask, path, noise, times)


class TestRepaint:
    schedule = build_schedule("cosine", 1000)
    image = torch.linspace(-1, 1, 48).view(3, 4, 4)
    everywhere = torch.ones(1, 4, 4, dtype=torch.bool)

    def test_all_known_is_the_image_exactly(self):
        """Pitfall 17, whatever the network says."""

        def wild(x, timestep):
            return Prediction(7 * x, -3 * x)

        for times in (1, 3):
            found = filled(self.schedule, self.image, ~self.everywhere, times=times, denoise=wild)
            assert torch.equal(found, self.image.expand(2, -1, -1, -1))

    def test_all_unknown_has_nothing_of_the_image(self):
        found = filled(self.schedule, self.image, self.everywhere)
        assert torch.equal(found, filled(self.schedule, -self.image, self.everywhere))
        assert not torch.isclose(found[0], found[1]).all()

    def test_the_mask_is_exact_to_the_pixel(self):
        mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        mask[0, 1, 2] = True
        found = filled(self.schedule, self.image, mask)
        known = ~mask.expand(2, 3, 4, 4)
        assert torch.equal(found[known], self.image.expand(2, -1, -1, -1)[known])
        assert not torch.isclose(found[~known], self.image.expand(2, -1, -1, -1)[~known]).any()

    def test_known_pixels_have_the_noise_of_their_level(self):
        """What the network is shown: √ᾱ x_0 + √(1 − ᾱ) ε at each level but the first, which is noise."""
        image = torch.full((3, 64, 64), 0.5)
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        seen = []

        def watched(x, timestep):
            seen.append((timestep, float(x.mean()), float(x.std())))
            return gaussian(self.schedule)(x, timestep)

        filled(self.schedule, image, mask, denoise=watched, numbers=[0], times=3)
        n = math.sqrt(image.numel())
        assert [t for t, _, _ in seen] == sorted((t for t, _, _ in seen), reverse=True)
        # nine levels three times each, and once from the last one to the image
        assert len(seen) == 9 * 3 + 1 and len({t for t, _, _ in seen}) == 10
        for k, (t, mean, std) in enumerate(seen):
            a, s = float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
            a = 0 if k == 0 else a
            s = 1 if k == 0 else s
            assert abs(mean - 0.5 * a) < 5 * s / n and abs(std / s - 1) < 5 / n

    def test_what_is_drawn_has_the_moments_of_the_data(self):
        """Pixels that do not hang together: those drawn are N(MEAN, STD²) beside any known ones."""
        image, mask = torch.full((3, 40, 40), -0.9), torch.zeros(1, 40, 40, dtype=torch.bool)
        mask[:, :, 20:] = True
        found = filled(self.schedule, image, mask, steps=250, times=2, numbers=range(4))
        drawn_pixels = found[:, :, :, 20:]
        n = drawn_pixels.numel()
        assert abs(float(drawn_pixels.mean()) - MEAN) < 5 * STD / math.sqrt(n) + 0.005
        assert float(drawn_pixels.std()) == pytest.approx(STD, rel=0.03)

    def test_pixels_that_hang_together_follow_the_known_ones(self):
        """Images of one value each, N(0, 1) over images: the rest must be what is known."""
        image, mask = torch.full((1, 4, 4), 0.8), torch.zeros(1, 4, 4, dtype=torch.bool)
        mask[:, 2:] = True
        levels = self.schedule.alphas_cumprod.tolist()

        def denoise(x, timestep):
            ac, n = levels[timestep], 16
            a, s = math.sqrt(ac), math.sqrt(1 - ac)
            # E[x_0 | x] of 16 pixels with one common value: the mean over all of them
            value = a * x.mean((1, 2, 3), keepdim=True) * n / (ac * n + 1 - ac)
            return Prediction(value.expand_as(x), (x - a * value) / s)

        errors = {}
        for times in (1, 10):
            found = filled(
                self.schedule, image, mask, 50, times=times, denoise=denoise, numbers=range(200)
            )
            errors[times] = float((found[:, :, 2:] - 0.8).square().mean().sqrt())
        # going through each level again and again is what RePaint is for
        assert errors[10] < 0.1 and errors[10] < errors[1] / 2

    def test_with_nothing_known_and_once_it_is_ancestral_sampling(self):
        """Up to the noise that known pixels would have had, which is drawn all the same."""
        path = trajectory(self.schedule, 10)
        noise = ImageNoise(1, [0, 1], (3, 4, 4))
        start = noise.start

        class EveryOther:
            def __call__(self, step):
                drawn = noise.draw()
                noise.draw()
                return drawn

        expected = ddpm(gaussian(self.schedule), start, path, EveryOther())
        found = filled(self.schedule, self.image, self.everywhere, times=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class TestInpainting:
    def test_known_pixels_come_back_to_the_value(self, model, pictures):
        options = options_of(pictures, inpaint="a.png", mask="mask.png", resample=2)
        images = drawn(inpainting(model, options), [4, 9, 2])
        white = np.asarray(Image.open(pictures / "mask.png")) > 0
        assert white.sum() == 33
        original = pixels_of(pictures / "a.png")
        for image in images:
            assert np.array_equal(image[:, ~white], original[:, ~white])
            assert (image[:, white] != original[:, white]).mean() > 0.9
        assert len({image.tobytes() for image in images}) == 3

    def test_images_depend_on_seed_and_number_alone(self, model, pictures):
        def draw(numbers, **changes):
            usual = dict(inpaint="a.png", mask="mask.png", resample=2)
            return drawn(inpainting(model, options_of(pictures, **usual, **changes)), numbers)

        whole = draw(range(5), batch_size=5)
        for numbers, size in ((range(5), 2), ([4, 1], 1)):
            part = draw(numbers, batch_size=size)
            assert np.abs(part.astype(int) - whole[list(numbers)]).max() <= 1
        assert not np.array_equal(draw(range(5), batch_size=5, seed=2), whole)
        assert not np.array_equal(draw(range(5), batch_size=5, label="bee"), whole)

    def test_gray_masks_are_cut_in_the_middle(self, model, pictures):
        ramp = np.repeat(np.array([0, 100, 127, 128, 200, 255, 0, 0], np.uint8)[None], 8, 0)
        Image.fromarray(ramp).save(pictures / "ramp.png")
        options = options_of(pictures, inpaint="a.png", mask="ramp.png", resample=1)
        (image,) = drawn(inpainting(model, options), [0])
        kept = (image == pixels_of(pictures / "a.png")).all((0, 1))
        assert kept.tolist() == [True, True, True, False, False, False, True, True]

    @pytest.mark.parametrize("colours", ["white on nothing", "any on nothing", "black and white"])
    def test_what_is_transparent_in_a_mask_is_kept(self, model, pictures, colours):
        """64 pixels that were painted are 64 that are drawn, and not 1,024 of 1,024."""
        painted = np.zeros((32, 32, 4), np.uint8)
        painted[8:16, 8:16] = 255
        if colours == "any on nothing":
            painted[..., :3] = 255  # what editors leave below transparent pixels
        if colours == "black and white":
            painted[..., 3] = 255
        Image.fromarray(painted).save(pictures / "alpha.png")
        Image.new("RGB", (32, 32)).save(pictures / "large.png")
        model.spec.update(height=32, width=32)
        where = read_mask(str(pictures / "alpha.png"), str(pictures / "large.png"), model)
        assert where.sum() == 64 and where[0, 8:16, 8:16].all()

    @pytest.mark.parametrize(
        "size, colour, words",
        [
            ((8, 8), "black", "is black or transparent everywhere"),
            ((8, 8), (255, 255, 255, 0), "is black or transparent everywhere"),
            ((8, 4), "white", "has 8 × 4 pixels, .*a.png 8 × 8: give a mask of the same shape"),
        ],
    )
    def test_masks_that_cannot_be_meant(self, model, pictures, size, colour, words):
        Image.new("RGBA", size, colour).save(pictures / "odd.png")
        with pytest.raises(UserError, match=words):
            inpainting(model, options_of(pictures, inpaint="a.png", mask="odd.png"))

    def test_a_folder_has_a_mask_for_each_or_one_for_all(self, model, pictures):
        for folder, names in (("in", "ab"), ("masks", "ab")):
            (pictures / folder).mkdir()
            for k, name in enumerate(names):
                if folder == "in":
                    Image.open(pictures / f"{name}.png").save(pictures / "in" / f"{name}.png")
                else:
                    mask = np.zeros((8, 8), np.uint8)
                    mask[4 * k : 4 * k + 4] = 255
                    Image.fromarray(mask).save(pictures / "masks" / f"{name}.png")
        options = options_of(pictures, inpaint="in", mask="masks", resample=1)
        images = drawn(inpainting(model, options, range(4)), range(4))
        for k, image in enumerate(images):
            original = pixels_of(pictures / f"{'ab'[k % 2]}.png")
            kept = (image == original).all((0, 2))
            assert kept.tolist() == [k % 2 == 1] * 4 + [k % 2 == 0] * 4
        (pictures / "masks" / "b.png").unlink()
        with pytest.raises(
            UserError, match="masks holds no mask for .*b.png: give one named b.png"
        ):
            inpainting(model, options, range(4))

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"inpaint": "text.png"}, "text.png cannot be used .not an image."),
            ({"mask": "text.png"}, "text.png cannot be used"),
            ({"label": "dog"}, "--label dog is no class of the model"),
            ({"steps": 101}, "--steps 101 is not possible"),
        ],
    )
    def test_mistakes_are_told_before_anything_is_drawn(self, model, pictures, changes, words):
        (pictures / "text.png").write_text("no image")
        options = options_of(pictures, **{"inpaint": "a.png", "mask": "mask.png", **changes})
        with pytest.raises(UserError, match=words) as caught:
            inpainting(model, options)
        assert "\n" not in str(caught.value)

    def test_gradients_stay_on_for_whoever_looks_at_a_batch(self, model, pictures):
        options = options_of(pictures, inpaint="a.png", mask="mask.png", resample=1, batch_size=1)
        for draw in (
            inpainting(model, options),
            interpolation(model, options_of(pictures, interpolate=["a.png", "b.png"]), range(2)),
        ):
            next(draw([0, 1]))
            assert torch.is_grad_enabled()


class TestVariation:
    def draw(self, model, pictures, strength, **changes):
        changes = {"sampler": "dpmpp_2m", **changes}
        options = options_of(pictures, image="a.png", strength=strength, **changes)
        return drawn(variation(model, options, range(2)), range(2)).astype(int)

    def test_the_more_noise_the_less_is_left_of_the_image(self, model, pictures):
        original = pixels_of(pictures / "a.png").astype(int)
        errors = [
            np.abs(self.draw(model, pictures, strength) - original).mean()
            for strength in (0.05, 0.4, 1.0)
        ]
        assert errors[0] < 15 and errors[0] < errors[1] < errors[2]
        two = self.draw(model, pictures, 0.4)
        assert not np.array_equal(*two), "each has its own noise"
        assert np.array_equal(two, self.draw(model, pictures, 0.4, batch_size=1))

    def test_exact_for_gaussian_pixels(self, model, pictures, monkeypatch):
        """The ODE from level t on: (x_t − αμ) s₀ / s_t + μ of the noised image, s² = α²σ² + 1 − α²."""
        monkeypatch.setattr(model, "denoiser", lambda *args: gaussian(model.schedule))
        found = self.draw(model, pictures, 0.5, steps=50, sampler="dpmpp_2m")
        image = read(pictures / "a.png", model.shape, "cpu")
        level = trajectory(model.schedule, 100).levels[50]
        x = level.alpha * image + level.sigma * ImageNoise(1, [0, 1], model.shape).start
        spread = math.sqrt((level.alpha * STD) ** 2 + level.sigma**2)
        expected = to_uint8(MEAN + STD * (x - level.alpha * MEAN) / spread)
        assert np.abs(found - expected).max() <= 3

    def test_mistakes(self, model, pictures):
        with pytest.raises(UserError, match="--strength is too small"):
            self.draw(model, pictures, 0.001)
        with pytest.raises(UserError, match="none.png cannot be used"):
            variation(model, options_of(pictures, image="none.png"), [0])


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_read_as_those_of_training(pictures, channels):
    found = read(pictures / "a.png", (channels, 8, 8), "cpu")
    assert found.shape == (channels, 8, 8) and found.dtype == torch.float32
    if channels == 3:
        original = torch.from_numpy(pixels_of(pictures / "a.png").copy())
        assert torch.equal(found, to_float(original))
    # another size is scaled, without squashing
    assert read(pictures / "a.png", (channels, 4, 6), "cpu").shape == (channels, 4, 6)


def test_as_one_types_it(tiny_checkpoint, tmp_path, recwarn):
    """Samples of the tiny model, the way between two of them, and one filled again."""

    def run(name, flags):
        arguments = [str(tmp_path / name), "--path", str(tiny_checkpoint), "--device", "cpu"]
        with untouched_logging():
            main([*arguments, "--steps", "4", *flags.split()])
        paths = sorted((tmp_path / name).glob("*.png"))
        return np.stack([np.asarray(Image.open(path)) for path in paths])

    a, b = tmp_path / "samples" / "000000.png", tmp_path / "samples" / "000001.png"
    run("samples", "--num 2")
    between = run("between", f"--num 5 --interpolate {a},{b}")
    assert between.shape == (5, 16, 16) and between.dtype == np.uint8
    for end, path in ((0, a), (-1, b)):
        original = np.asarray(Image.open(path)).astype(int)
        assert np.abs(between[end] - original).mean() < 10
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = run("filled", f"--num 3 --inpaint {a} --mask {tmp_path / 'mask.png'}")
    original = np.asarray(Image.open(a))
    assert (found[:, mask == 0] == original[mask == 0]).all()
    assert len({image.tobytes() for image in found}) == 3
    assert not [w for w in recwarn if "not writable" in str(w.message)]
    with pytest.raises(UserError, match="samples of another model or other options"):
        run("between", f"--num 4 --interpolate {a},{b}")

"""Pixels on their way out: rounding, grids, files."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from diffusion_ext.pictures import (
    display_scale,
    grid,
    pil_image,
    save_gif,
    save_png,
    sheet,
    to_float,
    to_uint8,
)


def pictures(n=5, channels=3, height=4, width=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (n, channels, height, width), dtype=np.uint8)  # no 255: the ruling


# --- 8 bits ---------------------------------------------------------------------------------------


@given(value=st.floats(-3, 3, width=32))
def test_rounding(value):
    """floor(127.5 x + 128), held in 0 … 255: the nearest of the 256 values."""
    (found,) = to_uint8(torch.tensor([value])).tolist()
    assert found == min(max(math.floor(float(np.float32(value)) * 127.5 + 128), 0), 255) or (
        # where float32 rounds 127.5 x + 128 up to a whole number
        abs(value * 127.5 + 128 - found) < 1e-4
    )
    values = np.arange(256) / 127.5 - 1
    nearest = np.abs(values - value).min()
    assert abs(values[found] - value) <= nearest + 1e-6


@pytest.mark.parametrize(
    "value, byte",
    [
        (-1, 0),
        (1, 255),
        (0, 128),
        (-7, 0),
        (7, 255),
        (1 / 255, 128),
        (-1 / 255 - 1e-4, 127),
        (0.999, 255),
        (0.99, 254),
    ],
)
def test_rounding_by_hand(value, byte):
    assert to_uint8(torch.tensor([float(value)])).tolist() == [byte]


def test_all_256_values_survive_the_way_to_float_and_back():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    x = to_float(bytes_)
    assert x.min() == -1 and x.max() == 1 and x.dtype == torch.float32
    assert to_uint8(x).tolist() == list(range(256))
    # and a disturbance of less than half a step
    for shift in (-0.49, 0.49):
        assert to_uint8(x + shift / 127.5).tolist() == list(range(256))


def test_uint8_of_a_batch_and_of_other_types():
    x = torch.linspace(-1, 1, 48).view(2, 2, 3, 4).requires_grad_()
    found = to_uint8(x)
    assert found.shape == (2, 2, 3, 4) and found.dtype == np.uint8
    np.testing.assert_array_equal(to_uint8(x.double()), found)
    coarse = x.detach().bfloat16()
    np.testing.assert_array_equal(to_uint8(coarse), to_uint8(coarse.float()))


# --- grids ----------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 13),
    channels=st.sampled_from([1, 3]),
    columns=st.one_of(st.none(), st.integers(1, 5)),
    gap=st.integers(0, 3),
)
def test_every_picture_stands_in_its_place_on_white(n, channels, columns, gap):
    images = pictures(n, channels)
    sheet = grid(images, columns, gap)
    columns = columns or math.ceil(n**0.5)
    rows = math.ceil(n / columns)
    assert sheet.shape == (channels, gap + rows * (4 + gap), gap + columns * (6 + gap))
    rest = sheet.copy()
    for i in range(n):
        row, column = divmod(i, columns)
        place = np.s_[:, gap + row * (4 + gap) :, gap + column * (6 + gap) :]
        np.testing.assert_array_equal(sheet[place][:, :4, :6], images[i])
        rest[place][:, :4, :6] = 255
    assert (rest == 255).all() and sheet.dtype == np.uint8


@pytest.mark.parametrize(
    "n, shape", [(1, (1, 1)), (2, (1, 2)), (4, (2, 2)), (5, (2, 3)), (9, (3, 3)), (10, (3, 4))]
)
def test_a_grid_is_about_square(n, shape):
    sheet = grid(np.zeros((n, 1, 2, 2), dtype=np.uint8), gap=0)
    assert sheet.shape == (1, 2 * shape[0], 2 * shape[1])


def test_the_input_of_a_grid_is_left_alone():
    images = pictures()
    before = images.copy()
    grid(images)[:] = 0
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_has_its_images_in_place_and_names_beside_above_and_over_them(channels):
    images = pictures(3, channels)
    rows = [[images[0], None], [images[1], images[2]]]
    plain = np.asarray(sheet(rows, scale=3)).reshape(42, 54, channels)
    expected = grid(np.stack([images[0], np.full_like(images[0], 255), *images[1:]]), 2)
    np.testing.assert_array_equal(plain[::3, ::3].transpose(2, 0, 1), expected)
    named = np.asarray(sheet(rows, ["ant", "a bee"], ["t 9"], "seed 1, images 0 to 2", 3))
    named = named.reshape(*named.shape[:2], channels)
    dark = (named < 99).any(2)
    for place in (np.s_[:16], np.s_[16:32], np.s_[32:, :20]):
        assert dark[place].any(), "there are letters"
    # the same images, below two lines and beside the names
    (x,) = [x for x in range(named.shape[1] - 53) if np.array_equal(named[32:, x : x + 54], plain)]
    assert x > 20


# --- files ----------------------------------------------------------------------------------------


@given(
    image=arrays.arrays(
        np.uint8, st.tuples(st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5))
    ),
    scale=st.integers(1, 3),
)
def test_pil_images_have_every_pixel_scale_times(image, scale):
    made = pil_image(image, scale)
    assert made.mode == {1: "L", 3: "RGB"}[len(image)]
    assert made.size == (image.shape[2] * scale, image.shape[1] * scale)
    pixels = np.asarray(made).reshape(*made.size[::-1], -1)
    for y, x in np.ndindex(*made.size[::-1]):
        np.testing.assert_array_equal(pixels[y, x], image[:, y // scale, x // scale])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    (image,) = pictures(1, channels)
    save_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as read:
        assert read.format == "PNG"
        pixels = np.asarray(read)
    np.testing.assert_array_equal(pixels, image[0] if channels == 1 else image.transpose(1, 2, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (image,) = pictures(1)
    save_png(tmp_path / "a.png", image)
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save_png(tmp_path / "a.png", pictures(1, channels=7)[0])
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def frames_of(path):
    with Image.open(path) as read:
        assert read.format == "GIF" and read.info["loop"] == 0
        frames, times = [], []
        for k in range(read.n_frames):
            read.seek(k)
            times.append(read.info["duration"])
            frames.append(np.asarray(read.convert("RGB")))
    return frames, times


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [2, 12, 200])
def test_gif_shows_every_frame_for_3_seconds_and_holds_the_last(tmp_path, channels, count):
    """At least 20 ms a frame, below which browsers slow down."""
    shades = np.linspace(0, 254, count).astype(np.uint8)
    frames = [np.full((channels, 4, 6), shade, dtype=np.uint8) for shade in shades]
    save_gif(tmp_path / "a.gif", frames, scale=2)
    found, times = frames_of(tmp_path / "a.gif")
    assert [len(found), found[0].shape] == [count, (8, 12, 3)]
    for frame, shade in zip(found, shades, strict=True):
        assert (abs(frame.astype(int) - int(shade)) <= 1).all()
    assert times[-1] == 2000
    shown = max(20, 3000 // count)
    assert all(abs(time - shown) < 10 for time in times[:-1])  # GIF counts hundredths


def test_gif_of_one_frame(tmp_path):
    save_gif(tmp_path / "a.gif", [pictures(1, 1)[0]])
    with Image.open(tmp_path / "a.gif") as read:
        np.testing.assert_array_equal(np.asarray(read.convert("L")), pictures(1, 1)[0, 0])


def test_frames_that_stand_still_keep_the_length_of_a_gif(tmp_path):
    """Pillow joins equal frames; their times add up."""
    frame = pictures(1, 1)[0]
    save_gif(tmp_path / "a.gif", [frame] * 3 + [255 - frame] * 3)
    _, times = frames_of(tmp_path / "a.gif")
    assert sum(times) == 5 * 500 + 2000 and times[-1] > 2000


@given(height=st.integers(1, 500), least=st.integers(1, 200))
def test_small_images_are_drawn_larger(height, least):
    scale = display_scale(height, least)
    assert scale >= 1 and (scale == 1 or abs(scale * height - least) <= height / 2)
    assert display_scale(16) == 3 and display_scale(64) == 1 and display_scale(8) == 6

import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from diffusion_ext.prepare.images import (
    BadImage,
    cover,
    decode_image,
    find_images,
    flatten,
    to_pixels,
)
from ext_common.cli import UserError

RED, GRAY = (200, 30, 90), 77


def picture(width=12, height=8, seed=0, mode="RGB"):
    """Noise, different in every pixel."""
    channels = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values)


def decode(image, tmp_path, name="a.png", size=None, channels=3, **save):
    path = tmp_path / name
    image.save(path, **save)
    width, height = image.size
    return decode_image(path, *(size or (height, width)), channels)


def reason(path, channels=3):
    with pytest.raises(BadImage) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode_image(path, 8, 8, channels)
    return str(error.value)


class TestFind:
    def test_recursive_any_case_sorted_without_hidden(self, tmp_path):
        wanted = ["B.PNG", "a.jpg", "a/b/c.Tiff", "a/z.JPEG", "c.webp", "d.bmp", "e.gif", "f.tif"]
        for name in [*wanted, "x.txt", "png", ".h.png", ".d/a.png", "a/.e/a.png", "g.png.part"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "folder.png").mkdir()
        assert find_images(tmp_path) == sorted(wanted)

    def test_order_is_that_of_the_names_not_of_the_disk(self, tmp_path, monkeypatch):
        for n in range(20):
            (tmp_path / f"{n}.png").touch()
        before = find_images(tmp_path)
        original = os.scandir
        monkeypatch.setattr(os, "scandir", lambda p: reversed(list(original(p))))
        assert find_images(tmp_path) == before == sorted(before)

    def test_links_are_followed_but_not_round(self, tmp_path):
        (tmp_path / "data" / "sub").mkdir(parents=True)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.png").touch()
        (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
        (tmp_path / "data" / "more").symlink_to(tmp_path / "other")
        assert find_images(tmp_path / "data") == ["more/a.png"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            find_images(tmp_path / "nothing")
        (tmp_path / "a.png").touch()
        with pytest.raises(UserError, match="is a file"):
            find_images(tmp_path / "a.png")


class TestModes:
    """One plain colour in every mode: what comes out is known."""

    def check(self, found, colour):
        expected = np.broadcast_to(np.array(colour)[:, None, None], found.shape)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.gif", "a.tif"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_gray(self, tmp_path, name, channels):
        image = Image.new("L", (6, 5), GRAY)
        self.check(decode(image, tmp_path, name, channels=channels), [GRAY] * channels)

    def test_colour(self, tmp_path):
        image = Image.new("RGB", (6, 5), RED)
        self.check(decode(image, tmp_path), RED)
        self.check(decode(image, tmp_path, "a.webp", lossless=True), RED)
        luma = round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
        self.check(decode(image, tmp_path, channels=1), [luma])

    @pytest.mark.parametrize("alpha", [0, 1, 128, 254, 255])
    def test_alpha_is_laid_over_white(self, tmp_path, alpha):
        over = [round((alpha * c + (255 - alpha) * 255) / 255) for c in (*RED, GRAY)]
        image = Image.new("RGBA", (6, 5), (*RED, alpha))
        found = decode(image, tmp_path)
        assert np.abs(found[:, 0, 0].astype(int) - over[:3]).max() <= 1
        found = decode(Image.new("LA", (6, 5), (GRAY, alpha)), tmp_path, channels=1)
        assert abs(int(found[0, 0, 0]) - over[3]) <= 1
        if alpha in (0, 255):
            self.check(found, over[3:])

    def test_palette(self, tmp_path):
        image = Image.new("P", (6, 5), 1)
        image.putpalette([0, 0, 0, *RED])
        self.check(decode(image, tmp_path), RED)
        self.check(decode(image, tmp_path, "a.gif"), RED)

    @pytest.mark.parametrize("name", ["a.png", "a.gif"])
    def test_palette_with_a_transparent_colour(self, tmp_path, name):
        image = Image.new("P", (6, 5), 1)
        image.putpalette([0, 0, 0, *RED])
        image.paste(0, (0, 0, 3, 5))
        found = decode(image, tmp_path, name, transparency=0)
        self.check(found[:, :, :3], [255] * 3)
        self.check(found[:, :, 3:], RED)

    def test_palette_with_alpha_of_each_colour(self, tmp_path):
        image = Image.new("P", (6, 5), 1)
        image.putpalette([0, 0, 0, *RED])
        found = decode(image, tmp_path, transparency=bytes([255, 0]))
        self.check(found, [255] * 3)

    @pytest.mark.parametrize("mode, colour", [("L", GRAY), ("RGB", RED)])
    def test_key_colour(self, tmp_path, mode, colour):
        image = Image.new(mode, (6, 5), colour)
        self.check(decode(image, tmp_path, transparency=colour), [255] * 3)

    def test_one_bit(self, tmp_path):
        image = Image.new("1", (6, 5), 1)
        image.paste(0, (0, 0, 3, 5))
        for channels in (1, 3):
            found = decode(image, tmp_path, channels=channels)
            self.check(found[:, :, :3], [0] * channels)
            self.check(found[:, :, 3:], [255] * channels)

    @pytest.mark.parametrize("name, order", [("a.png", "<"), ("a.tif", "<"), ("b.tif", ">")])
    def test_sixteen_bits_are_scaled_not_cut(self, tmp_path, name, order):
        values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
        values[0, :3] = 0, 129, 128  # the border between 0 and 1
        image = Image.fromarray(values.astype(order + "u2"))
        assert image.mode.startswith("I;16")
        found = decode(image, tmp_path, name, channels=1)
        np.testing.assert_array_equal(found[0], np.rint(values / 257))
        assert found.max() == 255

    def test_thirty_two_bits_are_taken_as_sixteen(self, tmp_path):
        found = decode(Image.new("I", (4, 4), 257 * 9), tmp_path, "a.tif", channels=1)
        self.check(found, [9])
        Image.new("I", (4, 4), 70000).save(tmp_path / "b.tif")
        assert reason(tmp_path / "b.tif") == "gray values outside 0 to 65535"

    def test_floating_point_is_refused(self, tmp_path):
        Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
        assert reason(tmp_path / "a.tif") == "floating-point pixels"

    def test_cmyk(self, tmp_path):
        image = Image.new("CMYK", (6, 5), (0, 255, 0, 0))
        self.check(decode(image, tmp_path, "a.tif"), (255, 0, 255))
        found = decode(image, tmp_path, "a.jpg", channels=3).astype(int)
        assert np.abs(found - np.array([255, 0, 255])[:, None, None]).max() <= 4
        self.check(decode(image, tmp_path, "a.tif", channels=1), [round(0.413 * 255)])

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX", "RGBa", "La"])
    def test_other_modes(self, mode):
        opaque = Image.new("RGB", (2, 2), (GRAY,) * 3)
        image = opaque.convert("LA" if mode == "La" else "RGBA" if mode == "RGBa" else "RGB")
        found = to_pixels(image.convert(mode), 2, 2, 3)
        assert np.abs(found.astype(int) - GRAY).max() <= 1

    @pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
    def test_first_frame(self, tmp_path, name):
        frames = [Image.new("RGB", (6, 5), c) for c in (RED, (0, 0, 0), (9, 200, 9))]
        options = {"lossless": True} if name == "a.webp" else {}
        found = decode(
            frames[0], tmp_path, name, save_all=True, append_images=frames[1:], **options
        )
        self.check(found, RED)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


class TestOrientation:
    @pytest.mark.parametrize("orientation", TURNS)
    def test_upright(self, tmp_path, orientation):
        image, exif = picture(), Image.Exif()
        exif[0x0112] = orientation
        expected = TURNS[orientation](np.asarray(image)).transpose(2, 0, 1)
        found = decode(image, tmp_path, size=expected.shape[1:], exif=exif)
        np.testing.assert_array_equal(found, expected)
        assert found.flags.c_contiguous

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_exif_is_no_reason_to_lose_an_image(self, tmp_path):
        image = picture()
        expected = np.asarray(image).transpose(2, 0, 1)
        found = decode(image, tmp_path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        np.testing.assert_array_equal(found, expected)


class TestGeometry:
    @pytest.mark.parametrize(
        "w, h, size",
        [(200, 100, (50, 50)), (96, 288, (32, 32)), (128, 64, (32, 16)), (120, 60, (30, 30))],
    )
    def test_as_torchvision_where_no_side_is_rounded(self, w, h, size):
        image = picture(w, h)
        scale = max(size[0] / h, size[1] / w)
        whole = (round(h * scale), round(w * scale))
        oracle = v2.Compose(
            [v2.Resize(whole, v2.InterpolationMode.LANCZOS), v2.CenterCrop(size), v2.PILToTensor()]
        )
        found = to_pixels(image, *size, 3).astype(int)
        assert np.abs(found - oracle(image).numpy()).max() <= 1

    def test_upscaling_is_bicubic(self):
        image = picture(8, 8)
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(to_pixels(image, 16, 16, 3), expected.transpose(2, 0, 1))

    @pytest.mark.parametrize("w, h, left, top", [(8, 8, 0, 0), (12, 8, 2, 0), (8, 13, 0, 2)])
    def test_where_a_side_fits_pixels_are_copied(self, w, h, left, top):
        image = picture(w, h)
        expected = np.asarray(image)[top : top + 8, left : left + 8].transpose(2, 0, 1)
        np.testing.assert_array_equal(to_pixels(image, 8, 8, 3), expected)

    sides = st.integers(1, 70)

    @given(sides, sides, sides, sides)
    def test_never_squashed_and_centred(self, w, h, width, height):
        """Pixels that hold their own coordinate hold that of the same place afterwards."""
        scale = max(width / w, height / h)
        for axis, (side, target) in enumerate([(h, height), (w, width)]):
            shape = (h, 1) if axis == 0 else (1, w)
            values = np.broadcast_to(np.arange(side, dtype=np.float32).reshape(shape), (h, w))
            found = np.asarray(cover(Image.fromarray(values.copy()), height, width))
            assert found.shape == (height, width)
            shift = 0.5 if scale == 1 and (side - target) % 2 else 0
            place = (np.arange(target) - (target - 1) / 2) / scale + (side - 1) / 2 - shift
            # at the edge a kernel is cut off
            inner = (place > 3 / min(scale, 1)) & (place < side - 1 - 3 / min(scale, 1))
            line = found.mean(1 - axis)
            np.testing.assert_allclose(line[inner], place[inner], atol=0.15)

    @given(sides, sides, sides, sides, st.integers(0, 255))
    def test_plain_stays_plain(self, w, h, width, height, value):
        found = to_pixels(Image.new("L", (w, h), value), height, width, 1)
        assert found.shape == (1, height, width) and (found == value).all()

    def test_antialiased(self):
        """A checkerboard becomes gray, not a moiré."""
        board = np.indices((128, 128)).sum(0) % 2 * 255
        found = to_pixels(Image.fromarray(board.astype(np.uint8)), 32, 32, 1)
        assert np.abs(found[:, 2:-2, 2:-2].astype(int) - 127).max() <= 2

    def test_colour_under_transparency_does_not_bleed(self, tmp_path):
        """Half of the image is red below alpha 0: the border to opaque blue has no red in it."""
        values = np.zeros((64, 64, 4), dtype=np.uint8)
        values[:, :32] = 255, 0, 0, 0
        values[:, 32:] = 0, 0, 255, 255
        found = decode(Image.fromarray(values), tmp_path, size=(16, 16)).astype(int)
        assert np.abs(found[0] - found[1]).max() <= 1


def damaged(image, format, keep):
    data = io.BytesIO()
    image.save(data, format)
    return data.getvalue()[: int(keep * len(data.getvalue()))]


class TestBad:
    @pytest.mark.parametrize(
        "content, expected",
        [
            (b"", "empty file"),
            (b"this is a text", "not an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
            (damaged(picture(64, 64), "PNG", 0.5), "truncated"),
            (damaged(picture(64, 64), "JPEG", 0.5), "truncated"),
            (damaged(picture(64, 64), "BMP", 0.5), "truncated"),
            (damaged(picture(64, 64), "PNG", 0.001), "not an image"),
        ],
    )
    def test_reason(self, tmp_path, content, expected):
        (tmp_path / "a.png").write_bytes(content)
        assert reason(tmp_path / "a.png") == expected

    def test_no_pixels(self, tmp_path):
        bmp = bytearray(damaged(picture(), "BMP", 1))
        bmp[18:22] = bytes(4)  # the width
        (tmp_path / "a.bmp").write_bytes(bmp)
        assert reason(tmp_path / "a.bmp") == "not an image"

    @pytest.mark.parametrize("side", [11, 40])
    def test_bomb(self, tmp_path, monkeypatch, side):
        picture(side, side).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120)
        assert reason(tmp_path / "a.png") == "decompression bomb, more than 120 pixels"

    def test_not_a_file(self, tmp_path):
        os.mkfifo(tmp_path / "a.png")
        assert reason(tmp_path / "a.png") == "not a regular file"
        (tmp_path / "b.png").symlink_to("nowhere")
        assert find_images(tmp_path) == ["a.png", "b.png"]
        assert reason(tmp_path / "b.png") == "cannot be read (No such file or directory)"

    ORIGINALS = {
        name: damaged(picture(24, 24, mode=mode), name, 1)
        for name, mode in [("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "L"), ("TIFF", "RGB")]
    }

    @settings(max_examples=150)
    @given(st.sampled_from(sorted(ORIGINALS)), st.data())
    def test_damage_is_a_bad_image_or_none(self, tmp_path_factory, name, data):
        """Whatever bytes are changed, nothing but BadImage comes out."""
        content = bytearray(self.ORIGINALS[name])
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.mktemp("damaged") / "a.png"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert decode_image(path, 8, 8, 3).shape == (3, 8, 8)
            except BadImage as error:
                assert 0 < len(str(error)) < 150 and "\n" not in str(error)


def test_flatten_leaves_its_argument_alone():
    image = picture(mode="RGBA")
    before = image.tobytes()
    flatten(image, "L")
    assert image.tobytes() == before and image.mode == "RGBA"


def test_real_images(shared_data):
    folder = shared_data / "emoji64"
    names = find_images(folder)
    assert len(names) == 3786
    for name in names[::200]:
        found = decode_image(folder / name, 32, 32, 3)
        image = Image.open(folder / name).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        expected = white.convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))

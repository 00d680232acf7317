"""What diffusion_ext.train presets from the size of the images."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_ext.train import DEEPEST, SIZES, fitted, main
from ext_common.cli import UsageError


def numbers(flags, name):
    return [int(part) for part in flags[name].split(",")]


@pytest.mark.parametrize(
    "size, mults, attends",
    [
        ((16, 16), "1,2,2", "8"),
        ((32, 32), "1,2,2", "16"),
        ((28, 28), "1,2,2", "14"),  # MNIST: 28, 14, 7
        ((48, 48), "1,2,3,4", "12"),
        ((64, 64), "1,2,3,4", "16"),
        ((36, 36), "1,2,3", "9"),
        ((48, 64), "1,2,3,4", "12"),
        ((80, 80), "1,1,2,2,4", "10"),
        ((256, 256), "1,1,2,2,4,4", "16"),
    ],
)
def test_networks_of_known_sizes(size, mults, attends):
    flags = fitted(*size, None)
    assert (flags["--channel-mults"], flags["--attention-resolutions"]) == (mults, attends)


@given(st.integers(1, 600), st.integers(1, 600))
def test_a_cut_network_fits_and_one_that_is_not_cut_is_the_preset(height, width):
    """Sides that cannot be halved often enough keep the preset, which the model refuses in words."""
    flags = fitted(height, width, None)
    mults = numbers(flags, "--channel-mults")
    preset = next(v for limit, v in SIZES.items() if max(height, width) <= limit)[1]
    assert preset.startswith(flags["--channel-mults"])
    shrunk = 2 ** (len(mults) - 1)
    if flags["--channel-mults"] != preset:
        assert height % shrunk == width % shrunk == 0
        assert max(height, width) // shrunk <= DEEPEST
    (attends,) = numbers(flags, "--attention-resolutions")
    heights = [height >> level for level in range(len(mults))]
    assert attends in heights or attends == 0 and min(heights) > 16


def test_attention_follows_the_multiples_asked_for():
    assert fitted(64, 64, "1,2")["--attention-resolutions"] == "0"
    assert fitted(48, 48, "1,2,2")["--attention-resolutions"] == "12"


@pytest.mark.parametrize("first", [["--save-dir", "CKPT"], ["--hflip", "0.5"], [""]])
def test_the_images_come_first(first):
    """`--save-dir CKPT faces` would write checkpoints into the images, and train on what is in CKPT."""
    with pytest.raises(UsageError, match="comes before all flags"):
        main([*first, "faces", "--image-size", "64"])

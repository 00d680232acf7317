"""What --task diffusion presets, from the images and from the machine."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_ext.presets import DEEPEST, SIZES, SMALL, Facts, choose, fitted, read, side_for
from diffusion_ext.train import main
from ext_common.cli import UsageError
from ext_common.presets import Machine


def network_for(height, width, **asked):
    return fitted(Facts(height, width), SIZES, asked)[1]


def flags_for(facts, machine=Machine(), **asked):  # noqa: B008 (frozen)
    choices = choose(facts, machine, asked)
    return {flag: value for choice in choices for flag, value in choice.flags.items()}


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
        # padded to 56, 18, 36, 112, 192 × 224
        ((50, 50), "1,2,3,4", "14"),
        ((17, 17), "1,2", "9"),
        ((33, 33), "1,2,3", "9"),
        ((100, 100), "1,1,2,2,4", "14"),
        ((178, 218), "1,1,2,2,4,4", "12"),
    ],
)
def test_networks_of_known_sizes(size, mults, attends):
    flags = network_for(*size)
    assert (flags["--channel-mults"], flags["--attention-resolutions"]) == (mults, attends)


@given(st.integers(1, 600), st.integers(1, 600))
def test_a_network_is_a_part_of_the_preset_and_attends_at_one_of_its_heights(height, width):
    """A cut one fits, or pads little; where nothing does, all of the preset is left."""
    flags = network_for(height, width)
    mults = numbers(flags, "--channel-mults")
    preset = next(v for limit, v in SIZES.items() if max(height, width) <= limit).mults
    assert preset.startswith(flags["--channel-mults"])
    shrunk = 2 ** (len(mults) - 1)
    padded = [-(-side // shrunk) * shrunk for side in (height, width)]
    if flags["--channel-mults"] != preset:
        assert padded[0] * padded[1] <= 1.3 * height * width
        assert max(height, width) // shrunk <= DEEPEST
    (attends,) = numbers(flags, "--attention-resolutions")
    heights = [padded[0] >> level for level in range(len(mults))]
    assert attends in heights or attends == 0 and min(heights) > 16


def test_attention_follows_the_multiples_asked_for():
    assert network_for(64, 64, channel_mults=[1, 2])["--attention-resolutions"] == "0"
    assert network_for(48, 48, channel_mults=[1, 2, 2])["--attention-resolutions"] == "12"


@pytest.mark.parametrize("first", [["--save-dir", "CKPT"], ["--hflip", "0.5"], [""]])
def test_the_images_come_first(first):
    """`--save-dir CKPT faces` would write checkpoints into the images, and train on what is in CKPT."""
    with pytest.raises(UsageError, match="comes before all flags"):
        main([*first, "faces", "--image-size", "64"])


@pytest.mark.parametrize(
    "median, side", [(8, 16), (16, 16), (31, 16), (32, 32), (63.5, 32), (700, 64)]
)
def test_the_size_is_the_median_rounded_down(median, side):
    assert side_for(median) == side


@pytest.fixture
def folder(tmp_path):
    """make(name → (width, height, mode)): a folder of such images."""

    def make(files):
        for name, (width, height, mode) in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (width, height)).save(tmp_path / name)
        return str(tmp_path)

    return make


def test_sub_folders_are_classes_and_gray_stays_gray(folder):
    data = folder({"a/1.png": (40, 33, "L"), "b/2.png": (50, 70, "L"), "b/3.png": (90, 20, "L")})
    assert read(data, {}) == Facts(32, 32, 1, 3, 2)


def test_one_image_beside_the_folders_and_there_are_no_classes(folder):
    data = folder({"a/1.png": (64, 64, "RGB"), "b/2.png": (64, 64, "L"), "3.png": (70, 64, "L")})
    assert read(data, {}) == Facts(64, 64, 3, 3, 0)


def test_a_given_size_is_trained_as_before_and_nothing_is_read():
    facts = read("nowhere", {"image_size": [48, 64]})
    assert facts == Facts(48, 64, size="given")
    flags = flags_for(facts)
    assert flags["--lr-scheduler"] == "fixed" and flags["--base-channels"] == SIZES[64].channels
    assert "--image-size" not in flags


def test_a_prepared_folder_says_all(tmp_path):
    meta = {"format": 1, "shape": [1, 28, 28], "images": 70, "classes": ["a", "b"]}
    (tmp_path / "images.meta.json").write_text(json.dumps(meta))
    facts = read(str(tmp_path), {})
    assert facts == Facts(28, 28, 1, 70, 2, "prepared")
    flags = flags_for(facts)
    assert "--class-labels" in flags and not {"--image-size", "--channels"} & flags.keys()
    assert read(str(tmp_path), {"image_size": [28]}).size == "given"


def test_a_cpu_is_planned_for_half_an_hour_and_a_gpu_is_not():
    def minutes(machine, side=64):
        return max(choice.minutes for choice in choose(Facts(side, side, 3, 5000), machine, {}))

    assert minutes(Machine()) == 30
    # what is asked for is not a limit of the preset's
    assert minutes(Machine(minutes=3)) == minutes(Machine(gpu=True)) == 0
    assert (
        flags_for(Facts(64, 64, 3, 5000), Machine(gpu=True))["--base-channels"]
        == SIZES[64].channels
    )
    assert flags_for(Facts(64, 64, 3, 5000))["--base-channels"] == SMALL[10**9].channels


def test_the_length_grows_with_the_images():
    """1,200 updates for the digits (measured); of many images each is seen 40 times."""
    assert flags_for(Facts(16, 16, 1, 1797, 10))["--max-update"] == "1200"
    assert flags_for(Facts(16, 16, 1, 64_000))["--max-update"] == "40000"


def test_the_batch_of_all_processes_stays():
    assert flags_for(Facts(16, 16, 1, 1797), Machine(processes=4))["--batch-size"] == "16"


def test_grids_take_at_most_a_twentieth_of_a_training():
    """64 images of 20 steps, a third of an update's work each: 6.67 updates of 64 images."""
    from diffusion_ext.task import grid_interval

    assert grid_interval(1200, 500, 64 * 20, 64) == 300
    # 5 % of 400 updates are 3 grids, of 100 none
    assert grid_interval(400, 500, 64 * 20, 64) == 134
    assert grid_interval(100, 500, 64 * 20, 64) == grid_interval(1200, 0, 64 * 20, 64) == 0


@pytest.mark.parametrize(
    "side, objective, times", [(16, "edm", "edm:mean=0"), (32, "edm", None), (16, "flow", None)]
)
def test_the_times_of_edm_are_of_more_noise_for_small_images(side, objective, times):
    flags = flags_for(Facts(side, side, 1, 2000), objective=objective)
    assert flags.get("--time-sampling") == times

"""From a checkpoint to images that depend on seed and number alone, and what is no checkpoint of ours."""

import copy
import hashlib
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq")
from fairseq.models import BaseFairseqModel

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.inference import PARTS, DiffusionModel, read_checkpoint
from diffusion_ext.network import network_of
from diffusion_ext.pictures import to_uint8
from diffusion_ext.randomness import ImageNoise
from diffusion_ext.samplers import SAMPLERS, dpmpp_2m, trajectory
from ext_common.checkpoints import build_network, untouched_logging
from ext_common.cli import UserError
from ext_common.pack import PackOptions, pack
from ext_common.packed import CARD, Pack

STEPS = 3


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    with untouched_logging():
        return DiffusionModel.from_checkpoint(tiny_checkpoint, "cpu")


@pytest.fixture
def with_classes(build):
    """A model of three classes, with random weights, two averages and self-conditioning."""
    made = build(
        {"class_labels": True, "hflip": 0.5},
        model={"self_condition": True, "ema_half_life": [10.0, 1e6]},
    )
    with torch.no_grad():
        made.model.ema.weights[1].mul_(0.5)

    def open_with(average=0, label_dropout=None):
        return DiffusionModel(
            made.model, made.task.cfg, made.task.spec, "cpu", average, label_dropout
        )

    return open_with


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    """Write the tiny checkpoint, changed by a function of its state; returns the path."""

    def save(change, name="changed.pt"):
        state = read_checkpoint(tiny_checkpoint)
        change(state)
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def test_what_the_checkpoint_knows(model):
    assert model.shape == (1, 16, 16) and model.classes == [] and model.objective == "v"
    assert model.schedule.timesteps == 1000 and model.average == 0
    assert not model.model.training
    images = model.sample(2, steps=STEPS)
    assert images.shape == (2, 1, 16, 16) and images.dtype == np.uint8


def test_nothing_but_the_file_is_needed(tiny_checkpoint, tmp_path, monkeypatch):
    """Neither data nor folder: the checkpoint may lie anywhere."""
    path = tmp_path / "alone.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    there = DiffusionModel.from_checkpoint(path, "cpu")
    assert there.shape == (1, 16, 16) and list(tmp_path.iterdir()) == [path]


def test_images_by_hand(with_classes):
    """The sampler, over the averaged weights put into a network of its own."""
    model = with_classes(1)
    net = model.model
    kept = {name: weight.detach().clone() for name, weight in net.net.named_parameters()}
    images = model.sample(2, labels=[2, 0], steps=4, guidance=2.0, seed=5)

    net.net.load_state_dict(net.ema.of(1))

    def network(x, t, label, x0):
        before = torch.zeros_like(x) if x0 is None else x0
        return net.net(torch.cat([x, before], 1), t, label)

    denoise = Denoiser(
        network,
        model.schedule,
        "v",
        label=torch.tensor([2, 0]),
        guidance=2.0,
        self_condition=True,
    )
    noise = ImageNoise(5, [0, 1], (3, 8, 8))
    with torch.no_grad():
        expected = dpmpp_2m(denoise, noise.start, trajectory(model.schedule, 4), noise)
    net.net.load_state_dict(kept)
    assert np.array_equal(images, to_uint8(expected))
    # the other average, and none
    for average in (0, None):
        other = with_classes(average).sample(2, labels=[2, 0], steps=4, guidance=2.0, seed=5)
        assert not np.array_equal(other, images)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim:eta=1", "ddpm", "heun"])
def test_batches_and_numbers_change_nothing(with_classes, sampler):
    model = with_classes()

    def draw(numbers, batch_size):
        labels = [k % 3 for k in numbers]
        found = model.batches(
            numbers,
            sampler=sampler,
            steps=STEPS,
            batch_size=batch_size,
            labels=labels,
            guidance=1.5,
        )
        return {
            k: image for chosen, images in found for k, image in zip(chosen, images, strict=True)
        }

    whole = draw(range(7), 7)
    for numbers, size in ((range(7), 3), (range(7), 1), (range(2, 5), 64), ([6, 0, 3], 2)):
        part = draw(numbers, size)
        assert list(part) == list(numbers)
        for k in part:
            # rounding of sums differs with the size of a batch, which moves a pixel by 1 at most
            assert np.abs(part[k].astype(int) - whole[k]).max() <= 1
            assert (part[k] == whole[k]).mean() > 0.99
    assert len({image.tobytes() for image in whole.values()}) == 7


def test_seed_label_and_steps_matter(with_classes):
    model = with_classes()
    usual = dict(steps=STEPS, labels=[0, 0], seed=1)
    images = model.sample(2, **usual)
    assert np.array_equal(model.sample(2, **usual), images)
    for change in (
        {"seed": 2},
        {"labels": [1, 1]},
        {"labels": None},
        {"steps": 4},
        {"guidance": 3.0},
        {"spacing": "logsnr"},
        {"sampler": "ddpm"},
        {"sampler": "ddim:eta=1"},
    ):
        assert not np.array_equal(model.sample(2, **{**usual, **change}), images), change


@pytest.mark.parametrize("options", [{"guidance": 2.0, "labels": [0, 1]}, {"labels": None}])
def test_a_class_that_was_never_hidden_in_training_cannot_be_left_out(with_classes, options):
    """What stands for `no class` would be as random as at the beginning."""
    with pytest.raises(UserError, match="--label-dropout 0"):
        with_classes(label_dropout=0.0).sample(2, steps=2, **options)
    assert len(with_classes(label_dropout=0.1).sample(2, steps=2, **options)) == 2
    assert len(with_classes(label_dropout=0.0).sample(2, steps=2, labels=[0, 1])) == 2


def test_the_label_dropout_is_in_the_checkpoint(model, saved):
    assert model.label_dropout == 0.1
    path = saved(lambda state: state["cfg"]["criterion"].update(label_dropout=0.0))
    assert DiffusionModel.from_checkpoint(path, "cpu").label_dropout == 0


def test_sampling_leaves_model_and_random_numbers_alone(with_classes):
    model = with_classes()

    def digest():
        found = hashlib.sha256()
        for key, value in model.model.state_dict().items():
            found.update(key.encode() + value.numpy().tobytes())
        return found.hexdigest()

    before, state = digest(), torch.get_rng_state()
    parts = model.batches(range(4), steps=STEPS, batch_size=1, sampler="ddpm")
    next(parts)
    assert torch.is_grad_enabled(), "also while a batch is looked at"
    list(parts)
    assert digest() == before and torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.model.parameters())


def test_bf16_is_nearly_the_same(with_classes):
    model, modes = with_classes(), []
    model.model.net.conv_in.register_forward_hook(lambda *a: modes.append(a[2].dtype))
    usual = dict(steps=STEPS, labels=[0, 1])
    whole, half = model.sample(2, **usual), model.sample(2, bf16=True, **usual)
    assert set(modes[:STEPS]) == {torch.float32} and set(modes[STEPS:]) == {torch.bfloat16}
    assert np.abs(whole.astype(int) - half).mean() < 4


def test_watching(model):
    """After each step: the noisy images, and the guess at the last of them is what comes out."""
    seen = []
    ((_, images),) = model.batches(
        range(2), steps=STEPS, watch=lambda i, x, x0: seen.append((i, x.clone(), x0.clone()))
    )
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert np.array_equal(to_uint8(seen[-1][1]), images)
    assert np.array_equal(to_uint8(seen[-1][2]), images)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"steps": 1001}, "--steps 1001 is not possible.*1000 timesteps"),
        ({"steps": 0}, "--steps 0 is not possible"),
        ({"sampler": "ddpn"}, "unknown sampler 'ddpn': did you mean 'ddpm'"),
        ({"sampler": "ddim:eta=2"}, r"eta must be in \[0, 1\]"),
        ({"sampler": "ddim:etha=1"}, "'etha': did you mean 'eta'"),
        ({"spacing": "leading"}, "unknown spacing 'leading'.*known: logsnr, trailing"),
    ],
)
def test_mistakes_are_told_at_once(model, options, words):
    """Not when the first image is asked for."""
    with pytest.raises(UserError, match=words) as caught:
        model.batches([0], **options)
    assert "\n" not in str(caught.value)


def test_class_by_name(model, with_classes):
    assert [with_classes().class_index(name) for name in ("ant", "cat")] == [0, 2]
    with pytest.raises(
        UserError, match="--label dog is no class of the model; known: ant, bee, cat"
    ):
        with_classes().class_index("dog")
    with pytest.raises(UserError, match="known: none, it was trained without --class-labels"):
        model.class_index("3")


@pytest.mark.parametrize("average", [2, 5, -1])
def test_an_average_that_is_not_there(with_classes, average):
    with pytest.raises(UserError, match=f"--ema {average} is not there.* 0, 1$"):
        with_classes(average)


# --- checkpoints ---------------------------------------------------------------------------------


def damage(folder, whole):
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").touch()
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "folder").mkdir()
    speaker = {"speakers": ["a"], "spec": {"n_mels": 80}}
    of_speakers = {"model": {}, "task_state": speaker, "cfg": {"task": {"_name": "speaker_id"}}}
    torch.save(of_speakers, folder / "speaker.pt")
    torch.save({"args": Namespace(task="translation", arch="t"), "model": {}}, folder / "old.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"net.conv_in.weight": torch.zeros(1)}, folder / "weights.pt")
    torch.save({"model": {}, "run": os.system}, folder / "evil.pt")


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing.pt", "does not exist"),
        ("cut.pt", "truncated"),
        ("empty.pt", "truncated or no checkpoint"),
        ("text.pt", "no checkpoint at all"),
        ("folder", "is a folder: give one checkpoint in it"),
        ("speaker.pt", r"is of another task \(speaker_id\), not of diffusion"),
        ("old.pt", r"is of another task \(translation\)"),
        ("list.pt", "is not a checkpoint of fairseq-train"),
        ("weights.pt", "is not a checkpoint of fairseq-train"),
        ("evil.pt", "posix.system.*refused"),
    ],
)
def test_what_is_no_diffusion_model_is_refused_in_a_sentence(
    tiny_checkpoint, tmp_path, name, words
):
    damage(tmp_path, tiny_checkpoint.read_bytes())
    with pytest.raises(UserError, match=words) as caught:
        DiffusionModel.from_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("cfg"), "does not say how its model was built"),
        (lambda s: s["cfg"].pop("model"), "does not say how its model was built"),
        (lambda s: s["task_state"]["spec"].pop("classes"), "is of another task"),
        (lambda s: s["cfg"]["model"].update(base_channels=16), "does not fit this model"),
        (lambda s: s["cfg"]["model"].update(_name="my_net"), "model 'my_net', which is not known"),
        (lambda s: s["cfg"]["task"].update(beta_schedule="mine"), "unknown beta schedule 'mine'"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_sentence(saved, change, words):
    path = saved(change)
    with pytest.raises(UserError, match=words) as caught:
        DiffusionModel.from_checkpoint(path, "cpu")
    assert re.match(re.escape(str(path)), str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, options",
    [
        ({}, {}),
        (
            {"classes": ["a", "b"], "condition_size": 3},
            {"self_condition": True, "learned_variance": True, "ema_half_life": [10.0, 500.0]},
        ),
    ],
)
def test_the_network_is_the_one_that_fairseq_builds(tiny_checkpoint, spec, options):
    """Bit for bit, with any of its averages."""
    state = read_checkpoint(tiny_checkpoint)
    state["task_state"]["spec"].update(spec)
    state["cfg"]["model"].update(options)
    torch.manual_seed(1)
    state["model"] = {
        k: torch.randn(v.shape) * 0.1 for k, v in network_of(state).state_dict().items()
    }
    ours, theirs = (
        build_network(copy.deepcopy(state), tiny_checkpoint, PARTS, None, own).eval()
        for own in (network_of, None)
    )
    assert isinstance(theirs, BaseFairseqModel) and not isinstance(ours, BaseFairseqModel)
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 500])
    label = torch.tensor([1, 2]) if spec else None
    condition = torch.randn(2, 3) if spec else None
    for average in (None, *range(len(ours.ema.half_lives))):
        with torch.inference_mode():
            mine, other = (net(x, t, label, x, condition, average) for net in (ours, theirs))
        assert torch.equal(mine, other) and mine.std() > 0


def test_drawing_images_needs_no_fairseq(tiny_checkpoint, tmp_path):
    code = f"""
import sys
from diffusion_ext.sample import main
main(["drawn", "--path", {str(tiny_checkpoint)!r}, "--num", "2", "--steps", "2", "--device", "cpu"])
assert not {{"fairseq", "omegaconf", "scipy", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=with_root(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


def with_root():
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_a_device_that_is_not_there(tiny_checkpoint):
    with pytest.raises(UserError, match="device 'cuda:99' cannot be used"):
        DiffusionModel.from_checkpoint(tiny_checkpoint, "cuda:99")


PLUGIN = '''
from diffusion_ext.samplers import SAMPLERS

@SAMPLERS.register("gray_of_a_plugin")
def gray(denoise, x, path, noise, watch=None):
    """Middle gray."""
    return 0 * x
'''


def test_a_sampler_of_ones_own(tiny_checkpoint, tmp_path, fresh_samplers):
    (tmp_path / "my_diffusion_plugin").mkdir()
    (tmp_path / "my_diffusion_plugin" / "__init__.py").write_text(PLUGIN)
    folder = str(tmp_path / "my_diffusion_plugin")
    there = DiffusionModel.from_checkpoint(tiny_checkpoint, "cpu", user_dir=folder)
    assert "gray_of_a_plugin" in SAMPLERS.names()
    assert (there.sample(2, sampler="gray_of_a_plugin", steps=1) == 128).all()


def test_a_pack_draws_what_its_checkpoint_draws(model, tiny_checkpoint, tmp_path):
    path = tmp_path / "digits.zip"
    pack(str(tiny_checkpoint), str(path), PackOptions())
    theirs = DiffusionModel.from_checkpoint(path, "cpu")
    ours = model.sample(2, steps=STEPS, seed=3)
    np.testing.assert_array_equal(theirs.sample(2, steps=STEPS, seed=3), ours)
    assert "16 × 16 pixels" in Pack(path).read(CARD).decode()

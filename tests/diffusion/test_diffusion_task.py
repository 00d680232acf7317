"""The task: full updates in any number of processes, averages of the weights, previews, resuming."""

import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests import processes

pytest.importorskip("fairseq")

from fairseq.distributed import ModuleProxyWrapper

from diffusion_ext.ema import decay
from diffusion_ext.inference import DiffusionModel
from diffusion_ext.pictures import grid
from diffusion_ext.preview import preview_of
from diffusion_ext.randomness import training_draws, validation_draws
from diffusion_ext.store import Images
from ext_common import engine
from ext_common.cli import UserError
from ext_common.compat import resume
from ext_common.random import STREAM

COLORS = {"color_jitter": [0.5, 0.5, 0.5, 0.1]}


class TestSpec:
    def test_what_a_sample_needs_is_in_plain_types(self, build):
        spec = build({"class_labels": True, "hflip": 0.5, **COLORS}).task.state_dict()["spec"]
        assert {k: v for k, v in spec.items() if k != "content_hash"} == {
            "height": 8,
            "width": 8,
            "channels": 3,
            "classes": ["ant", "bee", "cat"],
            "condition_size": 5,
        }
        assert type(spec) is dict and type(spec["classes"]) is list
        assert {type(value) for value in spec.values()} == {int, list, str}

    @pytest.mark.parametrize(
        "task, size",
        [
            ({}, 0),
            ({"hflip": 0.5}, 1),
            (COLORS, 4),
            ({"augment": "hflip;color_jitter:hue=0.1"}, 5),
            ({"hflip": 0.5, "leaky_augment": True}, 0),
            ({"color_jitter": [0.0, 0.0, 0.0, 0.0]}, 0),
        ],
    )
    def test_width_of_the_condition(self, build, task, size):
        made = build(task)
        assert made.task.spec["condition_size"] == size and made.task.spec["classes"] == []
        assert (made.model.net.condition.in_features if size else made.model.net.condition) == (
            size or None
        )

    def test_outside_of_training_no_image_is_opened(self, build):
        saved = build({"class_labels": True, "hflip": 0.5}).task.state_dict()
        elsewhere = build.task({"data": "gone/away"})
        elsewhere.load_state_dict(saved)
        assert elsewhere.spec == saved["spec"] and elsewhere.state_dict() == saved


@pytest.mark.parametrize(
    "task, words",
    [
        ({"color_jitter": [0.5]}, "--color-jitter takes four numbers.*got 0.5"),
        ({"color_jitter": [0.5, 0.5, 0.5, 0.7]}, "hue 0.7 is not between 0 and 0.5"),
        ({"hflip": 50.0}, "p 50.0 is not between 0 and 1"),
        ({"augment": "hfilp"}, "'hfilp': did you mean 'hflip'"),
        ({"beta_schedule": "sigmoyd"}, "'sigmoyd': did you mean 'sigmoid'"),
        ({"timesteps": 1}, "--timesteps 1 is too few"),
        ({"sample_grid": 0}, "--sample-grid 0 is too small: give 1"),
        ({"sample_steps": 0}, "--sample-steps 0 is too small: give 1"),
        ({"sample_interval": -1}, "--sample-interval -1 is too small: give 0"),
        ({"image_size": [1]}, "images of 1 × 1 are too small"),
    ],
)
def test_mistakes_are_told_before_training(build, task, words):
    with pytest.raises(UserError, match=words) as caught:
        build(task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, words",
    [
        ({"head_channels": 0}, "--head-channels 0 must be at least 1"),
        ({"head_channels": 3}, "--head-channels 3 does not divide the 16"),
        ({"base_channels": 6}, "--base-channels is a multiple of 4.*got 6 and 1"),
        ({"blocks": 0}, "got 8 and 0"),
        ({"channel_mults": [1, 0]}, "--channel-mults"),
        ({"dropout": 1.0}, r"--dropout 1.0 is not in \[0, 1\)"),
        ({"ema_half_life": []}, "--ema-half-life"),
        ({"ema_ramp_up": 0.0}, "--ema-ramp-up"),
    ],
)
def test_networks_that_cannot_be_built(build, model, words):
    with pytest.raises(UserError, match=words) as caught:
        build(model=model)
    assert "\n" not in str(caught.value)


# --- batches -------------------------------------------------------------------------------------


def batches_of(task, split, epoch=1, **options):
    """The batches of an epoch, as lists of (id, row)."""
    if split not in task.datasets:
        task.load_dataset(split)
    iterator = task.get_batch_iterator(task.dataset(split), epoch=epoch, **options)
    batches = iterator.next_epoch_itr(shuffle=split == "train")
    return [list(zip(b["id"].tolist(), b["row"].tolist(), strict=True)) for b in batches if b]


@pytest.mark.parametrize("size, freq, shards", [(4, 1, 1), (5, 2, 1), (3, 2, 2), (64, 1, 3)])
def test_every_update_is_full(build, size, freq, shards):
    """Batches of the same size, at least epoch_updates of updates, every image, none in two processes."""
    task = build.task({"update_freq": [freq], "epoch_updates": 3, "valid_fraction": 0.2})
    parts = [
        batches_of(
            task,
            "train",
            max_sentences=size,
            num_shards=shards,
            shard_id=shard,
            required_batch_size_multiple=8,
        )
        for shard in range(shards)
    ]
    assert {len(batch) for part in parts for batch in part} == {size}
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) % freq == 0
    updates = len(parts[0]) // freq
    assert updates == max(
        3, -(-len(task.images.rows("train", 0.2, 1000)) // (size * freq * shards))
    )
    ids = [i for part in parts for batch in part for i, _ in batch]
    assert sorted(ids) == list(range(updates * size * freq * shards))
    rows = [row for part in parts for batch in part for _, row in batch]
    assert set(rows) == set(task.images.rows("train", 0.2, 1000).tolist())


def test_two_processes_have_the_images_of_two_accumulated_batches(build):
    def updates(freq, shards):
        task = build.task({"update_freq": [freq]})
        parts = [
            batches_of(task, "train", max_sentences=4, num_shards=shards, shard_id=shard)
            for shard in range(shards)
        ]
        if shards == 1:
            (only,) = parts
            return [sorted(sum(only[i : i + freq], [])) for i in range(0, len(only), freq)]
        return [sorted(sum(rank, [])) for rank in zip(*parts, strict=True)]

    together = updates(2, 1)
    assert together == updates(1, 2) and len(together) >= 500


def test_update_freq_changes_with_the_epoch(build):
    task = build.task({"update_freq": [1, 3], "epoch_updates": 7})
    for epoch, freq in ((1, 1), (2, 3), (5, 3)):
        found = batches_of(task, "train", epoch=epoch, max_sentences=4)
        assert len(found) == 7 * freq
    first, second = (batches_of(task, "train", epoch=n, max_sentences=4) for n in (2, 3))
    assert first != second, "another order in another epoch"


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_no_image_is_dropped_in_validation(build, size):
    """fairseq's own iterator rounds batches to a multiple of 8."""
    task = build.task({"valid_fraction": 0.3})
    held_out = task.images.rows("valid", 0.3, 1000)
    for shards in (1, 2, 5):
        found = []
        for shard in range(shards):
            found += batches_of(
                task,
                "valid",
                max_sentences=size,
                num_shards=shards,
                shard_id=shard,
                required_batch_size_multiple=8,
            )
        assert sorted(row for batch in found for _, row in batch) == held_out.tolist()
        assert all(len(batch) <= size for batch in found)
    assert not set(held_out) & set(task.images.rows("train", 0.3, 1000))


def test_an_epoch_left_in_the_middle_is_taken_up_again(build):
    def fresh():
        task = build.task({})
        task.load_dataset("train")
        return task.get_batch_iterator(task.dataset("train"), max_sentences=4, epoch=2)

    def take(batches, n):
        return [next(batches)["row"].tolist() for _ in range(n)]

    iterator = fresh()
    batches = iterator.next_epoch_itr(shuffle=True)
    take(batches, 5)
    state = iterator.state_dict()
    rest = take(batches, 6)
    again = fresh()
    again.load_state_dict(state)
    assert take(again.next_epoch_itr(shuffle=True), 6) == rest


def test_nothing_to_train_or_validate_on(build):
    task = build.task({"valid_fraction": 0.0})
    with pytest.raises(UserError, match="--valid-fraction 0.0 holds out no image.*--disable-valid"):
        task.load_dataset("valid")
    task.load_dataset("train")
    assert len(task.dataset("train").rows) == 24
    with pytest.raises(UserError, match="--batch-size, the images of a batch, is missing"):
        task.get_batch_iterator(task.dataset("train"))


# --- updates -------------------------------------------------------------------------------------


class Optimizer:
    """What fairseq hands to `optimizer_step`: adds 1 to every weight."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def step(self, *args, **kwargs):
        for weight in self.model.net.parameters():
            weight.add_(1.0)


def steps(made, count, first=0, wrap=lambda model: model):
    for update in range(first, first + count):
        made.task.optimizer_step(Optimizer(made.model), wrap(made.model), update)


@pytest.mark.parametrize("freq, world, size", [(1, 1, 4), (3, 2, 4), (2, 1, 8)])
def test_averages_count_the_images_of_all_processes_and_batches(
    build, freq, world, size, monkeypatch
):
    """Closed form: a = w_0 + k − Σ_{j<k} Π_{i>j} d_i for weights that grow by 1 an update."""
    monkeypatch.setattr("diffusion_ext.task.get_data_parallel_world_size", lambda: world)
    options = {"update_freq": [freq], "batch_size": size}
    halves = [30.0, 1000.0]
    made = build(
        {**options, "sample_interval": 0}, model={"ema_half_life": halves, "ema_ramp_up": 0.5}
    )
    images = freq * world * size
    before = made.model.ema.weights.clone()
    steps(made, 12)
    for row, half_life in enumerate(halves):
        behind = 0.0  # how far the average is behind the weights
        for update in range(1, 13):
            # the half-life in force is at most half of the images seen
            share = 0.5 ** (images / min(half_life, 0.5 * update * images))
            assert share == pytest.approx(decay(half_life, update * images, images, 0.5))
            behind = share * (behind + 1)
        torch.testing.assert_close(made.model.ema.weights[row], before[row] + 12 - behind)


def test_a_step_that_is_tried_again_counts_once(build):
    """As --amp does after an overflow, with the same number of the update."""
    made = build({"sample_interval": 0}, model={"ema_half_life": [30.0]})
    steps(made, 3)
    kept = made.model.ema.weights.clone()
    steps(made, 1, first=2)
    assert torch.equal(made.model.ema.weights, kept)
    steps(made, 1, first=3)
    assert not torch.equal(made.model.ema.weights, kept)


def test_an_overflow_is_left_out_of_the_average_and_the_retry_taken(build):
    """fairseq's --amp with torch's scaler, on CPU: update 2 overflows twice, then one is skipped for good.

    The average is that of a run without overflows, which has the same updates.
    """
    averages, weights = [], []
    for attempts in ("+++", "+--+-+"):
        made = build({"sample_interval": 0}, model={"ema_half_life": [30.0]})
        optimizer = amp_optimizer(made.model.net.parameters())
        update = 0
        for attempt in attempts:
            for weight in made.model.net.parameters():
                # what multiply_grads and clip_grad_norm leave: the scale is taken out already
                weight.grad = torch.full_like(weight, 1.0 if attempt == "+" else torch.inf)
                weight.grad *= optimizer.scaler.get_scale()
            optimizer.scaler.scale(torch.zeros(1))
            optimizer.clip_grad_norm(0.0)
            made.task.optimizer_step(optimizer, made.model, update)
            update += attempt == "+"
        averages.append(made.model.ema.weights.clone())
        weights.append([weight.detach().clone() for weight in made.model.net.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    assert torch.equal(*averages)


def amp_optimizer(parameters):
    """fairseq's optimizer for --amp around SGD, with a scaler that works on CPU."""
    from fairseq.optim.amp_optimizer import AMPOptimizer

    cfg = OmegaConf.create(
        {"common": {"fp16_init_scale": 128, "min_loss_scale": 1e-4}, "optimizer": {}}
    )
    sgd = SimpleNamespace(optimizer=torch.optim.SGD(parameters, lr=0.125))
    sgd.step, sgd.clip_grad_norm = sgd.optimizer.step, lambda *args: torch.tensor(1.0)
    sgd.param_groups = sgd.optimizer.param_groups
    optimizer = AMPOptimizer(cfg, None, sgd)
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    return optimizer


def test_checkpoints_do_not_go_into_the_images(build, small_images, tmp_path):
    """The grids of samples in --save-dir would be trained on by the next start."""
    for place in (small_images, small_images / "checkpoints"):
        with pytest.raises(UserError, match="--save-dir .* lies in the folder of images"):
            len(build.task({"save_dir": str(place)}).images)
    assert len(build.task({"save_dir": str(small_images.parent / "checkpoints")}).images) == 24


def test_averages_of_weights_that_stand_still_are_the_weights(build):
    made = build({"sample_interval": 0})
    kept = made.model.ema.weights.clone()
    for update in range(20):
        made.task.optimizer_step(SimpleNamespace(step=lambda **kwargs: None), made.model, update)
    assert torch.equal(made.model.ema.weights, kept)


def test_averages_follow_the_update_freq_of_the_epoch(build, monkeypatch):
    made = build({"update_freq": [1, 5], "sample_interval": 0})
    counted = []
    monkeypatch.setattr(made.model.ema, "update", lambda net, seen, images: counted.append(images))
    for epoch in (1, 2, 3):
        made.task.begin_epoch(epoch, made.model)
        steps(made, 1, first=epoch)
    assert counted == [4, 20, 20]


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel, which fairseq wraps once more."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_averages_after_the_optimizer_and_of_what_a_wrapper_holds(build):
    """Data parallel training hands over the model as `module`."""
    plain = build({"sample_interval": 0})
    steps(plain, 3)
    for wrap in (Wrapper, lambda model: ModuleProxyWrapper(Wrapper(model))):
        wrapped = build({"sample_interval": 0})
        steps(wrapped, 3, wrap=wrap)
        assert torch.equal(plain.model.ema.weights, wrapped.model.ema.weights)
    # half-life 0 is no average: what was set by the optimizer just now
    bare = build({"sample_interval": 0}, model={"ema_half_life": [0.0]})
    steps(bare, 1)
    for name, weight in bare.model.net.named_parameters():
        assert torch.equal(bare.model.ema.of(0)[name], weight)


def test_the_criterion_knows_the_update(build):
    """Of every accumulated batch: noise and timesteps are drawn for it."""
    made, seen = build(), []
    made.criterion.forward = lambda model, sample: (
        seen.append(made.criterion.num_updates) or (sum(p.sum() for p in model.parameters()), 1, {})
    )
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    for update in (0, 0, 41):
        made.task.train_step({}, made.model, made.criterion, optimizer, update)
    assert seen == [0, 0, 41]


# --- previews ------------------------------------------------------------------------------------


def state_of(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {name: value.detach().clone() for name, value in tensors.items()}
    return found, {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


TITLE = 16  # pixels, height of the line over a preview


@pytest.fixture
def previewing(build, tmp_path):
    """A model in the middle of an update, with dropout, labels and self-conditioning."""
    made = build(
        {"sample_interval": 2, "sample_grid": 2, "sample_steps": 3, "save_dir": str(tmp_path)}
        | {"class_labels": True, "hflip": 0.5},
        model={"self_condition": True, "dropout": 0.5},
    )
    made.model.train()
    loss = made.model(torch.ones(2, 3, 8, 8), torch.tensor([1, 50])).square().sum()
    loss.backward()
    made.folder = tmp_path / "samples"
    return made


def test_a_preview_leaves_no_trace(previewing):
    """Pitfall 18: weights, averages, gradients, mode and the random numbers of training."""
    model = previewing.model
    weights, gradients = state_of(model)
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    np.random.seed(5)
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()
    previewing.task.preview.draw(model, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], other)
    after, then = state_of(model)
    assert gradients and gradients.keys() == then.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert all(torch.equal(then[name], gradients[name]) for name in gradients)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    # the same again: dropout was off, noise is fixed
    torch.manual_seed(6)
    previewing.task.preview.draw(model, 2)
    first, second = (np.asarray(Image.open(path)) for path in sorted(previewing.folder.iterdir()))
    assert np.array_equal(first[TITLE:], second[TITLE:])
    assert not np.array_equal(first[:TITLE], second[:TITLE]), "the update is named"


def test_a_preview_shows_the_averaged_weights_a_class_a_row(previewing):
    model, cfg = previewing.model, previewing.task.cfg
    with torch.no_grad():
        for weight in model.net.parameters():
            weight.zero_()
    cfg.sample_grid = 3
    previewing.task.preview.draw(model, 1)
    drawn = DiffusionModel(model.eval(), cfg, previewing.task.spec)
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    images = drawn.sample(9, steps=3, seed=0, batch_size=9, labels=labels)
    shown = np.asarray(Image.open(previewing.folder / "update_0000001.png"))
    sheet = grid(images, 3).transpose(1, 2, 0).repeat(6, 0).repeat(6, 1)
    # below the title, beside the names ant, bee and cat
    left = shown.shape[1] - sheet.shape[1]
    assert np.array_equal(shown[TITLE:, left:], sheet) and left > 20
    assert shown[TITLE:, :left].min() < 99
    # zero weights predict v = 0: of those an image would be its noise, whatever its label
    with torch.no_grad():
        model.ema.weights.zero_()
    assert not np.array_equal(drawn.sample(9, steps=3, seed=0, labels=labels), images)


def test_a_preview_of_more_classes_than_it_has_room_for(previewing):
    drawn = DiffusionModel(previewing.model.eval(), previewing.task.cfg, previewing.task.spec)
    seen = []

    def batches(numbers, labels, **options):
        seen.append(labels)
        yield None, np.zeros((len(numbers), 3, 8, 8), np.uint8)

    drawn.batches = batches
    drawn.spec["classes"] = [f"class {k}" for k in range(10)]
    preview_of(drawn, previewing.task.cfg, 1, False)
    assert seen == [[0, 2, 5, 7]]


def test_the_first_preview_comes_after_a_minute(previewing, monkeypatch):
    """Once, and not where an earlier start has drawn one, nor while speed is measured."""
    clock = [0.0]
    monkeypatch.setattr("diffusion_ext.preview.time.monotonic", lambda: clock[0])
    task, drawn = previewing.task, []
    task.preview.began, task.cfg.sample_interval = 0.0, 1000

    def draw(model, update):
        drawn.append(update)
        task.preview.drawn = True

    monkeypatch.setattr(task.preview, "draw", draw)
    steps(previewing, 2)
    clock[0], task.being_measured = 61.0, True
    steps(previewing, 2)
    assert not drawn
    task.being_measured = False
    steps(previewing, 2)
    assert drawn == [1]
    task.preview.drawn = False
    previewing.folder.mkdir()
    (previewing.folder / "update_0000003.png").touch()
    assert not task.preview.is_due()


def test_previews_come_every_so_many_updates(previewing):
    steps(previewing, 5)
    assert sorted(path.name for path in previewing.folder.iterdir()) == [
        "update_0000002.png",
        "update_0000004.png",
    ]


def test_a_preview_that_fails_leaves_the_model_in_training(previewing, monkeypatch):
    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr("diffusion_ext.preview.preview_of", full_disk)
    with pytest.raises(OSError, match="no space"):
        previewing.task.preview.draw(previewing.model, 1)
    assert previewing.model.training


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_draws(previewing, monkeypatch, rank):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    previewing.task.preview.draw(previewing.model, 1)
    assert previewing.folder.exists() == (rank == 0)


def test_steps_are_no_more_than_the_schedule_has(build, tmp_path):
    made = build({"timesteps": 4, "sample_grid": 1, "save_dir": str(tmp_path)})
    made.task.preview.draw(made.model, 1)
    assert (tmp_path / "samples" / "update_0000001.png").exists()


# --- resuming ------------------------------------------------------------------------------------


def saved(made):
    """What a checkpoint says of its task."""
    return {"task_state": made.task.state_dict(), "cfg": {"task": dict(made.task.cfg)}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_size": [16]}, "has height 16, the checkpoint was trained with 8"),
        ({"image_size": [8, 16]}, "has width 16, the checkpoint was trained with 8"),
        ({"channels": 1}, "has channels 1, the checkpoint was trained with 3"),
        ({"class_labels": False}, r"has classes \[\], .*\['ant', 'bee', 'cat'\]"),
        ({"leaky_augment": True}, "has condition_size 0, the checkpoint was trained with 1"),
        ({"objective": "eps"}, "--objective is eps, the checkpoint was trained with v"),
        ({"timesteps": 50}, "--timesteps is 50, the checkpoint was trained with 100"),
        ({"beta_schedule": "cosine"}, "--beta-schedule is cosine, .* trained with sigmoid"),
        ({"zero_terminal_snr": True}, "--zero-terminal-snr is True, .* trained with False"),
    ],
)
def test_another_training_is_not_continued(build, change, words):
    usual = {"class_labels": True, "hflip": 0.5}
    state = saved(build(usual))
    build(usual).task.check_resume(state, same_run=True)
    task = build.task({**usual, **change})
    with pytest.raises(UserError, match=words) as caught:
        task.check_resume(state, same_run=True)
    said = str(caught.value)
    assert "\n" not in said and "new --save-dir" in said
    # who takes over the weights alone means it
    task.check_resume(state, same_run=False)


def test_classes_of_the_same_number_and_other_names_are_refused(build, small_images, tmp_path):
    """The weights would fit, and every label mean another class."""
    other = tmp_path / "other"
    for old, new in (("ant", "yak"), ("bee", "bee"), ("cat", "cat")):
        shutil.copytree(small_images / old, other / new)
    state = saved(build({"class_labels": True}))
    task = build.task({"class_labels": True, "data": str(other)})
    with pytest.raises(UserError, match="'bee', 'cat', 'yak'"):
        task.check_resume(state, same_run=True)


def test_other_images_are_told_and_trained_on(build, small_images, tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(small_images, other)
    state = saved(build())
    task = build.task({"data": str(other)})
    task.check_resume(state, same_run=True)
    assert not caplog.records and not task.compare_anew, "the same images in another place"
    next(other.rglob("*.png")).unlink()
    task = build.task({"data": str(other)})
    task.check_resume(state, same_run=True)
    assert "holds other images than the checkpoint was trained on" in task.compare_anew


def test_losses_of_another_unit_are_not_compared(build):
    state = saved(build())
    state["cfg"]["criterion"] = {"loss_weighting": "min_snr"}
    task = build.task({})
    task.check_resume(state, same_run=True)
    assert task.compare_anew.startswith("--loss-weighting is none and was min_snr")


def test_what_was_trained_on_is_never_held_out(build):
    """24 images: 1 of them is held out at 5 %, 7 at 30 %, 3 at 12 %."""
    state = saved(build({"valid_fraction": 0.12}))
    with pytest.raises(UserError, match="0.3 .* hold out 4 images that .* trained on: give 0.12"):
        build.task({"valid_fraction": 0.3}).check_resume(state, same_run=True)
    fewer = build.task({"valid_fraction": 0.05})
    fewer.check_resume(state, same_run=True)
    assert fewer.compare_anew == "1 images are held out and not 3"
    same = build.task({"valid_fraction": 0.5, "max_valid": 3})
    same.check_resume(state, same_run=True)
    assert not same.compare_anew


@pytest.mark.parametrize(
    "then, now, refused",
    [
        ({}, {"hflip": 0.5, "leaky_augment": True}, True),
        ({"hflip": 0.5, "leaky_augment": True}, {}, True),
        ({"hflip": 0.5, "leaky_augment": True}, {"hflip": 0.9, "leaky_augment": True}, True),
        ({"hflip": 0.5, "leaky_augment": True}, {"hflip": 0.5, "leaky_augment": True}, False),
        ({"hflip": 0.5}, {"hflip": 0.2}, False),
        ({}, {"leaky_augment": True}, False),
    ],
)
def test_leaky_augmentation_stays_as_it_is(build, then, now, refused):
    state, task = saved(build(then)), build.task(now)
    if refused:
        with pytest.raises(UserError, match="with --leaky-augment samples show it"):
            task.check_resume(state, same_run=True)
    else:
        task.check_resume(state, same_run=True)


def test_an_old_checkpoint_goes_on_with_its_stream(build):
    """It says none; what takes over its weights alone draws as all new ones."""
    made = build({"seed": 3})
    state, batch = saved(made), {"id": torch.tensor([5]), "label": torch.tensor([-1])}
    assert state["task_state"].pop("stream") == STREAM
    batch["image"] = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    made.task.check_resume(state, same_run=False)
    assert made.task.stream == STREAM
    made.task.check_resume(state, same_run=True)
    for training in (True, False):
        found = made.criterion.train(training).batch(batch)
        if training:
            t, noise, _ = training_draws(3, 0, [5], (3, 8, 8), 100, 1, stream=None)
        else:
            t, noise = validation_draws([5], (3, 8, 8), 100, stream=None)
        assert torch.equal(found["noise"], noise) and torch.equal(found["t"], t)
    assert made.task.state_dict()["stream"] is None
    again = build.task({})
    again.load_state_dict(state["task_state"])
    assert again.stream is None


def test_what_a_task_takes_over_it_takes_over_in_every_process(build, monkeypatch):
    """The first one reads the file and sends what it read; it is asked once."""
    made = build()
    state, asked = saved(made), []
    made.task.check_resume = lambda state, same_run: asked.append(same_run)
    for rank in (0, 1):
        trainer = SimpleNamespace(data_parallel_rank=rank, task=made.task)
        monkeypatch.setattr(resume, "_resuming", [resume.Resuming(trainer, True)])
        engine._ask_the_others(state)
        assert asked == [True] * rank


def test_a_checkpoint_of_another_task_is_left_to_its_weights(build):
    """They do not fit, and the error says so."""
    for state in ({}, {"task_state": {}}, {"task_state": {"spec": {"n_mels": 80}}}):
        build.task({}).check_resume(state, same_run=True)


def test_training_asks_before_it_resumes(tiny_checkpoint, tmp_path):
    """fairseq itself calls no load_state_dict of a task when a training continues."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(tiny_checkpoint.parent, folder)
    before = (folder / "checkpoint_last.pt").read_bytes()
    data = tiny_checkpoint.parent.parent / "data"
    assert len(Images.open(data)) == 1797
    args = f"""{data} --save-dir {folder} --max-update 3 --sample-interval 0 --base-channels 8
        --head-channels 8 --batch-size 8 --objective x0"""
    done = processes.run(
        [sys.executable, "-m", "diffusion_ext.train", *args.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: --objective is x0, the checkpoint was trained with v" in done.stderr
    assert (folder / "checkpoint_last.pt").read_bytes() == before


def test_flags_that_help_names_exist(build, monkeypatch, capsys):
    from fairseq import options
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    from diffusion_ext.criterion import DdpmCriterionConfig
    from diffusion_ext.model import DdpmUNetConfig
    from diffusion_ext.task import DiffusionConfig
    from diffusion_ext.train import main

    monkeypatch.setattr(sys, "argv", ["fairseq-train", "data"])
    parser = options.get_training_parser()
    for config in (DiffusionConfig, DdpmUNetConfig, DdpmCriterionConfig):
        gen_parser_from_dataclass(parser, config(), delete_default=True)
    with pytest.raises(SystemExit):
        main(["--help"])
    named = re.findall(r"--[a-z-]+", capsys.readouterr().out.split("asked for most")[1])
    assert len(named) > 20
    # --warmup-updates is the LR schedule's
    known = {*parser._option_string_actions, "--all-help", "--warmup-updates"}
    assert set(named) <= known, set(named) - known


@pytest.mark.parametrize(
    "heights, said", [([4], False), ([0], False), ([16], True), ([16, 8], False), ([], False)]
)
def test_attention_at_a_height_that_there_is_not_is_said(build, caplog, heights, said):
    build(model={"attention_resolutions": heights})
    assert ("none of the heights [8, 4]" in caplog.text) == said


def test_muon_takes_the_matrices_between_the_first_and_the_last_convolution(build):
    from ext_common.muon import numbers_of

    net = build().model.net
    params = dict(net.named_parameters())
    numbers = dict(zip(params, numbers_of(list(params.values())), strict=True))
    left = {name for name, number in numbers.items() if not number and params[name].dim() > 1}
    assert left == {"conv_in.weight", "conv_out.weight"}
    assert sum(map(bool, numbers.values())) > 20 and numbers["time_1.weight"] == 1

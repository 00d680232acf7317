"""The watch over copies: what is one, when it is said, how a training ends by it; the gap of the losses."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fairseq")

from fairseq.logging import metrics

from diffusion_ext.criterion import DdpmCriterion
from diffusion_ext.evaluate.watch import Watch, copies
from diffusion_ext.presets import FEW, Facts, choose
from ext_common.compat.resume import why_finished
from ext_common.presets import Machine


def pictures(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


def near(image, by, seed=9):
    """An image changed by ± `by` everywhere."""
    signs = np.random.default_rng(seed).integers(0, 2, image.shape) * 2 - 1
    return (image.astype(int) + by * signs).clip(0, 255).astype(np.uint8)


def test_copies_are_told_from_new_images_of_the_same_kind():
    """Exact, and nearly so; of random images every distance is about the same, so none is a third."""
    train, held_out, new = pictures(50, 1), pictures(20, 2), pictures(30, 3)
    found = copies(new, train, held_out)
    assert found.share == 0 and found.nearest == pytest.approx(1, abs=0.05)
    samples = np.concatenate([new[:18], train[:6], near(train[6:12], 5)])
    found = copies(samples, train, held_out)
    assert found.share == 12 / 30
    assert copies(near(train[:10], 5), train, held_out).nearest < 0.1
    # an image that is there twice has two nearest ones, and is a copy all the same
    doubled = np.concatenate([train, train])
    assert copies(train[:4], doubled, held_out).share == 1
    assert np.isnan(copies(new, train, held_out[:0]).nearest)


def images_of(train, held_out):
    pixels = np.concatenate([train, held_out])
    split = {"train": np.arange(len(train)), "valid": np.arange(len(train), len(pixels))}
    return SimpleNamespace(pixels=pixels, rows=lambda name, *_: split[name])


def options_of(**changes):
    common = dict(watch_copies=True, stop_at_copies=False, valid_fraction=0.1, max_valid=10)
    return SimpleNamespace(**{**common, **changes})


@pytest.mark.parametrize("stop", [False, True])
def test_the_update_from_which_copies_are_drawn_is_said_and_may_end_the_training(stop, caplog):
    train = pictures(50, 1)
    images, options = images_of(train, pictures(20, 2)), options_of(stop_at_copies=stop)
    watch = Watch(options)
    trainer = SimpleNamespace(
        get_num_updates=lambda: 300,
        cumulative_training_time=lambda: 1.0,
        task=SimpleNamespace(),
    )
    cfg = SimpleNamespace(
        optimization=SimpleNamespace(max_update=500, stop_time_hours=0),
        checkpoint=SimpleNamespace(patience=-1),
    )
    for update, samples in ((100, pictures(20, 4)), (200, train[:20]), (300, train[:20])):
        watch.look(samples, images, options, update)
        assert watch.since == (None if update == 100 else 200)
        trainer.task.is_done = watch.ended
        said = why_finished(cfg, trainer)
        assert (said is not None) == (stop and update > 100)
    assert caplog.text.count("from update 200 on samples are copies") == 1
    assert not stop or "since update 200 (--stop-at-copies)" in said
    # samples that are none any more take it back
    watch.look(pictures(20, 5), images, options, 400)
    assert watch.since is None


def test_the_gap_between_the_losses_is_logged_by_quarter(build):
    """Validation twice, on held-out and on training images with the same noise: their ratio less one."""
    made = build({"watch_copies": True, "valid_fraction": 0.3})
    task = made.task
    for split in ("train", "valid"):
        task.load_dataset(split)
    made.model.eval(), made.criterion.eval()
    sample = task.dataset("valid").collater([task.dataset("valid")[k] for k in range(6)])
    _, _, log = task.valid_step(sample, made.model, made.criterion)
    metrics.reset()
    with metrics.aggregate() as agg:
        DdpmCriterion.reduce_metrics([log])
    logged = agg.get_smoothed_values()
    seen = [q for q in range(1, 5) if float(log[f"count_{q}"])]
    assert seen
    for q in seen:
        expected = float(log[f"sum_{q}"] / log[f"train_sum_{q}"]) - 1
        assert logged[f"gap_q{q}"] == pytest.approx(expected, abs=1e-4) and expected != 0
    # the training images at the same levels: as many in each quarter, and other errors
    without = build({"valid_fraction": 0.3}).task.valid_step(sample, made.model, made.criterion)[2]
    assert not any(key.startswith("train_") for key in without)
    assert {k: float(v) for k, v in without.items()} == {
        k: float(v) for k, v in log.items() if not k.startswith("train_")
    }


@pytest.mark.parametrize("count, few", [(FEW - 1, True), (FEW, False)])
def test_few_images_are_watched_and_augmented_a_little(count, few):
    flags = {}
    for choice in choose(Facts(32, 32, 3, count), Machine(), {}):
        flags |= choice.flags
    assert ("--stop-at-copies" in flags) == few and (flags["--dropout"] == "0.1") == few
    assert flags.get("--augment") == ("hflip:p=0.15;color_jitter:p=0.15" if few else None)

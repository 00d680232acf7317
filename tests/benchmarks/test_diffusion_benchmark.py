"""The benchmark compares like with like, and one command runs all of it."""

import json
import math
import multiprocessing
import statistics
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image

from tests import processes

pytest.importorskip("fairseq")
peer = pytest.importorskip("denoising_diffusion_pytorch")

from benchmarks.diffusion import cases, curves, sides  # noqa: E402
from benchmarks.diffusion import speed as benchmark  # noqa: E402
from ext_common.checkpoints import untouched_logging  # noqa: E402
from ext_common.cli import UserError  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    cases.write_images(folder / "small", 110, sides.SIZE)
    cases.write_images(folder / "large", 110, cases.LARGE, seed=2)
    cases.write_images(folder / "digits", 40, 16, seed=3)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # as a program of its own the benchmark silences the root logger, and with it the tests that follow
    with untouched_logging():
        yield
    torch.set_num_threads(before)


def pair_of(folder, seed=1, flags=""):
    """Both programs around one network whose output is not 0, as it is at first."""
    pair = curves.Pair(folder / "digits", folder / "store", 4, seed, flags)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        networks = pair.model.net.parameters(), pair.diffusion.model.net.parameters()
        for p, q in zip(*networks, strict=True):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
            q.copy_(p)
    return pair


def losses_of(pair, x0, t, noise):
    """The loss of each image by both programs, at the same timesteps and with the same noise."""
    a, s = pair.criterion.levels(t)
    batch = dict(x0=x0, noise=noise, t=t, x_t=a * x0 + s * noise, label=None, condition=None)
    ours, _ = pair.criterion.losses(pair.model, batch)
    # they are given images in [0, 1]
    theirs = pair.diffusion((x0 + 1) / 2, times=t, noise=noise.clone(), loss_reduction="none")
    return ours, theirs


def draws(shape=(1, 16, 16)):
    """Both ends of the schedule and timesteps all over it."""
    generator = torch.Generator().manual_seed(5)
    t = torch.tensor([0, 1, 2, 10, 100, 250, 499, 500, 750, 900, 990, 997, 998, 999])
    x0 = torch.rand((len(t), *shape), generator=generator) * 2 - 1
    return x0, t, torch.randn((len(t), *shape), generator=generator)


def test_same_loss_and_gradients(folder):
    pair = pair_of(folder)
    ours, theirs = losses_of(pair, *draws())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.max() > 0.05  # 0 at the last timestep, where their weight is ᾱ
    ours.sum().backward()
    theirs.sum().backward()
    gradients = pair.model.net.named_parameters(), pair.diffusion.model.net.parameters()
    for (name, p), q in zip(*gradients, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_their_schedule_is_ours_with_tau_1(folder):
    """But for the last timestep, where theirs has what single precision leaves of the sigmoid's end."""
    pair = pair_of(folder)
    ours, theirs = pair.task.schedule.alpha, pair.diffusion.sqrt_alphas_cumprod.double()
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=0, atol=1e-6)
    assert 0 < theirs[-1] < 1e-3 and 0 < ours[-1] < 1e-3
    weight = pair.criterion.table("weight", torch.device("cpu"))
    torch.testing.assert_close(weight, pair.diffusion.loss_weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.double(), pair.task.schedule.alphas_cumprod)


@pytest.mark.parametrize("flags", ["--loss-weighting none", "--beta-schedule sigmoid"])
def test_our_defaults_are_another_loss(folder, flags):
    """So the flags of the benchmark are needed, and the tests above could have failed."""
    ours, theirs = losses_of(pair_of(folder, flags=flags), *draws())
    assert not torch.allclose(ours, theirs, rtol=0.05)


def test_curves_begin_at_one_point_and_follow_the_draws(folder):
    found = curves.compare_curves(folder, batch=4, updates=4, seeds=1)
    assert found["largest_relative_difference_same_draws"] < 1e-4
    ours, theirs = found["curves"]["ours"], found["curves"]["theirs"]
    assert len(ours) == len(theirs) == 4 and not np.allclose(ours, theirs, rtol=1e-3)
    end = found["last_half"]["ours"]
    assert end["mean"] == pytest.approx(statistics.mean(ours[2:]))
    assert found["difference"] == pytest.approx(np.mean(ours[2:]) - np.mean(theirs[2:]))


def test_standard_error():
    assert curves.mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / math.sqrt(3)))


def test_curve_in_blocks():
    run = [float(k) for k in range(20)]
    assert curves.in_blocks([run, run]) == [0.5 + 2 * k for k in range(10)]
    assert curves.in_blocks([[1.0, 3.0], [2.0, 4.0]]) == [1.5, 3.5]


def test_training_sides_compute_as_they_are_called(folder):
    found = {}
    for name in ("ours, bfloat16", "ours, float32", *sides.THEIRS):
        side = sides.training_side(name, folder, 16, 1)
        ours = name in sides.OURS
        net = side.trainer.get_model().net if ours else side.trainer.model.model
        # a convolution in the middle of the network
        layer = net.middle_1.conv_1 if ours else net.mid_block1.block1.proj
        # what a first update changes, where ours begins at 0
        last_layer = net.conv_out if ours else net.final_conv
        dtypes, before = [], last_layer.weight.detach().clone()
        layer.register_forward_hook(lambda _, args, out, seen=dtypes: seen.append(out.dtype))
        assert side() == 16
        assert dtypes == [torch.bfloat16 if "bfloat16" in name else torch.float32], name
        assert layer.weight.dtype == torch.float32
        assert not torch.equal(last_layer.weight, before)
        updates = side.trainer.get_num_updates() if ours else int(side.trainer.ema.step)
        assert updates == 1
        found[name] = side.parameters
    # ours is no smaller network of the same width
    assert found["ours, bfloat16"] > found["theirs, float32"]


def test_trainers_have_the_same_optimizer(folder):
    ours = sides.training_side("ours, float32", folder, 16, 1).trainer
    theirs = sides.training_side("theirs, float32", folder, 16, 1).trainer
    a, b = ours.optimizer.optimizer.param_groups[0], theirs.opt.optimizer.param_groups[0]
    assert {k: a[k] for k in ("betas", "eps", "weight_decay")} == {
        k: b[k] for k in ("betas", "eps", "weight_decay")
    }
    assert ours.cfg.optimization.clip_norm == theirs.max_grad_norm == 1
    assert ours.cfg.optimization.lr == [theirs.opt.optimizer.param_groups[0]["lr"]]
    assert theirs.gradient_accumulate_every == 1


def test_samplers_ask_their_networks_equally_often(folder, monkeypatch):
    from diffusion_ext.unet import UNet

    monkeypatch.setattr(sides, "WIDTH", 8)
    monkeypatch.setattr(sides, "SAME_WIDTH", "--base-channels 8 --channel-mults 1,2,4")
    asked = []

    def watch(network):
        forward = network.forward

        def watched(self, x, *args, **kwargs):
            out = forward(self, x, *args, **kwargs)
            asked.append((len(x), out.dtype))
            return out

        monkeypatch.setattr(network, "forward", watched)

    watch(UNet)
    watch(peer.Unet)
    for name in ("ours, ddim", "ours, dpmpp_2m", "theirs, ddim", "ours, dpmpp_2m, bfloat16"):
        asked.clear()
        assert sides.sampling_side(name, folder, 2, 3)() == 2
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        assert asked == [(2, dtype)] * 3, name


def test_both_readers_give_the_images_of_the_folder(folder):
    names = ["ours, cold", "ours, warm", "theirs"]
    readers = sides.Readers(names, folder, cases.LARGE, 8, running=2)
    files = sorted((folder / "large").iterdir())
    known = {np.asarray(Image.open(f)).transpose(2, 0, 1).tobytes() for f in files}
    for name in names:
        readers.before(name)
        batch = next(readers.batches)
        assert batch.shape == (8, 3, cases.LARGE, cases.LARGE) and batch.dtype == torch.float32
        pixels = (batch + 1) * 127.5
        assert (pixels - pixels.round()).abs().max() < 1e-3
        seen = {image.tobytes() for image in pixels.round().byte().numpy()}
        assert len(seen) == 8 and seen <= known, name
        assert readers.run(name) == 16
    assert multiprocessing.active_children()
    readers.close()
    assert not multiprocessing.active_children()


def test_only_the_cold_reader_decodes(folder):
    readers = sides.Readers(["ours, cold", "ours, warm"], folder, cases.LARGE, 8)

    def stores(name):
        return {
            str(p): p.stat().st_mtime_ns for p in readers.sides[name].store.glob("*/images.bin")
        }

    for name in readers.sides:
        readers.before(name)
        before = stores(name)
        assert readers.run(name) == 1
        assert len(stores(name)) == 1 and (stores(name) == before) == (name == "ours, warm")
    readers.close()


def test_every_comparison_is_of_two_sides(tmp_path):
    found = cases.cases(tmp_path, cases.Size(), "ours, float32")
    for case in found:
        for comparison in case.comparisons:
            assert {comparison.ours, comparison.theirs} <= set(case.sides), comparison
    goals = [c.goal for case in found for c in case.comparisons if c.goal]
    assert goals == [2, 1.4, 1.4, 1.8]


def test_the_default_is_one_that_is_timed():
    assert cases.default_side() in sides.OURS


def test_without_the_peer(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(benchmark.metadata, "version", missing)
    with pytest.raises(UserError, match="not installed: pip install"):
        benchmark.check_peer()


def test_sentence():
    comparison = dict(what="both", goal=1.1, ratio=1.25, ratio_min=1.2, ratio_max=1.3)
    assert benchmark.sentence(comparison) == "both: **1.25 ×** (1.20 to 1.30; goal 1.1: met)"
    assert "goal 1.5: missed" in benchmark.sentence({**comparison, "goal": 1.5})
    assert "goal" not in benchmark.sentence({**comparison, "goal": None})


@pytest.mark.slow
def test_the_command(repo_root, tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.diffusion", "--quick", "--threads", "1"]
    command += ["--output", str(output), "--folder", str(tmp_path)]
    done = processes.run(command, cwd=repo_root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert len(figures["cases"]) == 4 and figures["rounds"] == figures["threads"] == 1
    for case in figures["cases"]:
        assert f"| {case['case']} |" in done.stdout
        assert all(side["median"] > 0 for side in case["sides"].values())
        assert all(c["ratio"] > 0 for c in case["comparisons"])
    training = figures["cases"][0]["sides"]
    assert training["ours, bfloat16"]["memory"]["peak_mb"] > 10
    assert figures["versions"]["denoising-diffusion-pytorch"]
    assert figures["curves"]["largest_relative_difference_same_draws"] < 1e-4
    assert list(tmp_path.iterdir()) == [output]

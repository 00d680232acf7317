"""Consistency: which two looks are compared, what they end in where every answer is known, the command."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq")

from diffusion_ext.distill.__main__ import DistillOptions, command_of
from diffusion_ext.inference import DiffusionModel, read_checkpoint
from diffusion_ext.objectives import OBJECTIVES, schedule_of
from diffusion_ext.samplers import SAMPLERS, trajectory
from ext_common.checkpoints import untouched_logging
from ext_common.cli import UserError

with untouched_logging():
    from diffusion_ext.distill.criterion import (
        ConsistencyConfig,
        ConsistencyCriterion,
        distance,
        noise_of,
        partner,
    )

MU, S = 0.3, 0.4


def levels_of(objective, timesteps):
    cfg = dict(beta_schedule="sigmoid", zero_terminal_snr=False)
    return schedule_of(dict(objective=objective, timesteps=timesteps, **cfg))


# --- two looks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["v", "flow", "edm"])
@pytest.mark.parametrize("stage", [0, 1, 4, 8])
def test_the_nearer_look_has_the_wanted_share_of_the_noise(objective, stage):
    """r below t, its σ the largest of the table that is at most (1 − n(t)/2^stage) σ_t; else the image."""
    schedule = levels_of(objective, 100)
    noise, t = noise_of(schedule), torch.arange(100)
    assert noise.isfinite().all() and (noise.diff() > 0).all()
    share = distance(noise, stage)
    r = partner(t, noise, share)
    assert (r < t).all() and (r >= -1).all()
    for k in range(100):
        wanted = float(noise[k]) * (
            1 - min(1, (1 + 8 / (1 + math.exp(min(noise[k], 500)))) / 2**stage)
        )
        below = [i for i in range(k) if float(noise[i]) <= wanted]
        assert int(r[k]) == (below[-1] if below else -1)
    if stage == 0:
        assert (r == -1).all()


# --- Gaussian data --------------------------------------------------------------------------------


def fixed_point(schedule, stage):
    """(gain, offset) of f at each level where the loss is least: f_t = E[f_r(x_r) | x_t], affine here.

    x_t = a x_0 + s ε and x_r with the same image and noise: Cov(x_r, x_t) = a_r a_t S² + s_r s_t.
    """
    noise, t = noise_of(schedule), torch.arange(schedule.timesteps)
    looks = partner(t, noise, distance(noise, stage)).tolist()
    a, s = schedule.alpha.tolist(), schedule.sigma.tolist()
    gains, offsets = [], []
    for k, r in enumerate(looks):
        near = (1.0, 0.0) if r < 0 else (a[r], s[r])
        gain, offset = (1.0, 0.0) if r < 0 else (gains[r], offsets[r])
        slope = (near[0] * a[k] * S**2 + near[1] * s[k]) / (a[k] ** 2 * S**2 + s[k] ** 2)
        gains.append(gain * slope)
        offsets.append(offset + gain * (near[0] - slope * a[k]) * MU)
    return np.array(gains), np.array(offsets)


def exact_map(schedule):
    """(gain, offset) of x_0 = μ + S (x_t − a μ) / √(a² S² + s²)."""
    std = np.hypot(schedule.alpha.numpy() * S, schedule.sigma.numpy())
    return S / std, MU - S / std * schedule.alpha.numpy() * MU


@pytest.mark.parametrize("objective", ["v", "flow", "edm"])
def test_what_is_learnt_of_gaussian_data_approaches_the_exact_map(objective):
    """The gain of the last level: within 6 % at the sixth stage, 2 % at the eighth, half as far a stage."""
    schedule = levels_of(objective, 4000)
    gain, _ = exact_map(schedule)
    errors = []
    for stage in range(3, 9):
        found = fixed_point(schedule, stage)
        errors.append(abs(found[0][-1] / gain[-1] - 1))
        # the mean is never wrong
        mean = found[1][-1] + found[0][-1] * float(schedule.alpha[-1]) * MU
        assert mean == pytest.approx(MU, abs=1e-9)
    ratios = [b / a for a, b in zip(errors, errors[1:], strict=False)]
    assert errors[3] < 0.06 and errors[5] < 0.02, errors
    assert all(0.4 < ratio < 0.65 for ratio in ratios[1:]), ratios


class Table(torch.nn.Module):
    """An output of the network that is affine in x_t, with a gain and an offset for each timestep."""

    self_condition = False

    def __init__(self, timesteps):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(timesteps))
        self.offset = torch.nn.Parameter(torch.zeros(timesteps))

    def forward(self, x, t, label, guess, condition, average):
        return self.gain[t][:, None, None, None] * x + self.offset[t][:, None, None, None]


def criterion_of(timesteps, **changes):
    schedule = levels_of("v", timesteps)
    cfg = SimpleNamespace(objective="v", seed=1, save_dir="no/such")
    task = SimpleNamespace(schedule=schedule, cfg=cfg, spec={"classes": []})
    options = ConsistencyConfig(**{"autocast": "fp32", "max_update": 400, **changes})
    return ConsistencyCriterion(options, task)


def test_the_criterion_learns_the_fixed_point():
    """400 updates on Gaussian pixels, 12 levels: within 0.03 of the exact minimum of the last stage."""
    criterion = criterion_of(12, halvings=2)
    schedule, model, source = criterion.schedule, Table(12), torch.Generator().manual_seed(1)
    a, s = schedule.alpha.float(), schedule.sigma.float()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 400)
    t = torch.arange(12).repeat_interleave(8)
    for update in range(400):
        criterion.set_num_updates(update)
        x0, noise = (torch.randn((96, 1, 4, 4), generator=source) for _ in range(2))
        x0 = MU + S * x0
        x_t = a[t][:, None, None, None] * x0 + s[t][:, None, None, None] * noise
        batch = dict(x0=x0, noise=noise, t=t, x_t=x_t, label=None, condition=None)
        loss, plain = criterion.losses(model, batch)
        assert (plain >= 0).all()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        rate.step()
    # v = −f / s + x a / s: f = a x − s v
    found = (a - s * model.gain).detach().numpy(), (-s * model.offset).detach().numpy()
    expected = fixed_point(schedule, 2)
    np.testing.assert_allclose(found[0], expected[0], atol=0.03)
    np.testing.assert_allclose(found[1], expected[1], atol=0.03)


def test_the_looks_come_nearer_while_it_trains():
    criterion = criterion_of(100, halvings=3)
    noise = torch.tensor([1.0])
    expected = {0: 0, 99: 0, 100: 1, 199: 1, 200: 2, 300: 3, 399: 3, 400: 3}
    for update, stage in expected.items():
        criterion.set_num_updates(update)
        assert float(criterion.distance(noise)) == float(distance(noise, stage)), update
    criterion.eval()
    criterion.set_num_updates(0)
    assert float(criterion.distance(noise)) == float(distance(noise, 3))


def test_an_objective_that_does_not_keep_the_image_is_refused(monkeypatch):
    schedule = levels_of("v", 10)
    cfg = SimpleNamespace(objective="x0", seed=1, save_dir="no/such")
    task = SimpleNamespace(schedule=schedule, cfg=cfg, spec={"classes": []})
    with pytest.raises(UserError, match="--objective x0 does not give back an image without noise"):
        ConsistencyCriterion(ConsistencyConfig(max_update=10), task)


# --- sampling and the command ---------------------------------------------------------------------


def test_the_sampler_of_a_consistent_model_is_exact_in_one_step():
    """With the exact map each guess is of the data's own distribution, after one step as after three."""
    schedule = levels_of("edm", 100)
    gain, offset = exact_map(schedule)
    source = torch.Generator().manual_seed(1)
    shape, dtype = (20_000, 1, 1, 1), torch.float64

    def denoise(x, t):
        x0 = gain[t] * x + offset[t]
        return OBJECTIVES.get("x0").prediction(x0, x, 1.0, 1.0)

    for steps in (1, 3):
        start = torch.randn(shape, generator=source, dtype=dtype)
        found = SAMPLERS.build(
            "consistency",
            denoise,
            start,
            trajectory(schedule, steps),
            lambda i: torch.randn(shape, generator=source, dtype=dtype),
        )
        assert float(found.mean()) == pytest.approx(MU, abs=0.02)
        assert float(found.std()) == pytest.approx(S, rel=0.02)


def test_the_command_is_that_training_with_the_network_of_the_checkpoint(tiny_checkpoint, tmp_path):
    options = DistillOptions(save_dir=str(tmp_path / "fast"), max_update=5)
    words = command_of(str(tiny_checkpoint), options, ["--lr", "0.5"])
    pairs = {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag.startswith("--")}
    wanted = {
        "--criterion": "consistency",
        "--init-from": str(tiny_checkpoint),
        "--base-channels": "8",
        "--objective": "v",
        "--image-size": "16,16",
        "--max-update": "5",
        "--lr": "0.5",
    }
    assert wanted.items() <= pairs.items() and words.count("--lr") == 1
    assert words[:2] == ["fairseq-train", read_checkpoint(tiny_checkpoint)["cfg"]["task"]["data"]]


@pytest.mark.parametrize("updates, halvings", [(5, "1"), (300, "3"), (600, "6"), (10_000, "8")])
def test_a_short_training_brings_its_two_looks_less_near(updates, halvings, tiny_checkpoint):
    words = command_of(str(tiny_checkpoint), DistillOptions("fast", max_update=updates), [])
    assert words[words.index("--halvings") + 1] == halvings
    words = command_of(str(tiny_checkpoint), DistillOptions("fast"), ["--halvings", "7"])
    assert words[words.index("--halvings") + 1] == "7" and words.count("--halvings") == 1


def test_a_distilled_checkpoint_is_drawn_from_in_two_steps(tiny_checkpoint, tmp_path):
    state = read_checkpoint(tiny_checkpoint)
    state["cfg"]["criterion"]["_name"] = "consistency"
    torch.save(state, tmp_path / "fast.pt")
    model = DiffusionModel.from_checkpoint(tmp_path / "fast.pt", "cpu")
    assert model.usual_sampler == ("consistency", 2)
    np.testing.assert_array_equal(model.sample(2), model.sample(2, sampler="consistency", steps=2))

"""Averages made after the training: profiles, their products, and what stands in the checkpoint."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from diffusion_ext.ema import WeightAverages
from diffusion_ext.ema.__main__ import EmaOptions, average, make
from diffusion_ext.ema.posthoc import (
    Profile,
    combination,
    gamma_of,
    misfit,
    power_decay,
    products,
    sigma_rel_of,
)
from diffusion_ext.ema.snapshots import tracks_of, write_snapshot
from diffusion_ext.inference import DiffusionModel, read_checkpoint
from ext_common.cli import UserError


class Weights(nn.Module):
    def __init__(self, size=64):
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))


def walk(updates, size=64, seed=1):
    """Weights on their way: a decaying drift and noise that does not end, (updates, size)."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, updates + 1)[:, None] / updates
    drift = rng.standard_normal(size) * (1 - np.exp(-4 * t)) + 0.3 * rng.standard_normal(size) * t
    return torch.tensor(drift + 0.3 * rng.standard_normal((updates, size)), dtype=torch.float32)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.15, 0.25])
def test_length_is_the_deviation_of_the_profile(length):
    """Of the density p(τ) = (γ + 1) τ^γ on [0, 1], by numerical integration."""
    gamma = gamma_of(length)
    mean, square = (
        integrate.quad(lambda x, k=k: x**k * (gamma + 1) * x**gamma, 0, 1)[0] for k in (1, 2)
    )
    assert math.sqrt(square - mean**2) == pytest.approx(length, rel=1e-6)
    assert sigma_rel_of(gamma) == pytest.approx(length)
    with pytest.raises(ValueError, match="between 0 and 0.2887"):
        gamma_of(0.3)


@pytest.mark.parametrize("a, b", [((1.0, 7.0), (1.0, 17.0)), ((300.0, 7.0), (1000.0, 3.0))])
def test_products_are_the_integrals(a, b):
    def density(profile, x):
        return (profile[1] + 1) * x ** profile[1] / profile[0] ** (profile[1] + 1)

    expected = integrate.quad(lambda x: density(a, x) * density(b, x), 0, min(a[0], b[0]))[0]
    assert products([Profile(*a)], [Profile(*b)])[0, 0] == pytest.approx(expected, rel=1e-6)


def test_a_track_weighs_its_updates_by_the_power_function():
    """Update k of n has the weight (k/n)^(γ+1) − ((k−1)/n)^(γ+1), the integral of the profile there."""
    gamma, n = gamma_of(0.1), 30
    values, module = walk(n), Weights()
    tracks = WeightAverages(module, [100.0], 0.05, [0.1])
    for k in range(n):
        module.values.data.copy_(values[k])
        tracks.update(module, (k + 1) * 16.0, 16.0)
    ends = (torch.arange(n + 1) / n) ** (gamma + 1)
    torch.testing.assert_close(tracks.weights[1], (ends.diff()[:, None] * values).sum(0))
    # the half-lives are as without tracks
    alone = WeightAverages(Weights(), [100.0], 0.05)
    for k in range(n):
        module.values.data.copy_(values[k])
        alone.update(module, (k + 1) * 16.0, 16.0)
    assert torch.equal(alone.weights[0], tracks.weights[0])
    assert power_decay(0.1, 16, 16) == 0


@pytest.mark.parametrize("length", [0.04, 0.06, 0.08, 0.12, 0.15])
def test_rebuilt_is_within_a_hundredth_of_the_directly_tracked(length, tmp_path):
    """From 20 snapshots of the two tracks of 1,000 updates, beside a third track of that length."""
    updates = 1000
    values, module = walk(updates), Weights()
    kept = WeightAverages(module, [100.0], 0.05, [0.05, 0.1])
    direct = WeightAverages(module, [100.0], 0.05, [length])
    for k in range(updates):
        module.values.data.copy_(values[k])
        for averages in (kept, direct):
            averages.update(module, (k + 1) * 8.0, 8.0)
        if (k + 1) % 50 == 0 and k + 1 < updates:
            write_snapshot(tmp_path, kept, k + 1)
    state = {
        "model": {"ema.weights": kept.weights},
        "cfg": {"model": {"ema_snapshots": 50}},
        "optimizer_history": [{"num_updates": updates}],
    }
    torch.save(state, tmp_path / "checkpoint_last.pt")
    tracks = tracks_of([tmp_path / "checkpoint_last.pt"], state)
    assert len(tracks) == 40
    found = average(tracks, updates, length)
    error = (found - direct.weights[1]).norm() / direct.weights[1].norm()
    assert float(error) < 0.01, float(error)
    # and as a profile, whatever the weights were
    have, wanted = [track.profile for track in tracks], Profile(updates, gamma_of(length))
    assert misfit(have, combination(have, wanted), wanted) < 0.01


@pytest.mark.parametrize("length", [0.039, 0.151, 0.3])
def test_lengths_that_the_snapshots_do_not_hold_are_refused(length):
    with pytest.raises(ValueError, match="give 0.04 to 0.15"):
        EmaOptions("out.pt", [0.05, length])


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def with_tracks(tiny_checkpoint, tmp_path):
    """The tiny checkpoint as if it had been trained with --ema-snapshots."""
    state = read_checkpoint(tiny_checkpoint)
    rows = state["model"]["ema.weights"]
    source = torch.Generator().manual_seed(1)
    more = rows + 0.01 * torch.randn((2, rows.shape[1]), generator=source)
    state["model"] = {**state["model"], "ema.weights": torch.cat([rows, more])}
    state["cfg"]["model"]["ema_snapshots"] = 10
    path = tmp_path / "checkpoint_last.pt"
    torch.save(state, path)
    return path, more


def test_a_length_that_was_tracked_comes_out_as_it_was(with_tracks, tmp_path, capsys):
    path, tracks = with_tracks
    make([str(path)], EmaOptions(str(tmp_path / "average.pt"), [0.1]))
    model = DiffusionModel.from_checkpoint(tmp_path / "average.pt", "cpu")
    torch.testing.assert_close(model.model.ema.weights[0], tracks[1])
    flat = torch.cat([p.detach().flatten() for p in model.model.net.parameters()])
    torch.testing.assert_close(flat, tracks[1])
    assert "length 0.1 after 2 updates" in capsys.readouterr().out


def test_the_best_on_held_out_images_is_taken_and_all_are_shown(with_tracks, tmp_path, capsys):
    path, _ = with_tracks
    output = tmp_path / "average.pt"
    make([str(path)], EmaOptions(str(output), [0.05, 0.1], draws=1, device="cpu"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "error" in line]
    errors = {float(line[1].strip(":")): float(line[3]) for line in lines}
    best = min(errors, key=errors.__getitem__)
    assert torch.load(output, weights_only=False)["posthoc_ema"]["sigma_rel"] == best
    assert (tmp_path / "average.pt.lengths.png").exists()


def test_checkpoints_without_tracks_or_of_another_network_are_refused(
    tiny_checkpoint, with_tracks, tmp_path
):
    options = EmaOptions(str(tmp_path / "out.pt"), [0.1])
    with pytest.raises(UserError, match="without snapshots: train with --ema-snapshots"):
        make([str(tiny_checkpoint)], options)
    write_snapshot(tmp_path, WeightAverages(Weights(), [1.0], 0.05, [0.05, 0.1]), 1)
    with pytest.raises(UserError, match="snapshot_0000001.pt is of another network"):
        make([str(with_tracks[0])], options)
    assert not (tmp_path / "out.pt").exists()

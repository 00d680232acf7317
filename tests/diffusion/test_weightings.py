"""Weights of the loss: tables of formulae, one meaning for all objectives, never negative."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_ext.objectives import OBJECTIVES, check_combination
from diffusion_ext.schedules import SCHEDULES, build_schedule
from diffusion_ext.weightings import WEIGHTINGS, loss_weights
from ext_common.cli import UserError

pytestmark = pytest.mark.pairs

SPECS = ("min_snr", "min_snr:gamma=1", "p2", "p2:k=0.5,gamma=2")
objectives = pytest.mark.parametrize("objective", OBJECTIVES.names())

# by hand, from the papers: w on the squared error of the output
FORMULAE = {
    ("none", "eps"): lambda r: np.ones_like(r),
    ("none", "x0"): lambda r: np.ones_like(r),
    ("none", "v"): lambda r: np.ones_like(r),
    ("min_snr", "eps"): lambda r: np.minimum(r, 5) / r,
    ("min_snr", "x0"): lambda r: np.minimum(r, 5),
    ("min_snr", "v"): lambda r: np.minimum(r, 5) / (r + 1),
    ("min_snr:gamma=1", "eps"): lambda r: np.minimum(r, 1) / r,
    ("min_snr:gamma=1", "x0"): lambda r: np.minimum(r, 1),
    ("min_snr:gamma=1", "v"): lambda r: np.minimum(r, 1) / (r + 1),
    ("p2", "eps"): lambda r: 1 / (1 + r),
    ("p2", "x0"): lambda r: r / (1 + r),
    ("p2", "v"): lambda r: r / (1 + r) ** 2,
    ("p2:k=0.5,gamma=2", "eps"): lambda r: (0.5 + r) ** -2.0,
    ("p2:k=0.5,gamma=2", "x0"): lambda r: r * (0.5 + r) ** -2.0,
    ("p2:k=0.5,gamma=2", "v"): lambda r: r / (r + 1) * (0.5 + r) ** -2.0,
}


@pytest.mark.parametrize("spec, objective", FORMULAE)
def test_formulae(spec, objective):
    snr = torch.logspace(-9, 6, 61, dtype=torch.float64)
    expected = FORMULAE[spec, objective](snr.numpy())
    np.testing.assert_allclose(loss_weights(spec, objective, snr), expected, rtol=1e-12)


def test_by_hand():
    """SNR 9 is a = √.9, s = √.1: min(9, 5)."""
    snr = torch.tensor([9.0, 3.0], dtype=torch.float64)
    assert loss_weights("min_snr", "eps", snr).tolist() == pytest.approx([5 / 9, 1])
    assert loss_weights("min_snr", "x0", snr).tolist() == pytest.approx([5, 3])
    assert loss_weights("min_snr", "v", snr).tolist() == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize("spec", SPECS)
@given(
    t=st.integers(0, 99),
    name=st.sampled_from(SCHEDULES.names()),
    x0=st.floats(-1, 1),
    eps=st.floats(-3, 3),
    error=st.floats(-2, 2).filter(lambda e: abs(e) > 1e-3),
)
def test_the_same_error_of_x0_costs_the_same_in_every_objective(spec, t, name, x0, eps, error):
    """And as much as the weight on x_0 says: the outputs of one wrong guess, through three losses."""
    schedule = build_schedule(name, 100)
    a, s = float(schedule.alpha[t]), float(schedule.sigma[t])
    x_t, guess = a * x0 + s * eps, x0 + error
    losses = []
    for objective in OBJECTIVES.names():
        entry = OBJECTIVES.get(objective)
        output = entry.target(guess, (x_t - a * guess) / s, a, s)
        weight = float(loss_weights(spec, objective, schedule.snr)[t])
        losses.append(weight * (output - entry.target(x0, eps, a, s)) ** 2)
    weight = float(loss_weights(spec, "x0", schedule.snr)[t])
    assert losses == pytest.approx([weight * error**2] * len(losses), rel=1e-6)


@pytest.mark.parametrize("spec", ("none", *SPECS))
@objectives
@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_whatever_is_not_refused_is_finite_and_trains_every_timestep(
    spec, objective, name, zero, timesteps
):
    schedule = build_schedule(name, timesteps, zero)
    try:
        check_combination(objective, spec, schedule)
    except UserError:
        # refused with reason: a weight is 0/0 or 0 (or the objective cannot be used at all)
        weights = loss_weights(spec, objective, schedule.snr)
        assert objective == "eps" or not weights[-1] > 0
        return
    weights = loss_weights(spec, objective, schedule.snr)
    assert weights.shape == (timesteps,) and weights.dtype == torch.float64
    assert weights.isfinite().all() and (weights > 0).all()
    assert weights.float().isfinite().all()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", SCHEDULES.names())
def test_no_weights_are_all_one(name, zero):
    snr = build_schedule(name, 50, zero).snr
    for objective in OBJECTIVES.names():
        assert torch.equal(
            loss_weights("none", objective, snr), torch.ones(50, dtype=torch.float64)
        )


def test_snr_as_diffusers():
    training = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    schedule = build_schedule("cosine", 200)
    peer = SimpleNamespace(alphas_cumprod=schedule.alphas_cumprod)
    expected = training.compute_snr(peer, torch.arange(200))
    torch.testing.assert_close(schedule.snr.float(), expected, rtol=1e-6, atol=0)


def test_min_snr_as_denoising_diffusion_pytorch():
    """The weights its GaussianDiffusion keeps for all three objectives."""
    reason = "denoising-diffusion-pytorch is not installed"
    peer = pytest.importorskip("denoising_diffusion_pytorch", reason=reason)
    net = torch.nn.Module()
    net.channels, net.out_dim, net.self_condition = 1, 1, False
    for ours, theirs in (("eps", "pred_noise"), ("x0", "pred_x0"), ("v", "pred_v")):
        made = peer.GaussianDiffusion(
            net,
            image_size=8,
            timesteps=300,
            objective=theirs,
            beta_schedule="cosine",
            min_snr_loss_weight=True,
            min_snr_gamma=4,
        )
        found = loss_weights("min_snr:gamma=4", ours, build_schedule("cosine", 300).snr)
        torch.testing.assert_close(found.float(), made.loss_weight, rtol=1e-4, atol=1e-9)


@dataclass
class OwnOptions:
    power: float = field(default=1.0, metadata={"help": "of the SNR"})


def test_a_decorator_is_enough(monkeypatch):
    for table in ("_entries", "_options"):
        monkeypatch.setattr(WEIGHTINGS, table, dict(getattr(WEIGHTINGS, table)))

    @WEIGHTINGS.register("mine", options=OwnOptions)
    def mine(snr, per_x0, power=1.0):
        """Powers."""
        return snr**power / per_x0

    snr = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert loss_weights("mine:power=2", "v", snr).tolist() == pytest.approx([0.25 / 1.5, 4 / 3])
    assert loss_weights("mine", "eps", snr).tolist() == pytest.approx([1, 1])
    with pytest.raises(UserError, match="did you mean 'mine'.* known: min_snr, mine, none, p2"):
        loss_weights("mines", "v", snr)


@pytest.mark.parametrize(
    "spec, said",
    [
        (
            "min_snrs",
            "unknown loss weighting 'min_snrs': did you mean 'min_snr'.* min_snr, none, p2",
        ),
        ("min_snr:gamma=0", "gamma must be above 0"),
        ("min_snr:gama=5", "unknown option 'gama': did you mean 'gamma'"),
        ("p2:k=0", "needs k > 0 and gamma ≥ 0"),
        ("p2:gamma=-1", "needs k > 0 and gamma ≥ 0"),
        ("none:gamma=1", "unknown option 'gamma'; it has no options"),
    ],
)
def test_refused_in_words(spec, said):
    with pytest.raises(UserError, match=said):
        loss_weights(spec, "v", torch.ones(3, dtype=torch.float64))
    with pytest.raises(UserError, match="unknown objective 'velocity'"):
        loss_weights("none", "velocity", torch.ones(3, dtype=torch.float64))

"""From a network's output to x_0 and ε: clipping, guidance, self-conditioning, learned variance."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_ext.denoiser import Denoiser, split_output
from diffusion_ext.objectives import OBJECTIVES
from diffusion_ext.samplers import LearnedPrediction, trajectory
from diffusion_ext.schedules import build_schedule
from ext_common.cli import UserError

SCHEDULE = build_schedule("cosine", 50)
objectives = pytest.mark.parametrize("objective", OBJECTIVES.names())


def level(t, schedule=SCHEDULE):
    return float(schedule.alpha[t]), float(schedule.sigma[t])


def images(seed=0, shape=(3, 2, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A network that keeps what it is asked, and answers `answer(x, t, label, x0)`."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, x, t, label, x0):
        self.asked.append((x, t, label, x0))
        return self.answer(x, t, label, x0)


def sure_of(x0, objective):
    """A network whose output means the image x0 at whatever it is shown."""

    def network(x, t, label, guess):
        a, s = level(int(t[0]))
        return OBJECTIVES.get(objective).target(x0, (x - a * x0) / s, a, s)

    return network


@objectives
@given(t=st.integers(0, 48), value=st.floats(-1, 1))
def test_an_image_that_the_network_is_sure_of_comes_out(objective, t, value):
    x, x0 = images(), torch.full((3, 2, 4, 4), value)
    found = Denoiser(sure_of(x0, objective), SCHEDULE, objective)(x, t)
    a, s = level(t)
    torch.testing.assert_close(found.x0, x0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a * found.x0 + s * found.eps, x, rtol=1e-4, atol=1e-5)


@objectives
@pytest.mark.parametrize("t", [0, 25, 45])
def test_3_is_clipped_to_1_and_the_noise_derived_anew(objective, t):
    x, x0 = images(), torch.full((3, 2, 4, 4), 3.0)
    x0[1] = -5
    x0[2] = 0.25
    a, s = level(t)
    found = Denoiser(sure_of(x0, objective), SCHEDULE, objective)(x, t)
    expected = torch.stack([torch.full((2, 4, 4), v) for v in (1.0, -1.0, 0.25)])
    torch.testing.assert_close(found.x0, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.eps, (x - a * expected) / s, rtol=1e-3, atol=1e-2)
    assert found.x0.abs().max() <= 1
    torch.testing.assert_close(a * found.x0 + s * found.eps, x, rtol=1e-5, atol=1e-5)
    free = Denoiser(sure_of(x0, objective), SCHEDULE, objective, clip=False)(x, t)
    torch.testing.assert_close(free.x0, x0, rtol=1e-3, atol=1e-3)


def test_the_network_is_asked_once_with_one_timestep_for_each_image():
    x = images()
    network = Recorder(lambda x, t, label, x0: x)
    Denoiser(network, SCHEDULE, "v")(x, 17)
    ((shown, t, label, x0),) = network.asked
    assert torch.equal(shown, x) and t.tolist() == [17] * 3 and t.dtype == torch.int64
    assert label is None and x0 is None


# --- guidance -------------------------------------------------------------------------------------


def by_label(x, t, label, x0):
    """0.5 x without a label, and a tenth of the label more with one."""
    if label is None:
        return 0.5 * x
    return 0.5 * x + 0.1 * label[:, None, None, None]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0, -1.0])
def test_guidance_moves_the_output_along_the_difference(weight):
    """out = none + w (label − none), in every objective the same combination of outputs."""
    x, label = images(), torch.tensor([1, 2, 3])
    a, s = level(20)
    output = 0.5 * x + weight * 0.1 * label[:, None, None, None]
    network = Recorder(by_label)
    found = Denoiser(network, SCHEDULE, "v", label=label, guidance=weight, clip=False)(x, 20)
    torch.testing.assert_close(found.x0, a * x - s * output)
    torch.testing.assert_close(found.eps, s * x + a * output)
    # the weight 1 costs one look, any other two
    labels = [asked[2] for asked in network.asked]
    assert len(labels) == (1 if weight == 1 else 2) and torch.equal(labels[0], label)
    assert weight == 1 or labels[1] is None


def test_guidance_without_a_label_is_no_guidance():
    network = Recorder(by_label)
    x = images()
    found = Denoiser(network, SCHEDULE, "x0", guidance=4.0, clip=False)(x, 20)
    assert len(network.asked) == 1 and torch.equal(found.x0, 0.5 * x)


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_guidance_leaves_the_learned_variance_to_the_label(weight):
    """Extrapolated it would leave [0, 1], and the noise be (large/small)^4 too much at weight 5."""
    x, label = images(), torch.tensor([1, 1, 1])

    def network(x, t, label, x0):
        said = torch.full_like(x, -0.5 if label is None else 0.9)
        return torch.cat([by_label(x, t, label, x0), said], 1)

    found = Denoiser(network, SCHEDULE, "x0", label=label, guidance=weight, clip=False)(x, 20)
    torch.testing.assert_close(found.fraction, torch.full_like(x, 0.95))
    torch.testing.assert_close(found.x0, 0.5 * x + 0.1 * weight)


def test_both_halves_are_one_batch_where_the_label_of_none_is_known():
    """As `DiffusionModel` asks: the same images as by two looks, by one at twice as many."""
    x, label = images(), torch.tensor([1, 2, 3])

    def network(x, t, label, x0):
        assert t.shape == (len(x),) and (x0 is None or x0.shape == x.shape)
        label = torch.zeros(len(x)) if label is None else label % 7
        return 0.5 * x + 0.1 * label[:, None, None, None] + (0 if x0 is None else 0.1 * x0)

    def drawn(**more):
        asked = Recorder(network)
        denoise = Denoiser(
            asked, SCHEDULE, "v", label=label, guidance=2.0, self_condition=True, **more
        )
        denoise(x, 30)
        return denoise(x, 20), asked.asked

    (one, asked), (two, _) = drawn(none_label=7), drawn()
    torch.testing.assert_close(one, two)
    assert [len(x) for x, *_ in asked] == [6, 6]
    assert asked[0][2].tolist() == [1, 2, 3, 7, 7, 7]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_a_worse_model_guides_with_and_without_classes(labelled, weight):
    """out = worse + w (ours − worse), each with the same labels; the weight 1 does not even ask it."""
    x, label = images(), torch.tensor([1, 2, 3]) if labelled else None
    guide = Recorder(lambda x, t, label, x0: 0.3 * by_label(x, t, label, x0))
    ours = by_label(x, None, label, None)
    found = Denoiser(
        by_label,
        SCHEDULE,
        "x0",
        label=label,
        guidance=weight,
        clip=False,
        guide=guide,
        none_label=9,
    )(x, 20)
    torch.testing.assert_close(found.x0, 0.3 * ours + weight * 0.7 * ours)
    assert len(guide.asked) == (weight != 1)
    if guide.asked:
        assert guide.asked[0][2] is label
    else:
        alone = Denoiser(by_label, SCHEDULE, "x0", label=label, clip=False)(x, 20)
        assert torch.equal(found.x0, alone.x0)


def test_guidance_holds_inside_its_interval_of_noise_alone():
    x, label = images(), torch.tensor([1, 2, 3])
    schedule = build_schedule("cosine", 50, True)
    sigma = (schedule.sigma / schedule.alpha).tolist()
    interval = (sigma[10], sigma[30])
    denoise, full, none = (
        Denoiser(by_label, schedule, "x0", label=label, clip=False, **options)
        for options in (dict(guidance=3.0, interval=interval), dict(guidance=3.0), {})
    )
    for t in range(50):
        expected = full if 10 < t <= 30 else none
        assert torch.equal(denoise(x, t).x0, expected(x, t).x0), t
    # everywhere is everywhere, pure noise too
    assert not torch.equal(full(x, 49).x0, none(x, 49).x0)


# --- self-conditioning ----------------------------------------------------------------------------


def test_self_conditioning_feeds_back_the_clipped_image_of_the_step_before():
    network = Recorder(lambda x, t, label, x0: 2 * x)
    denoise = Denoiser(network, SCHEDULE, "x0", self_condition=True)
    x = images()
    first = denoise(x, 40)
    second = denoise(0.1 * x, 30)
    denoise(x, 20)
    fed = [asked[3] for asked in network.asked]
    assert fed[0] is None
    assert torch.equal(fed[1], first.x0) and torch.equal(fed[2], second.x0)
    assert fed[1].abs().max() == 1 and (2 * x).abs().max() > 1


def test_both_looks_of_guidance_are_fed_the_same():
    network = Recorder(lambda x, t, label, x0: x)
    label = torch.tensor([0, 1, 2])
    denoise = Denoiser(network, SCHEDULE, "x0", label=label, guidance=2.0, self_condition=True)
    first = denoise(images(), 40)
    denoise(images(1), 30)
    assert [asked[3] is None for asked in network.asked] == [True, True, False, False]
    assert network.asked[2][3] is network.asked[3][3] is first.x0


def test_without_self_conditioning_nothing_is_fed_back():
    network = Recorder(lambda x, t, label, x0: x)
    denoise = Denoiser(network, SCHEDULE, "x0")
    denoise(images(), 40)
    denoise(images(), 30)
    assert all(asked[3] is None for asked in network.asked)


# --- learned variance, precision, names -------------------------------------------------------------


def test_split_output():
    output = torch.arange(24.0).view(1, 6, 2, 2) / 23 * 2 - 1
    prediction, fraction = split_output(output, 6)
    assert prediction is output and fraction is None
    prediction, fraction = split_output(output, 3)
    assert torch.equal(prediction, output[:, :3])
    torch.testing.assert_close(fraction, (output[:, 3:] + 1) / 2)
    assert fraction.max() == 1


def test_learned_variance_comes_with_the_prediction():
    x = images()
    network = Recorder(lambda x, t, label, x0: torch.cat([x, torch.tanh(x)], 1))
    found = Denoiser(network, SCHEDULE, "x0")(x, 20)
    assert isinstance(found, LearnedPrediction)
    torch.testing.assert_close(found.fraction, (torch.tanh(x) + 1) / 2)
    assert torch.equal(found.x0, x.clamp(-1, 1))
    assert not hasattr(Denoiser(lambda x, t, label, x0: x, SCHEDULE, "x0")(x, 20), "fraction")


@objectives
def test_half_precision_networks_are_read_in_float32(objective):
    x = images()
    network = sure_of(torch.full_like(x, 0.5), objective)
    full = Denoiser(network, SCHEDULE, objective)(x, 25)
    half = Denoiser(lambda *args: network(*args).bfloat16(), SCHEDULE, objective)(x, 25)
    assert half.x0.dtype == half.eps.dtype == torch.float32
    torch.testing.assert_close(half.x0, full.x0, rtol=0, atol=0.02)
    a, s = level(25)
    torch.testing.assert_close(a * half.x0 + s * half.eps, x, rtol=1e-5, atol=1e-5)


def test_pure_noise_is_denoised_without_a_division():
    schedule = build_schedule("cosine", 50, True)
    path = trajectory(schedule, 4)
    assert path.levels[0].alpha == 0
    x = images()
    for objective in ("v", "x0"):
        found = Denoiser(lambda x, t, label, x0: 0.1 * x, schedule, objective)(x, 49)
        assert found.x0.isfinite().all()
        torch.testing.assert_close(found.eps, x)


def test_unknown_objective():
    with pytest.raises(UserError, match="unknown objective 'epsilon': did you mean 'eps'"):
        Denoiser(None, SCHEDULE, "epsilon")

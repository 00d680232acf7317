"""Numbers that belong to an image: nothing but (seed, update, id) moves them, and they move nothing."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.objectives import OBJECTIVES
from diffusion_ext.randomness import (
    BEFORE,
    ImageNoise,
    coin,
    generator,
    stream_seed,
    training_draws,
    validation_draws,
)
from diffusion_ext.samplers import SAMPLERS, trajectory
from diffusion_ext.schedules import build_schedule

SHAPE = (2, 3, 5)
ids_of_batches = st.lists(st.integers(0, 10**9), min_size=1, max_size=12, unique=True)


@pytest.fixture(autouse=True)
def global_generator_is_left_alone():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# --- streams of before ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "purpose, numbers, seed",
    # never to change: a resumed run, a second machine and yesterday's samples rest on them
    [
        ("training", (1, 0, 0), 8269640309057572796),
        ("training", (1, 0, 1), 5232097542109779044),
        ("training", (1, 1, 0), 8400053669648460464),
        ("training", (2, 0, 0), 5550352009557748602),
        ("validation", (0,), 2625730375566099278),
        ("sampling", (1, 0), 8930381773022607991),
        ("sampling", (1, 999), 5783709124909826829),
        ("self", (1, 0), 1827725467744886465),
        ("training", (), 5640018359175361867),
        ("training", (-1, 9223372036854775807, -9223372036854775808), 3344176098586632810),
    ],
)
def test_seeds_of_all_machines(purpose, numbers, seed):
    assert stream_seed(purpose, *numbers) == seed


@given(
    a=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    b=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
def test_seeds_differ_with_anything(a, b):
    seed = stream_seed("training", *a)
    assert 0 <= seed < 2**63
    assert (seed == stream_seed("training", *b)) == (a == b)
    assert seed != stream_seed("sampling", *a)
    assert seed != stream_seed("training", *a, 0)


def test_seeds_spread_over_the_bits_that_torch_looks_at():
    """Its CPU generator takes the lower 32: 20,000 streams share one with odds of 1 in 20."""
    lower = {
        stream_seed("training", 1, update, i) % 2**32 for update in range(200) for i in range(100)
    }
    assert len(lower) >= 20_000 - 2
    ones = torch.tensor([[seed >> bit & 1 for bit in range(32)] for seed in lower]).double().mean(0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 20_000**0.5


def test_long_purposes_are_not_cut():
    with pytest.raises(ValueError):
        stream_seed("a purpose of seventeen", 1)


def test_a_generator_is_its_seed():
    source = generator("cpu", "training", 1, 2, 3)
    assert source.initial_seed() == stream_seed("training", 1, 2, 3)
    again = torch.Generator().manual_seed(stream_seed("training", 1, 2, 3))
    assert torch.equal(torch.randn(9, generator=source), torch.randn(9, generator=again))


def test_old_checkpoints_go_on_with_a_generator_for_each_image():
    """By torch's generators alone, as the versions that wrote them drew."""
    t, noise, uniforms = training_draws(1, 7, [3, 9], SHAPE, 1000, 2, stream=BEFORE)
    for row, number in enumerate((3, 9)):
        source = torch.Generator().manual_seed(stream_seed("training", 1, 7, number))
        drawn = torch.rand(3, generator=source)
        assert t[row] == int(drawn[0].double() * 1000) and torch.equal(uniforms[row], drawn[1:])
        assert torch.equal(noise[row], torch.randn(SHAPE, generator=source))
    source = torch.Generator().manual_seed(stream_seed("validation", 3))
    expected = torch.randn(SHAPE, generator=source)
    assert torch.equal(validation_draws([3], SHAPE, 9, stream=BEFORE)[1][0], expected)
    tosses = [coin(1, update, BEFORE) for update in range(40)]
    sources = [torch.Generator().manual_seed(stream_seed("self", 1, k)) for k in range(40)]
    assert tosses == [bool(torch.rand((), generator=source) < 0.5) for source in sources]
    image = ImageNoise(5, [9], SHAPE, stream=BEFORE)
    source = torch.Generator().manual_seed(stream_seed("sampling", 5, 9))
    for drawn in (image.start, image(0), image(1)):
        assert torch.equal(drawn[0], torch.randn(SHAPE, generator=source))


# --- training -------------------------------------------------------------------------------------

draws = partial(training_draws, shape=SHAPE, timesteps=1000, uniforms=3)


@given(ids=ids_of_batches, update=st.integers(0, 10**6), seed=st.integers(0, 10**6), data=st.data())
def test_draws_of_an_image_do_not_depend_on_its_batch(ids, update, seed, data):
    whole = draws(seed, update, ids)
    order = data.draw(st.permutations(range(len(ids))))
    cut = data.draw(st.integers(0, len(ids)))
    for part in (order[:cut], order[cut:]):
        if part:
            found = draws(seed, update, [ids[k] for k in part])
            for a, b in zip(found, whole, strict=True):
                assert torch.equal(a, b[list(part)])


def test_shapes_and_ranges():
    t, noise, uniforms = draws(1, 2, [5, 6, 7, 8])
    assert t.shape == (4,) and t.dtype == torch.int64
    assert noise.shape == (4, *SHAPE) and noise.dtype == torch.float32
    assert uniforms.shape == (4, 3) and (0 <= uniforms).all() and (uniforms < 1).all()
    assert draws(1, 2, [5], uniforms=0)[2].shape == (1, 0)


def test_another_seed_update_or_image_is_another_draw():
    base = draws(1, 2, [3])[1]
    others = [draws(2, 2, [3])[1], draws(1, 3, [3])[1], draws(1, 2, [4])[1]]
    for i, other in enumerate(others):
        assert not torch.isclose(base, other).any()
        assert not any(torch.isclose(other, rest).any() for rest in others[i + 1 :])


def test_t_is_uniform_and_noise_normal():
    """χ² over 20 equal classes: 19 ± 6.2; moments of 60,000 normals; no correlation between the two."""
    n = 6000
    t, noise, uniforms = training_draws(1, 7, list(range(n)), (10,), 1000, 2)
    counts = torch.bincount(t * 20 // 1000, minlength=20).double()
    assert len(counts) == 20 and ((counts - n / 20) ** 2 / (n / 20)).sum() < 19 + 4 * 6.2
    assert t.min() < 5 and t.max() > 994
    assert (
        abs(noise.mean()) < 4 / (10 * n) ** 0.5 and abs(noise.var() - 1) < 4 * (2 / (10 * n)) ** 0.5
    )
    together = torch.stack([t.float(), *uniforms.T, noise[:, 0], noise[:, 1]])
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() < 4.5 / n**0.5
    # and over updates for one image
    t = torch.cat([training_draws(1, update, [3], (1,), 4)[0] for update in range(2000)])
    assert (torch.bincount(t, minlength=4) - 500).abs().max() < 4 * (2000 * 3 / 16) ** 0.5


@pytest.mark.parametrize("timesteps", [1, 2, 3, 7])
def test_every_timestep_is_drawn_and_none_beyond(timesteps):
    t = training_draws(1, 0, list(range(200)), (1,), timesteps)[0]
    assert sorted(set(t.tolist())) == list(range(timesteps))


# --- validation -------------------------------------------------------------------------------------


@given(first=st.integers(0, 10**6), count=st.integers(1, 400), parts=st.integers(1, 12))
def test_validation_meets_all_timesteps_about_equally(first, count, parts):
    """However many images and wherever they start; random draws would stray by √(count / parts)."""
    t, _ = validation_draws(list(range(first, first + count)), (1,), 1000 * parts)
    counts = torch.bincount(t // 1000, minlength=parts)
    assert len(counts) == parts and (counts - count / parts).abs().max() < 3.2


@given(ids=ids_of_batches, data=st.data())
def test_validation_draws_of_an_image_are_its_own(ids, data):
    t, noise = validation_draws(ids, SHAPE, 1000)
    order = list(data.draw(st.permutations(range(len(ids)))))
    again = validation_draws([ids[k] for k in order], SHAPE, 1000)
    assert torch.equal(again[0], t[order]) and torch.equal(again[1], noise[order])
    assert t.dtype == torch.int64 and ((0 <= t) & (t < 1000)).all()
    assert len({tuple(row.tolist()) for row in noise.flatten(1)}) == len(ids)


def test_validation_by_hand():
    """0.5, then golden-ratio steps of 0.618… modulo 1, in hundredths."""
    assert validation_draws([0, 1, 2, 3, 4], (1,), 100)[0].tolist() == [50, 11, 73, 35, 97]


# --- sampling -------------------------------------------------------------------------------------


def test_image_noise_is_a_stream_for_each_image():
    noise = ImageNoise(5, [3, 9], SHAPE)
    rows = [noise.start] + [noise(i) for i in range(3)]
    for row, number in enumerate((3, 9)):
        alone = ImageNoise(5, [number], SHAPE)
        for drawn, again in zip(rows, [alone.start, *map(alone, range(3))], strict=True):
            assert torch.equal(drawn[row], again[0])
    assert not torch.isclose(rows[0], rows[1]).any()


def sample(numbers, sampler, seed=1, clip=True):
    schedule = build_schedule("sigmoid", 60)
    scales = torch.linspace(0.1, 0.9, 60)

    def network(x, t, label, x0):
        return torch.tanh(2 * x + t[:, None, None, None]) * scales[t][:, None, None, None]

    name, _, options = sampler.partition(":")
    noise = ImageNoise(seed, numbers, SHAPE)
    return SAMPLERS.build(
        name,
        Denoiser(network, schedule, "v", clip=clip),
        noise.start,
        trajectory(schedule, 9),
        noise,
        options=options,
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim:eta=1", "ddim", "heun", "dpmpp_2m"])
@settings(max_examples=25)
@given(data=st.data())
def test_an_image_depends_on_seed_and_number_alone(sampler, data):
    """Not on batch size, order or what else is in its batch: to the last bit."""
    numbers = list(range(6))
    whole = sample(numbers, sampler)
    order = data.draw(st.permutations(numbers))
    size = data.draw(st.integers(1, 6))
    found = torch.empty_like(whole)
    for start in range(0, 6, size):
        chosen = list(order[start : start + size])
        found[chosen] = sample(chosen, sampler)
    assert torch.equal(found, whole)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_another_seed_is_another_image(sampler):
    one, other = sample([1, 2], sampler), sample([1, 2], sampler, seed=2)
    assert (one - other).abs().mean() > 0.01 and (one[0] - one[1]).abs().mean() > 0.01


# --- nothing else is touched ------------------------------------------------------------------------


def test_what_is_drawn_outside_changes_nothing():
    expected = draws(1, 2, [3, 4]), validation_draws([3], SHAPE, 10), ImageNoise(1, [2], SHAPE)(0)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    torch.rand(1000)
    found = draws(1, 2, [3, 4]), validation_draws([3], SHAPE, 10), ImageNoise(1, [2], SHAPE)(0)
    torch.set_rng_state(state)
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_nothing_advances_the_global_generator():
    """Checked by the fixture above, for everything that sampling and training call."""
    draws(1, 2, [3, 4])
    validation_draws([3, 4], SHAPE, 100)
    for sampler in SAMPLERS.names():
        sample([1, 2], sampler)
    schedule = build_schedule("cosine", 30, True)
    for name in OBJECTIVES.names():
        OBJECTIVES.get(name).target(torch.ones(1), torch.ones(1), schedule.alpha, schedule.sigma)


def test_the_fixture_would_notice():
    before = torch.get_rng_state()
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)

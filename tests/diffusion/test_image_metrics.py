"""diffusion_ext.evaluate.metrics, neighbours, leakage and controls against closed forms and slow versions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from benchmarks.diffusion.controls import averaged_images, copies, covariance_gaussian, noisy
from diffusion_ext.evaluate import metrics
from diffusion_ext.evaluate.leakage import (
    ASYMMETRY,
    ASYMMETRY_KEPT,
    colour_moments,
    leak_report,
    left_right_asymmetry,
    mirror_difference,
)
from diffusion_ext.evaluate.metrics import (
    disjoint_sets,
    floor_note,
    floor_sizes,
    frechet_distance,
    frechet_of,
    kid,
    mmd2,
    precision_recall,
)
from diffusion_ext.evaluate.neighbours import memorisation, nearest_neighbours
from ext_common.cli import UserError


def gaussian_set(n, d, seed, rank=None):
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(rank or d, d))
    return random.normal(size=(n, rank or d)) @ mixing + random.normal(size=d)


def by_sqrtm(a, b):
    """The textbook formula; for full rank only."""
    mean, cov_a, cov_b = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    return mean @ mean + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))


# --- Fréchet distance ---------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0, 4)] * 2), min_size=1, max_size=6))
def test_of_two_diagonal_gaussians_is_the_closed_form(axes):
    # the axes do not mix: the sum of (m1 - m2)² + (s1 - s2)²
    m1, m2, s1, s2 = np.array(axes).T
    found = frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2))
    expected = np.sum((m1 - m2) ** 2 + (s1 - s2) ** 2)
    assert found == pytest.approx(expected, abs=1e-6 + 1e-9 * expected)


def test_of_gaussians_that_share_their_axes_in_any_rotation():
    random = np.random.default_rng(0)
    axes, _ = np.linalg.qr(random.normal(size=(8, 8)))
    s1, s2 = random.uniform(0, 3, size=(2, 8))
    s1[:3] = 0  # singular
    covs = [axes @ np.diag(s**2) @ axes.T for s in (s1, s2)]
    found = frechet_distance(np.zeros(8), covs[0], np.ones(8), covs[1])
    assert found == pytest.approx(8 + np.sum((s1 - s2) ** 2), rel=1e-9)


def test_agrees_with_the_matrix_root_of_scipy_and_with_torch_fidelity():
    a, b = gaussian_set(300, 20, 1), gaussian_set(200, 20, 2)
    assert frechet_of(a, b) == pytest.approx(by_sqrtm(a, b), rel=1e-9)
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="pip install torch-fidelity")
    statistics = [{"mu": x.mean(0), "sigma": np.cov(x.T)} for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, False)[fid.KEY_METRIC_FID]
    assert frechet_of(a, b) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("n, d, rank", [(500, 30, 30), (500, 30, 5), (20, 200, 20), (3, 64, 2)])
def test_of_a_set_with_itself_is_zero(n, d, rank):
    a = gaussian_set(n, d, 3, rank) * 100
    assert frechet_of(a, a) <= 1e-9 * np.trace(np.cov(a.T))
    mean, cov = a.mean(0), np.cov(a.T)
    assert frechet_distance(mean, cov, mean, cov) <= 1e-8 * np.trace(cov)


@pytest.mark.parametrize("n, m, d", [(10, 40, 25), (40, 10, 25), (10, 12, 25), (25, 25, 25)])
def test_with_few_rows_is_that_of_the_singular_covariances(n, m, d):
    # limit of the regular case: a little of the identity on both covariances
    a, b = gaussian_set(n, d, 4), gaussian_set(m, d, 5)
    covs = [np.cov(x.T) + 1e-10 * np.eye(d) for x in (a, b)]
    expected = frechet_distance(a.mean(0), covs[0], b.mean(0), covs[1])
    assert frechet_of(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_of(a, b) == pytest.approx(frechet_of(b, a), rel=1e-9)
    # the same number from the covariances as from the features
    direct = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert frechet_of(a, b) == pytest.approx(direct, rel=1e-7)


def test_wide_features_need_no_covariance(monkeypatch):
    def no_root(_):
        raise AssertionError("a covariance of 12,288 features")

    monkeypatch.setattr(metrics, "_root", no_root)
    a = np.random.default_rng(0).normal(size=(20, 12_288))
    assert frechet_of(a[:10], a[10:]) > 0


def test_constant_features_differ_by_their_means():
    assert frechet_of(np.zeros((5, 3)), np.full((7, 3), 2.0)) == pytest.approx(12)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"covariances \(D, D\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="3 and 2 columns"):
        frechet_of(np.zeros((5, 3)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="two rows"):
        frechet_of(np.zeros((1, 3)), np.zeros((5, 3)))


# --- KID ----------------------------------------------------------------------------------------


def test_mmd_by_hand():
    x, y = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0], [1.0]])

    def k(a, b):
        return (a * b + 1) ** 3

    within_y = (k(0, 3) + k(0, 1) + k(3, 1)) / 3
    across = sum(k(a, b) for a in (1, 2) for b in (0, 3, 1)) / 6
    assert mmd2(x, y) == pytest.approx(k(1, 2) + within_y - 2 * across)


def test_mmd_is_unbiased():
    # the mean of many estimates on 5 rows is the exact value: 0 for equal distributions, else that of
    # the kernel's expectation, here for points that are 0 or 1 with probability 1/2 and always 1
    random = np.random.default_rng(0)
    equal = [mmd2(*random.integers(2, size=(2, 5, 1))) for _ in range(8000)]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / math.sqrt(8000)
    other = [mmd2(random.integers(2, size=(5, 1)), np.ones((5, 1))) for _ in range(8000)]
    exact = (3 / 4 + 8 / 4) + 8 - 2 * (1 / 2 + 8 / 2)
    assert abs(np.mean(other) - exact) < 4 * np.std(other) / math.sqrt(8000)


def test_kid_agrees_with_torch_fidelity_and_repeats_itself():
    a, b = gaussian_set(60, 12, 1), gaussian_set(80, 12, 2)
    found = kid(a, b, 20, 30, seed=3)
    assert found == kid(a, b, 20, 30, seed=3) != kid(a, b, 20, 30, seed=4)
    # subsets of all rows are all equal: no chance left to differ by
    whole = kid(a, b[:60], 3, 60)
    assert whole.std == pytest.approx(0, abs=1e-6 * abs(whole.mean))
    theirs = pytest.importorskip(
        "torch_fidelity.metric_kid", reason="pip install torch-fidelity"
    ).kernel_mmd(a, b[:60], kid_kernel="poly", kid_kernel_poly_degree=3)
    assert whole.mean == pytest.approx(theirs, rel=1e-9)
    with pytest.raises(ValueError, match="subsets of 70"):
        kid(a, b, 3, 70)


# --- precision and recall -----------------------------------------------------------------------


def slow_precision_recall(real, fake, k):
    def covered(points, centres):
        apart = cdist(centres, centres)
        radii = np.sort(apart, axis=1)[:, k]  # the 0-th is itself
        return np.mean([(cdist([p], centres)[0] <= radii).any() for p in points])

    return covered(fake, real), covered(real, fake)


@pytest.mark.parametrize("cells", [100, 4_000_000])
def test_precision_and_recall_are_those_of_counting_one_by_one(monkeypatch, cells):
    monkeypatch.setattr(metrics, "_CELLS", cells)  # blocks of a few rows give the same
    real, fake = gaussian_set(70, 3, 1), gaussian_set(50, 3, 2) * 0.7
    for k in (1, 3, 10):
        assert precision_recall(real, fake, k) == pytest.approx(
            slow_precision_recall(real, fake, k)
        )


def test_precision_and_recall_of_sets_made_for_it():
    random = np.random.default_rng(0)
    two = np.concatenate([random.normal(0, 1, (200, 2)), random.normal(50, 1, (200, 2))])
    one = random.normal(0, 1, (200, 2))
    precision, recall = precision_recall(two, one)
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)  # a mode is missing
    precision, recall = precision_recall(one, two)
    assert precision == pytest.approx(0.5, abs=0.05) and recall > 0.9  # a mode too many
    assert precision_recall(one, one) == (1, 1)
    assert precision_recall(one, one + 1000) == (0, 0)
    with pytest.raises(ValueError, match="3-th nearest other of 3 rows"):
        precision_recall(one, one[:3])


# --- the floor ----------------------------------------------------------------------------------


def test_the_floor_is_between_disjoint_sets():
    pairs = list(disjoint_sets(100, 30, 60, seed=1, splits=3))
    assert [(len(a), len(b)) for a, b in pairs] == [(30, 60)] * 3
    for a, b in pairs:
        assert len({*a.tolist(), *b.tolist()}) == 90
    assert len({tuple(a.tolist()) for a, _ in pairs}) == 3


def test_too_few_real_images_for_the_floor_are_told():
    assert floor_sizes(101, 80, 80) == (50, 50)
    assert floor_note(101, (80, 80), (50, 50)) == (
        "101 real images are not enough: the floor is of 50 against 50 instead of 80 against 80"
    )
    assert floor_sizes(100, 90, 30) == (75, 25) and floor_sizes(100, 30, 70) == (30, 70)
    assert floor_note(200, (80, 80), floor_sizes(200, 80, 80)) == ""


def test_a_perfect_model_scores_the_floor():
    floors, scores = [], []
    for seed in range(60):
        draws = np.random.default_rng(seed).normal(size=(300, 4)) * [1, 2, 3, 4]
        pairs = disjoint_sets(200, 100, 100, seed=1, splits=3)
        floors.append(np.mean([frechet_of(draws[a], draws[b]) for a, b in pairs]))
        scores.append(frechet_of(draws[200:], draws[:100]))
    error = np.std(scores) / math.sqrt(60)
    assert abs(np.mean(scores) - np.mean(floors)) < 3 * error < 0.3 * np.mean(floors)


# --- neighbours and memorisation ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.float64])
@pytest.mark.parametrize("cells", [50, 4_000_000])
def test_nearest_neighbours_are_those_of_a_full_matrix(monkeypatch, cells, kind):
    monkeypatch.setattr(metrics, "_CELLS", cells)
    random = np.random.default_rng(0)
    queries = random.integers(256, size=(40, 7)).astype(kind)
    bank = random.integers(256, size=(90, 7)).astype(kind)
    bank[17] = queries[5]
    apart = cdist(queries.astype(float), bank.astype(float))
    found = nearest_neighbours(queries, bank)
    assert found.indices.tolist() == apart.argmin(1).tolist()
    assert found.distances == pytest.approx(apart.min(1)) and found.distances[5] == 0
    assert found.distances.dtype == np.float64 and found.indices.dtype == np.int64
    own = nearest_neighbours(bank, bank, exclude=np.arange(90))
    apart = cdist(bank.astype(float), bank.astype(float)) + np.diag(np.full(90, np.inf))
    assert own.distances == pytest.approx(apart.min(1))
    with pytest.raises(ValueError, match="no neighbour among 0"):
        nearest_neighbours(queries, bank[:0])


def test_a_copy_of_large_features_is_at_no_distance_at_all():
    bank = np.random.default_rng(0).normal(1e4, 1, size=(30, 50))
    assert nearest_neighbours(bank[::3], bank).distances.tolist() == [0.0] * 10


def test_memorisation_of_copies_near_copies_and_fresh_images():
    random = np.random.default_rng(0)
    train, held, fresh = (random.normal(size=(n, 5)) for n in (400, 300, 300))
    same = memorisation(fresh, train, held)
    assert same.median == pytest.approx(same.median_held_out, rel=0.1)
    assert same.below_1 < 0.04 and same.below_5 < 0.11 and same.copies == 0
    assert same.authentic == pytest.approx(same.authentic_held_out, abs=0.1)
    copied = memorisation(train[:300], train, held)
    assert copied[:1] == (0,) and copied.below_1 == copied.below_5 == 1 and copied.copies == 300
    assert copied.authentic == 0 and copied.authentic_held_out == same.authentic_held_out
    near = memorisation(train[:300] + random.normal(0, 0.01, (300, 5)), train, held)
    assert near.below_1 > 0.99 and near.copies == 0 and near.authentic < 0.01
    assert (near.n, near.train, near.held_out) == (300, 400, 300)


def test_authentic_by_hand():
    # the train images lie 1 apart, the last alone at 10: a sample must be farther than that
    train = np.array([[0.0], [1.0], [10.0]])
    found = memorisation(np.array([[-0.5], [2.5], [15.0], [25.0]]), train, np.array([[0.5]]))
    assert found.authentic == 0.5  # 2.5 is 1.5 from 1; 25 is 15 from 10, which is 9 from 1
    assert found.median == pytest.approx((1.5 + 5) / 2)


# --- colours and asymmetry ----------------------------------------------------------------------


def coloured(n, channels=3, seed=0):
    random = np.random.default_rng(seed)
    base = random.integers(60, 180, size=(n, channels, 1, 1))
    shape = (n, channels, 8, 8)
    images = base + random.integers(-30, 30, size=shape) + np.linspace(0, 40, 8).astype(int)
    return images.astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_moments_are_those_of_all_pixels(channels):
    from scipy.stats import skew

    images = coloured(500, channels)
    found = colour_moments(images)
    for c, name in enumerate(["gray"] if channels == 1 else ["red", "green", "blue"]):
        values = images[:, c].ravel() / 255
        assert found[f"{name} mean"] == pytest.approx(values.mean())
        assert found[f"{name} std"] == pytest.approx(values.std())
        assert found[f"{name} skew"] == pytest.approx(skew(values))
    each = images.reshape(500, channels, -1) / 255
    assert found["brightness spread"] == pytest.approx(each.mean(2).mean(1).std())
    assert found["contrast spread"] == pytest.approx(each.std(2).mean(1).std())
    if channels == 3:
        import colorsys

        saturation = [
            np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.T]) for image in each[:40]
        ]
        small = colour_moments(images[:40])
        assert small["saturation mean"] == pytest.approx(np.mean(saturation))
        assert small["saturation spread"] == pytest.approx(np.std(saturation))
    else:
        assert "saturation mean" not in found


def test_asymmetry_is_that_of_the_mean_image_less_chance():
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, size=(300, 1, 6, 8)).astype(np.uint8)
    mean = noise.mean(0) / 255
    assert mirror_difference(noise) == pytest.approx(mean - mean[..., ::-1])
    raw = np.sqrt(np.mean(mirror_difference(noise) ** 2))
    assert left_right_asymmetry(noise) < 0.5 * raw  # all of it is chance
    half = noise.copy()
    half[..., :4] = 0
    half[..., 4:] = 51  # 0.2 brighter on the right, without noise
    assert left_right_asymmetry(half) == pytest.approx(0.2)
    both = np.concatenate([coloured(400), coloured(400)[..., ::-1]])
    assert left_right_asymmetry(both) < 0.01 < left_right_asymmetry(coloured(400))


def z_of(rows):
    return {row.name: row.z for row in rows}


def test_the_leak_meter_is_quiet_on_fresh_images():
    z = z_of(leak_report(coloured(800), coloured(400, seed=1)))
    assert max(abs(value) for value in z.values()) < 4
    values = [
        z_of(leak_report(coloured(200, seed=s), coloured(200, seed=s + 50))) for s in range(30)
    ]
    for name in z:  # standard errors are of the right size
        assert 0.5 < np.std([v[name] for v in values]) < 1.6, name


def test_the_leak_meter_sees_jitter_and_flips():
    real, fake = coloured(600), coloured(600, seed=1)
    random = np.random.default_rng(2)
    jittered = np.clip(fake * random.uniform(0.5, 1.5, (600, 1, 1, 1)), 0, 255).astype(np.uint8)
    z = z_of(leak_report(real, jittered))
    assert z["brightness spread"] > 8 and z["red std"] > 8 and abs(z["red mean"]) < 4
    flipped = np.where(random.random((600, 1, 1, 1)) < 0.5, fake[..., ::-1], fake)
    rows = {row.name: row for row in leak_report(real, flipped)}
    assert rows[ASYMMETRY].z < -8 and rows[ASYMMETRY_KEPT].z < -8
    kept = rows[ASYMMETRY_KEPT]
    assert kept.real.value == pytest.approx(1, abs=0.1) and abs(kept.fake.value) < 0.1
    assert abs(rows["red mean"].z) < 4


def test_the_leak_meter_repeats_itself_and_refuses_other_shapes():
    real, fake = coloured(50), coloured(40, seed=1)
    assert leak_report(real, fake) == leak_report(real, fake) != leak_report(real, fake, seed=2)
    with pytest.raises(UserError, match="give both in one size"):
        leak_report(real, fake[..., :4])
    with pytest.raises(UserError, match="too few for standard errors"):
        leak_report(real[:3], fake)
    with pytest.raises(ValueError, match="uint8"):
        colour_moments(real / 255)


def test_pictures_of_one_colour_have_no_z():
    flat = np.full((20, 1, 4, 4), 7, dtype=np.uint8)
    rows = leak_report(flat, flat)
    assert all(row.z is None for row in rows) and ASYMMETRY_KEPT not in {row.name for row in rows}


# --- controls -----------------------------------------------------------------------------------


def test_the_covariance_gaussian_has_the_moments_of_the_images():
    images = coloured(400)
    samples = covariance_gaussian(images, 4000, seed=1)
    assert samples.shape == (4000, 3, 8, 8) and samples.dtype == np.uint8
    a, b = (x.reshape(len(x), -1) / 255 for x in (images, samples))
    assert b.mean(0) == pytest.approx(a.mean(0), abs=0.02)
    assert np.abs(np.cov(a.T) - np.cov(b.T)).max() < 0.1 * np.cov(a.T).max()
    assert np.array_equal(samples[:5], covariance_gaussian(images, 4000, seed=1)[:5])


def test_averages_are_of_images_of_one_class():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * 10
    labels = np.array([0, 0, 0, 1, 1, 2])
    found = averaged_images(images, 60, 2, seed=1, labels=labels)
    assert set(found.ravel()) == {5, 10, 15, 35, 50}
    assert set(averaged_images(images, 20, 6, seed=1).ravel()) == {25}


def test_noise_and_copies():
    images = coloured(50)
    assert np.std(noisy(images, 10, 1) - images.astype(float)) == pytest.approx(10, rel=0.05)
    assert len({image.tobytes() for image in copies(images, 50, 1)}) == 50
    assert len(copies(images, 70, 1)) == 70
    assert np.all(
        nearest_neighbours(copies(images, 9, 1).reshape(9, -1), images.reshape(50, -1))[0] == 0
    )

"""PLDA, normalisation, calibration and the backend against brute force and simulation."""

import numpy as np
import pytest
from lir.algorithms.logistic_regression import LogitCalibrator
from scipy.linalg import eigh
from scipy.stats import multivariate_normal

from ext_common.cli import OptionError, UserError
from fairseq_ext.speaker.verify.backend import Backend, Side
from fairseq_ext.speaker.verify.calibration import fit_calibration, quality_features
from fairseq_ext.speaker.verify.norms import as_norm, no_norm, normalised, s_norm
from fairseq_ext.speaker.verify.plda import Plda, fit_lda, fit_plda, scale_to_sphere
from fairseq_ext.speaker.verify.scores import SCORES, Cosine, pair_scores, unit


def simulated(people, each, psi, rng):
    """Embeddings (people · each, D) with W = I, B = diag psi, and their speakers."""
    person = rng.normal(size=(people, len(psi))) * np.sqrt(psi)
    labels = np.repeat(np.arange(people), each)
    return person[labels] + rng.normal(size=(len(labels), len(psi))), labels


@pytest.mark.parametrize("n", [1, 2, 5])
def test_plda_is_the_ratio_of_joint_gaussians(n):
    rng = np.random.default_rng(n)
    d = 3
    mix = rng.normal(size=(d, d))
    within, between = mix @ mix.T + np.eye(d), np.diag([3.0, 1.0, 0.2])
    mean = rng.normal(size=d)
    psi, vectors = eigh(between, within)
    plda = Plda(mean, vectors.T[::-1], psi[::-1])
    enrolled, test = rng.normal(size=(n, d)) + mean, rng.normal(size=(4, d)) + mean

    def joint(count):
        return np.kron(np.eye(count), within) + np.kron(np.ones((count, count)), between)

    expected = []
    for t in test:
        same = multivariate_normal(np.tile(mean, n + 1), joint(n + 1))
        together = same.logpdf(np.concatenate([enrolled.ravel(), t]))
        apart = multivariate_normal(np.tile(mean, n), joint(n)).logpdf(enrolled.ravel())
        expected.append(together - apart - multivariate_normal(mean, within + between).logpdf(t))
    found = plda.llr(plda.project(enrolled).mean(0)[None], np.array([n]), plda.project(test))
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)


def test_em_recovers_what_was_simulated():
    rng = np.random.default_rng(2)
    psi = np.array([6.0, 2.0, 0.5, 0.0])
    x, labels = simulated(1500, 4, psi, rng)
    turn = rng.normal(size=(4, 4))
    plda = fit_plda(x @ turn.T + 3.0, labels, 20)
    np.testing.assert_allclose(plda.psi, psi, atol=0.35)
    # the transform takes W to I
    residual = plda.project(x @ turn.T + 3.0)
    means = residual.reshape(1500, 4, 4).mean(1)[labels]
    np.testing.assert_allclose(np.cov((residual - means).T) * 4 / 3, np.eye(4), atol=0.08)


def test_plda_of_lone_recordings_is_refused():
    with pytest.raises(ValueError, match="several recordings of a speaker"):
        fit_plda(np.eye(4), np.arange(4))
    for score in ("plda", "plda:lda=2"):
        with pytest.raises(UserError, match="several recordings of a speaker: give more, or cut"):
            Backend.fit(score, "none", np.eye(4), list("abcd"))


def test_lda_finds_the_one_direction_that_tells_people_apart():
    rng = np.random.default_rng(4)
    x, labels = simulated(100, 10, np.array([0.0, 25.0, 0.0]), rng)
    found = fit_lda(x, labels, 1)
    assert abs(found[0, 1]) / np.linalg.norm(found) > 0.99
    # scaled so that a person's recordings vary by 1, and people by 25
    assert np.var(x @ found.T) == pytest.approx(26, rel=0.3)
    with pytest.raises(ValueError, match="1 to 2 dimensions, not 3"):
        fit_lda(x, labels % 3, 3)


def test_length_makes_gaussian_what_is_not():
    found = scale_to_sphere(np.array([[3.0, 4.0], [0.3, 0.4]]))
    np.testing.assert_allclose(found, np.sqrt(2) * np.array([[0.6, 0.8], [0.6, 0.8]]))


def test_as_norm_of_the_whole_cohort_is_s_norm_and_neither_sees_scale():
    rng = np.random.default_rng(6)
    cohort = rng.normal(size=(5, 30))
    for one, two in zip(as_norm(cohort, 30), s_norm(cohort), strict=True):
        np.testing.assert_array_equal(one, two)
    mean, deviation = as_norm(cohort, 4)
    best = np.sort(cohort, axis=1)[:, -4:]
    np.testing.assert_allclose(mean, best.mean(1))
    np.testing.assert_allclose(deviation, best.std(1))
    scores = rng.normal(size=5)
    plain = normalised(scores, as_norm(cohort, 4), as_norm(cohort[::-1], 4))
    # another scale and zero of the scores change nothing, and neither does the order of the sides
    scaled = 3 * cohort + 7
    again = normalised(3 * scores + 7, as_norm(scaled[::-1], 4), as_norm(scaled, 4))
    np.testing.assert_allclose(again, plain)
    np.testing.assert_array_equal(normalised(scores, no_norm(cohort), no_norm(cohort)), scores)


def test_calibration_is_lirs_and_gives_ratios_whatever_the_counts():
    rng = np.random.default_rng(7)
    # ratios N(± 2, 4) in another scale: r = (s − 5) / 3
    targets = np.repeat([True, False], [4000, 40_000])
    ratios = rng.normal(np.where(targets, 2, -2), 2)
    found = fit_calibration((3 * ratios + 5)[:, None], targets)
    np.testing.assert_allclose(found.weights, [1 / 3], atol=0.01)
    assert found.offset == pytest.approx(-5 / 3, abs=0.05)
    # of equal counts it is plain logistic regression
    half = np.r_[:4000, 4000:8000]
    mine = fit_calibration(ratios[half, None], targets[half])
    lir = LogitCalibrator(C=1e6).fit(ratios[half], targets[half].astype(int))
    np.testing.assert_allclose(mine.weights[0], lir._logit.coef_.item(), rtol=1e-3)


def test_calibration_of_what_separates_is_finite_and_of_nothing_refused():
    found = fit_calibration(np.array([[0.0], [1.0]]), np.array([False, True]))
    assert 5 < found.weights[0] < 1e3
    with pytest.raises(ValueError, match="all scores are equal"):
        fit_calibration(np.ones((4, 1)), np.array([True, False, True, False]))


def test_quality_does_not_depend_on_the_order_of_the_sides():
    one, two = np.array([[1.0, 5.0]]), np.array([[3.0, 4.0]])
    assert quality_features(one, two).tolist() == [[1.0, 4.0, 2.0, 1.0]]
    assert quality_features(two, one).tolist() == quality_features(one, two).tolist()


def test_a_person_of_several_recordings():
    people, tests = [np.array([[2.0, 0.0], [0.0, 0.5]])], np.array([[1.0, 1.0], [1.0, 0.0]])
    left, right = Cosine().sides({}, people, tests)
    # the mean of directions, not of vectors
    np.testing.assert_allclose(left @ right.T, [[1.0, np.sqrt(0.5)]])


@pytest.mark.parametrize("people, tests, pairs", [(3, 4, 500), (40, 50, 20), (9, 7, 40)])
def test_pairs_are_the_same_however_they_are_computed(people, tests, pairs, monkeypatch):
    monkeypatch.setattr("fairseq_ext.speaker.verify.scores.MATRIX", 14)
    rng = np.random.default_rng(8)
    left, right = rng.normal(size=(people, 6)), rng.normal(size=(tests, 6))
    first, second = rng.integers(people, size=pairs), rng.integers(tests, size=pairs)
    found = pair_scores(left, right, first, second)
    np.testing.assert_allclose(found, (left @ right.T)[first, second], rtol=1e-5, atol=1e-5)


@pytest.fixture
def backend():
    rng = np.random.default_rng(9)
    x, labels = simulated(30, 5, np.array([4.0, 2.0, 1.0, 1.0]), rng)
    names = [f"p{label:02d}" for label in labels]
    return Backend.fit("plda:length=false", "as_norm:top=10", x, names, "abc")


def of_tests(seed, count=12, dimensions=4):
    x = np.random.default_rng(seed).normal(size=(count, dimensions))
    return Side.of_tests(x, np.linspace(1, 2, count))


def test_a_backend_scores_as_its_parts_do(backend):
    people, tests = of_tests(1), of_tests(2)
    first, second = np.arange(12), np.arange(12)[::-1]
    found = backend.scores(people, tests, first, second)
    arrays = backend.parameters
    plda = Plda(*(arrays[name] for name in ("plda_mean", "plda_transform", "psi")))

    def ratio(a, b):
        one, two = (plda.project(x - backend.parameters["mean"]) for x in (a, b))
        return plda.llr(one, np.ones(len(one)), two)

    x, y = np.concatenate(people.recordings), np.concatenate(tests.recordings)
    plain = ratio(x, y)
    sides = [as_norm(ratio(z, backend.cohort), 10) for z in (x, y)]
    expected = [
        (
            (plain[i, j] - sides[0][0][i]) / sides[0][1][i]
            + (plain[i, j] - sides[1][0][j]) / sides[1][1][j]
        )
        / 2
        for i, j in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_backend_comes_back_from_its_file_and_the_bytes_are_the_same(backend, tmp_path):
    people, tests = of_tests(1), of_tests(2)
    sides = people, tests, np.arange(12), np.arange(12)
    scores = backend.scores(*sides)
    features = backend.features(scores, *sides, ["duration", "norm", "cohort"])
    targets = np.arange(12) % 2 == 0
    backend = backend.calibrated(features, targets, ["duration", "norm", "cohort"], ["x", "y"])
    for name in ("a.npz", "b.npz"):
        backend.save(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = Backend.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.scores(*sides), scores)
    np.testing.assert_array_equal(again.llr(scores, *sides), backend.llr(scores, *sides))
    expected = backend.calibration.llr(features)
    np.testing.assert_allclose(again.llr(scores, *sides), expected, rtol=1e-5)


def test_another_mean_is_as_if_all_had_been_moved(backend):
    moved = backend.recentred(backend.parameters["mean"] + 5)
    people, tests = of_tests(1), of_tests(2)
    rows = np.arange(12)
    expected = backend.scores(people, tests, rows, rows)
    people, tests = (
        Side([x + 5 for x in s.recordings], s.seconds, s.hertz) for s in (people, tests)
    )
    np.testing.assert_allclose(moved.scores(people, tests, rows, rows), expected, rtol=1e-4)
    with pytest.raises(UserError, match="takes no mean off"):
        Backend.unfitted("cosine", 4).recentred(np.zeros(4))


def test_who_it_was_fitted_on_may_not_be_tested(backend):
    backend.check_disjoint(["new"], "t")
    with pytest.raises(
        UserError, match="1 of the speakers of t are those of the backend's cohort .p03"
    ):
        backend.check_disjoint(["new", "p03"], "t")
    targets = np.arange(12) % 2 == 0
    calibrated = backend.calibrated(
        np.random.default_rng(1).normal(size=(12, 1)), targets, (), ["q"]
    )
    with pytest.raises(UserError, match="calibration"):
        calibrated.check_disjoint(["q"], "t")
    with pytest.raises(UserError, match="another model"):
        backend.check_model("abd", "B.npz")


def test_names_and_files_that_are_none(backend, tmp_path):
    x, names = np.random.default_rng(1).normal(size=(6, 4)), list("aabbcc")
    with pytest.raises(UserError, match="did you mean 'plda'"):
        Backend.fit("pldaa", "none", x, names)
    with pytest.raises(OptionError, match="dimensions"):
        Backend.fit("plda:dimensions=3", "none", x, names)
    with pytest.raises(UserError, match="is fitted first"):
        Backend.unfitted("mean_cosine", 4)
    with pytest.raises(UserError, match="does not exist"):
        Backend.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="not a backend"):
        Backend.load(tmp_path / "other.npz")
    backend.save(tmp_path / "half.npz")
    (tmp_path / "half.npz").write_bytes((tmp_path / "half.npz").read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot be read"):
        Backend.load(tmp_path / "half.npz")
    sides = of_tests(1), Side.of_tests(np.ones((2, 4)), np.full(2, np.nan)), np.zeros(1, int)
    with pytest.raises(UserError, match="with --norm as_norm"):
        plain = Backend.fit("plda", "none", x, names)
        plain.features(np.zeros(1), *sides, np.zeros(1, int), ["cohort"])
    with pytest.raises(UserError, match="needs durations"):
        backend.features(np.zeros(1), *sides, np.zeros(1, int), ["duration"])
    assert {"cosine", "mean_cosine", "plda"} <= set(SCORES.names())
    np.testing.assert_allclose(np.linalg.norm(unit(x), axis=1), 1)

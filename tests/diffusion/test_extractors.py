"""diffusion_ext.evaluate.extractors: features depend on the image alone, names promise no more."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_ext.evaluate import extractors, inception
from diffusion_ext.evaluate.cache import cache_folder
from diffusion_ext.evaluate.classifier import ClassifierOptions, train_classifier, weights_of
from diffusion_ext.evaluate.evaluation import EvaluationOptions
from diffusion_ext.evaluate.extractors import EXTRACTORS, build_extractor
from diffusion_ext.prepare.options import SplitOptions
from diffusion_ext.prepare.sets import array_set
from ext_common.cli import UserError

SPLIT = SplitOptions(valid_fraction=0.2)


def striped(n, seed=0, channels=1, side=12):
    """Noisy pictures of two classes: a bright column at the left or the right."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 90, size=(n, channels, side, side)).astype(np.uint8)
    labels = random.integers(2, size=n)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 2 + 7 * label] += 150
    return images, labels


@pytest.fixture(scope="module")
def reals():
    return array_set(*striped(200)[:1], "reals", striped(200)[1], ("left", "right"), SPLIT)


class Tiny(nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3)) + torch.tensor([1.0])


def save_script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export is to replace TorchScript
        torch.jit.save(torch.jit.script(module), path)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "tiny.pt"
    save_script(Tiny(), path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the real network; torch-fidelity's class wants some to be made at all."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity"
    )
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    state = {
        name: torch.randn_like(value) / max(value[0].numel(), 1) ** 0.5
        if value.ndim == 4
        else value
        for name, value in network.state_dict().items()
    }
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["pixels", "pca", "classifier:updates=20", "torchscript:path={}"])
def test_features_do_not_depend_on_the_batch(name, reals, script):
    extractor = build_extractor(name.format(script), reals, None)
    images = reals.pixels[:150]
    together = extractor(images)
    assert together.shape == (150, extractor.dim) and together.dtype == np.float64
    alone = np.concatenate([extractor(images[i : i + 1]) for i in range(0, 150, 30)])
    assert np.allclose(together[::30], alone, rtol=0, atol=1e-12 * np.abs(together).max())
    assert np.allclose(extractor(images[::-1])[::-1], together, rtol=0, atol=1e-12)
    assert extractor(images[:0]).shape == (0, extractor.dim)


def test_pixels_are_in_the_unit_range(reals):
    extractor = build_extractor("pixels", reals, None)
    assert np.array_equal(extractor(reals.pixels), reals.flat / 255)
    assert extractor.label == "Fréchet distance (pixels)"


@pytest.mark.parametrize("n", [40, 200])  # fewer and more images than pixels
def test_principal_components_are_those_of_the_covariance(n):
    images = striped(n, side=12)[0]
    reals = array_set(images, "reals")
    extractor = build_extractor("pca:components=5", reals, None)
    features = extractor(images)
    values = np.linalg.eigvalsh(np.cov(reals.flat.T / 255))[::-1][:5]
    assert np.cov(features.T) == pytest.approx(np.diag(values), abs=1e-9)
    assert features.mean(0) == pytest.approx(0, abs=1e-9)
    assert extractor.dim == 5 and "5 principal components" in extractor.label
    # no more axes than the images span
    assert build_extractor("pca:components=500", reals, None).dim == min(n - 1, 144)


def test_principal_components_of_one_picture_are_refused():
    reals = array_set(np.zeros((9, 1, 4, 4), dtype=np.uint8), "reals")
    with pytest.raises(UserError, match="all real images are the same one"):
        build_extractor("pca", reals, None)


def test_the_classifier_learns_from_images_that_are_not_held_out(reals, monkeypatch):
    seen = []

    def spy(pixels, labels, classes, options):
        seen.append((pixels, labels, classes))
        return train_classifier(pixels, labels, classes, options)

    monkeypatch.setattr(extractors, "train_classifier", spy)
    extractor = build_extractor("classifier:updates=60,features=16", reals, None)
    assert np.array_equal(seen[0][0], reals.pixels[~reals.held_out]) and seen[0][2] == 2
    assert extractor.held_out == 40 and extractor.accuracy > 0.95
    assert extractor.about == f"{100 * extractor.accuracy:.1f} % right on 40 held-out images"
    fresh, labels = striped(100, seed=9)
    assert np.mean(extractor.predict(fresh) == labels) > 0.95
    assert extractor(fresh).shape == (100, 16)


def test_the_classifier_repeats_itself_and_leaves_random_state_alone():
    images, labels = striped(60)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = ClassifierOptions(updates=5)
    first = weights_of(train_classifier(images, labels, 2, options))
    assert torch.equal(torch.rand(3), expected)
    again = weights_of(train_classifier(images, labels, 2, options))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = weights_of(train_classifier(images, labels, 2, ClassifierOptions(updates=5, seed=2)))
    assert not np.array_equal(first["out.weight"], other["out.weight"])


@pytest.mark.parametrize("shape", [(3, 40, 24), (1, 5, 9)])
def test_the_classifier_takes_any_size(shape):
    random = np.random.default_rng(0)
    images = random.integers(256, size=(20, *shape)).astype(np.uint8)
    model = train_classifier(images, np.arange(20) % 3, 3, ClassifierOptions(updates=1))
    assert model(torch.from_numpy(images)).shape == (20, 3)


def test_the_classifier_is_kept_under_all_it_depends_on(reals, tmp_path, monkeypatch):
    calls = []

    def fit(*args):
        calls.append(args)
        return train_classifier(*args)

    monkeypatch.setattr(extractors, "train_classifier", fit)
    name = "classifier:updates=3"
    first = build_extractor(name, reals, tmp_path)
    again = build_extractor(name, reals, tmp_path)
    assert len(calls) == 1 and first.key == again.key
    assert np.array_equal(first(reals.pixels), again(reals.pixels))
    keys = {first.key}
    pixels = reals.pixels.copy()
    pixels[0, 0, 0, 0] += 1
    others = [
        (name + ",seed=2", reals),
        ("classifier:updates=4", reals),
        (name, array_set(pixels, "reals", reals.labels, reals.classes, SPLIT)),
        (name, dataclasses.replace(reals, labels=1 - reals.labels)),
        (name, dataclasses.replace(reals, held_out=~reals.held_out)),
    ]
    for text, other in others:
        keys.add(build_extractor(text, other, tmp_path).key)
    assert len(calls) == len(keys) == 6
    # a damaged file costs the time only
    (path,) = [
        p
        for p in tmp_path.iterdir()
        if p.stat().st_mtime_ns == min(q.stat().st_mtime_ns for q in tmp_path.iterdir())
    ]
    path.write_bytes(path.read_bytes()[:500])
    assert build_extractor(name, reals, tmp_path).key == first.key and len(calls) == 7


def test_a_cache_that_cannot_be_written_is_no_error(reals, tmp_path):
    (tmp_path / "file").write_text("")
    assert build_extractor("pca:components=2", reals, tmp_path / "file" / "cache").dim == 2


def test_data_without_classes_have_no_classifier(reals):
    bare = array_set(reals.pixels, "somewhere/faces")
    with pytest.raises(UserError, match="somewhere/faces has no classes .* --extractor pca"):
        build_extractor("classifier", bare, None)


def test_torchscript_states_what_it_takes(reals, script, tmp_path):
    raw = build_extractor(f"torchscript:path={script}", reals, None)
    assert raw.dim == 1
    means = reals.pixels.mean(axis=(2, 3))
    assert raw(reals.pixels) == pytest.approx(means + 1)
    signed = build_extractor(f"torchscript:path={script},input=signed", reals, None)
    assert signed(reals.pixels) == pytest.approx(means / 127.5, abs=1e-6)
    assert raw.key != signed.key and raw.label.startswith("Fréchet distance (torchscript tiny.pt, ")
    (tmp_path / "no.pt").write_text("text")
    for path, reason in (
        (tmp_path / "no.pt", "no TorchScript"),
        (tmp_path / "x", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"{reason}.*torch.jit.save"):
            build_extractor(f"torchscript:path={path}", reals, None)
    linear = tmp_path / "linear.pt"
    save_script(nn.Linear(3, 2), linear)
    with pytest.raises(UserError, match="does not map uint8 images of 12x12 gray to features"):
        build_extractor(f"torchscript:path={linear}", reals, None)
    with pytest.raises(UserError, match="option 'path' is missing"):
        build_extractor("torchscript", reals, None)


def test_without_inceptions_weights_nothing_is_called_fid(reals, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    message = r"is not in torch.hub's cache, .* is called FID: download https://\S+\.pth and give"
    with pytest.raises(UserError, match=message):
        build_extractor("inception", reals, None)
    with pytest.raises(UserError, match="nowhere.pth is not there"):
        build_extractor("inception:weights=nowhere.pth", reals, None)
    for name in ("pixels", "pca", "classifier:updates=1"):
        assert "FID" not in build_extractor(name, reals, None).label


def test_inception_with_weights(weights, reals, monkeypatch, tmp_path):
    extractor = build_extractor(f"inception:weights={weights}", reals, None)
    digest = inception.sha256_file(weights)
    # the architecture alone does not make it Inception
    assert extractor.label == f"Fréchet distance (inception, other weights {digest[:8]})"
    assert "no FID" in extractor.about
    gray = extractor(reals.pixels[:3])
    assert gray.shape == (3, 2048) and np.isfinite(gray).all() and gray.std() > 0
    alone = extractor(reals.pixels[1:2])
    assert alone[0] == pytest.approx(gray[1], abs=1e-5 * np.abs(gray).max())
    assert extractor(reals.pixels[:1].repeat(3, axis=1)) == pytest.approx(gray[:1], rel=1e-6)
    # in torch.hub's cache, and taken for genuine
    monkeypatch.setattr(inception, "DIGEST", digest[:8])
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    place = tmp_path / "checkpoints" / inception.WEIGHTS
    place.parent.mkdir()
    place.symlink_to(weights)
    found = build_extractor("inception", reals, None)
    assert (found.label, found.about, found.key) == ("FID", "", extractor.key)


def test_foreign_weights_are_refused(reals, tmp_path):
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="other.pth holds no weights of torch-fidelity's"):
        build_extractor(f"inception:weights={path}", reals, None)

    class Bomb:
        def __reduce__(self):
            return print, ("executed",)

    torch.save(Bomb(), path)
    with pytest.raises(UserError, match="holds no weights"):
        build_extractor(f"inception:weights={path}", reals, None)


def test_unknown_names_and_options_are_one_sentence(reals):
    with pytest.raises(
        UserError, match="unknown feature extractor 'piksels': did you mean 'pixels'"
    ):
        build_extractor("piksels", reals, None)
    with pytest.raises(UserError, match="unknown option 'component'.*'components'"):
        build_extractor("pca:component=3", reals, None)
    with pytest.raises(UserError, match="components must be at least 1"):
        build_extractor("pca:components=0", reals, None)


def test_an_extractor_of_someone_elses(reals):
    @EXTRACTORS.register("test_mean")
    def mean(reals, cache):
        """Mean of the pixels."""
        return extractors.Extractor(
            "test_mean", 1, "mean", "key", lambda batch: batch.mean(axis=(1, 2, 3))[:, None]
        )

    try:
        assert build_extractor("test_mean", reals, None)(reals.pixels).shape == (200, 1)
    finally:
        del EXTRACTORS._entries["test_mean"], EXTRACTORS._options["test_mean"]


def test_the_cache_lies_where_xdg_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_folder()) == "/x/diffusion_ext/statistics"
    assert EvaluationOptions().cache


@pytest.mark.parametrize("option", ["updates=0", "features=0", "seed=-1"])
def test_a_classifier_that_cannot_be_trained(reals, option):
    with pytest.raises(UserError, match=f"{option.partition('=')[0]} must be at least"):
        build_extractor(f"classifier:{option}", reals, None)

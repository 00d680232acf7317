"""python -m diffusion_ext.evaluate on small images: what it prints, writes, keeps and refuses."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.diffusion.controls import averaged_images, copies, covariance_gaussian
from diffusion_ext.evaluate import evaluation
from diffusion_ext.evaluate.__main__ import main
from diffusion_ext.evaluate.cache import cache_folder, cache_key
from diffusion_ext.evaluate.comparison import averaged, statistics_parts, total_variation
from diffusion_ext.evaluate.detectors import DETECTORS
from diffusion_ext.evaluate.evaluation import EvaluationOptions, choose_rows, evaluate
from diffusion_ext.evaluate.extractors import build_extractor
from diffusion_ext.prepare.images import decode_image
from diffusion_ext.prepare.options import ImageOptions, SplitOptions
from diffusion_ext.prepare.sets import array_set, open_reals, open_samples
from diffusion_ext.store import open_images
from ext_common.cli import UserError, run
from tests import processes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def blobs(n, seed=0, channels=1, side=8):
    """A bright spot at one of nine places, in noise; the place is the class."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 80, size=(n, channels, side, side)).astype(np.uint8)
    labels = random.integers(3, size=n)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label + 1 : 2 * label + 3, 2:5] += 160
    return images, labels


def save_folder(folder, images, labels=None, ending="png"):
    for k, image in enumerate(images):
        inner = folder if labels is None else folder / f"class{labels[k]}"
        inner.mkdir(parents=True, exist_ok=True)
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(inner / f"{k:04}.{ending}")
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return (
        save_folder(tmp_path / "reals", *blobs(120)),
        save_folder(tmp_path / "samples", blobs(40, seed=1)[0]),
    )


def call(capsys, *argv):
    """(exit code, what was printed, what was complained about) of the command."""
    with pytest.raises(SystemExit) as ended:
        run(main, [str(part) for part in argv])
    out = capsys.readouterr()
    complaint = [line for line in out.err.splitlines() if line.startswith("error: ")]
    return ended.value.code, out.out, complaint


def metric_lines(text):
    rows = re.findall(r"^(\S.*?) +(\d+)((?: +[-\d.e+]+){5})(.*)$", text, flags=re.M)
    return {label: (int(n), numbers.split(), rest) for label, n, numbers, rest in rows}


# --- what it prints and writes ------------------------------------------------------------------


def test_each_number_stands_beside_its_floor(folders, capsys, tmp_path):
    real, fake = folders
    output = tmp_path / "metrics.json"
    code, text, complaint = call(
        capsys, "--real", real, "--fake", fake, "--train", real, "--output", output,
        "--extractor", "classifier:updates=80,features=16", "--valid-fraction", 0.2,
    )  # fmt: skip
    assert code == 0 and not complaint
    record = json.loads(output.read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert f"samples    40 of 40 in {fake}, 8x8 gray" in text
    assert f"reals      120 of 120 in {real}: means over 10 x 40" in text
    lines = metric_lines(text)
    assert list(lines) == [
        "Fréchet distance (classifier)", "KID (classifier)", "precision", "recall",
        "total variation of classes",
    ]  # fmt: skip
    for label, (n, numbers, _) in lines.items():
        value, _, floor, _, ratio = numbers
        assert n == 40
        if label.startswith("KID"):
            assert ratio == "-"
        else:
            assert float(ratio) == pytest.approx(float(value) / float(floor), rel=0.01)
    frechet = record["metrics"]["frechet"]
    assert (frechet["n"], frechet["reference"], frechet["draws"]) == (40, 40, 10)
    assert frechet["floor"]["n"] == frechet["floor"]["reference"] == 40
    assert frechet["ratio"] > 0
    assert "3 of 3 classes among the samples: class0: " in text
    assert sum(record["classes"]["samples"]) == 40 and record["classes"]["missing"] == []
    assert "nearest of 96 training images, for 40 samples and 24 held-out images" in text
    assert "N = 40 is less than 2048: the covariance of 16 features is poorly estimated" in text
    assert re.search(r"leak meter +40 samples +120 raw reals +z", text)
    assert record["options"]["extractor"].startswith("classifier:updates=80")
    assert record["extractor"]["about"].endswith("% right on 24 held-out images")
    assert record["detection"] is None and "FID" not in text


def test_the_screen_can_be_the_json_alone(folders):
    real, fake = folders
    program = [sys.executable, "-m", "diffusion_ext.evaluate", "--real", real, "--fake", fake]
    found = processes.run([*program, "--output", "-"], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["metrics"]["recall"]["n"] == 40
    assert json.loads(found.stdout)["memorisation"] is None
    assert "precision" in found.stderr


def test_it_repeats_itself_from_the_cache_and_without_it(folders, capsys, cache):
    real, fake = folders

    def numbers(**options):
        found = evaluate(real, fake, EvaluationOptions(**options))
        return {key: found[key] for key in ("metrics", "leak")}, found["extractor"]["cached"]

    first, was_there = numbers()
    assert not was_there and len(list(cache.iterdir())) == 3  # axes, features, floor
    again, was_there = numbers()
    assert was_there and again == first
    before = sorted(cache.iterdir())
    bare, was_there = numbers(cache=False)
    assert not was_there and bare == first and sorted(cache.iterdir()) == before
    other, _ = numbers(seed=2)
    assert other != first


def test_statistics_are_kept_under_all_they_depend_on():
    images = array_set(blobs(60)[0], "reals")
    rows = np.arange(40)

    def key(images=images, rows=rows, extractor="pca-64"):
        return cache_key("features", **statistics_parts(images, rows, extractor))

    pixels = images.pixels.copy()
    pixels[50, 0, 0, 0] ^= 1
    resized = np.stack([np.kron(image[0], np.ones((2, 2))).astype(np.uint8) for image in pixels])
    others = [
        key(array_set(pixels, "reals")),  # data
        key(array_set(resized[:, None], "reals")),  # size
        key(array_set(images.pixels.reshape(60, 1, 4, 16), "reals")),  # shape of the same bytes
        key(array_set(images.pixels[::-1], "reals")),  # order
        key(rows=rows[:39]),  # N
        key(rows=rows + 1),  # which N
        key(extractor="pca-32"),
    ]
    assert len({key(), *others}) == 8
    assert key() == key(array_set(images.pixels.copy(), "under another name"))


def test_a_folder_read_with_another_filter_has_another_key(tmp_path, monkeypatch):
    large = blobs(30, side=16)[0]
    folder = save_folder(tmp_path / "large", large)
    like = array_set(blobs(30)[0], "samples")
    lanczos = open_reals(folder, like, SplitOptions())
    assert lanczos.shape == (1, 8, 8)
    nearest = array_set(large[:, :, ::2, ::2], "samples")
    keys = {statistics_parts(one, np.arange(30), "x")["data"] for one in (lanczos, nearest)}
    assert len(keys) == 2


# --- what the numbers tell ----------------------------------------------------------------------


def ratio_of(real, fake, **options):
    return evaluate(real, fake, EvaluationOptions(**options))["metrics"]["frechet"]["ratio"]


def test_controls_score_clearly_worse_than_fresh_images():
    real = blobs(400)[0]
    fresh = ratio_of(real, blobs(200, seed=1)[0])
    assert 0.7 < fresh < 1.4
    assert ratio_of(real, averaged_images(real, 200, 5, 1)) > 2 * fresh
    # a Gaussian has all the moments a Fréchet distance of pixels sees: features that are not linear tell
    labelled = array_set(real, "reals", blobs(400)[1], ("a", "b", "c"), SplitOptions(0.2))
    gaussian = covariance_gaussian(real, 200, 1)
    options = {"extractor": "classifier:updates=60,features=16"}
    assert ratio_of(labelled, gaussian, **options) > 2 * ratio_of(
        labelled, blobs(200, seed=1)[0], **options
    )


def test_copies_of_training_images_are_found():
    train, fresh = blobs(300)[0], blobs(150, seed=1)[0]
    options = EvaluationOptions(valid_fraction=0.3)
    seen = array_set(train, "train", split=options)
    trained_on = train[~seen.held_out]
    found = evaluate(train, copies(trained_on, 100, 1), options, train=train)
    for part in found["memorisation"].values():
        assert part["below_1"] == 1 and part["authentic"] == 0
    assert found["memorisation"]["pixels"]["copies"] == 100
    assert any("100 samples are exact copies of images in" in text for text in found["warnings"])
    honest = evaluate(train, fresh, options, train=train)
    for part in honest["memorisation"].values():
        assert part.get("copies", 0) == 0 and part["below_5"] < 0.2
        assert part["median"] == pytest.approx(part["median_held_out"], rel=0.1)
        assert (part["train"], part["held_out"]) == (210, 90)
    assert not any("exact copies" in text for text in honest["warnings"])


def test_mirrored_copies_are_copies_where_training_mirrored():
    train = blobs(200)[0]
    options = EvaluationOptions(valid_fraction=0.3)
    seen = array_set(train, "train", split=options)
    mirrored = train[~seen.held_out][:80][..., ::-1].copy()
    plain = evaluate(train, mirrored, options, train=train)["memorisation"]["pixels"]
    options = dataclasses.replace(options, mirror=True)
    aware = evaluate(train, mirrored, options, train=train)["memorisation"]["pixels"]
    assert (plain["copies"], aware["copies"]) == (0, 80) and aware["train"] == 280


def test_real_images_that_were_not_trained_on_are_held_out_too():
    images = blobs(300)[0]
    options = EvaluationOptions(valid_fraction=0)
    # 100 trained on, and all 300 are real: the other 200 serve, though none is split off
    found = evaluate(images, blobs(50, seed=1)[0], options, train=images[:100])["memorisation"]
    assert (found["pixels"]["train"], found["pixels"]["held_out"]) == (100, 200)
    with pytest.raises(UserError, match="leaves 0 held-out and 300 training images"):
        evaluate(images, blobs(50, seed=1)[0], options, train=images)


def test_numbers_of_each_class_and_a_verdict(tmp_path, capsys):
    """Samples in folders of classes, of which one is drawn as another; noise over all of them is told."""
    reals = save_folder(tmp_path / "reals", *blobs(240))
    images, labels = blobs(90, seed=1)
    wrong = np.where(labels == 2, 0, labels)
    samples = save_folder(tmp_path / "samples", images, wrong)
    args = ["--extractor", "classifier:updates=150", "--output", str(tmp_path / "x.json")]
    main(["--real", reals, "--fake", samples, *args])
    record = json.loads((tmp_path / "x.json").read_text())
    lines = {line["name"]: line for line in record["by_class"]}
    assert list(lines) == ["class0", "class1"] and lines["class1"]["samples"] == (labels == 1).sum()
    assert lines["class0"]["ratio"] > 3 * lines["class1"]["ratio"]
    assert lines["class1"]["recognised"] > 0.9 > 0.7 > lines["class0"]["recognised"]
    assert record["verdict"]["passed"], record["verdict"]
    said = capsys.readouterr().out
    assert "verdict: not told from real images by any of these" in said
    assert re.search(r"class1 +\d+ +\d+ .* \d+\.\d %", said)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 12, images.shape), 0, 255)
    record = evaluate(tmp_path / "reals", noisy.astype(np.uint8))
    told = {line["label"] for line in record["verdict"]["lines"] if not line["passed"]}
    assert "gradients" in told and not record["verdict"]["passed"]


def test_a_missing_class_is_named():
    images, labels = blobs(300)
    real = array_set(images, "reals", labels, ("a", "b", "c"), SplitOptions(0.2))
    fake = images[labels != 1][:60]
    options = EvaluationOptions(extractor="classifier:updates=60")
    classes = evaluate(real, fake, options)["classes"]
    assert classes["missing"] == ["b"]
    assert classes["distance"]["value"] > 3 * classes["distance"]["floor"]["mean"]
    assert total_variation(np.array([5, 0]), np.array([0, 2])) == 1


def test_repeated_samples_are_told():
    fake = blobs(40, seed=1)[0]
    fake[10:20] = fake[0]
    warnings = evaluate(blobs(120)[0], fake)["warnings"]
    assert "10 of the 40 samples are exact copies of other samples" in warnings


def test_faces_are_counted_among_samples_and_reals(capsys, folders):
    @DETECTORS.register("test_bright")
    def bright():
        """Bright corners are faces."""
        return lambda image: [image.getpixel((0, 0))[0] / 255]

    real, fake = folders
    try:
        code, text, _ = call(
            capsys, "--real", real, "--fake", fake, "--detector", "test_bright", "--threshold", 0.2
        )
    finally:
        del DETECTORS._entries["test_bright"], DETECTORS._options["test_bright"]
    assert code == 0
    found = re.findall(r"faces by test_bright, threshold 0.2, (\w+): .* % \((\d+) of (\d+)\)", text)
    assert [row[0] for row in found] == ["samples", "reals"] and {row[2] for row in found} == {"40"}


# --- how many images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "samples, reals, options, expected",
    [
        (100, 300, {}, (100, 100, (100, 100))),
        (100, 120, {}, (60, 60, (60, 60))),  # the floor decides
        (100, 120, {"num": 100}, (100, 100, (60, 60))),
        (100, 120, {"num": 30}, (30, 30, (30, 30))),
        (100, 300, {"reference": 300}, (100, 300, (75, 225))),
        (100, 300, {"split": "valid", "valid_fraction": 0.2}, (30, 30, (30, 30))),
    ],
)
def test_how_many_are_compared(samples, reals, options, expected):
    options = EvaluationOptions(**options)
    fake = array_set(blobs(samples, seed=1)[0], "samples")
    real = array_set(blobs(reals)[0], "reals", split=options)
    rows = choose_rows(fake, real, options)
    assert (len(rows.fake), rows.reference, rows.floor) == expected
    assert len(set(rows.real)) == len(rows.real) and len(set(rows.fake)) == len(rows.fake)
    if options.split == "valid":
        assert real.held_out[rows.real].all()
    references = rows.references()
    assert {len(one) for one in references} == {rows.reference}
    assert len(references) == (1 if rows.reference == len(rows.real) else 10)


def test_a_floor_of_other_size_is_told(folders, capsys):
    real, fake = folders
    code, text, _ = call(capsys, "--real", real, "--fake", fake, "--reference", 120)
    assert code == 0
    assert (
        "warning: 120 real images are not enough: the floor is of 30 against 90 instead of 40 "
        "against 120, so it is too high and the ratio too low"
    ) in text
    lines = metric_lines(text)
    assert lines["precision"][2] == "  (floor at N = 30)" and lines["precision"][1][1] == "-"


# --- what images can be -------------------------------------------------------------------------


def test_a_folder_a_store_and_arrays_give_the_same(tmp_path, folders):
    real, fake = folders
    images, labels = blobs(120)
    store = open_images(real, ImageOptions(image_size=[8], channels=1, class_labels=True))
    np.save(tmp_path / "reals.npy", store.pixels)
    np.savez(tmp_path / "reals.npz", images=store.pixels, labels=store.labels)
    np.save(tmp_path / "samples.npy", blobs(40, seed=1)[0])
    results = [
        evaluate(one, other)["metrics"]
        for one, other in [
            (real, fake),
            (store.path, fake),
            (store.pixels, tmp_path / "samples.npy"),
            (tmp_path / "reals.npy", blobs(40, seed=1)[0]),
        ]
    ]
    values = [[metric["value"] for metric in result.values()] for result in results]
    # labels are part of the key in the cache, and change no number
    assert all(one == pytest.approx(values[0]) for one in values)
    named = open_reals(tmp_path / "reals.npz", array_set(images, "x"), SplitOptions())
    assert named.classes == ("0", "1", "2") and sorted(named.labels) == sorted(labels)


def test_real_images_are_read_at_the_size_of_the_samples(tmp_path):
    folder = save_folder(tmp_path / "large", blobs(60, channels=3, side=16)[0])
    reals = open_reals(folder, array_set(blobs(9, side=8)[0], "samples"), SplitOptions())
    assert reals.shape == (1, 8, 8)
    expected = decode_image(f"{folder}/0007.png", 8, 8, 1)
    assert np.array_equal(reals.pixels[7], expected)


def test_colour_samples_are_compared_in_colour(tmp_path, capsys):
    real = save_folder(tmp_path / "reals", blobs(60, channels=3)[0])
    fake = save_folder(tmp_path / "samples", blobs(30, 1, channels=3)[0])
    code, text, _ = call(capsys, "--real", real, "--fake", fake, "--extractor", "pixels")
    assert code == 0 and "8x8 colour" in text and "saturation mean" in text
    assert "pixels, 192 features" in text


def test_pictures_of_samples_are_not_samples(folders, capsys, tmp_path):
    real, fake = folders
    for name in ("grid.png", "strip.png"):
        Image.new("L", (80, 80)).save(f"{fake}/{name}")
    code, text, _ = call(capsys, "--real", real, "--fake", fake)
    assert code == 0 and "warning: not read as samples: grid.png, strip.png" in text
    assert "samples    40 of 40" in text


# --- what it refuses ----------------------------------------------------------------------------


def refused(capsys, code, message, *argv):
    found, text, complaint = call(capsys, *argv)
    assert found == code and len(complaint) == 1, (found, complaint)
    assert re.search(message, complaint[0]), complaint[0]
    assert "Traceback" not in text


def test_bad_folders_are_one_sentence(folders, capsys, tmp_path):
    real, fake = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    one = save_folder(tmp_path / "one", blobs(1)[0])
    mixed = save_folder(tmp_path / "mixed", blobs(5)[0])
    Image.new("L", (9, 8)).save(f"{mixed}/0009.png")
    broken = save_folder(tmp_path / "broken", blobs(5)[0])
    with open(f"{broken}/text.png", "w") as file:
        file.write("hello")
    cut = save_folder(tmp_path / "cut", blobs(5, side=64)[0])
    with open(f"{cut}/0003.png", "r+b") as file:
        file.truncate(200)
    for folder, message in (
        (empty, "empty holds no images .*: give a folder of samples"),
        (one, "one has 1 and .*reals 120 images: at least 4 samples and 8 real images are needed"),
        (mixed, "0009.png is 8x9 gray, .*0000.png is 8x8 gray: give samples of one size"),
        (broken, r"text.png cannot be used \(not an image\): take it out or repair it"),
        (cut, r"0003.png cannot be used \(truncated\): take it out or repair it"),
        (tmp_path / "nowhere", "nowhere does not exist: give a folder of images"),
    ):
        refused(capsys, 1, message, "--real", real, "--fake", folder)
    for folder, message in (
        (empty, "empty holds no images"),
        (one, "one holds a single image"),
        (tmp_path / "nowhere", "nowhere does not exist"),
    ):
        refused(capsys, 1, message, "--real", folder, "--fake", fake)


def test_bad_arrays_are_one_sentence(folders, capsys, tmp_path):
    real, fake = folders
    images = blobs(20)[0]
    np.save(tmp_path / "float.npy", images / 255)
    np.save(tmp_path / "last.npy", images.transpose(0, 2, 3, 1))
    np.savez(tmp_path / "two.npz", a=images, b=images)
    np.savez(tmp_path / "labels.npz", images=images, labels=np.zeros(3))
    (tmp_path / "text.npy").write_text("hello")
    np.save(tmp_path / "wide.npy", blobs(20, side=16)[0])
    for name, message in (
        ("float.npy", r"float.npy is float64 \(20, 1, 8, 8\): give images as uint8"),
        ("last.npy", r"last.npy is uint8 \(20, 8, 8, 1\)"),
        ("two.npz", "two.npz holds the arrays a, b: name the one with the images 'images'"),
        ("labels.npz", r"labels.npz has 20 images and labels \(3,\)"),
        ("text.npy", "text.npy cannot be read .*: write it with numpy.save"),
        ("absent.npy", "absent.npy does not exist"),
    ):
        refused(capsys, 1, message, "--real", real, "--fake", tmp_path / name)
    refused(
        capsys, 1, "wide.npy holds images of 16x16 gray, the samples are 8x8 gray: give the folder",
        "--real", tmp_path / "wide.npy", "--fake", fake,
    )  # fmt: skip


def test_bad_options_are_one_sentence(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    real, fake = folders
    both = ("--real", real, "--fake", fake)
    for code, message, *argv in (
        (2, "required: --fake", "--real", real),
        (1, "unknown feature extractor 'incepton': did you mean 'inception'", *both,
         "--extractor", "incepton"),
        (1, "without Inception's weights no number here is called FID", *both,
         "--extractor", "inception:weights=absent.pth"),
        (1, "unknown face detector", *both, "--detector", "yolo"),
        (1, "samples has 40 images, 50 are asked for", *both, "--num", "50"),
        (2, "num 1 must be at least 2", *both, "--num", "1"),
        (2, "bad value 'half' for split", *both, "--split", "half"),
        (2, "valid_fraction 2", *both, "--valid-fraction", "2"),
        (2, "is one of the inputs", *both, "--output", fake),
    ):  # fmt: skip
        refused(capsys, code, message, *argv)
    flat = save_folder(tmp_path / "flat", blobs(20)[0])
    refused(
        capsys, 1, "flat has no classes for --extractor classifier", "--real", flat, "--fake", fake,
        "--extractor", "classifier",
    )  # fmt: skip


def test_detectors_and_extractors_are_looked_for_before_work_is_done(folders, monkeypatch):
    monkeypatch.setattr(evaluation, "compare", lambda *_: pytest.fail("worked"))
    with pytest.raises(UserError, match="unknown face detector"):
        evaluate(*folders, EvaluationOptions(detector="nobody"))


def test_help_lists_extractors_and_detectors(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in ("classifier:", "inception:", "pca:", "pixels:", "torchscript:", "animeface:"):
        assert name in text


def test_samples_know_what_they_are():
    images = open_samples(blobs(5)[0])
    assert (len(images), images.shape, images.size) == (5, (1, 8, 8), "8x8 gray")
    assert images.flat.shape == (5, 64) and not images.held_out.any()


# --- real digits --------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_and_their_controls(capsys):
    datasets = pytest.importorskip("sklearn.datasets", reason="pip install scikit-learn")
    digits = datasets.load_digits()
    pixels = np.stack(
        [
            np.asarray(Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).resize((16, 16)))
            for image in digits.images
        ]
    )[:, None]
    order = np.random.default_rng(0).permutation(len(pixels))
    train, held = order[:900], order[900:]
    options = EvaluationOptions(extractor="classifier", num=400, valid_fraction=0.2, draws=20)
    classes = tuple(map(str, range(10)))
    real = array_set(
        pixels[train], "train half", digits.target[train].astype(int), classes, options
    )
    assert build_extractor("classifier", real, cache_folder()).accuracy > 0.96
    found = {
        name: evaluate(real, images, options, train=real)
        for name, images in {
            "held-out": pixels[held],
            "gaussian": covariance_gaussian(pixels[train], 400, 1),
            "averages": averaged_images(pixels[train], 400, 5, 1),
            "copies": copies(pixels[train][~real.held_out], 400, 1),
        }.items()
    }
    ratios = {name: one["metrics"]["frechet"]["ratio"] for name, one in found.items()}
    assert 0.6 < ratios["held-out"] < 1.5
    assert ratios["gaussian"] > 3 and ratios["averages"] > 3
    memory = {name: one["memorisation"]["pixels"] for name, one in found.items()}
    assert memory["copies"]["copies"] == 400 and memory["copies"]["authentic"] == 0
    assert memory["held-out"]["median"] == pytest.approx(
        memory["held-out"]["median_held_out"], rel=0.05
    )
    assert found["held-out"]["classes"]["missing"] == []


def test_each_draw_has_other_subsets_for_kid():
    """Or a tenth of the samples would stand for all of them."""
    random = np.random.default_rng(1)
    fake, real = random.normal(size=(90, 4)), random.normal(size=(80, 4))
    settings = dict(subsets=2, subset_size=10, neighbours=3)
    found = averaged([(fake, real)] * 4, 7, **settings)
    assert len(set(found["kid"])) == 4 and len(set(found["frechet"])) == 1
    again = averaged([(fake, real)] * 3, 8, **settings)
    assert found["kid"][1:].tolist() == again["kid"].tolist()


def test_broken_files_are_allowed_for_as_in_training(folders, tmp_path):
    reals, samples = folders
    for k in range(6):
        (tmp_path / "reals" / f"broken{k}.png").write_text("no image")
    with pytest.raises(UserError, match="--max-bad"):
        evaluate(reals, samples)
    store = tmp_path / "store"
    options = EvaluationOptions(max_bad=0.1, image_store=str(store))
    assert evaluate(reals, samples, options)["reals"]["images"] == 120
    assert any(store.iterdir())

"""diffusion_ext.evaluate.detectors with stubs, and with animeface where it works."""

import sys
from types import SimpleNamespace

import numpy as np
import PIL
import pytest

from diffusion_ext.evaluate.detectors import (
    DETECTORS,
    DetectionOptions,
    build_detector,
    detection_rate,
    detection_scores,
    drawn_face,
    enlarged,
)
from ext_common.cli import UserError


def brightness(image):
    """A face for each image that is not black, as sure as it is bright."""
    value = np.asarray(image).mean() / 255
    return [value / 2, value] if value else []


def levels(*values, channels=3, side=8):
    return np.stack([np.full((channels, side, side), v, dtype=np.uint8) for v in values])


def test_the_score_is_that_of_the_best_face():
    scores = detection_scores(brightness, levels(0, 51, 255), 0)
    assert scores == pytest.approx([0, 0.2, 1])


def test_the_rate_depends_on_the_threshold_and_needs_a_face():
    scores = np.array([0, 0.2, 0.5, 1.0])
    assert detection_rate(scores, 0.5) == (0.5, 2, 4, 0.5)
    assert detection_rate(scores, 0.51) == (0.25, 1, 4, 0.51)
    assert detection_rate(scores, 0.0).detected == 3  # no face is no face at any threshold


@pytest.mark.parametrize("channels", [1, 3])
def test_a_detector_sees_rgb_enlarged_with_its_aspect_kept(channels):
    image = np.zeros((channels, 20, 10), dtype=np.uint8)
    assert enlarged(image, 40).size == (40, 80)
    assert enlarged(image, 0).size == enlarged(image, 10).size == (10, 20)
    assert enlarged(image, 40).mode == "RGB"
    # channels stay in order
    red = levels(0)[0]
    red[0] = 200
    assert enlarged(red, 16).getpixel((3, 3)) == (200, 0, 0)


def test_absent_packages_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "animeface", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="needs the package animeface, .* pip install animeface"):
        build_detector("animeface")
    with pytest.raises(UserError, match="needs OpenCV, .* pip install opencv-python-headless"):
        build_detector("opencv_cascade:path=x.xml")


def test_an_animeface_that_sees_nothing_is_refused(monkeypatch):
    # what version 2.0.3 does with Pillow 12: it returns no face, and no error either
    monkeypatch.setitem(sys.modules, "animeface", SimpleNamespace(detect=lambda image: []))
    with pytest.raises(UserError, match=rf"with Pillow {PIL.__version__}.*pip install 'pillow<12'"):
        build_detector("animeface")


def test_animefaces_likelihood_is_the_score(monkeypatch):
    face = SimpleNamespace(likelihood=0.75)
    monkeypatch.setitem(sys.modules, "animeface", SimpleNamespace(detect=lambda image: [face]))
    assert build_detector("animeface")(drawn_face()) == [0.75]


def test_animeface_itself():
    pytest.importorskip("animeface", reason="pip install animeface")
    if int(PIL.__version__.split(".")[0]) >= 12:
        pytest.skip("animeface 2.0.3 sees nothing with Pillow 12 and later")
    face = np.asarray(drawn_face(64)).transpose(2, 0, 1)
    images = np.stack([face, np.full_like(face, 200)])
    assert detection_scores(build_detector("animeface"), images, 128) == pytest.approx(
        [1, 0], abs=0.1
    )


class Cascade:
    def __init__(self, path):
        self.path = path

    def empty(self):
        return "empty" in self.path

    def detectMultiScale(self, gray, *options):
        self.options = options
        return [(0, 0, 5, 5)] if gray.max() else ()


def test_opencvs_cascade(monkeypatch, tmp_path):
    cv2 = SimpleNamespace(
        CascadeClassifier=Cascade, equalizeHist=lambda gray: gray, error=RuntimeError
    )
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    for name in ("good.xml", "empty.xml"):
        (tmp_path / name).write_text("")
    detector = build_detector(f"opencv_cascade:path={tmp_path}/good.xml,min_size=10")
    assert detection_scores(detector, levels(0, 9), 16).tolist() == [0, 1]
    with pytest.raises(UserError, match="empty.xml is no cascade file"):
        build_detector(f"opencv_cascade:path={tmp_path}/empty.xml")
    with pytest.raises(UserError, match="nope.xml does not exist"):
        build_detector(f"opencv_cascade:path={tmp_path}/nope.xml")
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0.0"))
    with pytest.raises(UserError, match="OpenCV 5.0.0 has no CascadeClassifier"):
        build_detector(f"opencv_cascade:path={tmp_path}/good.xml")


def test_names_and_options():
    assert set(DETECTORS.names()) >= {"animeface", "opencv_cascade"}
    with pytest.raises(UserError, match="unknown face detector 'animefaces': did you mean"):
        build_detector("animefaces")
    with pytest.raises(ValueError, match="threshold 1.5"):
        DetectionOptions(threshold=1.5)
    with pytest.raises(ValueError, match="detector_size -1"):
        DetectionOptions(detector_size=-1)

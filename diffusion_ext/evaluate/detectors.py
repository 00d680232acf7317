"""Share of images in which a detector finds a face: the anime-face detection rate (AFD) and its like.

A rate depends on detector, threshold and size, and real images do not reach 1 either: it is told beside the
rate of real images. Detectors are made for large pictures and see small ones enlarged. Someone's own
--user-dir adds one with @DETECTORS.register(name, options=Options): it returns a function from an RGB Pillow
image to the scores of the faces in it, each in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageDraw

from diffusion_ext.pictures import pil_image
from ext_common.cli import UserError, progress
from ext_common.registry import Registry

DETECTORS = Registry("face detector")
Detector = Callable[[Image.Image], Sequence[float]]


class DetectionRate(NamedTuple):
    """`detected` of `n` images have a face of at least `threshold`."""

    rate: float
    detected: int
    n: int
    threshold: float


@dataclass
class DetectionOptions:
    """What counts as a face."""

    threshold: float = field(
        default=0.5, metadata={"help": "least score in [0, 1] of a face that counts"}
    )
    detector_size: int = field(
        default=128,
        metadata={"help": "images with a shorter side are enlarged to so many pixels; 0: never"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} must lie in [0, 1]")
        if self.detector_size < 0:
            raise ValueError(f"detector_size {self.detector_size} must not be negative")


def build_detector(text: str) -> Detector:
    """The detector that `name` or `name:key=value,key=value` describes. Raises UserError."""
    detector: Detector = DETECTORS.bind(text)()
    return detector


def detection_scores(detector: Detector, images: np.ndarray, size: int) -> np.ndarray:
    """Score of the best face in each of uint8 (N, C, H, W), float64 (N,); 0 where there is none.

    size: what the shorter side is enlarged to, bicubic; larger images stay as they are.
    """
    scores = np.zeros(len(images))
    for row, image in enumerate(progress(images, "looking for faces", "images")):
        scores[row] = max(map(float, detector(enlarged(image, size))), default=0.0)
    return scores


def detection_rate(scores: np.ndarray, threshold: float) -> DetectionRate:
    """The share of `scores` (N,) of at least `threshold` and above 0."""
    scores = np.asarray(scores)
    detected = int(np.sum((scores >= threshold) & (scores > 0)))
    return DetectionRate(detected / len(scores), detected, len(scores), threshold)


def enlarged(image: np.ndarray, size: int) -> Image.Image:
    """uint8 (C, H, W) as an RGB Pillow image whose shorter side has at least `size` pixels."""
    picture = pil_image(np.asarray(image)).convert("RGB")
    scale = size / min(picture.size)
    if scale <= 1:
        return picture
    width, height = (round(side * scale) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


@DETECTORS.register("animeface")
def animeface() -> Detector:
    """AnimeFace of the package animeface; its likelihood is the score."""
    try:
        import animeface as package
    except ImportError:
        raise UserError(
            "--detector animeface needs the package animeface, which is not installed: pip install "
            "animeface 'pillow<12'"
        ) from None
    # Version 2.0.3 reads Pillow's memory by the layout it had before 12, and finds nothing after.
    if not package.detect(drawn_face()):
        raise UserError(
            f"animeface does not see the plainest face with Pillow {PIL.__version__}, whose memory it "
            "misreads from version 12 on: pip install 'pillow<12'"
        )
    return lambda image: [face.likelihood for face in package.detect(image)]


@dataclass
class CascadeOptions:
    """Options of opencv_cascade."""

    path: str = field(metadata={"help": "cascade file of OpenCV, such as lbpcascade_animeface.xml"})
    scale_factor: float = field(
        default=1.1, metadata={"help": "ratio of successive sizes searched"}
    )
    min_neighbors: int = field(default=5, metadata={"help": "overlapping finds that make a face"})
    min_size: int = field(default=24, metadata={"help": "least side of a face in pixels"})


@DETECTORS.register("opencv_cascade", options=CascadeOptions)
def opencv_cascade(path: str, scale_factor: float, min_neighbors: int, min_size: int) -> Detector:
    """A cascade classifier of OpenCV; every face it finds has the score 1."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "--detector opencv_cascade needs OpenCV, which is not installed: pip install "
            "opencv-python-headless"
        ) from None
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: give the cascade file of opencv_cascade")
    # OpenCV 5 has moved it to its contributed modules.
    if not hasattr(cv2, "CascadeClassifier"):
        raise UserError(
            f"OpenCV {cv2.__version__} has no CascadeClassifier: pip install "
            "'opencv-python-headless<5'"
        )
    try:
        cascade = cv2.CascadeClassifier(path)
    except (cv2.error, SystemError):
        cascade = None
    if cascade is None or cascade.empty():
        raise UserError(f"{path} is no cascade file of OpenCV: give another one")

    def detect(image: Image.Image) -> list[float]:
        gray = cv2.equalizeHist(np.asarray(image.convert("L")))
        found = cascade.detectMultiScale(gray, scale_factor, min_neighbors, 0, (min_size, min_size))
        return [1.0] * len(found)

    return detect


def drawn_face(side: int = 256) -> Image.Image:
    """A face as simple as anime goes, RGB (side, side): what every detector of such faces must find."""
    picture = Image.new("RGB", (side, side), (240, 240, 250))
    draw = ImageDraw.Draw(picture)

    def oval(x: float, y: float, across: float, down: float, fill: Any) -> None:
        left, right, top, bottom = x - across, x + across, y - down, y + down
        draw.ellipse([side * edge for edge in (left, top, right, bottom)], fill=fill)

    hair, skin, dark = (90, 50, 30), (255, 228, 205), (20, 10, 20)
    oval(0.5, 0.42, 0.34, 0.34, hair)
    draw.rectangle([0.16 * side, 0.4 * side, 0.84 * side, 0.9 * side], fill=hair)
    oval(0.5, 0.47, 0.25, 0.25, skin)
    chin = [(0.28 * side, 0.55 * side), (0.72 * side, 0.55 * side), (0.5 * side, 0.82 * side)]
    draw.polygon(chin, fill=skin)
    box = [side * edge for edge in (0.22, 0.12, 0.78, 0.6)]
    draw.pieslice(box, 180, 360, fill=hair)
    for x in (0.38, 0.62):
        oval(x, 0.52, 0.08, 0.085, "white")
        oval(x, 0.52, 0.06, 0.085, (60, 80, 180))
        oval(x, 0.52, 0.032, 0.05, dark)
        oval(x - 0.024, 0.482, 0.016, 0.019, "white")
        lid = [side * edge for edge in (x - 0.088, 0.422, x + 0.088, 0.605)]
        draw.arc(lid, 190, 350, fill=dark, width=max(2, side // 70))
    mouth = [(0.47 * side, 0.7 * side), (0.53 * side, 0.7 * side)]
    draw.line(mouth, fill=(150, 50, 50), width=max(1, side // 100))
    return picture

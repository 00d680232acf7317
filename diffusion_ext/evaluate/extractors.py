"""Features of images: what distances between sets of images are measured on.

    extractor = build_extractor("pca:components=64", reals, cache=None)
    features = extractor(reals.pixels)

Someone's own --user-dir adds one with @EXTRACTORS.register(name, options=Options): called with (reals, cache,
**options) it returns an object with the attributes of Extractor.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from diffusion_ext.evaluate.cache import cache_key, cached
from diffusion_ext.evaluate.classifier import (
    VERSION,
    Classifier,
    ClassifierOptions,
    load_weights,
    train_classifier,
    weights_of,
)
from diffusion_ext.evaluate.inception import InceptionOptions, load_inception
from diffusion_ext.pictures import to_float
from diffusion_ext.prepare.sets import ImageSet
from ext_common.cli import UserError, progress
from ext_common.manifest import sha256_file
from ext_common.registry import Registry

EXTRACTORS = Registry("feature extractor")
BATCH = 64


@dataclass(frozen=True)
class Extractor:
    """Features, float64 (N, dim), of images, uint8 (N, C, H, W), whatever the size of a batch.

    compute: what does it for one batch. name: for messages; label: what the Fréchet distance on these
    features is called, which is FID for the original Inception network alone; key: hash of all that the
    features of an image depend on; about: what else a reader should know, or empty.
    """

    name: str
    dim: int
    label: str
    key: str
    compute: Callable[[np.ndarray], np.ndarray]
    about: str = ""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        features = np.empty((len(images), self.dim))
        with progress(len(images), f"features ({self.name})", "images") as bar:
            for start in range(0, len(images), BATCH):
                batch = np.ascontiguousarray(images[start : start + BATCH])
                features[start : start + len(batch)] = self.compute(batch)
                bar.update(len(batch))
        return features


@dataclass(frozen=True)
class ClassifierExtractor(Extractor):
    """An extractor that also names classes: predict gives int64 (N,) into `classes`."""

    classes: tuple[str, ...] = ()
    predict: Optional[Callable[[np.ndarray], np.ndarray]] = None
    accuracy: Optional[float] = None  # on the held-out images, None where there is none
    held_out: int = 0


def build_extractor(text: str, reals: ImageSet, cache: Path | None, device: str = "cpu") -> Any:
    """The extractor that `name` or `name:key=value,key=value` describes.

    reals: what is fitted is fitted on them. cache: folder for what takes time, or None. device: where it
    computes, told to those that have an argument of this name. Raises UserError.
    """
    build = EXTRACTORS.bind(text)
    knows = "device" in inspect.signature(build.func).parameters
    return build(reals, cache, device=device) if knows else build(reals, cache)


@EXTRACTORS.register("pixels")
def pixels(reals: ImageSet, cache: Path | None) -> Extractor:
    """All pixel values in [0, 1], as they are."""
    return Extractor(
        "pixels", int(np.prod(reals.shape)), _label("pixels"), cache_key("pixels"), _flat
    )


@dataclass
class PcaOptions:
    """Options of pca."""

    components: int = field(default=64, metadata={"help": "axes of largest variance to keep"})
    fit: int = field(
        default=4000, metadata={"help": "real images, evenly spaced, that the axes are fitted on"}
    )

    def __post_init__(self) -> None:
        if min(self.components, self.fit - 1) < 1:
            raise ValueError("components must be at least 1 and fit at least 2")


@EXTRACTORS.register("pca", options=PcaOptions)
def pca(reals: ImageSet, cache: Path | None, components: int, fit: int) -> Extractor:
    """Principal components of the pixels of the real images, not whitened."""
    rows = np.linspace(0, len(reals) - 1, min(fit, len(reals))).round().astype(np.int64)
    parts = {"data": reals.content_hash, "components": components, "rows": len(rows)}
    arrays, _ = cached(cache, "pca", parts, lambda: _principal(reals.flat[rows], components))
    mean, axes = arrays["mean"], arrays["axes"]

    def compute(batch: np.ndarray) -> np.ndarray:
        return np.asarray((_flat(batch) - mean) @ axes)

    name = f"pixels, {axes.shape[1]} principal components"
    return Extractor("pca", axes.shape[1], _label(name), cache_key("pca", **parts), compute)


@EXTRACTORS.register("classifier", options=ClassifierOptions)
def classifier(
    reals: ImageSet, cache: Path | None, device: str = "cpu", **given: Any
) -> ClassifierExtractor:
    """Hidden layer of a small network trained on the classes of the real images.

    It is trained on those that are not held out, and its accuracy on the held-out ones is told.
    """
    options = ClassifierOptions(**given)
    if not reals.classes or (reals.labels < 0).any():
        raise UserError(
            f"{reals.name} has no classes for --extractor classifier: give a folder with a sub-folder "
            "for each class, or --extractor pca"
        )
    train = np.flatnonzero(~reals.held_out)
    parts = {
        "data": reals.content_hash,
        "train": hashlib.sha256(train.tobytes()).hexdigest(),
        "options": vars(options),
        "version": VERSION,
    }
    count = len(reals.classes)

    def fitted() -> dict[str, np.ndarray]:
        pixels = np.asarray(reals.pixels)[train]
        return weights_of(train_classifier(pixels, reals.labels[train], count, options))

    arrays, _ = cached(cache, "classifier", parts, fitted)
    model = load_weights(Classifier(*reals.shape, options.features, count), arrays).to(device)

    @torch.inference_mode()
    def compute(batch: np.ndarray) -> np.ndarray:
        return np.asarray(model.features(torch.from_numpy(batch).to(device)).cpu().numpy())

    @torch.inference_mode()
    def predict(images: np.ndarray) -> np.ndarray:
        blocks = (np.ascontiguousarray(images[i : i + BATCH]) for i in range(0, len(images), BATCH))
        return np.concatenate(
            [model(torch.from_numpy(b).to(device)).argmax(1).cpu().numpy() for b in blocks]
        )

    held = np.flatnonzero(reals.held_out)
    accuracy = None
    if len(held):
        accuracy = float(np.mean(predict(reals.pixels[held]) == reals.labels[held]))
    return ClassifierExtractor(
        "classifier",
        options.features,
        _label("classifier"),
        cache_key("classifier", **parts),
        compute,
        _accuracy(accuracy, len(held)),
        classes=reals.classes,
        predict=predict,
        accuracy=accuracy,
        held_out=len(held),
    )


@EXTRACTORS.register("inception", options=InceptionOptions)
def inception(
    reals: ImageSet, cache: Path | None, weights: Optional[str], device: str = "cpu"
) -> Extractor:
    """2048 features of the Inception network of Heusel et al. 2017, whose Fréchet distance is the FID.

    Gray images become three equal channels. Nothing is downloaded.
    """
    network = load_inception(weights)
    module = network.module.to(device)

    @torch.inference_mode()
    def compute(batch: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(batch).to(device)
        (features,) = module(images.expand(-1, 3, -1, -1).contiguous())
        return np.asarray(features.double().cpu().numpy())

    label, about = "FID", ""
    if not network.genuine:
        label = _label(f"inception, other weights {network.digest[:8]}")
        about = f"{network.path} holds other weights than the original ones: no FID"
    key = cache_key("inception", weights=network.digest)
    return Extractor("inception", 2048, label, key, compute, about)


@dataclass
class TorchScriptOptions:
    """Options of torchscript."""

    path: str = field(
        metadata={"help": "file of torch.jit.save, from images (B, C, H, W) to (B, D)"}
    )
    input: str = field(
        default="uint8",
        metadata={
            "help": "what it takes: uint8, or signed for float32 in [-1, 1]",
            "choices": ("uint8", "signed"),
        },
    )


@EXTRACTORS.register("torchscript", options=TorchScriptOptions)
def torchscript(
    reals: ImageSet, cache: Path | None, path: str, input: str, device: str = "cpu"
) -> Extractor:
    """A network of your own in a TorchScript file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the user has no other file to give
            network = torch.jit.load(path, map_location=device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        reason = "it does not exist" if not Path(path).exists() else "it is no TorchScript file"
        raise UserError(
            f"{path} cannot be loaded ({reason}): write it with torch.jit.save"
        ) from error

    @torch.inference_mode()
    def compute(batch: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(batch).to(device)
        if input == "signed":
            images = to_float(images)
        return np.asarray(network(images).flatten(1).double().cpu().numpy())

    try:
        (dim,) = compute(np.asarray(reals.pixels[:2])).shape[1:]
    # What a stranger's network raises on input that it was not made for can be anything.
    except Exception as error:
        raise UserError(
            f"{path} does not map {input} images of {reals.size} to features: see its input, and the "
            f"option input of torchscript ({' '.join(str(error).split())[-120:]})"
        ) from error
    digest = sha256_file(path)
    label = _label(f"torchscript {Path(path).name}, {digest[:8]}")
    return Extractor(
        "torchscript", dim, label, cache_key("torchscript", file=digest, input=input), compute
    )


def _label(features: str) -> str:
    return f"Fréchet distance ({features})"


def _flat(batch: np.ndarray) -> np.ndarray:
    return batch.reshape(len(batch), -1) / 255.0


def _accuracy(accuracy: float | None, held_out: int) -> str:
    if accuracy is None:
        return "no held-out images to test it on"
    return f"{100 * accuracy:.1f} % right on {held_out} held-out images"


def _principal(flat: np.ndarray, components: int) -> dict[str, np.ndarray]:
    """mean (D,) and axes (D, K) of uint8 (N, D), in [0, 1]; K is at most the rank."""
    data = flat / 255.0
    mean = data.mean(axis=0)
    data -= mean
    wide = data.shape[1] > data.shape[0]
    # The smaller of the two products: the eigenvectors of one give those of the other.
    values, vectors = np.linalg.eigh(data @ data.T if wide else data.T @ data)
    keep = [i for i in range(len(values))[::-1] if values[i] > 1e-10 * values[-1]][:components]
    if not keep:
        raise UserError("all real images are the same one: there are no principal components")
    axes = vectors[:, keep]
    if wide:
        axes = data.T @ axes / np.sqrt(values[keep])
    # Of the two directions the one whose largest entry is positive, for features that can be compared.
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(len(keep))])
    return {"mean": mean, "axes": axes * signs}

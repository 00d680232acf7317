"""Samples against real images: every number with N and what real images score against real ones at that N."""

from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import numpy as np

from diffusion_ext.evaluate.cache import cache_folder
from diffusion_ext.evaluate.comparison import Rows, by_class, class_counts, compare
from diffusion_ext.evaluate.detectors import (
    DetectionOptions,
    build_detector,
    detection_rate,
    detection_scores,
)
from diffusion_ext.evaluate.extractors import build_extractor
from diffusion_ext.evaluate.leakage import leak_report
from diffusion_ext.evaluate.metrics import floor_note, floor_sizes
from diffusion_ext.evaluate.neighbours import memorisation
from diffusion_ext.evaluate.texture import features_of, judged, texture
from diffusion_ext.prepare.options import SplitOptions, StoreOptions
from diffusion_ext.prepare.sets import ImageSet, open_reals, open_samples
from ext_common.checkpoints import usable_device
from ext_common.cli import UserError

SPLITS = ("all", "train", "valid")
ENOUGH = 2048  # samples; fewer, and much of the Fréchet distance is their small number
POOL = 2  # real images at most, as multiples of what one comparison needs: features cost time
MOST_TEXTURES = 2000  # samples whose texture is looked at
LEAST_SPREAD = 0.05  # of the floor of a distance: some draws do not tell its deviation well
MAX_HELD_OUT = 2000  # images that memorisation is compared with; percentiles need no more


@dataclass
class EvaluationOptions(DetectionOptions, SplitOptions, StoreOptions):
    """How samples are judged."""

    extractor: str = field(
        default="pca", metadata={"help": "features to measure on, as name or name:key=value"}
    )
    device: str = field(
        default="cpu", metadata={"help": "where networks compute features: cpu, cuda, auto"}
    )
    num: Optional[int] = field(
        default=None,
        metadata={
            "help": "samples to judge, drawn at random; none: all, but at most half as many as there "
            "are real images, so that the floor is of the same N"
        },
    )
    reference: Optional[int] = field(
        default=None,
        metadata={"help": "real images to compare them with at a time; none: as many as samples"},
    )
    split: str = field(
        default="all",
        metadata={"help": "real images to take; valid: those held out", "choices": SPLITS},
    )
    draws: int = field(
        default=10,
        metadata={
            "help": "random sets of real images that samples are compared with, and random pairs of "
            "sets for the floor; a distance is the mean over them"
        },
    )
    kid_subsets: int = field(
        default=100, metadata={"help": "random subsets of KID, divided among the draws"}
    )
    kid_subset_size: int = field(
        default=1000, metadata={"help": "images in each, at most half as many as are compared"}
    )
    neighbours: int = field(
        default=3, metadata={"help": "k of the manifolds of precision and recall"}
    )
    mirror: bool = field(
        default=False,
        metadata={"help": "training images were mirrored at random: mirrored copies are copies"},
    )
    detector: Optional[str] = field(
        default=None, metadata={"help": "face detector, as name or name:key=value"}
    )
    cache: bool = field(
        default=True,
        metadata={
            "help": "keep what is computed on real images in diffusion_ext/statistics of "
            "$XDG_CACHE_HOME or ~/.cache"
        },
    )
    seed: int = field(default=1, metadata={"help": "seed of all random choices"})

    def __post_init__(self):
        DetectionOptions.__post_init__(self)
        SplitOptions.__post_init__(self)
        StoreOptions.__post_init__(self)
        least = {"num": 2, "reference": 2, "draws": 1, "kid_subsets": 1, "kid_subset_size": 2}
        for name, limit in (least | {"neighbours": 1, "seed": 0}).items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"{name} {value} must be at least {limit}")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} must be one of {', '.join(SPLITS)}")


def evaluate(real, fake, options: Optional[EvaluationOptions] = None, train=None) -> dict[str, Any]:
    """All numbers about samples, as what --output writes.

    real, fake, train: path or uint8 array (N, C, H, W), see diffusion_ext.prepare.sets. train: the images
    that the model was trained on, less those that the split options hold out; without it memorisation is not
    judged. Raises UserError.
    """
    options = options or EvaluationOptions()
    samples = open_samples(fake)
    reals = open_reals(real, samples, options, options)
    source = reals
    if train is not real:
        source = None if train is None else open_reals(train, samples, options, options)
    rows = choose_rows(samples, reals, options)
    cache = cache_folder() if options.cache else None
    # Both before anything that takes long: they may be missing.
    detector = build_detector(options.detector) if options.detector else None
    extractor = build_extractor(options.extractor, reals, cache, usable_device(options.device))
    images = samples.pixels[rows.fake]
    features = extractor(images)
    metrics, from_cache = compare(features, reals, rows, extractor, cache, options)
    record = {
        "samples": _described(samples, len(rows.fake)),
        "reals": _described(reals, len(rows.real)),
        "size": samples.size,
        "extractor": {
            "name": extractor.name,
            "features": extractor.dim,
            "key": extractor.key,
            "about": extractor.about,
            "cached": from_cache,
        },
        "metrics": metrics,
        "verdict": verdict_of(metrics["frechet"], samples, reals, rows),
        "by_class": by_class(features, samples, reals, rows, extractor),
        "classes": class_counts(extractor, images, reals.labels[rows.real], rows),
        "memorisation": None,
        "leak": leak_report(reals.pixels[rows.real], images, options.seed),
        "detection": None,
        "warnings": warnings_about(samples, reals, rows, extractor.dim),
        "options": asdict(options),
    }
    if source is not None:
        record["memorisation"] = memorisation_of(
            images, features, reals, source, extractor, options.mirror
        )
    if detector:
        real_images = reals.pixels[rows.real[: rows.reference]]
        rates = {
            name: detection_rate(
                detection_scores(detector, part, options.detector_size), options.threshold
            )._asdict()
            for name, part in (("samples", images), ("reals", real_images))
        }
        record["detection"] = {"detector": options.detector, **rates}
    record["leak"] = [asdict(row) for row in record["leak"]]
    return record


def verdict_of(
    distance: dict[str, Any], samples: ImageSet, reals: ImageSet, rows: Rows
) -> dict[str, Any]:
    """Whether samples are told from real images by any of distance, power spectrum, gradients and tones."""
    floor = distance["floor"]
    line = judged("distance", distance["value"], floor["mean"], floor["std"], LEAST_SPREAD)
    # evenly over the rows, which come in the order of the files
    fake = rows.fake[:: -(-len(rows.fake) // MOST_TEXTURES)]
    real = rows.real[: 2 * MOST_TEXTURES]
    ours, theirs = (features_of(s.pixels[r]) for s, r in ((samples, fake), (reals, real)))
    lines = [line, *texture(ours, theirs, rows.seed)]
    return {"passed": all(line["passed"] for line in lines), "lines": lines}


def choose_rows(samples: ImageSet, reals: ImageSet, options: EvaluationOptions) -> Rows:
    """Random rows by the seed. UserError where there are too few images."""
    pool, part = np.arange(len(reals)), ""
    if options.split != "all":
        pool = np.flatnonzero(reals.held_out == (options.split == "valid"))
        part = f" (split {options.split})"
    for name, asked, there in (
        (samples.name, options.num, len(samples)),
        (reals.name + part, options.reference, len(pool)),
    ):
        if asked and asked > there:
            raise UserError(f"{name} has {there} images, {asked} are asked for: ask for fewer")
    n = options.num or min(len(samples), max(len(pool) // 2, 1))
    reference = min(options.reference or n, len(pool))
    floor = floor_sizes(len(pool), n, reference)
    least = options.neighbours + 1
    if min(n, *floor) < least:
        raise UserError(
            f"{samples.name} has {len(samples)} and {reals.name}{part} {len(pool)} images: at least "
            f"{least} samples and {2 * least} real images are needed"
        )
    random = np.random.default_rng(options.seed)
    fake = np.sort(random.permutation(len(samples))[:n])
    real = random.permutation(pool)[: POOL * (n + reference)]
    return Rows(fake, real, reference, floor, options.draws, options.seed)


def memorisation_of(
    images: np.ndarray,
    features: np.ndarray,
    reals: ImageSet,
    source: ImageSet,
    extractor,
    mirror: bool,
) -> dict[str, Any]:
    """Memorisation on pixels, in units of [0, 1], and on the extractor's features where they are others.

    images, features: of the samples. Training images: those of `source` that are not held out. Held-out
    ones: all others of `source` and `reals`. UserError where one of them is missing.
    """
    train = source.pixels[~source.held_out]
    seen = {h for h, out in zip(source.hashes, source.held_out, strict=True) if not out}
    unseen = {}
    for part in (reals, source):
        for row, digest in enumerate(part.hashes):
            if digest not in seen:
                unseen.setdefault(digest, (part, row))
    if not unseen or len(train) < 2:
        raise UserError(
            f"{source.name} leaves {len(unseen)} held-out and {len(train)} training images to judge "
            "memorisation by: raise --valid-fraction, or give --real images that were not trained on"
        )
    places = list(unseen.values())
    step = -(-len(places) // MAX_HELD_OUT)
    held_out = np.stack([part.pixels[row] for part, row in places[::step]])
    if mirror:
        train = np.concatenate([train, train[..., ::-1]])
    found = memorisation(*(part.reshape(len(part), -1) for part in (images, train, held_out)))
    record = {"pixels": found._asdict()}
    for key in ("median", "median_held_out"):
        record["pixels"][key] /= 255
    if extractor.name != "pixels":
        found = memorisation(features, extractor(train), extractor(held_out))
        record[extractor.name] = found._asdict()
        # The last digit of a feature depends on its batch: copies are told by their pixels.
        del record[extractor.name]["copies"]
    return record


def warnings_about(samples: ImageSet, reals: ImageSet, rows: Rows, dim: int) -> list[str]:
    """What a reader of the numbers must know."""
    found = []
    n = len(rows.fake)
    if n < max(ENOUGH, dim):
        found.append(
            f"N = {n} is less than {max(ENOUGH, dim)}: the covariance of {dim} features is poorly "
            "estimated and the Fréchet distance too large, so compare it with its floor, and with "
            "others of the same N only"
        )
    note = floor_note(len(rows.real), (n, rows.reference), rows.floor)
    if note:
        found.append(f"{note}, so it is too high and the ratio too low")
    hashes = [samples.hashes[row] for row in rows.fake]
    if repeated := n - len(set(hashes)):
        found.append(f"{repeated} of the {n} samples are exact copies of other samples")
    if real := len({*hashes} & {*reals.hashes}):
        found.append(
            f"{real} samples are exact copies of images in {reals.name}: no distance says anything "
            "about the others"
        )
    if samples.left_out:
        found.append(f"not read as samples: {', '.join(samples.left_out)}")
    return found


def _described(images: ImageSet, used: int) -> dict[str, Any]:
    return {
        "name": images.name,
        "images": len(images),
        "used": used,
        "content_hash": images.content_hash,
    }

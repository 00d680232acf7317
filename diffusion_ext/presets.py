"""What `--task diffusion` wants where no flag says it: as data, by what is in IMAGES and by the machine.

The values are those of configs/diffusion; the recipes are snapshots of them.
"""

import contextlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_ext.prepare.arrays import is_array, read_array, rows_last
from diffusion_ext.prepare.build import read_meta
from diffusion_ext.prepare.images import ImageFiles, formats
from ext_common.presets import Choice, Machine, TaskPresets, cosine, shared_batch
from ext_common.store import parts_of

SIDES = (16, 32, 64)
# Image files whose header is read for the size and the colours of all.
SAMPLED = 200
CPU_MINUTES = 30
GRAY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L"}
MUCH_PADDING = 1.3  # times the pixels of the images
# Fewer images than these are soon learnt by heart.
FEW = 1000
DEEPEST = 16  # pixels; a network that ends above would attend over too many of them in its middle


@dataclass(frozen=True)
class Facts:
    """height, width in pixels; count 0 where nobody looked; size: "read", "given" or "prepared"; start: flags
    of the checkpoint of --init-from.
    """

    height: int
    width: int
    channels: int = 0
    count: int = 0
    classes: int = 0
    size: str = "read"
    start: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """A network and how it is trained; batch: images of an update; passes: over the images, at least."""

    channels: str
    mults: str
    blocks: str
    attends: str
    lr: str
    batch: int
    updates: int
    passes: int = 0
    warmup: int = 500
    epoch: int = 500
    grids: int = 1000
    dropout: str = "0.0"
    weighting: str = "none"
    more: tuple[tuple[str, str], ...] = ()


# By the larger side, pixels: what a GPU trains, for about so many updates.
SIZES = {
    16: Size("32", "1,2,2", "1", "8", "0.001", 64, 2500),
    32: Size("64", "1,2,2", "2", "16", "0.0005", 64, 50000),
    64: Size("64", "1,2,3,4", "2", "16", "0.0003", 64, 200000),
    10**9: Size("128", "1,1,2,2,4,4", "2", "16", "0.0001", 32, 500000),
}
# What a GPU trains on MANY images of more than 16 pixels: CIFAR-10 as Ho et al. 2020, and a course's faces.
MANY = 20_000
_LONG = Size("128", "1,2,2,2", "2", "16", "0.0002", 128, 800_000, 0, 5000, 2000, 5000, "0.1")
LARGE = {
    32: replace(_LONG, more=(("--head-channels", "256"),)),
    64: replace(
        _LONG,
        channels="96",
        mults="1,2,3,4",
        attends="16,8",
        updates=300_000,
        warmup=2000,
        weighting="min_snr",
    ),
    10**9: SIZES[10**9],
}
# Of edm on what is as small as the digits, which its own times, those of photographs, leave twice as far
# from real ones (docs/results/diffusion.md).
SMALL_TIMES = "edm:mean=0"
# Who gives one of them has the objective that they are options of; without, flow is nearer to the images
# after the same minutes, or as near (docs/results/diffusion.md).
OF_V = {"beta_schedule", "zero_terminal_snr", "loss_weighting", "learned_variance"}
# What learns within minutes on a CPU.
_SHORT = Size("32", "1,2,2", "1", "8", "0.001", 64, 1200, 40, warmup=200, grids=500)
SMALL = {
    16: _SHORT,
    32: replace(_SHORT, mults="1,2,3", batch=32, updates=3000, passes=25),
    10**9: replace(_SHORT, mults="1,2,3,4", batch=32, updates=6000, passes=25),
}


def read(data: str, asked: Mapping[str, Any]) -> Facts:
    """What is in the images, of the size of the checkpoint that --init-from names."""
    if not asked.get("init_from"):
        return look(data, asked)
    from diffusion_ext.inference import read_checkpoint
    from diffusion_ext.network import flags_of

    state = read_checkpoint(asked["init_from"])
    spec = state["task_state"]["spec"]
    size = asked.get("image_size") or [spec["height"], spec["width"]]
    found = look(data, {"minutes": 1, **asked, "image_size": size})
    return replace(found, channels=spec["channels"], start=flags_of(state))


def look(data: str, asked: Mapping[str, Any]) -> Facts:
    """A prepared folder says all; of others the names are listed and the headers of a few files read.

    Nothing is looked at where --image-size says the size and no --minutes ask for a plan.
    """
    if len(parts := parts_of(data)) > 1:
        each = [read(part, asked) for part in parts]
        count, classes = sum(one.count for one in each), max(one.classes for one in each)
        return replace(each[0], count=count, classes=classes)
    given = list(asked.get("image_size") or [])
    if given and not asked.get("minutes"):
        return Facts(given[0], given[-1], size="given")
    folder = Path(data)
    meta = read_meta(folder)
    if meta is not None:
        channels, height, width = meta["shape"]
        return Facts(height, width, channels, meta["images"], len(meta["classes"]), "prepared")
    if is_array(folder) and folder.is_file():
        pixels, name, labels = read_array(folder)
        rows = rows_last(pixels, name)
        height, width = (given[0], given[-1]) if given else rows.shape[1:3]
        classes = 0 if labels is None else len(set(labels.tolist()))
        return Facts(height, width, 3 if rows.ndim == 4 else 1, len(rows), classes)
    files = ImageFiles(folder)
    names = files.names
    sides, gray = headers(files)
    if given:
        height, width = given[0], given[-1]
    else:
        height = width = side_for(statistics.median(sides) if sides else SIDES[-1])
    folders = {name.split("/")[0] for name in names if "/" in name}
    grouped = len(folders) > 1 and all("/" in name for name in names)
    classes = len(folders) if grouped else 0
    return Facts(height, width, 1 if gray else 3, len(names), classes)


def headers(files: ImageFiles) -> tuple[list[int], bool]:
    """The shorter sides of at most SAMPLED of the images, pixels, and whether all of them are gray."""
    names = files.names
    chosen = np.random.default_rng(0).permutation(len(names))[:SAMPLED]
    sides, modes = [], set()
    for number in chosen:
        with (
            contextlib.suppress(Exception),
            Image.open(files.file(names[number]), formats=formats()) as image,
        ):
            sides.append(min(image.size))
            modes.add(image.mode)
    return sides, bool(modes) and modes <= GRAY


def side_for(median: float) -> int:
    """16, 32 or 64 pixels: the largest that is not above the median, 16 below that."""
    return max((side for side in SIDES if side <= median), default=SIDES[0])


def choose(facts: Facts, machine: Machine, asked: Mapping[str, Any]) -> Sequence[Choice]:
    sizes = sizes_for(facts, machine)
    small, patient = sizes is SMALL, is_patient(facts, machine)
    size, network = fitted(facts, sizes, asked)
    network |= {k: v for k, v in facts.start.items() if k != "--objective"}
    least = max(size.updates, math.ceil(facts.count * size.passes / size.batch))
    updates = asked.get("max_update", least)
    batch, _, together = shared_batch(size.batch, machine.processes)
    schedule: dict[str, str | None]
    schedule = {"--lr-scheduler": "fixed", "--warmup-updates": str(size.warmup)}
    if small:
        schedule = cosine(updates, size.warmup, asked)
    predicted = asked.get("objective") or facts.start.get("--objective")
    if not predicted:
        predicted = "v" if not small or asked.keys() & OF_V else "flow"
    # the path of flow ends in noise, and edm's own weighting is none
    own = predicted in ("flow", "edm")
    weighting = "none" if own else size.weighting
    criterion: dict[str, str | None] = {"--criterion": "ddpm", "--loss-weighting": weighting}
    if predicted == "edm" and max(facts.height, facts.width) <= SIDES[0]:
        criterion["--time-sampling"] = SMALL_TIMES
    levels = "with noise levels of its own" if own else "with the sigmoid schedule"
    intervals = {"--epoch-updates": str(size.epoch), "--sample-interval": str(size.grids)}
    planned = CPU_MINUTES if small and not machine.gpu and not machine.minutes else 0
    seen = f"{facts.count:,} images, " if facts.count else ""
    kinds = f", {facts.classes} classes (sub-folders)" if facts.classes else ""
    data = f"{seen}{facts.height} × {facts.width} pixels{kinds}"
    few = 0 < facts.count < FEW
    if few and not facts.start:
        network["--dropout"] = "0.1"
    whose = "those of --init-from" if facts.start else f"for {facts.height} × {facts.width}"
    return [
        Choice("data", {} if patient else data_flags(facts), data),
        Choice("arch", {"--arch": "ddpm_unet", **network}, whose),
        Choice("criterion", {"--objective": predicted, **criterion}, levels),
        Choice("few images", few_flags(facts) if few else {}, "soon learnt by heart"),
        Choice("optimizer", {"--optimizer": "adam", "--adam-betas": "(0.9, 0.99)"}, ""),
        Choice("rate", {"--lr": size.lr}, f"for {size.batch} images an update"),
        Choice("schedule", schedule, "falls to 0 in the end" if small else "the average falls"),
        Choice("clipping", {"--clip-norm": "1.0"}, "a rare large gradient costs nothing"),
        Choice("batch", {"--batch-size": str(batch)}, together or "images an update"),
        Choice(
            "length",
            {"--max-update": str(least)},
            f"{least * size.batch:,} images"
            + (f", and at most {planned} minutes (--minutes sets others)" if planned else ""),
            planned,
        ),
        Choice("intervals", intervals, "epochs, and grids of samples"),
        Choice("checkpoints", {"--no-epoch-checkpoints": None}, "the best and the last"),
        Choice("loading", {"--num-workers": "0", "--log-interval": "100"}, "images are in memory"),
    ]


def is_patient(facts: Facts, machine: Machine) -> bool:
    """Who says the size has got the networks for a GPU so far, and goes on to."""
    return facts.size == "given" and not machine.minutes


def sizes_for(facts: Facts, machine: Machine) -> Mapping[int, Size]:
    if is_patient(facts, machine):
        return SIZES
    if not machine.gpu or max(facts.height, facts.width) <= SIDES[0]:
        return SMALL
    return LARGE if facts.count >= MANY else SIZES


def levels_for(height: int, width: int, most: int) -> int:
    """Resolutions of a network: the most that need no padding, else the most that need little, else all."""
    for limit in (1.0, MUCH_PADDING):
        for levels in range(most, 1, -1):
            n = 2 ** (levels - 1)
            area = math.prod(-(-side // n) * n for side in (height, width))
            deep = levels == most or max(height, width) >> (levels - 1) <= DEEPEST
            if deep and area <= limit * height * width:
                return levels
    return most


def data_flags(facts: Facts) -> dict[str, str | None]:
    """What a folder of images is to be read as; a prepared one knows its size and colours."""
    flags: dict[str, str | None] = {}
    if facts.size != "prepared":
        size = [facts.height] + [facts.width] * (facts.height != facts.width)
        flags |= {"--image-size": ",".join(map(str, size)), "--channels": str(facts.channels)}
    return flags | ({"--class-labels": None} if facts.classes else {})


def few_flags(facts: Facts) -> dict[str, str | None]:
    """Against learning by heart: 15 % of the images changed (Karras et al. 2022), an end where it begins."""
    jitter = ";color_jitter:p=0.15" if facts.channels == 3 else ""
    return {"--augment": f"hflip:p=0.15{jitter}", "--stop-at-copies": None}


def fitted(
    facts: Facts, sizes: Mapping[int, Size], asked: Mapping[str, Any]
) -> tuple[Size, dict[str, str | None]]:
    """The row of `sizes` for these images, and its network, with as many multiples as a side halves.

    Sides that do not halve so often are padded by the network, with fewer multiples where that would be much.
    It attends at the largest height there is up to the row's, with the --channel-mults asked for.
    """
    height, width = facts.height, facts.width
    size = next(row for limit, row in sizes.items() if max(height, width) <= limit)
    mults = ",".join(size.mults.split(",")[: levels_for(height, width, size.mults.count(",") + 1)])
    depth = len(asked.get("channel_mults") or mults.split(","))
    heights = [-(-height >> (depth - 1)) << (depth - 1 - level) for level in range(depth)]
    wanted = {
        max((h for h in heights if h <= int(limit)), default=0) for limit in size.attends.split(",")
    }
    attends = ",".join(map(str, sorted(wanted, reverse=True)))
    network: dict[str, str | None] = {
        "--base-channels": size.channels,
        "--channel-mults": mults,
        "--blocks": size.blocks,
        "--attention-resolutions": attends,
        "--dropout": size.dropout,
        **dict(size.more),
    }
    return size, network


PRESETS = TaskPresets(
    {
        "arch": "ddpm_unet",
        "criterion": "ddpm",
        "optimizer": "adam",
        "lr_scheduler": "cosine",
    },
    read,
    choose,
)

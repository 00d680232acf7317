"""What can be asked of images; the task's configuration may inherit from both dataclasses."""

from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

from ext_common.cli import OptionError


@dataclass
class StoreOptions:
    """How the images of a folder are decoded, and where to."""

    max_bad: float = field(
        default=0.01,
        metadata={
            "help": "share of files that may be unusable: they are reported and skipped, more than "
            "this is an error"
        },
    )
    image_store: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder to keep decoded images in, a sub-folder for each data and size; none: "
            "diffusion_ext in $XDG_CACHE_HOME or ~/.cache"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise OptionError(f"max_bad {self.max_bad} must lie in [0, 1]")


@dataclass
class ImageOptions(StoreOptions):
    """What is made of the images in a folder, and what is asked of a finished store."""

    image_size: List[int] = field(
        default_factory=list,
        metadata={
            "help": "pixels: one number for square images, or height,width; empty or 0: what a "
            "prepared folder has"
        },
    )
    channels: int = field(
        default=0,
        metadata={
            "help": "3 for colour, 1 for gray; 0: what a prepared folder has, 3 for other images",
            "choices": (0, 1, 3),
        },
    )
    class_labels: bool = field(
        default=False, metadata={"help": "the sub-folder an image lies in is its class"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        asked_size(self)
        if self.channels not in (0, 1, 3):
            raise OptionError(f"channels {self.channels} must be 1 (gray) or 3 (colour)")


@dataclass
class SplitOptions:
    """Which images are held out; see `image_store.held_out`."""

    valid_fraction: float = field(
        default=0.05, metadata={"help": "share of the images held out for validation"}
    )
    max_valid: int = field(default=1000, metadata={"help": "at most so many of them"})

    def __post_init__(self) -> None:
        check_split(self.valid_fraction, self.max_valid)


def asked_size(options: Any) -> Optional[Tuple[int, int]]:
    """(height, width) of the option image_size, None where it leaves that open."""
    size = list(options.image_size or [])
    if size in ([], [0]):
        return None
    if len(size) > 2 or min(size) < 1:
        text = ",".join(map(str, size))
        raise OptionError(f"image_size {text} must be one number of pixels or height,width")
    return size[0], size[-1]


def check_split(valid_fraction: float, max_valid: int) -> None:
    """OptionError for values that divide nothing."""
    if not 0 <= valid_fraction < 1:
        raise OptionError(f"valid_fraction {valid_fraction} must lie in [0, 1)")
    if max_valid < 1:
        raise OptionError(f"max_valid {max_valid} must be at least 1")

"""Options of the commands of a gallery."""

from dataclasses import dataclass, field
from typing import List, Optional

from fairseq_ext.speaker.inference import SpeakerModel
from fairseq_ext.speaker.inference.inputs import RunOptions
from fairseq_ext.speaker.verify.voices import Runner


@dataclass
class ModelOptions(RunOptions):
    """What every command of a gallery that runs a model has."""

    subset: Optional[str] = field(
        default=None, metadata={"help": "split of a prepared folder; none: all of it"}
    )


@dataclass
class EnrolOptions(ModelOptions):
    """Options of `enrol`."""

    name: Optional[str] = field(
        default=None, metadata={"help": "whose the files are; none: the folder of each says it"}
    )
    speakers: Optional[List[str]] = field(
        default=None, metadata={"help": "only these of a folder; none: all"}
    )
    backend: Optional[str] = field(
        default=None,
        metadata={
            "help": "for a new gallery: file of verify --fit or --calibrate, which it takes in; none: cosine"
        },
    )


@dataclass
class CalibrateOptions(ModelOptions):
    """Options of `calibrate`."""

    fpir: float = field(
        default=0.01, metadata={"help": "share of strangers that may get a name, at most"}
    )
    window: Optional[float] = field(
        default=None,
        metadata={
            "help": "for windows of so many seconds, as of identify --every; none: whole recordings"
        },
    )
    seed: int = field(default=1, metadata={"help": "of the recording drawn of each stranger"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fpir < 1:
            raise ValueError(f"--fpir lies between 0 and 1, got {self.fpir}")
        if self.window is not None and not self.window > 0:
            raise ValueError(f"--window must be positive, got {self.window}")


@dataclass
class GalleryIdentifyOptions(ModelOptions):
    """Options of `identify`."""

    output: Optional[str] = field(
        default=None, metadata={"help": "file to write (CSV, RTTM with --every); none: the screen"}
    )
    threshold: Optional[float] = field(
        default=None, metadata={"help": "score that a name takes; none: what calibrate found"}
    )
    prior_known: float = field(
        default=0.5,
        metadata={"help": "how probable it is beforehand that somebody enrolled speaks"},
    )
    every: Optional[float] = field(
        default=None,
        metadata={
            "help": "say who speaks in each so many seconds, as RTTM; none: once a recording"
        },
    )
    window: Optional[float] = field(
        default=None, metadata={"help": "with --every: seconds heard for each; none: the same"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.prior_known < 1:
            raise ValueError(f"--prior-known lies between 0 and 1, got {self.prior_known}")
        for name in ("every", "window"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.window is not None and (self.every is None or self.window < self.every):
            raise ValueError("--window goes with --every and is no shorter")


def load_runner(options: ModelOptions, batch_size: int | None = None) -> Runner:
    """The model of --path."""
    model = SpeakerModel.from_checkpoint(options.path, options.device, options.user_dir)
    return Runner(model, options.path, batch_size, options.max_frames)

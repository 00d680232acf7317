"""`--task speaker_id`: closed-set speaker identification on a folder made by `speaker.prepare`."""

import logging
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING, open_dict

from ext_common.checkpoints import refuse_foreign
from ext_common.cli import UserError
from ext_common.devices import sums
from ext_common.epochs import OwnBatches, Wanted
from ext_common.presets import PresetOptions
from fairseq_ext.speaker.augment import (
    AUGMENTATIONS,
    Context,
    build_augmentation,
    mel_frequencies,
    random_noise,
    random_reverb,
)
from fairseq_ext.speaker.augment.made import made_noises, made_rooms
from fairseq_ext.speaker.balance import power_of
from fairseq_ext.speaker.batching import batches_by_frames
from fairseq_ext.speaker.corpus import Corpus
from fairseq_ext.speaker.criterion import SCALED
from fairseq_ext.speaker.dataset import CropDataset, UtteranceDataset
from fairseq_ext.speaker.features import FeatureSpec, audio_features, log_mel
from fairseq_ext.speaker.inference import MAX_FRAMES
from fairseq_ext.speaker.metrics import likeliest_scale
from fairseq_ext.speaker.model import complete
from fairseq_ext.speaker.prepare.tables import AUDIO_ENDINGS, audio_files
from fairseq_ext.speaker.presets import PRESETS

logger = logging.getLogger(__name__)

OWN = ("fairseq_ext.speaker",)


@dataclass
class SpeakerIdConfig(PresetOptions, FairseqDataclass):
    data: str = field(
        default=MISSING, metadata={"help": "folder made by fairseq_ext.speaker.prepare"}
    )
    crop_frames: int = field(
        default=101, metadata={"help": "length of a training crop, frames of 10 ms"}
    )
    epoch_updates: int = field(
        default=200,
        metadata={
            "help": "an epoch covers the recordings once, but has at least this many updates"
        },
    )
    augment: str = field(
        default="channel;specaugment",
        metadata={
            "help": "augmentation of training crops, as name:key=value,key=value;name"
            f" ({', '.join(AUGMENTATIONS.names())}; their options: python -m fairseq_ext.speaker.parts);"
            " '' for none"
        },
    )
    balance: str = field(
        default="none",
        metadata={
            "help": "crops of a speaker: none: in proportion to the speech there is; speaker: as many of"
            " each; a number p between 0 (speaker) and 1 (none): in proportion to its p-th power"
        },
    )
    speed_perturb: float = field(
        default=0.0, metadata={"help": "play training crops at 1 ± this times their speed"}
    )
    speed_classes: bool = field(
        default=False,
        metadata={
            "help": "of each speaker three in training: at 1, and at 1 − and 1 + --speed-perturb, who sound"
            " like other people"
        },
    )
    noise_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "audio files, or a prepared folder, for augmentation 'noise'; none: made noises"
        },
    )
    rir_dir: Optional[str] = field(
        default=None,
        metadata={"help": "room impulse responses for augmentation 'reverb'; none: made rooms"},
    )
    max_valid_frames: int = field(
        default=MAX_FRAMES,
        metadata={
            "help": "padded frames in a validation batch, whatever --batch-size (4000 is fastest on"
            " a CPU; more pays on a GPU)"
        },
    )
    seed: int = II("common.seed")
    train_subset: str = II("dataset.train_subset")
    update_freq: Any = II("optimization.update_freq")


@register_task("speaker_id", dataclass=SpeakerIdConfig)
class SpeakerIdTask(OwnBatches, FairseqTask):
    """Crops for training, whole utterances for the rest; nothing is dropped from either.

    The names of the speakers, the feature specification and the scale that makes scores probabilities travel
    in the checkpoint (`task_state`), so that a model can be used without the data it was trained on.
    """

    presets = PRESETS
    progress_unit = "utterances"
    exact_inputs = True

    def __init__(self, cfg: SpeakerIdConfig, from_checkpoint: bool = False):
        super().__init__(cfg)
        self.from_checkpoint = from_checkpoint
        if not from_checkpoint:
            check_options(cfg)
        self._corpus: Optional[Corpus] = None
        self._scaled = np.zeros(len(SCALED))
        self._scale: Optional[float] = None
        self.state.add_factory("speakers", lambda: list(self.corpus.speakers))
        self.state.add_factory("spec", lambda: self.corpus.spec.to_dict())

    @property
    def corpus(self) -> Corpus:
        if self._corpus is None:
            self._corpus = Corpus.open(self.cfg.data)
        return self._corpus

    @property
    def speakers(self) -> List[str]:
        """Names of the speakers; the index is the label."""
        return self.state.speakers

    @property
    def spec(self) -> Dict[str, Any]:
        """The feature specification, as `FeatureSpec.to_dict` gives it."""
        return self.state.spec

    @property
    def feature_mean(self) -> np.ndarray:
        return self.corpus.mean if not self.from_checkpoint else np.zeros(self.spec["n_mels"])

    @property
    def feature_std(self) -> np.ndarray:
        return self.corpus.std if not self.from_checkpoint else np.ones(self.spec["n_mels"])

    def begin_valid_epoch(self, epoch, model):
        super().begin_valid_epoch(epoch, model)
        self._scaled[:] = 0

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        total = sums([{k: log[k] for k in SCALED if k in log} for log in logging_outputs])
        if total:
            self._scaled += [total[key] for key in SCALED]
            self._scale = likeliest_scale(self._scaled)

    def state_dict(self):
        found = {} if self._scale is None else {"scale": self._scale}
        return {"speakers": list(self.speakers), "spec": dict(self.spec), **found}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if self._corpus is not None:
            self.check_state(state_dict)
        self.state.merge_state_dict(state_dict)
        self._scale = state_dict.get("scale")

    def check_resume(self, state: Dict[str, Any], same_run: bool) -> None:
        """Asked before a training takes over a checkpoint; fairseq calls no load_state_dict then."""
        saved = state.get("task_state") or {}
        if {"speakers", "spec"} <= set(saved):
            self.check_state(saved)
            self._scale = saved.get("scale")

    def check_state(self, saved: Dict[str, Any]) -> None:
        """UserError for a checkpoint of other speakers or features than the data's."""
        if saved["speakers"] != self.corpus.speakers:
            raise UserError(
                f"{self.cfg.data} has other speakers than the checkpoint: to train on them from it,"
                " give --init-from CHECKPOINT and a new --save-dir"
            )
        if saved["spec"] != self.corpus.spec.to_dict():
            raise UserError(
                f"{self.cfg.data} has features {self.corpus.spec.to_dict()}, the checkpoint was"
                f" trained on {saved['spec']}: prepare the data again with its options"
            )

    def build_criterion(self, cfg, from_checkpoint=False):
        refuse_foreign(cfg, CRITERION_REGISTRY, "--criterion", OWN, "am_softmax")
        return super().build_criterion(cfg, from_checkpoint)

    def build_model(self, cfg, from_checkpoint=False):
        refuse_foreign(
            cfg, ARCH_MODEL_REGISTRY | MODEL_REGISTRY, "--arch", OWN, "conformer_speaker"
        )
        self.from_checkpoint = self.from_checkpoint or from_checkpoint
        if not self.from_checkpoint and "init_from" in cfg:
            # one of our models, not someone's own. fairseq builds from a copy of cfg, but saves cfg itself
            with open_dict(cfg):
                complete(cfg, self)
        return super().build_model(cfg, from_checkpoint)

    def load_dataset(self, split: str, combine: bool = False, **kwargs) -> None:
        rows = self.corpus.rows(split)
        rows = rows[self.corpus.labels[rows] >= 0]
        if not len(rows):
            raise UserError(
                f"{self.cfg.data}: split {split!r} has no utterance with a known speaker"
            )
        if split == self.cfg.train_subset and len(np.unique(self.corpus.labels[rows])) < 2:
            raise UserError(
                f"{self.cfg.data}: split {split!r} has one speaker only: there is nobody to tell apart from;"
                " prepare recordings of two or more"
            )
        if self.from_checkpoint or split != self.cfg.train_subset:
            self.datasets[split] = UtteranceDataset(self.corpus, rows)
            return
        self.datasets[split] = CropDataset(
            self.corpus,
            rows,
            self.cfg.crop_frames,
            self.cfg.seed,
            self.cfg.speed_perturb,
            build_augmentation(self.cfg.augment),
            self._context(rows),
            power_of(self.cfg.balance),
            len(self.corpus.speakers) if self.cfg.speed_classes else 0,
        )

    def _context(self, rows: np.ndarray) -> Context:
        """What augmentation of the utterances in `rows` needs."""
        spec, seed = self.corpus.spec, self.cfg.seed
        steps = {step.func for step in build_augmentation(self.cfg.augment)}
        noises = read_collection(self.cfg.noise_dir, spec)
        if random_noise in steps and not noises:
            noises = made_noises(spec, seed, partial(speech_of, self.corpus, rows))
        rooms = read_collection(self.cfg.rir_dir, spec)
        if random_reverb in steps and not rooms:
            rooms = made_rooms(spec, seed)
        return Context(
            self.corpus.mean,
            mel_frequencies(spec.n_mels, spec.f_min, spec.sample_rate / 2),
            spec.sample_rate,
            float(np.log(spec.floor)),
            noises,
            relative_rooms(rooms, spec),
            spec,
        )

    def batches_of(self, dataset, wanted: Wanted):
        """Full updates of crops for training; for the rest, validation is bounded in padded frames."""
        if not isinstance(dataset, CropDataset):
            frames = min(self.cfg.max_valid_frames, wanted.max_tokens or self.cfg.max_valid_frames)
            return batches_by_frames(dataset.sizes, frames, wanted.max_sentences)
        size = wanted.max_sentences or max(1, wanted.max_tokens // self.cfg.crop_frames)
        if wanted.max_tokens:
            size = max(1, min(size, wanted.max_tokens // self.cfg.crop_frames))
        return self.full_updates(dataset, size, wanted)

    def train_step(
        self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs
    ):
        criterion.set_num_updates(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def length_chosen(self, trainer, updates: int, before: int) -> None:
        """--minutes has chosen the length: a margin that grows has all its size as early in a shorter one."""
        criterion = trainer.get_criterion()
        if getattr(criterion, "warmup", None) and updates < before:
            start, end = (round(update * updates / before) for update in criterion.warmup)
            criterion.warmup = (start, end)
            with open_dict(trainer.cfg):
                trainer.cfg.criterion.margin_start, trainer.cfg.criterion.margin_end = start, end

    def next_command(self, save_dir: str, checkpoint: str) -> str:
        """What a user does with a trained model."""
        subset = "test" if "test" in self.corpus.splits else "valid"
        words = [
            "python",
            "-m",
            "fairseq_ext.speaker.identify",
            self.cfg.data,
            "--path",
            checkpoint,
        ]
        return shlex.join([*words, "--subset", subset, "--output", "predictions.csv"])

    def max_positions(self):
        return None

    @property
    def source_dictionary(self):
        return None

    @property
    def target_dictionary(self):
        return None


def check_options(cfg: SpeakerIdConfig) -> None:
    """UserError for what would only fail after the model is built, or not at all."""
    if cfg.crop_frames < 1 or cfg.epoch_updates < 1 or cfg.max_valid_frames < 1:
        raise UserError("--crop-frames, --epoch-updates and --max-valid-frames are at least 1")
    if not 0 <= cfg.speed_perturb < 1:
        raise UserError(
            f"--speed-perturb {cfg.speed_perturb} is not in [0, 1): give 0.1 for ± 10 %"
        )
    if cfg.speed_classes and not cfg.speed_perturb:
        raise UserError("--speed-classes needs --speed-perturb: give 0.1 for 0.9, 1 and 1.1")
    try:
        power_of(cfg.balance)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    build_augmentation(cfg.augment)
    for flag, folder in (("--noise-dir", cfg.noise_dir), ("--rir-dir", cfg.rir_dir)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder} does not exist: give a folder of audio files")


def read_collection(folder: Optional[str], spec: FeatureSpec) -> List[np.ndarray]:
    """Log-mel features (T, n_mels) of all audio under a folder, or of a prepared folder (memory-mapped)."""
    if not folder:
        return []
    if (Path(folder) / "corpus.json").exists():
        corpus = Corpus.open(folder)
        if corpus.spec != spec:
            raise UserError(f"{folder} was prepared with other features than the training data")
        return [
            corpus.features[o : o + n] for o, n in zip(corpus.offsets, corpus.lengths, strict=True)
        ]
    files = audio_files(folder)
    if not files:
        raise UserError(f"{folder} has no audio files ({', '.join(AUDIO_ENDINGS)})")
    logger.info(f"reading {len(files)} files of {folder}")
    # a room is shorter than anything said in it
    return [audio_features(Path(folder) / name, spec, min_seconds=0) for name in files]


def relative_rooms(rooms: List[np.ndarray], spec: FeatureSpec) -> List[np.ndarray]:
    """Impulse responses as `Context` wants them: (T, n_mels) relative to that of a single sample."""
    impulse = np.zeros(4 * spec.n_fft, dtype=np.float32)
    impulse[2 * spec.hop_length] = 1
    flat = log_mel(impulse, spec.plain).max(0)
    return [response - flat for response in rooms]


def speech_of(
    corpus: Corpus, rows: np.ndarray, rng: np.random.Generator, frames: int
) -> np.ndarray:
    """`frames` frames of a drawn utterance of `rows`, from a drawn place on and round its end."""
    row = int(rng.choice(rows))
    x = corpus.read(row)
    return x[(int(rng.integers(len(x))) + np.arange(frames)) % len(x)]

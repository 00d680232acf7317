"""`--task diffusion`: images from a folder, a noise schedule, and pictures drawn while training."""

import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed.utils import get_data_parallel_world_size
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from diffusion_ext.augment import AUGMENTATIONS, build_augmentations
from diffusion_ext.dataset import ImageDataset
from diffusion_ext.ema.snapshots import write_snapshot
from diffusion_ext.evaluate.watch import Watch, WatchOptions, as_trained_on
from diffusion_ext.inference import read_checkpoint
from diffusion_ext.model import unwrapped
from diffusion_ext.network import initialise, options_of
from diffusion_ext.objectives import OBJECTIVES, schedule_of
from diffusion_ext.prepare.build import is_prepared
from diffusion_ext.prepare.options import ImageOptions, SplitOptions
from diffusion_ext.presets import PRESETS
from diffusion_ext.preview import Preview, check_previews, grid_interval
from diffusion_ext.schedules import SCHEDULES
from diffusion_ext.store import Images, check_outside, open_images
from ext_common.checkpoints import refuse_foreign
from ext_common.cli import UserError
from ext_common.epochs import OwnBatches, Wanted, in_order, update_freq
from ext_common.presets import PresetOptions
from ext_common.random import STREAM

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
LAST = "checkpoint_last.pt"
OWN = ("diffusion_ext",)


@dataclass
class DiffusionConfig(PresetOptions, ImageOptions, SplitOptions, WatchOptions, FairseqDataclass):
    data: str = field(
        default=MISSING, metadata={"help": "folder of images, or one made by diffusion_ext.prepare"}
    )
    timesteps: int = field(
        default=1000,
        metadata={
            "help": "noise levels T of the schedule; flow and edm divide their path into so many"
        },
    )
    beta_schedule: str = field(
        default="sigmoid",
        metadata={
            "help": f"{', '.join(SCHEDULES.names())}, with options as sigmoid:tau=0.9; --objective flow and"
            " edm bring their own"
        },
    )
    zero_terminal_snr: bool = field(
        default=False, metadata={"help": "rescale the schedule so that timestep T is pure noise"}
    )
    objective: str = field(
        default="v", metadata={"help": f"what is predicted: {', '.join(OBJECTIVES.names())}"}
    )
    hflip: float = field(
        default=0.0, metadata={"help": "share of training images mirrored left to right"}
    )
    color_jitter: List[float] = field(
        default_factory=list,
        metadata={"help": "brightness,contrast,saturation,hue as in torchvision: 0.5,0.5,0.5,0.1"},
    )
    augment: str = field(
        default="",
        metadata={
            "help": "further augmentations, as name:key=value,key=value;name"
            f" ({', '.join(AUGMENTATIONS.names())})"
        },
    )
    leaky_augment: bool = field(
        default=False,
        metadata={
            "help": "do not tell the network how an image was changed, so that samples are changed too"
        },
    )
    init_from: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint whose weights the training begins with, on other images or classes; its"
            " network and its noise are then the presets'"
        },
    )
    epoch_updates: int = field(
        default=500,
        metadata={"help": "an epoch covers the images once, but has at least this many updates"},
    )
    sample_interval: int = field(
        default=1000,
        metadata={
            "help": "draw a grid of samples into SAVE_DIR/samples every so many updates; 0: never"
        },
    )
    sample_grid: int = field(default=8, metadata={"help": "rows and columns of that grid"})
    sample_steps: int = field(default=20, metadata={"help": "steps of dpmpp_2m for that grid"})
    seed: int = II("common.seed")
    save_dir: str = II("checkpoint.save_dir")
    train_subset: str = II("dataset.train_subset")
    batch_size: Any = II("dataset.batch_size")
    update_freq: Any = II("optimization.update_freq")
    # not II(): a criterion without it is another task's, which is said in words
    autocast: str = "${oc.select:criterion.autocast,auto}"
    loss_weighting: str = "${oc.select:criterion.loss_weighting,none}"


@register_task("diffusion", dataclass=DiffusionConfig)
class DiffusionTask(OwnBatches, FairseqTask):
    """Batches of images for training and validation; the averages of the weights after each update.

    What a sample needs beside the weights (size, channels, classes, width of the augmentation condition)
    travels in the checkpoint as `task_state`.
    """

    presets = PRESETS
    progress_unit = "images"
    data_may_be_file = True
    being_measured = False
    distils = False

    def __init__(self, cfg: DiffusionConfig, from_checkpoint: bool = False):
        super().__init__(cfg)
        check_previews(cfg)
        self.schedule = schedule_of(cfg)
        check_schedule(cfg)
        self.augmentations = build_augmentations(
            pipeline_of(cfg.hflip, list(cfg.color_jitter), cfg.augment)
        )
        self._images: Optional[Images] = None
        self._epoch, self._done = 1, 0
        self.stream: Optional[str] = STREAM
        self.state.add_factory("spec", self._spec)
        self.preview, self.watch = Preview(self), Watch(cfg)

    @property
    def images(self) -> Images:
        if self._images is None:
            if not is_prepared(self.cfg.data):
                check_outside(self.cfg.save_dir, self.cfg.data, "--save-dir")
            self._images = open_images(self.cfg.data, options_of(ImageOptions, self.cfg))
            if self._images.remark:
                logger.info(self._images.remark)
        return self._images

    @property
    def spec(self) -> Dict[str, Any]:
        """height, width, channels, classes (names), condition_size, content_hash of the images."""
        return self.state.spec

    def _spec(self) -> Dict[str, Any]:
        images = self.images
        conditioned = not self.cfg.leaky_augment
        return {
            "height": images.height,
            "width": images.width,
            "channels": images.channels,
            "classes": list(images.classes),
            "condition_size": self.augmentations.condition_size if conditioned else 0,
            "content_hash": images.content_hash,
        }

    def state_dict(self):
        return {"spec": dict(self.spec), "stream": self.stream, "copies_since": self.watch.since}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.state.merge_state_dict(state_dict)
        self.stream = state_dict.get("stream")
        self.watch.since = state_dict.get("copies_since")

    @property
    def is_done(self) -> Optional[str]:
        """Why a training ends before its length; None while it does not."""
        return self.watch.ended

    def check_resume(self, state: Dict[str, Any], same_run: bool) -> None:
        """UserError before a training continues from the checkpoint of another one.

        same_run is False where only the weights are taken over, which may then learn something else.
        """
        saved = state.get("task_state") or {}
        spec = saved.get("spec") or {}
        if not same_run or "condition_size" not in spec:
            return
        self.stream = saved.get("stream")
        trained = state["cfg"]["task"]
        for key in ("objective", "beta_schedule", "timesteps", "zero_terminal_snr"):
            if self.cfg[key] != trained[key]:
                raise UserError(
                    f"--{key.replace('_', '-')} is {self.cfg[key]}, the checkpoint was trained with"
                    f" {trained[key]}: give that, or a new --save-dir"
                )
        ours = self._spec()
        for key in ("height", "width", "channels", "classes", "condition_size"):
            if ours[key] != spec[key]:
                raise UserError(
                    f"{self.cfg.data} has {key} {ours[key]}, the checkpoint was trained with"
                    f" {spec[key]}: give the options it was trained with, or a new --save-dir"
                )
        check_leaks(self.cfg, trained)
        changed = []
        if ours["content_hash"] != spec["content_hash"]:
            changed.append(
                f"{self.cfg.data} holds other images than the checkpoint was trained on, which may have seen"
                " what is held out now"
            )
        elif "valid_fraction" in trained:
            changed += self._changed_split(trained)
        weighting = (state["cfg"].get("criterion") or {}).get("loss_weighting", "none")
        if weighting != self.cfg.loss_weighting:
            changed.append(
                f"--loss-weighting is {self.cfg.loss_weighting} and was {weighting}, so that losses are of"
                " another unit"
            )
        self.compare_anew = "; ".join(changed)

    def _changed_split(self, trained: Dict[str, Any]) -> List[str]:
        """What to say where fewer images are held out; UserError where some that were trained on are."""
        then, now = (
            set(self.images.rows("valid", cfg["valid_fraction"], cfg["max_valid"]).tolist())
            for cfg in (trained, self.cfg)
        )
        if now - then:
            raise UserError(
                f"--valid-fraction {self.cfg.valid_fraction:g} and --max-valid {self.cfg.max_valid} hold out"
                f" {len(now - then)} images that the checkpoint was trained on: give"
                f" {trained['valid_fraction']:g} and {trained['max_valid']}, or a new --save-dir"
            )
        return [f"{len(now)} images are held out and not {len(then)}"] if then != now else []

    def build_model(self, cfg, from_checkpoint=False):
        refuse_foreign(cfg, ARCH_MODEL_REGISTRY | MODEL_REGISTRY, "--arch", OWN, "ddpm_unet")
        model = super().build_model(cfg, from_checkpoint)
        path = self.cfg.init_from
        if path and not from_checkpoint and not (Path(self.cfg.save_dir) / LAST).exists():
            initialise(unwrapped(model), self.spec, read_checkpoint(path), path)
        return model

    def build_criterion(self, cfg, from_checkpoint=False):
        refuse_foreign(cfg, CRITERION_REGISTRY, "--criterion", OWN, "ddpm")
        self.distils = getattr(cfg, "_name", None) == "consistency"
        return super().build_criterion(cfg, from_checkpoint)

    def load_dataset(self, split: str, combine: bool = False, **kwargs) -> None:
        if split not in SPLITS:
            raise UserError(
                f"{self.cfg.data} has no split {split!r}: it has {' and '.join(SPLITS)}"
            )
        training = split == self.cfg.train_subset
        name = "train" if training else "valid"
        rows = self.images.rows(name, self.cfg.valid_fraction, self.cfg.max_valid)
        if not len(rows):
            raise UserError(
                f"--valid-fraction {self.cfg.valid_fraction} holds out no image to validate on: give"
                " --disable-validation with it"
            )
        self.datasets[split] = ImageDataset(self.images, rows, self.cfg.seed, shuffle=training)

    def batches_of(self, dataset, wanted: Wanted):
        """Full updates for training: all processes and accumulation steps together have the same images
        however many they are."""
        size = self._batch_size(wanted.max_sentences)
        return (
            self.full_updates(dataset, size, wanted) if dataset.shuffle else in_order(dataset, size)
        )

    def _batch_size(self, max_sentences: Optional[int]) -> int:
        if not max_sentences:
            raise UserError("--batch-size, the images of a batch, is missing")
        return max_sentences

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)
        self._epoch = epoch

    def train_step(
        self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs
    ):
        criterion.set_num_updates(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def valid_step(self, sample, model, criterion):
        found = super().valid_step(sample, model, criterion)
        if self.watch.on and sample:
            rows = self.dataset(self.cfg.train_subset).rows
            twin = as_trained_on(sample, self.images, rows)
            _, _, log = super().valid_step(twin, model, criterion)
            found[2].update({f"train_{key}": log[key] for key in log if key[:4] == "sum_"})
        return found

    def optimizer_step(self, optimizer, model, update_num):
        scale = loss_scale(optimizer)
        super().optimizer_step(optimizer, model, update_num)
        if loss_scale(optimizer) < scale:
            # --amp: the gradients overflowed, nothing was changed, and the update is tried again
            return
        done = update_num + 1
        if done == self._done:
            return
        self._done = done
        size = self._batch_size(self.cfg.batch_size)
        images = size * update_freq(self.cfg.update_freq, self._epoch)
        images *= get_data_parallel_world_size()
        model = unwrapped(model)
        # as if all updates had been like this one: only the ramp-up of the half-life asks
        model.ema.update(model.net, done * images, images)
        if model.snapshots and done % model.snapshots == 0:
            write_snapshot(self.cfg.save_dir, model.ema, done)
        interval = self.cfg.sample_interval
        if interval and (done % interval == 0 or not self.being_measured and self.preview.is_due()):
            self.preview.draw(model, done)

    def length_chosen(self, trainer, updates: int, before: int) -> None:
        """--minutes has chosen the length: grids of samples take at most a twentieth of it."""
        interval = grid_interval(
            updates,
            self.cfg.sample_interval,
            self.cfg.sample_grid**2 * self.cfg.sample_steps,
            self._batch_size(self.cfg.batch_size) * update_freq(self.cfg.update_freq, 1),
        )
        for cfg in (self.cfg, trainer.cfg.task):
            cfg.sample_interval = interval

    def next_command(self, save_dir: str, checkpoint: str) -> str:
        """What a user does with a trained model; the last one has the longest average."""
        last = Path(save_dir) / LAST
        words = ["python", "-m", "diffusion_ext.sample", str(Path(save_dir) / "drawn"), "--path"]
        return shlex.join([*words, str(last if last.exists() else checkpoint), "--num", "64"])

    def max_positions(self):
        return None

    @property
    def source_dictionary(self):
        return None

    @property
    def target_dictionary(self):
        return None


def loss_scale(optimizer) -> float:
    """By what `--amp` multiplies the loss; it falls when an update is skipped. 1 without --amp."""
    scaler = getattr(optimizer, "scaler", None)
    return scaler.get_scale() if hasattr(scaler, "get_scale") else 1.0


def check_schedule(cfg) -> None:
    """UserError for another --beta-schedule than the usual one beside an objective with its own path."""
    usual = DiffusionConfig.__dataclass_fields__["beta_schedule"].default
    if hasattr(OBJECTIVES.get(cfg.objective), "schedule") and cfg.beta_schedule != usual:
        raise UserError(
            f"--objective {cfg.objective} has noise levels of its own: leave out --beta-schedule"
            f" {cfg.beta_schedule}"
        )


def check_leaks(ours: Any, trained: Any) -> None:
    """UserError where images would be changed in another way than before, and the network not told of it."""
    ways = [
        (
            cfg["leaky_augment"],
            pipeline_of(cfg["hflip"], list(cfg["color_jitter"]), cfg["augment"]),
        )
        for cfg in (trained, ours)
    ]
    if ways[0] != ways[1] and any(leaky and steps for leaky, steps in ways):
        said = [f"{steps or 'nothing'}{' leaking' if leaky else ''}" for leaky, steps in ways]
        raise UserError(
            f"the checkpoint was trained with augmentation by {said[0]}, which is {said[1]} now, and with"
            " --leaky-augment samples show it: give what it was trained with, or a new --save-dir"
        )


def pipeline_of(hflip: float, color_jitter: List[float], more: str) -> str:
    """The flags of the usual augmentations, and `--augment`, as one pipeline."""
    steps = [f"hflip:p={hflip}"] if hflip else []
    if any(color_jitter):
        if len(color_jitter) != 4:
            raise UserError(
                "--color-jitter takes four numbers, brightness,contrast,saturation,hue, as"
                f" 0.5,0.5,0.5,0.1: got {','.join(map(str, color_jitter))}"
            )
        names = ("brightness", "contrast", "saturation", "hue")
        pairs = (f"{name}={value}" for name, value in zip(names, color_jitter, strict=True))
        steps.append(f"color_jitter:{','.join(pairs)}")
    return ";".join([*steps, more] if more else steps)

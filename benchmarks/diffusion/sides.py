"""The two programs of benchmarks/diffusion.py, each as its users run it.

Ours is fairseq's trainer with the flags of `diffusion_ext.train`, theirs the Trainer of
denoising-diffusion-pytorch (Unet, GaussianDiffusion, Adam, clipping, EMA). Nothing of the other program is
imported by a side, as its memory is measured in a process of its own.
"""

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE = 32  # pixels of the images trained on and drawn
WIDTH, MULTS = 32, (1, 2, 4)
SAME_WIDTH = f"--base-channels {WIDTH} --channel-mults {','.join(map(str, MULTS))}"
# name → flags of diffusion_ext.train
OURS = {
    "ours, bfloat16": f"{SAME_WIDTH} --autocast bf16",
    "ours, float32": f"{SAME_WIDTH} --autocast fp32",
    "ours, preset of 32 pixels": "",
}
THEIRS = {"theirs, float32": False, "theirs, bfloat16": True}
# theirs, without warm-up; speed is the same for every one
LEARNING_RATE = "0.0001"


def quiet_fairseq() -> None:
    """Import fairseq and our plugin without messages."""
    from ext_common.compat.messages import leave_out_harmless_warnings

    leave_out_harmless_warnings()
    import fairseq  # noqa: F401

    from ext_common import compat

    # this package may have been imported before fairseq
    compat.apply()
    from diffusion_ext import criterion, model, task  # noqa: F401

    logging.getLogger().setLevel(logging.ERROR)


def our_config(images: Path, store: Path, flags: str):
    """The configuration fairseq-train has from `diffusion_ext.train IMAGES FLAGS`."""
    quiet_fairseq()
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    from diffusion_ext.train import arguments

    # a size that is given gets the network of a GPU, also here; one of `flags` counts, which comes later
    given = ["--image-size", str(SIZE), "--sample-interval", "0", "--image-store", str(store)]
    given += ["--save-dir", str(store / "checkpoints"), *flags.split()]
    command = [str(images), *arguments(str(images), [], given)]
    parsed = options.parse_args_and_arch(options.get_training_parser(), command)
    return convert_namespace_to_omegaconf(parsed)


def our_parts(images: Path, store: Path, flags: str) -> tuple[Any, Any, Any, Any]:
    """(configuration, task, model, criterion), as fairseq-train builds them; --seed counts."""
    cfg = our_config(images, store, flags)
    from fairseq import tasks

    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion)


def our_batches(cfg, task, epoch: int = 1) -> Iterator[dict]:
    """The batches of an epoch, from opening the images on."""
    task.load_dataset("train")
    batches = task.get_batch_iterator(
        task.datasets["train"],
        max_sentences=cfg.dataset.batch_size,
        num_workers=cfg.dataset.num_workers,
        seed=cfg.common.seed,
        epoch=epoch,
        data_buffer_size=cfg.dataset.data_buffer_size,
    )
    return iter(batches.next_epoch_itr(shuffle=True))


class OurTraining:
    """`steps` updates of fairseq's trainer on one batch; returns how many images that were."""

    def __init__(self, name: str, folder: Path, batch: int, steps: int):
        flags = f"{OURS[name]} --image-size {SIZE} --batch-size {batch}"
        flags += f" --lr {LEARNING_RATE} --warmup-updates 0"
        cfg, task, model, criterion = our_parts(folder / "small", folder / "store", flags)
        from fairseq.trainer import Trainer

        self.trainer = Trainer(cfg, task, model, criterion)
        self.batch, self.steps = next(our_batches(cfg, task)), steps
        self.parameters = count(model)

    def __call__(self) -> int:
        for _ in range(self.steps):
            self.trainer.train_step([self.batch])
        return self.steps * len(self.batch["id"])


def their_diffusion(size: int = SIZE, **options):
    """Their network of the width of ours in their GaussianDiffusion, with their defaults."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    return GaussianDiffusion(Unet(dim=WIDTH, dim_mults=MULTS), image_size=size, **options)


class TheirTraining:
    """`steps` updates of their Trainer on one batch; returns how many images that were."""

    def __init__(self, name: str, folder: Path, batch: int, steps: int):
        from denoising_diffusion_pytorch import Trainer

        torch.manual_seed(1)
        diffusion = their_diffusion()
        self.parameters = count(diffusion)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pinned memory, which a CPU has no use for
            self.trainer = Trainer(
                diffusion,
                folder / "small",
                train_batch_size=batch,
                train_lr=float(LEARNING_RATE),
                train_num_steps=0,
                # an update alone: no pictures, no files, no Inception
                save_and_sample_every=10**9,
                calculate_fid=False,
                results_folder=str(folder / "results"),
            )
        if THEIRS[name]:
            # What amp=True with mixed_precision_type="bf16" does; but accelerate knows one precision a
            # process, and the sides alternate in one.
            self.trainer.accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        images = torch.stack([self.trainer.ds[i] for i in range(batch)])
        self.trainer.dl = endless(images)
        self.batch, self.steps = batch, steps

    def __call__(self) -> int:
        self.trainer.train_num_steps += self.steps
        with contextlib.redirect_stderr(io.StringIO()):  # their progress bar
            with contextlib.redirect_stdout(io.StringIO()):
                self.trainer.train()
        return self.steps * self.batch


def endless(batch: Tensor) -> Iterator[Tensor]:
    while True:
        yield batch


def training_side(name: str, folder: Path, batch: int, steps: int) -> Callable[[], int]:
    side = OurTraining if name in OURS else TheirTraining
    return side(name, folder, batch, steps)


def sampling_side(name: str, folder: Path, batch: int, steps: int) -> Callable[[], int]:
    """Draw `batch` images; theirs as their Trainer does, ours as `diffusion_ext.sample`."""
    if name.startswith("theirs"):
        torch.manual_seed(1)
        diffusion = their_diffusion(sampling_timesteps=steps).eval()

        def theirs() -> int:
            with contextlib.redirect_stderr(io.StringIO()):
                return len(diffusion.sample(batch_size=batch))

        return theirs
    flags = f"{SAME_WIDTH} --image-size {SIZE}"
    cfg, task, model, _ = our_parts(folder / "small", folder / "store", flags)
    from diffusion_ext.inference import DiffusionModel

    trained = DiffusionModel(model, cfg.task, task.spec)
    _, sampler, *more = name.split(", ")
    how = dict(sampler=sampler, steps=steps, batch_size=batch, bf16="bfloat16" in more)
    return lambda: len(trained.sample(batch, **how))


class OurReading:
    """Batches of float images in [-1, 1], from a folder of PNG files on."""

    def __init__(self, folder: Path, size: int, batch: int, cold: bool):
        self.folder, self.cold = folder, cold
        self.store = folder / ("cold" if cold else "warm")
        flags = f"--image-size {size} --batch-size {batch}"
        self.cfg = our_config(folder / "large", self.store, flags)

    def clear(self) -> None:
        """What is not timed: with `cold` nothing is decoded yet, else everything."""
        if self.cold:
            shutil.rmtree(self.store, ignore_errors=True)
        else:
            next(self.start())

    def start(self) -> Iterator[Tensor]:
        from fairseq import tasks

        from diffusion_ext.pictures import to_float

        task = tasks.setup_task(self.cfg.task)
        return (to_float(batch["image"]) for batch in our_batches(self.cfg, task))


class TheirReading:
    """The same, by the dataset and the loader that their Trainer makes."""

    def __init__(self, folder: Path, size: int, batch: int):
        self.folder, self.size, self.batch = folder, size, batch

    def clear(self) -> None:
        pass

    def start(self) -> Iterator[Tensor]:
        from multiprocessing import cpu_count

        from accelerate import Accelerator
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import (
            Dataset,
            cycle,
            normalize_to_neg_one_to_one,
        )
        from torch.utils.data import DataLoader

        # without mirroring, which ours leaves to augmentation, on by request
        dataset = Dataset(self.folder / "large", (self.size,) * 2, convert_image_to="RGB")
        loader = DataLoader(
            dataset,
            batch_size=self.batch,
            shuffle=True,
            pin_memory=True,
            num_workers=cpu_count(),
        )
        loader = Accelerator(split_batches=True, mixed_precision="no").prepare(loader)
        return (normalize_to_neg_one_to_one(batch) for batch in cycle(loader))


def reading_side(name: str, folder: Path, size: int, batch: int) -> OurReading | TheirReading:
    if name == "theirs":
        return TheirReading(folder, size, batch)
    return OurReading(folder, size, batch, cold=name.endswith("cold"))


class Readers:
    """Sides that read, of which only the one that is timed has an open loader."""

    def __init__(self, names: Sequence[str], folder: Path, size: int, batch: int, running: int = 0):
        """running: 0 times the first batch; n > 0 times n batches after the first."""
        self.sides = {name: reading_side(name, folder, size, batch) for name in names}
        self.running, self.batches = running, None

    def before(self, name: str) -> None:
        self.close()
        self.sides[name].clear()
        if self.running:
            self.batches = self.sides[name].start()
            next(self.batches)

    def run(self, name: str) -> int:
        if not self.running:
            self.batches = self.sides[name].start()
            next(self.batches)
            return 1
        return sum(len(next(self.batches)) for _ in range(self.running))

    def close(self) -> None:
        """End the workers of the side before, which would read on."""
        if self.batches is not None:
            self.batches.close()
        self.batches = None


def count(network: torch.nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)

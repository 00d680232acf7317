"""A trained diffusion model outside of training: from a checkpoint file to images.

    model = DiffusionModel.from_checkpoint("CKPT/checkpoint_last.pt")
    images = model.sample(16, sampler="dpmpp_2m", steps=20, seed=1)      # uint8 (16, C, H, W)

Needs the checkpoint and nothing else: schedule, objective, size and classes are in it.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_ext.denoiser import Denoiser
from diffusion_ext.network import network_of
from diffusion_ext.objectives import OBJECTIVES, schedule_of, shown
from diffusion_ext.pictures import to_uint8
from diffusion_ext.randomness import BEFORE, ImageNoise
from diffusion_ext.samplers import SAMPLERS, trajectory
from ext_common.checkpoints import build_network, read_state, usable_device, why_unfit
from ext_common.cli import UserError
from ext_common.random import STREAM

PARTS = tuple(
    f"diffusion_ext.{name}" for name in ("criterion", "distill.criterion", "model", "task")
)
ONE_BATCH = 4096  # pixels
SPEC = {"height", "width", "channels", "classes", "condition_size"}


class DiffusionModel:
    """A network with one of its averages of weights, and how it was trained.

    average: number of the average (order of --ema-half-life), None for the weights themselves;
    label_dropout: what it was trained with, None where that is not known; stream: see `randomness`;
    distilled: whether each of its guesses is an image (`diffusion_ext.distill`).
    """

    def __init__(
        self,
        model,
        cfg: Mapping,
        spec: Mapping,
        device="cpu",
        average: int | None = 0,
        label_dropout: float | None = None,
        stream: str | None = STREAM,
        distilled: bool = False,
    ):
        self.label_dropout, self.stream, self.distilled = label_dropout, stream, distilled
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.spec = dict(spec)
        self.schedule = schedule_of(cfg)
        self.objective = cfg["objective"]
        self.levels = torch.stack([self.schedule.alpha, self.schedule.sigma]).float().to(device)
        known = range(len(model.ema.weights))
        if average is not None and average not in known:
            raise UserError(
                f"--ema {average} is not there: the model has the averages {', '.join(map(str, known))}"
            )
        self.average = average

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        device: str = "auto",
        average: int | None = 0,
        user_dir: str | None = None,
    ) -> "DiffusionModel":
        """The model in a checkpoint of fairseq-train; UserError, in one sentence, where it fails."""
        device = usable_device(device)
        state = read_checkpoint(path)
        model = build_network(state, path, PARTS, user_dir, network_of)
        try:
            schedule_of(state["cfg"]["task"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        saved, criterion = state["task_state"], state["cfg"]["criterion"]
        return cls(
            model,
            state["cfg"]["task"],
            saved["spec"],
            device,
            average,
            criterion.get("label_dropout"),
            saved.get("stream", BEFORE),
            criterion.get("_name") == "consistency",
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.spec["channels"], self.spec["height"], self.spec["width"]

    @property
    def usual_sampler(self) -> tuple[str, int]:
        """Sampler and steps of who asks for none."""
        return ("consistency", 2) if self.distilled else ("dpmpp_2m", 20)

    @property
    def classes(self) -> list[str]:
        return list(self.spec["classes"])

    def classes_in_turn(self, numbers: Sequence[int]) -> list[int] | None:
        """Class index of the images with these numbers; None for a model without classes."""
        return [k % len(self.classes) for k in numbers] if self.classes else None

    def class_index(self, name: str) -> int:
        """Number of the class `name`, or of that number where no name is it; UserError for any other."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        known = ", ".join(self.classes) or "none, it was trained without --class-labels"
        raise UserError(f"--label {name} is no class of the model; known: {known}")

    def check_guide(self, guide: "DiffusionModel") -> None:
        """UserError where `guide` does not speak of the same noisy images as this model."""
        for what in ("shape", "classes", "objective"):
            if getattr(guide, what) != getattr(self, what):
                raise UserError(
                    f"--guide has the {what} {getattr(guide, what)}, the model {getattr(self, what)}: give a"
                    " smaller model of the same images, or an earlier checkpoint"
                )
        if not torch.equal(guide.levels, self.levels):
            raise UserError("--guide has other noise levels: give a model of the same schedule")

    def check_classes(self, labelled: bool, guidance: float) -> None:
        """UserError where the model cannot draw without a class (not `labelled`), or with guidance."""
        if guidance != 1 and not self.classes:
            raise UserError(
                "--guidance needs a model trained with --class-labels, or a worse one of the same images as"
                " --guide"
            )
        if self.classes and self.label_dropout == 0 and (guidance != 1 or not labelled):
            raise UserError(
                "the model never saw an image without its class (it was trained with --label-dropout 0): give"
                " --label without --guidance, or train with --label-dropout 0.1"
            )

    def compile(self) -> None:
        """Let torch compile the network, for each size of batch anew, with the weights of this average."""
        if self.average is not None:
            self.model.net.load_state_dict(self.model.ema.of(self.average))
            self.average = None
        self.model.net.compile()

    def network(self, bf16: bool) -> Callable[..., Tensor]:
        """(x_t, t, label, x0) → the output for noisy images x_t at timesteps t, as `Denoiser` asks."""
        objective = OBJECTIVES.get(self.objective)

        def network(x, t, label, x0):
            x, t = shown(objective, x, t, *self.levels[:, t, None, None, None])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                return self.model(x, t, label, x0, average=self.average)

        return network

    def _is_small(self, label: Tensor) -> bool:
        """Whether both halves of guidance are faster as one batch (CPU: 1.4 times for few, 0.9 for 64)."""
        return label.device.type != "cpu" or len(label) * math.prod(self.shape[1:]) <= ONE_BATCH

    def denoiser(
        self,
        label: Tensor | None = None,
        guidance: float = 1.0,
        clip: bool = True,
        bf16: bool = False,
        guide: "DiffusionModel | None" = None,
        interval: tuple[float, float] = (0.0, math.inf),
    ) -> Denoiser:
        """What a sampler asks, for one batch on its one way to images; see `Denoiser`."""
        return Denoiser(
            self.network(bf16),
            self.schedule,
            self.objective,
            label=label,
            guidance=guidance,
            clip=clip,
            self_condition=self.model.self_condition,
            guide=None if guide is None else guide.network(bf16),
            interval=interval,
            none_label=len(self.classes) if label is not None and self._is_small(label) else None,
        )

    def batches(
        self,
        numbers: Sequence[int],
        *,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int = 1,
        batch_size: int = 64,
        spacing: str = "trailing",
        labels: Sequence[int] | None = None,
        guidance: float = 1.0,
        clip: bool = True,
        bf16: bool = False,
        guide: "DiffusionModel | None" = None,
        interval: tuple[float, float] = (0.0, math.inf),
        watch: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """(numbers, uint8 (B, C, H, W)) batch by batch; image `number` depends on (seed, number) alone.

        sampler: registered name, or "name:option=value,…", and steps: those of `usual_sampler` where they are
        None; labels: class index of each number; guide, interval: see `Denoiser`. UserError at once, before
        anything is drawn, for names and steps that there are not.
        """
        self.check_classes(labels is not None, 1 if guide else guidance)
        if guide:
            self.check_guide(guide)
        name, usual = self.usual_sampler
        run, steps = SAMPLERS.bind(sampler or name), usual if steps is None else steps
        if watch is not None:
            run = partial(run, watch=watch)
        path = trajectory(self.schedule, steps, spacing)

        def draw():
            for start in range(0, len(numbers), batch_size):
                chosen = list(numbers[start : start + batch_size])
                noise = ImageNoise(seed, chosen, self.shape, self.device, self.stream)
                label = None
                if labels is not None:
                    label = torch.tensor(labels[start : start + batch_size], device=self.device)
                denoise = self.denoiser(label, guidance, clip, bf16, guide, interval)
                with torch.no_grad():
                    x0 = run(denoise, noise.start, path, noise)
                yield chosen, to_uint8(x0)

        return draw()

    def sample(self, count: int, first: int = 0, **options: Any) -> np.ndarray:
        """uint8 (count, C, H, W), the images number `first` on; options as of `batches`."""
        parts = [images for _, images in self.batches(range(first, first + count), **options)]
        return np.concatenate(parts)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """What `torch.save` wrote, as plain dicts and tensors on the CPU.

    Nothing the file holds is run (weights_only). UserError where it is missing, damaged, or of
    anything but a diffusion model.
    """
    state = read_state(path)
    why = why_no_diffusion_model(state)
    if why:
        raise UserError(f"{path} {why}: give a checkpoint of diffusion_ext.train")
    return state


def why_no_diffusion_model(state: Any) -> str | None:
    """The second half of a sentence about a checkpoint's content; None for a diffusion model."""

    def saved(task_state):
        spec = task_state.get("spec")
        return isinstance(spec, Mapping) and set(spec) >= SPEC

    return why_unfit(state, saved, "diffusion")

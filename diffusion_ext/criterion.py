"""`--criterion ddpm`: the squared error of the prediction at a random timestep."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from diffusion_ext.denoiser import split_output
from diffusion_ext.model import unwrapped
from diffusion_ext.objectives import OBJECTIVES, check_combination, shown
from diffusion_ext.pictures import to_float
from diffusion_ext.randomness import coin, training_draws, validation_draws
from diffusion_ext.schedules import TIME_SAMPLINGS
from diffusion_ext.weightings import WEIGHTINGS, PosteriorTables, bound, loss_weights
from ext_common.checkpoints import last_checkpoint
from ext_common.cli import UserError
from ext_common.devices import sums

QUARTERS = 4
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass
class DdpmCriterionConfig(FairseqDataclass):
    loss_weighting: str = field(
        default="none",
        metadata={"help": f"of timesteps: {', '.join(WEIGHTINGS.names())}, e.g. min_snr:gamma=5"},
    )
    time_sampling: str = field(
        default="auto",
        metadata={
            "help": f"how often each noise level is trained: {', '.join(TIME_SAMPLINGS.names())}, with"
            " options as logit_normal:mean=0.5; auto: edm with --objective edm, else uniform"
        },
    )
    vlb_weight: float = field(
        default=0.001,
        metadata={"help": "weight of the variational bound, which trains --learned-variance"},
    )
    label_dropout: float = field(
        default=0.1,
        metadata={"help": "share of images whose label is hidden, for classifier-free guidance"},
    )
    autocast: str = field(
        default="auto",
        metadata={
            "help": "precision of the network: bf16, fp32 or auto (bf16 where the processor computes in it)"
        },
    )


@register_criterion("ddpm", dataclass=DdpmCriterionConfig)
class DdpmCriterion(FairseqCriterion):
    """Loss summed over images; timestep and noise of an image follow from (seed, update, id).

    In validation they follow from the id alone, and the averaged weights are what is measured.
    """

    num_updates = 0

    def __init__(self, cfg, task):
        super().__init__(task)
        self.cfg = cfg
        if cfg.autocast not in PRECISIONS:
            raise UserError(
                f"--autocast {cfg.autocast} is unknown: known are {', '.join(PRECISIONS)}"
            )
        if not 0 <= cfg.label_dropout <= 1:
            raise UserError(
                f"--label-dropout {cfg.label_dropout} is a share of the images: give 0 to 1"
            )
        self.schedule, self.objective = task.schedule, OBJECTIVES.get(task.cfg.objective)
        check_combination(task.cfg.objective, cfg.loss_weighting, self.schedule)
        self.times = times_of(cfg.time_sampling, task.cfg.objective)
        weights = loss_weights(cfg.loss_weighting, task.cfg.objective, self.schedule.snr)
        # no buffers: --fp16 and --bf16 would round those
        self.tables = {
            "alpha": self.schedule.alpha,
            "sigma": self.schedule.sigma,
            "weight": weights,
        }
        self.posterior = PosteriorTables(self.schedule)
        self.seen: List[tuple[Tensor, Tensor]] = []  # loss and t of the batches of an update

    def set_num_updates(self, num_updates: int) -> None:
        if num_updates != self.num_updates:
            self.seen.clear()
        self.num_updates = num_updates

    def forward(self, model, sample, reduce=True):
        """(loss summed over the B images, B, sums to log); loss (B,) where `reduce` is False."""
        batch = self.batch(sample)
        loss, plain = self.losses(model, batch)
        if self.training:
            self.seen.append((loss.detach(), batch["t"]))
        n = len(loss)
        log = {"loss": loss.detach().sum(), "mse": plain.sum(), "sample_size": n}
        log.update(nsentences=n, ntokens=n, **self.quarters(plain, batch["t"]))
        return (loss.sum() if reduce else loss), n, log

    def batch(self, sample: Dict) -> Dict:
        """What the network is shown: image x0, noise and t, drawn for each image, x_t in float32."""
        ids, stream = sample["id"], self.task.stream
        x0, timesteps = to_float(sample["image"]), self.schedule.timesteps
        label, condition = sample["label"] if self.task.spec["classes"] else None, None
        if self.training:
            augment = self.task.augmentations
            t, noise, uniforms = training_draws(
                self.task.cfg.seed,
                self.num_updates,
                ids,
                x0.shape[1:],
                timesteps,
                augment.n_uniforms + 1 + (self.times is not None),
                x0.device,
                stream,
            )
            if self.times is not None:
                t, uniforms = self.times(uniforms[:, -1], self.schedule), uniforms[:, :-1]
            if augment.n_uniforms:
                x0, condition = augment(x0, uniforms[:, 1:])
                condition = condition if self.task.spec["condition_size"] else None
            if label is not None:
                hidden = uniforms[:, 0] < self.cfg.label_dropout
                label = label.masked_fill(hidden, len(self.task.spec["classes"]))
        else:
            t, noise = validation_draws(ids, x0.shape[1:], timesteps, x0.device, stream)
        a, s = self.levels(t)
        x_t = a * x0 + s * noise
        return dict(x0=x0, noise=noise, t=t, x_t=x_t, label=label, condition=condition)

    def losses(self, model, batch: Dict) -> tuple[Tensor, Tensor]:
        """(loss to minimise, plain squared error of the output), each (B,)."""
        x_t, t, x0 = batch["x_t"], batch["t"], batch["x0"]
        a, s = self.levels(t)
        guess = self.own_guess(model, batch) if uses_own_guess(model) else None
        output, fraction = split_output(self.output(model, batch, guess), x_t.shape[1])
        target = self.objective.target(x0, batch["noise"], a, s)
        plain = ((output - target) ** 2).flatten(1).mean(1)
        loss = self.table("weight", t.device)[t] * plain
        if fraction is not None and self.cfg.vlb_weight:
            said = self.objective.prediction(output.detach(), x_t, a, s).x0.clamp(-1, 1)
            terms = bound(self.posterior.to(t.device), x0, x_t, t, said, fraction)
            # the sum over all timesteps, estimated from one, as in the paper
            loss = loss + self.cfg.vlb_weight * self.schedule.timesteps * terms
        return loss, plain.detach()

    def own_guess(self, model, batch: Dict) -> Tensor:
        """The x_0 of a first look, for half of the updates; clipped, as it will be in sampling."""
        if self.training and coin(self.task.cfg.seed, self.num_updates, self.task.stream):
            return None
        with torch.no_grad():
            output, _ = split_output(self.output(model, batch, None), batch["x_t"].shape[1])
            a, s = self.levels(batch["t"])
            return self.objective.prediction(output, batch["x_t"], a, s).x0.clamp(-1, 1)

    def output(self, model, batch: Dict, guess) -> Tensor:
        """The network's output in float32."""
        average = None if self.training else 0
        t = batch["t"]
        x, time = shown(self.objective, batch["x_t"], t, *self.levels(t))
        with autocast(self.cfg.autocast, x.device):
            output = model(x, time, batch["label"], guess, batch["condition"], average)
        return output.float()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)), each (B, 1, 1, 1)."""
        a, s = (self.table(name, t.device)[t] for name in ("alpha", "sigma"))
        return a[:, None, None, None], s[:, None, None, None]

    def table(self, name: str, device: torch.device) -> Tensor:
        """alpha, sigma or weight of each timestep, float32 (T,)."""
        self.tables[name] = self.tables[name].to(device, torch.float32)
        return self.tables[name]

    def quarters(self, plain: Tensor, t: Tensor) -> Dict[str, Tensor]:
        """Sum of errors and number of images in each quarter of the timesteps."""
        quarter = t * QUARTERS // self.schedule.timesteps
        zeros = torch.zeros(QUARTERS, device=plain.device)
        sums = zeros.index_add(0, quarter, plain)
        counts = zeros.index_add(0, quarter, torch.ones_like(plain))
        return {f"sum_{q + 1}": sums[q] for q in range(QUARTERS)} | {
            f"count_{q + 1}": counts[q] for q in range(QUARTERS)
        }

    def why_stop(self) -> Optional[str]:
        """A sentence with timestep and loss where training has left the numbers; asked by the engine."""
        if not self.seen:
            return None
        loss, t = (torch.cat(part) for part in zip(*self.seen, strict=True))
        bad = ~torch.isfinite(loss)
        if not bad.any():
            return None
        at = ", ".join(
            f"{float(v):g} at t = {int(k)}" for v, k in zip(loss[bad][:5], t[bad][:5], strict=True)
        )
        return (
            f"training stops: the loss of {int(bad.sum())} of {len(loss)} images is not finite at update"
            f" {self.num_updates + 1} ({at}); {last_checkpoint(self.task.cfg.save_dir)}; lower --lr or"
            " --clip-norm, or train with --autocast fp32"
        )

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict]) -> None:
        total = sums(logging_outputs)
        n = total["sample_size"]
        if not n:
            return
        metrics.log_scalar("loss", total["loss"] / n, n, round=5)
        metrics.log_scalar("mse", total["mse"] / n, n, round=5)
        for q in range(1, QUARTERS + 1):
            if count := total[f"count_{q}"]:
                metrics.log_scalar(f"mse_q{q}", total[f"sum_{q}"] / count, count, round=5)
                if trained := total.get(f"train_sum_{q}"):
                    # how far the loss on held-out images is above that on training images
                    gap = total[f"sum_{q}"] / trained - 1
                    metrics.log_scalar(f"gap_q{q}", gap, count, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def times_of(name: str, objective: str) -> Optional[Callable]:
    """What makes timesteps of uniform numbers; None for the uniform ones, which are drawn as such."""
    if name == "auto":
        name = "edm" if objective == "edm" else "uniform"
    return None if name == "uniform" else TIME_SAMPLINGS.bind(name)


def uses_own_guess(model) -> bool:
    return getattr(unwrapped(model), "self_condition", False)


def autocast(precision: str, device: torch.device):
    """A context in which networks compute in bfloat16, where `uses_bf16` says so."""
    # no disabled autocast: it would end the one of --amp
    return (
        torch.autocast(device.type, torch.bfloat16)
        if uses_bf16(precision, device)
        else nullcontext()
    )


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether networks compute in bfloat16 with this --autocast on this processor."""
    return precision == "bf16" or (precision == "auto" and computes_bf16(device))


def computes_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies matrices in bfloat16, and not only emulates it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False

"""`--lr-scheduler noam`: the schedule of the Transformer paper, for any model with a dimension."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, List, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II
from omegaconf.errors import OmegaConfBaseException

from ext_common.cli import UserError
from ext_common.engine import trained_model

# fairseq's default of --lr, which it has whether anybody gave one or not.
FAIRSEQ_LR = 0.25


@dataclass
class NoamConfig(FairseqDataclass):
    warmup_updates: int = field(
        default=4000, metadata={"help": "updates until the peak, at least 1"}
    )
    noam_factor: float = field(
        default=1.0,
        metadata={
            "help": "multiplies the schedule; its only factor, --lr is not used. A resumed run goes on with"
            " today's value"
        },
    )
    noam_d_model: Optional[int] = field(
        default=None,
        metadata={
            "help": "dimension of the model, only where the model itself says none (default: the"
            " model's encoder embedding dimension, else its d_model)"
        },
    )
    noam_cooldown: int = field(
        default=0,
        metadata={
            "help": "so many updates before --max-update the rate begins to fall linearly, to 0 behind the"
            " last one (0: it never does)"
        },
    )
    lr: List[float] = II("optimization.lr")
    max_update: int = II("optimization.max_update")


@register_lr_scheduler("noam", dataclass=NoamConfig)
class NoamSchedule(FairseqLRScheduler):
    """lrate = factor · :func:`get_rate`, where step = num_updates + 1 (Vaswani et al. 2017, eq. 3).

    With a cooldown it is also multiplied by :func:`falling`.

    fairseq sets the rate of the next update after each update, so that update k (1, 2, …) is made
    with `step_update(k - 1)`: the k-th rate of the paper. The rate is a function of the update
    count and today's options alone: nothing of it is in a checkpoint, so that a run resumed with
    another --noam-factor or --warmup-updates goes on with the new one from its first update.
    """

    def __init__(self, cfg: NoamConfig, optimizer: Any):
        super().__init__(cfg, optimizer)
        self.factor, self.warmup = cfg.noam_factor, cfg.warmup_updates
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise UserError(f"--noam-factor {self.factor:g} must be a finite number above 0")
        if self.warmup < 1:
            raise UserError(_bad_warmup(self.warmup))
        self.cooldown = cfg.noam_cooldown
        self.updates = cfg.max_update if self.cooldown else 0
        if self.cooldown and not 0 < self.cooldown <= self.updates:
            raise UserError(
                f"--noam-cooldown {self.cooldown} must be from 0 to --max-update, which is {self.updates}:"
                " the rate falls over the last updates of a training whose length is known"
            )
        self.d_model = _dimension(cfg.noam_d_model)
        _refuse_lr(cfg.lr, self.d_model, self.warmup)
        self.step_update(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take `best` from the state of this or any other scheduler; there is nothing else."""
        self.best = state_dict.get("best")

    def step(self, epoch: int, val_loss: Optional[float] = None) -> float:
        """The end of an epoch changes nothing."""
        super().step(epoch, val_loss)
        rate: float = self.optimizer.get_lr()
        return rate

    def step_update(self, num_updates: int) -> float:
        """Set and return the rate of the update that follows `num_updates` of them."""
        rate = self.factor * get_rate(self.d_model, num_updates + 1, self.warmup)
        if self.cooldown:
            rate *= falling(num_updates + 1, self.updates, self.cooldown)
        self.optimizer.set_lr(rate)
        return rate


def _dimension(flag: Optional[int]) -> int:
    trained = trained_model()
    own = model_dimension(trained.options, trained.model) if trained else None
    if own is None:
        if flag is None:
            raise UserError(
                "--lr-scheduler noam: the model says neither encoder_embed_dim nor d_model: "
                "give --noam-d-model"
            )
        if flag < 1:
            raise UserError(f"--noam-d-model {flag} must be at least 1")
        return flag
    if flag not in (None, own):
        raise UserError(
            f"--noam-d-model {flag} contradicts the model, whose dimension is {own}: leave it out"
        )
    return own


def _refuse_lr(lr: Any, d_model: int, warmup: int) -> None:
    rates = list(lr) if isinstance(lr, Collection) else [lr]
    if len(rates) > 1:
        raise UserError(
            f"--lr {','.join(f'{rate:g}' for rate in rates)} is a list of rates for epochs, which "
            "--lr-scheduler noam has no use for: leave --lr out and scale with --noam-factor"
        )
    if rates and rates[0] != FAIRSEQ_LR:
        factor = rates[0] * math.sqrt(d_model * warmup)
        raise UserError(
            f"--lr {rates[0]:g} is not used by --lr-scheduler noam: leave it out; for a peak of "
            f"{rates[0]:g} with d_model {d_model} and --warmup-updates {warmup} give "
            f"--noam-factor {factor:.6g}"
        )


def _bad_warmup(warmup: float) -> str:
    return (
        f"--warmup-updates {warmup:g} must be at least 1: noam rises over the warm-up and falls "
        "after it (1 falls from the first update on)"
    )


def model_dimension(options: Any, model: Any = None) -> Optional[int]:
    """The dimension d_model that a model says it has; None where it says none.

    `options`: cfg.model of fairseq (DictConfig or Namespace): `encoder.embed_dim`, else
    `encoder_embed_dim`, else `d_model`. Where they hold none of them, those of `model.cfg`.
    """
    for source in (options, getattr(model, "cfg", None)):
        for path in ("encoder.embed_dim", "encoder_embed_dim", "d_model"):
            value = source
            for name in path.split("."):
                value = _attribute(value, name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name, None)
    except OmegaConfBaseException:  # mandatory and not given, or points to nothing
        return None


def get_rate(d_model: int, step_num: int, warmup_step: int) -> float:
    """d_model^-0.5 · min(step_num^-0.5, step_num · warmup_step^-1.5).

    The learning rate of update `step_num` (1, 2, …): it rises linearly to its peak
    (d_model · warmup_step)^-0.5 at step `warmup_step`, then falls with the inverse square root.
    Vaswani et al., "Attention Is All You Need" (2017), equation 3. Raises ValueError where d_model,
    step_num or warmup_step is below 1: update 0 does not exist.
    """
    if d_model < 1:
        raise ValueError(f"d_model is {d_model}, it must be at least 1")
    if step_num < 1:
        raise ValueError(f"step_num is {step_num}, it must be at least 1: the first update is 1")
    if warmup_step < 1:
        raise ValueError(f"warmup_step is {warmup_step}, it must be at least 1")
    rate: float = d_model**-0.5 * min(step_num**-0.5, step_num * warmup_step**-1.5)
    return rate


def falling(step_num: int, updates: int, cooldown: int) -> float:
    """1, and from update `updates` − `cooldown` on a line that is 0 one update after the last.

    Update `updates`, the last one, has 1 / (cooldown + 1).
    """
    return min(1.0, max(0.0, (updates + 1 - step_num) / (cooldown + 1)))

"""Learning-rate schedules: what one has to know about the model it is for."""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from fairseq import trainer

from ext_common.compat.patching import replace


class Trained(NamedTuple):
    """The model whose optimizer and schedule are being built."""

    options: Any  # cfg.model: DictConfig, or argparse.Namespace of an arch without dataclass
    model: Any


_being_built: list[Trained] = []


def trained_model() -> Optional[Trained]:
    """What the schedule being built is for; None outside a Trainer."""
    return _being_built[-1] if _being_built else None


def show_schedules_the_model() -> None:
    """Symptom: a schedule that depends on the model's dimension cannot be written.

    A scheduler is built from its own options and the optimizer; an interpolation such as
    ``II("model.encoder_embed_dim")`` raises for archs without dataclass, whose options are a
    Namespace. While Trainer._build_optimizer runs, :func:`trained_model` answers.
    """

    def make(original: Callable) -> Callable:
        def _build_optimizer(self):
            _being_built.append(Trained(self.cfg.model, self.model))
            try:
                return original(self)
            finally:
                _being_built.pop()

        return _build_optimizer

    replace(trainer.Trainer, "_build_optimizer", make, ("lr_scheduler.build_lr_scheduler(",))


GAPS = (show_schedules_the_model,)

"""What we add to fairseq's training, beside what `compat` mends in it.

A task of any plugin may have, and is asked for, where it does:

    best_metric                      (name, larger is better) of what selects checkpoints, or None
    check_resume(state, same_run)    UserError where a checkpoint is another run's
    target dictionary's scorer()     what `fairseq-generate` ends with, in place of BLEU of words

and a learning-rate schedule may ask which model it is for: `trained_model`.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from fairseq import checkpoint_utils, scoring, trainer
from omegaconf import open_dict

from ext_common import compat
from ext_common.compat.patching import after, replace
from ext_common.given import given

logger = logging.getLogger(__name__)

# fairseq's default of --best-checkpoint-metric.
_DEFAULT_METRIC = "loss"


def apply() -> None:
    """Mend fairseq and add the above to it; what every plugin calls first. Again changes nothing."""
    compat.apply()
    for add in (
        _show_schedules_the_model,
        _ask_before_resuming,
        _take_the_best_metric_from_the_task,
        _take_the_scorer_from_the_dictionary,
    ):
        add()


# --- schedules know the model ---------------------------------------------------------------------


class Trained(NamedTuple):
    """The model whose optimizer and schedule are being built."""

    options: Any  # cfg.model: DictConfig, or argparse.Namespace of an arch without dataclass
    model: Any


_being_built: list[Trained] = []


def trained_model() -> Optional[Trained]:
    """What the schedule being built is for; None outside a Trainer."""
    return _being_built[-1] if _being_built else None


def _show_schedules_the_model() -> None:
    """Without it a schedule that depends on the model's dimension cannot be written.

    A scheduler is built from its own options and the optimizer; an interpolation such as
    `II("model.encoder_embed_dim")` raises for archs without dataclass, whose options are a
    Namespace.
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


# --- questions before a resume --------------------------------------------------------------------

_taking_over: list[tuple[Any, bool]] = []


def _ask_before_resuming() -> None:
    """A task is asked whether a checkpoint fits it before a training takes the checkpoint over.

    Without: other names for the same number of classes, or another vocabulary of the same size, and
    it goes on with permuted labels and says nothing. same_run is False where only the weights are
    taken over.
    """

    def make(original: Callable) -> Callable:
        def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
            _taking_over.append((self.task, not reset_optimizer))
            try:
                return original(self, filename, reset_optimizer, *args, **kwargs)
            finally:
                _taking_over.pop()

        return load_checkpoint

    replace(trainer.Trainer, "load_checkpoint", make, ("reset_optimizer=False",))
    after(checkpoint_utils, "load_checkpoint_to_cpu", _ask_the_task, ("torch.load(f,",))


def _ask_the_task(state: dict, *_args: Any, **_kwargs: Any) -> None:
    task, same_run = _taking_over[-1] if _taking_over else (None, False)
    if hasattr(task, "check_resume"):
        task.check_resume(state, same_run)


# --- the task says what is best -------------------------------------------------------------------


def _take_the_best_metric_from_the_task() -> None:
    """A task that is judged by BLEU or accuracy keeps the checkpoint with the best of it.

    Without: the one of lowest loss, or with `--best-checkpoint-metric bleu` alone the worst one, as
    it is then minimised. `best_metric` counts where no metric was asked for.
    """

    def choose(_none: None, self: Any, _cfg: Any, task: Any, *_args: Any, **_kwargs: Any) -> None:
        choose_best_metric(self.cfg, task)

    after(trainer.Trainer, "__init__", choose, ("self.cfg = cfg",))


def choose_best_metric(cfg: Any, task: Any) -> None:
    """Write `task.best_metric` into ``cfg.checkpoint``, unless a metric was asked for."""
    best = getattr(task, "best_metric", None)
    asked = "best_checkpoint_metric" in given()
    asked = asked or cfg.checkpoint.best_checkpoint_metric != _DEFAULT_METRIC
    if best is None or asked or cfg.dataset.disable_validation:
        return
    # The same object as in fairseq_cli.train.main, which reads it after every validation.
    with open_dict(cfg):
        cfg.checkpoint.best_checkpoint_metric, cfg.checkpoint.maximize_best_checkpoint_metric = best
    rule = "highest" if best[1] else "lowest"
    logger.info(f"the best checkpoint is the one with the {rule} {best[0]}")


def _take_the_scorer_from_the_dictionary() -> None:
    """A dictionary with `scorer()` says what `fairseq-generate` ends with where `--scoring` does not.

    Without: BLEU of words between spaces, which Chinese lacks.
    """

    def make(original: Callable) -> Callable:
        def build_scorer(choice, tgt_dict):
            default = getattr(choice, "_name", choice) == "bleu"
            if default and hasattr(tgt_dict, "scorer"):
                return tgt_dict.scorer()
            return original(choice, tgt_dict)

        return build_scorer

    replace(scoring, "build_scorer", make, ('_choice == "bleu"',))

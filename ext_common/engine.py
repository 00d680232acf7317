"""What we add to fairseq's training, beside what `compat` mends in it.

A task of any plugin may have, and is asked for, where it does:

    best_metric                      (name, larger is better) of what selects checkpoints, or None
    is_done                          why a training ends before its length, or None
    check_resume(state, same_run)    UserError where a checkpoint is another run's
    compare_anew                     why metrics of before a resume are no longer comparable, or empty
    target dictionary's scorer()     what `fairseq-generate` ends with, in place of BLEU of words
    exact_inputs                     True: --fp16 and --bf16 leave float32 inputs to the model
    criterion's why_stop()           a sentence where a loss of the update is no number, else None

and a learning-rate schedule may ask which model it is for: `trained_model`.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from fairseq import checkpoint_utils, options, scoring, trainer, utils
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import TASK_REGISTRY
from omegaconf import open_dict

from ext_common import checkpoints, compat, devices, screen, stopping, threads
from ext_common.checkpoints import refuse_other_wing
from ext_common.cli import UsageError, UserError
from ext_common.compat import resume
from ext_common.compat.patching import after, replace
from ext_common.given import given

logger = logging.getLogger(__name__)

# fairseq's default of --best-checkpoint-metric.
_DEFAULT_METRIC = "loss"


def apply() -> None:
    """Mend fairseq and add the above to it; what every plugin calls first. Again changes nothing."""
    compat.apply()
    threads.settle_fairseq()
    for add in (
        _show_schedules_the_model,
        _ask_before_resuming,
        _tell_of_a_new_curve,
        _take_the_best_metric_from_the_task,
        _take_the_scorer_from_the_dictionary,
        _take_the_task_from_the_checkpoint,
    ):
        add()
    devices.apply()
    stopping.apply()
    screen.apply()


# --- schedules know the model ---------------------------------------------------------------------


class Trained(NamedTuple):
    """The model whose optimizer and schedule are being built."""

    options: Any  # cfg.model: DictConfig, or argparse.Namespace of an arch without dataclass
    model: Any


_being_built: list[Trained] = []


def trained_model() -> Optional[Trained]:
    """What the schedule being built is for; None outside a Trainer."""
    return _being_built[-1] if _being_built else None


@contextlib.contextmanager
def building(trainer: Any) -> Iterator[None]:
    """While a schedule is built for the model of `trainer`."""
    _being_built.append(Trained(trainer.cfg.model, trainer.model))
    try:
        yield
    finally:
        _being_built.pop()


def _show_schedules_the_model() -> None:
    """Without it a schedule that depends on the model's dimension cannot be written.

    A scheduler is built from its own options and the optimizer; an interpolation such as
    `II("model.encoder_embed_dim")` raises for archs without dataclass, whose options are a
    Namespace.
    """

    def make(original: Callable) -> Callable:
        def _build_optimizer(self):
            with building(self):
                return original(self)

        return _build_optimizer

    replace(trainer.Trainer, "_build_optimizer", make, ("lr_scheduler.build_lr_scheduler(",))


# --- questions before a resume --------------------------------------------------------------------


def _ask_before_resuming() -> None:
    """A task is asked whether a checkpoint fits it before a training takes the checkpoint over.

    Without: other names for the same number of classes, or another vocabulary of the same size, and
    it goes on with permuted labels and says nothing. same_run is False where only the weights are
    taken over.
    """
    resume.note_what_is_resumed()
    after(checkpoint_utils, "load_checkpoint_to_cpu", _ask_the_task, ("torch.load(f,",))
    after(distributed_utils, "broadcast_object", _ask_the_others, ("_split_tensors_from_obj",))


def _ask_the_task(state: dict, *_args: Any, **_kwargs: Any) -> None:
    now = resume.resuming()
    if now and isinstance(state.get("cfg"), Mapping):
        task = getattr(getattr(now.trainer.task, "cfg", None), "_name", None)
        if task:
            refuse_other_wing(
                state, "the checkpoint", task, "give another one, or a new --save-dir"
            )
    if now and hasattr(now.trainer.task, "check_resume"):
        now.trainer.task.check_resume(state, now.same_run)


def _ask_the_others(state: Any, *_args: Any, **_kwargs: Any) -> None:
    """The processes that are sent what the first one has read: what a task takes over, it takes in all."""
    now = resume.resuming()
    if now and now.trainer.data_parallel_rank > 0 and "task_state" in state:
        _ask_the_task(state)


def _tell_of_a_new_curve() -> None:
    """A longer `--max-update` under a schedule that ends with it: the rate jumps, which is said.

    Without: the cosine of a finished training starts again near its middle, and says nothing.
    """
    for action in (_compare_rates, _compare_anew):
        after(checkpoint_utils, "load_checkpoint", action, ("trainer.lr_step(epoch_itr.epoch)",))


def _compare_anew(_result: Any, _cfg: Any, trainer: Any, **_kwargs: Any) -> None:
    """Forget the best metric so far where the task says that it means nothing any more."""
    why = getattr(trainer.task, "compare_anew", "")
    if why:
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        logger.warning(f"{why}: the best checkpoint is chosen anew from here on")


def _compare_rates(result: Any, cfg: Any, trainer: Any, **_kwargs: Any) -> None:
    before = (result[0] or {}).get("trained_with")
    if before and not (cfg.reset_optimizer or cfg.reset_lr_scheduler):
        said = new_curve(before, trainer.cfg, trainer.get_lr(), trainer.get_num_updates())
        if said:
            logger.warning(said)


def new_curve(before: dict, cfg: Any, rate: float, updates: int) -> Optional[str]:
    """What to say where another --max-update changed the rate of the next update; None elsewhere.

    before: `trained_with` of the checkpoint, of `updates` updates; rate: that of the next one now.
    """
    old_length, length = before["optimization"].get("max_update"), cfg.optimization.max_update
    name, old_rate = before["lr_scheduler"].get("_name"), before["lr"]
    same_schedule = getattr(cfg.lr_scheduler, "_name", None) == name
    if old_length == length or old_rate is None or not same_schedule:
        return None
    if math.isclose(old_rate, rate, rel_tol=1e-3, abs_tol=1e-12):
        return None
    # Behind its end a curve may begin anew (cosine), so that the rate there says nothing.
    ended = updates >= (old_length or math.inf)
    there, here = ("its end", "RATE") if ended else (f"{old_rate:.3g}", f"{old_rate:.3g}")
    return (
        f"--max-update was {old_length} and is {length}: the learning rate, which --lr-scheduler {name} had"
        f" brought to {there}, is {rate:.3g} on the new curve, and this training takes that; to go"
        f" on at a constant rate instead, give --lr-scheduler fixed --lr {here} --reset-lr-scheduler in"
        f" place of the flags of {name}"
    )


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
    """Write `task.best_metric` into `cfg.checkpoint`, unless a metric was asked for."""
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


# --- the checkpoint says what it was trained for --------------------------------------------------

_LIMITS = ("max_source_positions", "max_target_positions")


def _take_the_task_from_the_checkpoint() -> None:
    """`fairseq-generate`, `-interactive` and `-validate` take task and longest lengths from --path.

    Without: where `--task` is forgotten they take `translation`, for which a line of text is words, most of
    them unknown, and say nothing; and what the model can hold beyond 1024 pieces is left out.
    """

    def make(original: Callable) -> Callable:
        def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
            words = list(sys.argv[1:] if input_args is None else input_args)
            saved = trained_for(parser, words)
            if saved and saved["task"] in TASK_REGISTRY:
                parser.set_defaults(task=saved["task"])
            parsed = original(parser, input_args, *args, **kwargs)
            for name in _LIMITS if saved else ():
                if hasattr(parsed, name) and name in saved and not _typed(name, words):
                    setattr(parsed, name, saved[name])
            return parsed

        return parse_args_and_arch

    replace(options, "parse_args_and_arch", make, ("TASK_REGISTRY[args.task]",))


def trained_for(parser: Any, words: Sequence[str]) -> Optional[dict[str, Any]]:
    """{"task": name, and its longest lengths} of the (first) checkpoint that --path names; None without.

    UsageError where --task names another one than a checkpoint of ours was trained with.
    """
    if not any(action.dest == "path" for action in parser._actions):
        return None
    few = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    few.add_argument("--path")
    few.add_argument("--task")
    typed, _ = few.parse_known_args(list(words))
    path = utils.split_paths(typed.path)[0] if typed.path else ""
    if not os.path.isfile(path):
        return None
    try:
        state = checkpoints.read_state(path)
    except UserError:
        return None  # told by who loads the model
    name = checkpoints.name_of(state, "task") if isinstance(state, dict) else None
    if name is None:
        return None
    own = getattr(TASK_REGISTRY.get(name), "__module__", "").startswith(checkpoints.OUR_PLUGINS)
    if own and typed.task not in (None, name):
        raise UsageError(
            f"--task {typed.task} is not what {path} was trained with: give --task {name}, or a checkpoint"
            f" of {typed.task}"
        )
    cfg = (state.get("cfg") or {}).get("task") or {}
    return {"task": name, **{key: cfg[key] for key in _LIMITS if key in cfg}}


def _typed(name: str, words: Sequence[str]) -> bool:
    flag = f"--{name.replace('_', '-')}"
    return any(word.partition("=")[0] == flag for word in words)

"""How good a checkpoint is on its own validation data, by the metric that chose its training's best."""

import importlib
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from ext_common.checkpoints import OUR_PLUGINS, import_fairseq, import_plugin, untouched_logging
from ext_common.cli import UserError


class Measure(NamedTuple):
    """The value of a metric, and whether more of it is better."""

    metric: str
    value: float
    more_is_better: bool

    def is_better_than(self, other: "Measure") -> bool:
        return self.value > other.value if self.more_is_better else self.value < other.value

    def __str__(self) -> str:
        return f"{self.metric} {self.value:g}"


def measured(
    path: str | os.PathLike[str], state: dict[str, Any], data: str | None = None
) -> Measure:
    """What fairseq's validation says of a checkpoint; state: what is in its file.

    data: its folder, where the one of the training has moved. UserError where it is not there.
    """
    cfg = state.get("cfg")
    task = cfg.get("task") if isinstance(cfg, dict) else None
    data = data or (task.get("data") if isinstance(task, dict) else None)
    if not data or not all(os.path.exists(part) for part in data.split(":")):
        raise UserError(
            f"{data or 'the data of this training'} is not there: give --data with its folder"
        )
    with untouched_logging():
        return _validate(os.fspath(path), state, data)


def _validate(path: str, state: dict[str, Any], data: str) -> Measure:
    import_fairseq()
    # the plugin may have been imported before fairseq was, and has then registered nothing
    folder = Path(state["cfg"]["common"]["user_dir"] or __package__)
    importlib.import_module(folder.name if folder.name in OUR_PLUGINS else __package__).register()
    import_plugin(state, None)
    from fairseq.logging import metrics
    from fairseq_cli import validate
    from omegaconf import OmegaConf

    groups = ("common", "common_eval", "dataset", "checkpoint", "distributed_training")
    cfg = OmegaConf.create({name: state["cfg"][name] for name in groups})
    cfg.common_eval.path, cfg.common.log_format = path, "none"
    cfg.common.fp16, cfg.distributed_training.distributed_world_size = False, 1
    cfg.dataset.max_tokens = cfg.dataset.max_tokens_valid or cfg.dataset.max_tokens
    cfg.dataset.batch_size = cfg.dataset.batch_size_valid or cfg.dataset.batch_size
    overrides = Namespace(data=data, model_overrides="{}")
    name = state["cfg"]["checkpoint"]["best_checkpoint_metric"]
    more_is_better = bool(state["cfg"]["checkpoint"]["maximize_best_checkpoint_metric"])
    task = state["cfg"]["task"]
    if task.get("no_valid_text") and task["select_by"] != "loss":
        # what training saves the time for, once is cheap: the loss takes the best one far too early
        overrides.no_valid_text = False
        name, more_is_better = task["select_by"], True
    # fairseq's own remarks are its whole configuration, once a checkpoint
    logging.disable(logging.INFO)
    try:
        with metrics.aggregate(new_root=True) as found:
            validate.main(cfg, overrides)
    finally:
        logging.disable(logging.NOTSET)
    values = found.get_smoothed_values()
    if name not in values:
        raise UserError(
            f"validation of {path} does not measure {name}, by which its training chose the best"
        )
    return Measure(name, float(values[name]), more_is_better)

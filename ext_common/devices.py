"""Training on any device and in several processes.

Bits that come again, kernels that are fused, 16 bits that leave the data exact, and one word for all of them
where a loss is no number.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fairseq import trainer

from ext_common.cli import UserError
from ext_common.compat import messages
from ext_common.compat.patching import before, replace


def apply() -> None:
    """Mend trainings in this; calling it again changes nothing."""
    before(trainer.Trainer, "__init__", settle, ("self._model = model",))
    replace(trainer.Trainer, "_fp_convert_sample", _exact, ("apply_bfloat16", "apply_half"))
    replace(trainer.Trainer, "clip_grad_norm", _together, ("self.optimizer.clip_grad_norm(",))


def settle(_trainer: Any, cfg: Any, _task: Any, model: Any, *_args: Any, **_kwargs: Any) -> None:
    """`--deterministic` and `--compile`, before the Trainer moves the model.

    Without the former a GPU adds in the order in which its threads come to an end. UserError for a backend
    that there is not.
    """
    task = getattr(cfg, "task", None)  # none in a Trainer that is made by hand
    if getattr(task, "deterministic", False):
        # read by cuBLAS when it begins
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    backend = getattr(task, "compile", "")
    if backend:
        known = torch._dynamo.list_backends(())
        if backend not in known:
            raise UserError(f"--compile {backend} is unknown: known are {', '.join(known)}")
        # in place: the weights keep their names
        model.compile(backend=backend)


def _exact(original: Callable[..., Any]) -> Callable[..., Any]:
    """A task whose inputs need 32 bits until they are normalised has them (`exact_inputs`).

    Without: features are rounded to 16 bits, before their mean is taken off.
    """

    def _fp_convert_sample(self: Any, sample: Any) -> Any:
        return sample if getattr(self.task, "exact_inputs", False) else original(self, sample)

    return _fp_convert_sample


def _together(original: Callable[..., Any]) -> Callable[..., Any]:
    """A loss that is no number ends the training of all processes, with one sentence.

    Without: the process that sees it raises, and the others wait for its gradients until a time-out. Here all
    ask when the norm of the gradients, which they share, is no number: no batch waits for a device for it.
    """

    def clip_grad_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            norm = original(self, *args, **kwargs)
        except OverflowError:
            # --fp16 asks itself, and tries the update again with another scale
            stop_together(self)
            raise
        if not torch.isfinite(torch.as_tensor(norm)).all():
            stop_together(self)
        return norm

    return clip_grad_norm


def stop_together(trainer: Any) -> None:
    """UserError, or in several processes their end, where the criterion of any says why."""
    ask = getattr(trainer.get_criterion(), "why_stop", None)
    if ask is None:
        return
    own = ask()
    if trainer.data_parallel_world_size == 1:
        if own:
            raise UserError(own)
        return
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    sentence = next(filter(None, every), None)
    if sentence is None:
        return
    if trainer.is_data_parallel_master:
        for action in messages.before_an_error:
            action()
        messages.tell(sentence)
    # a launcher that sees one end would end the one that speaks
    dist.barrier()
    sys.exit(1)


def sums(logs: Sequence[Mapping[str, Any]]) -> defaultdict[str, float]:
    """Sum of each key over the logs of an update; of tensors by one transfer from their device."""
    keys = dict.fromkeys(key for log in logs for key in log)
    found = {key: sum(log.get(key, 0) for log in logs) for key in keys}
    tensors = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if tensors:
        together = torch.stack([value.detach().double() for value in tensors.values()])
        found.update(zip(tensors, together.tolist(), strict=True))
    return defaultdict(float, found)

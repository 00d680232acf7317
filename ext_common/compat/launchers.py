"""What launchers of several processes do that a training has to know: SLURM's tasks, torchrun's restarts."""

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

from torch.distributed import PrefixStore

from ext_common.cli import UserError
from ext_common.compat.patching import replace

# By its name: torch.distributed has a function that is called the same.
rendezvous = importlib.import_module("torch.distributed.rendezvous")
# In the source of versions of torch that give all starts one store, under one name.
_ONE_NAME = "no need to add prefix for each attempt"


def meet_anew_after_a_restart() -> None:
    """Symptom: under `torchrun --max-restarts` with gloo the second start ends in "connectFullMesh failed …
    Connection refused".

    torchrun's agent keeps its store, in which the addresses of the processes that died still stand under the
    same names; earlier versions of torch told the starts apart. Each gets names of its own here.

    Thread: none found.
    """
    if _ONE_NAME in inspect.getsource(rendezvous._create_c10d_store):
        replace(rendezvous, "_create_c10d_store", _named_by_start, (_ONE_NAME,))


GAPS = (meet_anew_after_a_restart,)


def _named_by_start(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_c10d_store(*args: Any, **kwargs: Any) -> Any:
        store = original(*args, **kwargs)
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store if start == "0" else PrefixStore(f"start_{start}", store)

    return _create_c10d_store


def refuse_one_task_each(options: Any) -> None:
    """UserError in one of several tasks of SLURM that each see one GPU, or none, and know of no other.

    fairseq then trains once in each, all into one folder. options: cfg.distributed_training.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    group = options.distributed_init_method is not None or options.distributed_port > 0
    if tasks > 1 and options.distributed_world_size == 1 and not group:
        raise UserError(
            f"this is one of {tasks} tasks of a SLURM step, and each would train alone into the same folder:"
            " use python -m ext_common.launch, or srun --ntasks-per-node=1 torchrun …"
        )

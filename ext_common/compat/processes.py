"""Several processes: one group under torchrun, processes on CPU, gloo.

torchrun --nproc_per_node 2 --no-python fairseq-train DATA --cpu …      (CPU)
torchrun --nproc_per_node 8 --no-python fairseq-train DATA …            (8 GPUs)
torchrun --nnodes 2 --node_rank R --master_addr HOST … the same         (several machines)
fairseq-train DATA --cpu --distributed-world-size 2 …                   (without a launcher)
"""

import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, trainer, utils
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.multiprocessing import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from ext_common.cli import UsageError, UserError
from ext_common.compat.command import in_training_command
from ext_common.compat.launchers import refuse_one_task_each
from ext_common.compat.messages import before_an_error, tell
from ext_common.compat.patching import after, as_expected, before, replace
from ext_common.given import given
from ext_common.parallel import free_port


def form_one_group() -> None:
    """Symptom: `torchrun --nproc_per_node 2 … fairseq-train` trains twice into one folder.

    fairseq takes torchrun's variables only when it already believes in several processes, which on
    CPU or with one GPU it does not (infer_init_method); with `--distributed-world-size 2` it
    divides by zero GPUs, or spawns min(0, 2) processes and ends without having trained. Here a
    launcher's group is always joined, and without a launcher the asked number of processes is
    started here, on GPUs too: in those that fairseq starts nobody tells a mistake in words or leaves the
    group.

    Thread: fairseq 2879.
    """

    def make(original: Callable) -> Callable:
        def call_main(cfg, main, **kwargs):
            count = arrange(cfg)
            try:
                if count == 0:
                    return original(cfg, main, **kwargs)
                _spawn(count, main, cfg, kwargs)
            finally:
                leave_group()

        return call_main

    replace(distributed_utils, "call_main", make, ("distributed_no_spawn", "spawn("))


def join_from_inside() -> None:
    """Symptom: the same for fairseq-hydra-train under torchrun.

    It imports the plugin only in a training's main, when its call_main has been passed already: the
    group is joined there.

    Thread: fairseq 2879.
    """
    in_training_command(_join_in)


def refuse_to_train_apart() -> None:
    """Symptom: the same in a program that builds a Trainer without fairseq's call_main.

    Thread: fairseq 2879.
    """

    def refuse_apart(self, cfg, *args, **kwargs):
        launch = launched()
        if launch and not cfg.common.tpu and not dist.is_initialized():
            raise UserError(
                f"{launch.world_size} processes were launched, but this program did not join "
                "them and each would train alone into the same folder: start it without "
                "torchrun, or use fairseq-train"
            )

    before(trainer.Trainer, "__init__", refuse_apart, ("self._wrapped_model = None",))


def wrap_models_on_cpu() -> None:
    """Symptom: the default `--ddp-backend pytorch_ddp` raises ValueError device_ids on CPU.

    Thread: fairseq 2879.
    """
    if getattr(distributed_fairseq_model.DistributedDataParallel, "_ext_common", False):
        return
    wrap = distributed_fairseq_model.DistributedFairseqModel
    if not as_expected(wrap, ("device_ids=[args.device_id]",), "DistributedFairseqModel"):
        return

    def on_any_device(module, device_ids=None, output_device=None, **kwargs):
        if all(parameter.device.type == "cpu" for parameter in module.parameters()):
            device_ids = output_device = None
        return DistributedDataParallel(
            module, device_ids=device_ids, output_device=output_device, **kwargs
        )

    on_any_device._ext_common = True
    distributed_fairseq_model.DistributedDataParallel = on_any_device


def resume_in_every_process() -> None:
    """Symptom: resuming with several processes raises an UnpicklingError in all but the first.

    Process 0 sends what it read, options as a DictConfig included, and torch.load refuses that
    since 2.6. Options are sent as plain containers instead; what is read from the first process
    then holds nothing a checkpoint may not, but the marks where tensors go.

    Thread: fairseq 5610 (its own call of torch.load is not mentioned there).
    """

    def make(original: Callable) -> Callable:
        def broadcast_object(obj, *args, **kwargs):
            if isinstance(obj, dict) and isinstance(obj.get("cfg"), DictConfig):
                obj = {**obj, "cfg": OmegaConf.to_container(obj["cfg"])}
            obj = original(obj, *args, **kwargs)
            if isinstance(obj, dict) and isinstance(obj.get("cfg"), dict):
                obj["cfg"] = OmegaConf.create(obj["cfg"], flags={"allow_objects": True})
            return obj

        return broadcast_object

    replace(distributed_utils, "broadcast_object", make, ("_split_tensors_from_obj",))

    def make_slow(original: Callable) -> Callable:
        def _broadcast_object_slow(*args, **kwargs):
            with torch.serialization.safe_globals([distributed_utils._TensorPlaceholder]):
                return original(*args, **kwargs)

        return _broadcast_object_slow

    replace(distributed_utils, "_broadcast_object_slow", make_slow, ("torch.load(buffer",))


def gather_without_cuda() -> None:
    """Symptom: criterions whose outputs cannot be summed fail on CPU: all_gather_list wants CUDA.

    Without NCCL the objects are gathered by torch itself, which also knows no maximal size.

    Thread: fairseq 1826, 780, 1088.
    """

    def make(original: Callable) -> Callable:
        def all_gather_list(data, group=None, max_size=16384):
            group = distributed_utils.get_global_group() if group is None else group
            if not isinstance(group, dist.ProcessGroup) or dist.get_backend(group) == "nccl":
                return original(data, group=group, max_size=max_size)
            gathered = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, utils.move_to_cpu(data), group=group)
            return gathered

        return all_gather_list

    replace(distributed_utils, "all_gather_list", make, ("torch.cuda.ByteTensor",))


def keep_buffers_alike() -> None:
    """Symptom: BatchNorm statistics differ between processes; those of the first are saved.

    Neither backend sends buffers by default, so that validation measures models nobody keeps.
    Before each validation and each checkpoint the floating buffers become their mean over the
    processes (of variances too: the small part between the processes' means is left out).

    Thread: fairscale 68, where fairseq's author says that they were taken out for speed.
    """

    def alike_in_validation(self, epoch):
        average_buffers(self)

    before(trainer.Trainer, "begin_valid_epoch", alike_in_validation, ("begin_valid_epoch(epoch",))

    def alike_in_checkpoints(cfg, trainer, epoch_itr, val_loss):
        average_buffers(trainer)

    before(checkpoint_utils, "save_checkpoint", alike_in_checkpoints, ("checkpoint_conds",))


GAPS = (
    form_one_group,
    join_from_inside,
    refuse_to_train_apart,
    wrap_models_on_cpu,
    resume_in_every_process,
    gather_without_cuda,
    keep_buffers_alike,
)


# Called first in each process that is started here: it imports the plugin only later.
at_start: list[Callable[[], None]] = []


# --- what the gaps stand on ---------------------------------------------------------------------


class Launch(NamedTuple):
    """What a launcher such as torchrun tells a process."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> Optional[Launch]:
    """The launcher's group, None without a launcher or with one process alone."""
    env = os.environ
    if any(name not in env for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")):
        return None
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    local_rank = env.get("LOCAL_RANK")
    if local_rank is None:
        local_rank = rank % max(1, torch.cuda.device_count())
    return Launch(rank, world_size, int(local_rank)) if world_size > 1 else None


def arrange(cfg: Any) -> int:
    """Complete `cfg.distributed_training`; returns how many processes to start here.

    0 means that fairseq goes on by itself: alone, or in a launcher's group.
    """
    options = cfg.distributed_training
    if cfg.common.tpu or options.pipeline_model_parallel:
        return 0
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if on_cpu and cfg.common.cpu and options.distributed_world_size == torch.cuda.device_count():
        # The default counts GPUs that --cpu just said not to use.
        if "distributed_world_size" not in given():
            options.distributed_world_size = 1
    launch = launched()
    if launch and not options.distributed_no_spawn:
        join_launch(options, launch, on_cpu)
    elif not launch:
        refuse_one_task_each(options)
    if on_cpu and options.distributed_backend == "nccl":
        options.distributed_backend = "gloo"
    by_hand = options.distributed_no_spawn or options.distributed_world_size == 1
    if by_hand or (on_cpu and _slurm_does_it(options)):
        return 0
    if not on_cpu:
        return started_on_gpus(options)
    method = options.distributed_init_method
    if method is None:
        port = options.distributed_port if options.distributed_port > 0 else free_port()
        options.distributed_init_method = f"tcp://127.0.0.1:{port}"
    elif not method.startswith(("tcp://localhost:", "tcp://127.0.0.1:", "file://")):
        raise UserError(
            f"--distributed-init-method {method} does not say how many of the "
            f"{options.distributed_world_size} CPU processes to start here: use torchrun "
            "--nnodes N --nproc_per_node M --no-python fairseq-train … --cpu"
        )
    return options.distributed_world_size


def started_on_gpus(options: Any) -> int:
    """How many processes fairseq starts on the GPUs of this machine; 0 where it starts none."""
    if options.distributed_init_method is None:
        distributed_utils.infer_init_method(options)
    if options.distributed_init_method is None or options.distributed_no_spawn:
        return 0
    return min(torch.cuda.device_count(), int(options.distributed_world_size))


def join_launch(options: Any, launch: Launch, on_cpu: bool) -> None:
    """Write a launcher's group into `cfg.distributed_training`."""
    with open_dict(options):
        if options.distributed_init_method is None:
            options.distributed_init_method = "env://"
        options.distributed_world_size = launch.world_size
        options.distributed_rank = launch.rank
        options.distributed_no_spawn = True
        # more processes than cards share them, which takes --distributed-backend gloo
        cards = max(1, torch.cuda.device_count())
        options.device_id = 0 if on_cpu else launch.local_rank % cards


def join_late(cfg: Any) -> None:
    """Join a launcher's group from inside a training's main that was called without one.

    fairseq-hydra-train imports the plugin only there, when its call_main has been passed already.
    """
    launch = launched()
    if launch is None or dist.is_initialized() or cfg.common.tpu:
        return
    arrange(cfg)
    if not (cfg.common.cpu or not torch.cuda.is_available()):
        torch.cuda.set_device(cfg.distributed_training.device_id)
    distributed_utils.distributed_init(cfg)


def leave_group() -> None:
    """End the group this process is in, so that it ends without torch's warning about it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if hasattr(distributed_utils.get_global_group, "_global_group"):
        del distributed_utils.get_global_group._global_group


def average_buffers(trainer: Any) -> None:
    """Make the model's persistent floating buffers their mean over the data-parallel processes."""
    if trainer.data_parallel_world_size == 1 or trainer.is_fsdp:
        return
    model = trainer.get_model()
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept and buffer.is_floating_point():
            distributed_utils.all_reduce(buffer, trainer.data_parallel_process_group)
            buffer.div_(trainer.data_parallel_world_size)


def _slurm_does_it(options: Any) -> bool:
    in_slurm = "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ
    return in_slurm and options.distributed_init_method is None and options.distributed_port > 0


def _spawn(count: int, main: Callable, cfg: Any, kwargs: dict) -> None:
    first = cfg.distributed_training.distributed_rank or 0  # of the processes of this machine
    cfg.distributed_training.distributed_rank = None
    threads = max(1, torch.get_num_threads() // count)
    context = torch.multiprocessing.spawn(
        fn=_worker,
        args=(main, cfg, {**kwargs, "start_rank": first}, threads, tuple(at_start)),
        nprocs=count,
        join=False,
    )
    told: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        told.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        sys.exit(128 + told[0] if told else error.exit_code or 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # torch lets a process that Ctrl-C ends before its training pass for one that is done
    if told:
        sys.exit(128 + told[0])


def _worker(
    index: int, main: Callable, cfg: Any, kwargs: dict, threads: int, first: tuple[Callable, ...]
) -> None:
    for action in first:
        action()
    torch.set_num_threads(threads)
    try:
        distributed_utils.distributed_main(index, main, cfg, kwargs)
        leave_group()
    except SystemExit:
        leave_group()
        raise
    except UserError as error:
        for action in before_an_error:
            action()
        tell(str(error))
        leave_group()
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _join_in(train: ModuleType) -> None:
    after(train, "add_defaults", _join_with, ("merge_with_parent",))


def _join_with(_none: None, cfg: Any) -> None:
    join_late(cfg)

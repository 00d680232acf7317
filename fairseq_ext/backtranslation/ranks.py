"""Processes that torchrun or SLURM started together: which one speaks, which GPU is whose."""

from collections.abc import Mapping


def is_first_rank(environ: Mapping[str, str]) -> bool:
    """Whether this process speaks for all that torchrun or SLURM started."""
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def device_of_rank(device: str, environ: Mapping[str, str]) -> str:
    """``device``, where it is auto the GPU of this process under torchrun or SLURM."""
    rank = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID"))
    if device != "auto" or not (rank or "").isdigit():
        return device
    import torch

    # SLURM can also show each process its own GPU only
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(rank) % count}" if count else device

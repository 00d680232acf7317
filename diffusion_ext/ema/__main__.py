"""An average of the weights of any length, made after a training with --ema-snapshots.

    python -m diffusion_ext.ema CKPT/checkpoint_last.pt --sigma-rel 0.08 --output average.pt
    python -m diffusion_ext.ema CKPT/checkpoint_last.pt --output average.pt

The length is a share of the training, 0.04 to 0.15. Without --sigma-rel, or with several of them, that with
the lowest error on the held-out images is written, and average.pt.lengths.png shows all. The snapshots are
found beside CKPT; more checkpoints of the same training count as snapshots too. `sample` and `export` take
average.pt like any checkpoint; a training does not go on from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional

import numpy as np
import torch
from torch import Tensor

from diffusion_ext.ema.posthoc import LONGEST, SHORTEST, Profile, combination, gamma_of, misfit
from diffusion_ext.ema.snapshots import Track, tracks_of, updates_of
from ext_common.cli import Parser, UsageError, add_dataclass, from_args, progress, run
from ext_common.manifest import atomic_write, beside, check_writable

LENGTHS = (0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15)
NEAR = 0.01  # of a profile, by which a sum of snapshots may miss it without a word


@dataclass
class EmaOptions:
    """Which average."""

    output: str = field(metadata={"help": "checkpoint to write"})
    sigma_rel: List[float] = field(
        default_factory=lambda: list(LENGTHS),
        metadata={
            "help": f"length, a share of the training from {SHORTEST} to {LONGEST}; of several, the"
            " best on the held-out images"
        },
    )
    data: Optional[str] = field(
        default=None, metadata={"help": "images to choose by; none: those of the training"}
    )
    draws: int = field(default=8, metadata={"help": "noise levels a held-out image is judged at"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, cuda:1; auto: cuda if there"})

    def __post_init__(self) -> None:
        if not self.sigma_rel or self.draws < 1:
            raise ValueError("--sigma-rel is at least one length, and --draws at least 1")
        for length in self.sigma_rel:
            if not SHORTEST <= length <= LONGEST:
                raise ValueError(
                    f"--sigma-rel {length:g} cannot be made of the snapshots: give {SHORTEST} to {LONGEST}"
                )


def main(argv: list[str]) -> None:
    """The command."""
    parser = Parser(prog="python -m diffusion_ext.ema", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="of one training")
    add_dataclass(parser, EmaOptions)
    args = parser.parse_args(argv)
    make(args.checkpoints, from_args(EmaOptions, args))


def make(checkpoints: list[str], options: EmaOptions) -> None:
    """Write the average; raises UserError."""
    from diffusion_ext.inference import read_checkpoint

    check_writable(options.output)
    if Path(options.output).resolve() in [Path(path).resolve() for path in checkpoints]:
        raise UsageError(f"--output {options.output} would replace an input: give another file")
    states = {path: read_checkpoint(path) for path in checkpoints}
    path = max(states, key=lambda name: updates_of(states[name]))
    state = states[path]
    tracks = tracks_of(checkpoints, state)
    length = options.sigma_rel[0]
    if len(options.sigma_rel) > 1:
        length = best_length(path, state, tracks, options)
    weights = average(tracks, updates_of(state), length)
    with atomic_write(options.output, "wb") as file:
        torch.save(with_weights(state, weights, length), file)
    print(
        f"{options.output}: the average of length {length:g} after {updates_of(state)} updates, of"
        f" {len(tracks)} tracks"
    )


def average(tracks: list[Track], updates: int, sigma_rel: float) -> Tensor:
    """float32 (parameters,): the sum of the tracks that is nearest to the profile of this length."""
    wanted, have = Profile(updates, gamma_of(sigma_rel)), [track.profile for track in tracks]
    factors = combination(have, wanted)
    missed = misfit(have, factors, wanted)
    if missed > NEAR:
        print(
            f"warning: {len(have) // 2} snapshots miss the profile of length {sigma_rel:g} by {missed:.1%}:"
            " more of them (a smaller --ema-snapshots) come nearer"
        )
    total = torch.zeros_like(tracks[0].weights, dtype=torch.float64)
    for factor, track in zip(factors.tolist(), tracks, strict=True):
        total += factor * track.weights
    return total.float()


def with_weights(state: Mapping[str, Any], weights: Tensor, sigma_rel: float) -> dict[str, Any]:
    """A checkpoint's state whose network and whose every average are these weights; no optimizer."""
    model = dict(state["model"])
    names = [name for name in model if name.startswith("net.")]
    sizes = [model[name].numel() for name in names]
    for name, part in zip(names, weights.split(sizes), strict=True):
        model[name] = part.view(model[name].shape).to(model[name].dtype).clone()
    model["ema.weights"] = weights.repeat(len(model["ema.weights"]), 1)
    kept = ("args", "cfg", "task_state", "optimizer_history")
    return {
        **{key: state[key] for key in kept if key in state},
        "model": model,
        "posthoc_ema": {"sigma_rel": sigma_rel, "updates": updates_of(state)},
    }


def best_length(
    path: str, state: Mapping[str, Any], tracks: list[Track], options: EmaOptions
) -> float:
    """The length of the lowest error on held-out images; all of them on the screen and in a picture."""
    from diffusion_ext.ema.held_out import HeldOut
    from ext_common.plots import curves

    held_out = HeldOut.of(path, state, options.data, options.device)
    errors = []
    with progress(len(options.sigma_rel), desc="lengths", unit="lengths") as bar:
        for length in options.sigma_rel:
            weights = average(tracks, updates_of(state), length)
            errors.append(held_out.error(weights, options.draws))
            bar.update(1)
    best = min(range(len(errors)), key=errors.__getitem__)
    for length, error in zip(options.sigma_rel, errors, strict=True):
        print(f"length {length:g}: error {error:.5f} on {len(held_out.rows)} held-out images")
    picture = beside(options.output, "lengths.png")
    order = sorted(range(len(errors)), key=options.sigma_rel.__getitem__)
    curves(
        {
            "held-out images": (
                np.array([options.sigma_rel[i] for i in order]),
                np.array([errors[i] for i in order]),
            )
        },
        picture,
        f"lowest at {options.sigma_rel[best]:g}",
        ("length of the average, share of the training", "mean squared error"),
    )
    print(f"{picture} shows them")
    return options.sigma_rel[best]


if __name__ == "__main__":
    run(main)

"""What draws samples away from a worse guess: at which noise levels, by which model, how far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, List, Optional

from ext_common.cli import UserError
from ext_common.manifest import beside, sha256_file

SHOWN = 8  # images of a row of the sweep


@dataclass(kw_only=True)
class GuidanceOptions:
    """What goes with --guidance."""

    guide: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint of a worse model of the same images, smaller or earlier, which --guidance"
            " leads away from; none: from the model's own guess without the class"
        },
    )
    guidance_interval: Optional[List[float]] = field(
        default=None,
        metadata={
            "help": "LOW,HIGH: guide only where noise / image is in it, as 0.3,3; none: everywhere"
        },
    )
    guidance_sweep: Optional[List[float]] = field(
        default=None,
        metadata={
            "help": "strengths, as 1,1.5,2,3: also OUTPUT.sweep.png, a row of the first images for each"
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "compile the network first, minutes with a C++ compiler: for thousands of images"
        },
    )

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
            raise ValueError("--guidance-interval takes two numbers from 0, as 0.3,3")
        if self.guidance_sweep is not None and not self.guidance_sweep:
            raise ValueError("--guidance-sweep takes strengths, as 1,1.5,2,3")


def without_guidance(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the images depend on less these options, which earlier folders do not know."""
    own = {f.name for f in fields(GuidanceOptions)}
    return {key: value for key, value in plan.items() if key not in own}


def guidance_plan(options: Any) -> dict[str, Any]:
    """What the images depend on among these options, where it is given."""
    found: dict[str, Any] = {}
    if options.guide:
        if not Path(options.guide).is_file():
            raise UserError(f"--guide {options.guide} does not exist: give a checkpoint")
        found["guide"] = sha256_file(options.guide)
    if options.guidance_interval:
        found["guidance_interval"] = options.guidance_interval
    return found


def guidance_of(options: Any) -> dict[str, Any]:
    """Options of `DiffusionModel.batches`."""
    found: dict[str, Any] = {}
    if options.guide:
        found["guide"] = guide_at(options.guide, options.device, options.user_dir)
    if options.guidance_interval:
        found["interval"] = tuple(options.guidance_interval)
    return found


@cache
def guide_at(path: str, device: str, user_dir: Optional[str]) -> Any:
    from diffusion_ext.inference import DiffusionModel

    return DiffusionModel.from_checkpoint(path, device, 0, user_dir)


def settled(model: Any, options: Any) -> Any:
    """The options with the model's sampler and steps where none are given, and the network as they want it.

    UserError for what a distilled model cannot do.
    """
    if model.distilled and options.edits:
        raise UserError(
            f"a distilled model draws out of noise only: give {options.edits[0]} the checkpoint it was"
            " distilled from"
        )
    sampler, steps = model.usual_sampler
    if options.edits:
        # by a solver, whatever the steps
        sampler, steps = "dpmpp_2m", 20
    if options.compile:
        model.compile()
    steps = min(steps, model.schedule.timesteps) if options.steps is None else options.steps
    return replace(options, sampler=options.sampler or sampler, steps=steps)


def draw_sweep(
    model: Any, options: Any, folder: Path, numbers: Sequence[int], sampling: Callable[..., Any]
) -> str:
    """Write OUTPUT.sweep.png: the first images with every strength, from the same noise; what shows it."""
    from diffusion_ext.pictures import display_scale, save_picture, sheet

    some = list(numbers[:SHOWN])
    rows = []
    for strength in options.guidance_sweep:
        chosen = {**sampling(model, options, some), "guidance": strength, "batch_size": len(some)}
        ((_, images),) = model.batches(some, **chosen)
        rows.append([*images])
    picture = beside(folder.resolve(), "sweep.png")
    names = [f"{strength:g}" for strength in options.guidance_sweep]
    save_picture(picture, sheet(rows, names, title="guidance", scale=display_scale(model.shape[1])))
    return str(picture)

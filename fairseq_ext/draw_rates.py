"""Draw learning-rate schedules side by side: noam for several warm-ups, inverse_sqrt of the same peak.

python -m fairseq_ext.draw_rates OUT.png --d-model 512 --noam-warmups 1000,4000,8000
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, List, NamedTuple, Optional

from ext_common.cli import OptionError, Parser, add_dataclass, from_args, run

_POINTS = 1000  # more than the picture has pixels


@dataclass
class ScheduleOptions:
    d_model: int = field(default=512, metadata={"help": "dimension of the model"})
    noam_factor: float = field(default=1.0, metadata={"help": "--noam-factor of all curves"})
    noam_warmups: List[int] = field(
        default_factory=lambda: [1000, 4000, 8000],
        metadata={"help": "a curve of noam for each of these --warmup-updates"},
    )
    inverse_sqrt_warmups: List[int] = field(
        default_factory=lambda: [4000],
        metadata={
            "help": "a curve of fairseq's inverse_sqrt for each of these --warmup-updates, with the"
            " --lr that has noam's peak: noam-factor · (d-model · warm-up)^-0.5; '' for none"
        },
    )
    updates: Optional[int] = field(
        default=None, metadata={"help": "updates to draw (none: four times the longest warm-up)"}
    )

    def __post_init__(self) -> None:
        warmups = [*self.noam_warmups, *self.inverse_sqrt_warmups]
        if not warmups:
            raise OptionError("nothing to draw: give --noam-warmups or --inverse-sqrt-warmups")
        if min(warmups) < 1:
            raise OptionError(f"a warm-up of {min(warmups)} updates: it must be at least 1")
        if self.d_model < 1:
            raise OptionError(f"--d-model {self.d_model} must be at least 1")
        if self.noam_factor <= 0:
            raise OptionError(f"--noam-factor {self.noam_factor:g} must be above 0")
        if self.updates is None:
            self.updates = 4 * max(warmups)
        if self.updates < 1:
            raise OptionError(f"--updates {self.updates} must be at least 1")


class Curve(NamedTuple):
    """The rates of some updates of one schedule; update k (1, 2, …) is made with `rates`' k-th."""

    name: str
    kind: str
    updates: List[int]
    rates: List[float]

    @property
    def peak(self) -> tuple[int, float]:
        """(update, rate) where the rate is highest."""
        rate, update = max(zip(self.rates, self.updates, strict=True), key=lambda pair: pair[0])
        return update, rate


def curves(options: ScheduleOptions) -> list[Curve]:
    """What the real scheduler classes set for updates 1 … `options.updates`, as a trainer asks them."""
    _load_fairseq()
    d_model, factor = options.d_model, options.noam_factor
    made = []
    for warmup in options.noam_warmups:
        made.append((f"noam, warm-up {warmup}", "noam", warmup, _noam(d_model, factor, warmup)))
    for warmup in options.inverse_sqrt_warmups:
        lr = factor * (d_model * warmup) ** -0.5
        name = f"inverse_sqrt, warm-up {warmup}, --lr {lr:.6g}"
        made.append((name, "inverse_sqrt", warmup, _inverse_sqrt(lr, warmup)))
    corners = [warmup for _, _, warmup, _ in made]
    updates = _sample(options.updates, corners)
    return [
        Curve(name, kind, updates, [step_update(update - 1) for update in updates])
        for name, kind, _, step_update in made
    ]


def draw(drawn: Sequence[Curve], out_png: str | os.PathLike, title: str) -> None:
    """Write the picture of the curves, rate against update."""
    import matplotlib
    from matplotlib.figure import Figure

    from ext_common.plots import _STYLE, _save

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axis = figure.subplots()
        dashed = 0
        for curve in drawn:
            style: dict[str, Any] = dict(lw=1.8)
            if curve.kind == "inverse_sqrt":
                # Dashes on top: the curves of both kinds coincide but for one update.
                style = dict(ls=(0, (4, 4 + 2 * dashed)), color="black", lw=1.2, zorder=3)
                dashed += 1
            axis.plot(curve.updates, curve.rates, label=curve.name, **style)
        axis.set_xlabel("update")
        axis.set_ylabel("learning rate")
        axis.set_xlim(0, max(drawn[0].updates))
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        axis.set_title(title)
        _save(figure, out_png)


def table(drawn: Sequence[Curve]) -> str:
    """One line a curve: its first rate, its peak and where, its last rate."""
    width = max(len(curve.name) for curve in drawn)
    last = drawn[0].updates[-1]
    rows = [f"{'':{width}}  {'update 1':>10}  {'peak':>10}  {'at':>7}  {f'update {last}':>14}"]
    for curve in drawn:
        update, rate = curve.peak
        rows.append(
            f"{curve.name:{width}}  {curve.rates[0]:10.4e}  {rate:10.4e}  {update:7d}"
            f"  {curve.rates[-1]:14.4e}"
        )
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Draw learning-rate schedules side by side and print where they peak."""
    parser = Parser(prog="python -m fairseq_ext.draw_rates", description=main.__doc__)
    parser.add_argument("out", metavar="OUT.png", help="picture to write (png, pdf or svg)")
    add_dataclass(parser, ScheduleOptions)
    args = parser.parse_args(argv)
    options = from_args(ScheduleOptions, args)
    drawn = curves(options)
    factor = "" if options.noam_factor == 1 else f", factor {options.noam_factor:g}"
    draw(drawn, args.out, f"d_model {options.d_model}{factor}")
    print(table(drawn))
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def _load_fairseq() -> None:
    from ext_common.checkpoints import import_fairseq, untouched_logging
    from ext_common.compat.messages import leave_out_harmless_warnings

    leave_out_harmless_warnings()
    import_fairseq()
    with untouched_logging():
        from fairseq_ext import noam  # noqa: F401


def _noam(d_model: int, factor: float, warmup: int) -> Callable[[int], float]:
    from fairseq_ext.noam import FAIRSEQ_LR, NoamConfig, NoamSchedule

    config = NoamConfig(
        warmup_updates=warmup, noam_factor=factor, noam_d_model=d_model, lr=[FAIRSEQ_LR]
    )
    return NoamSchedule(config, _rate_holder()).step_update


def _inverse_sqrt(lr: float, warmup: int) -> Callable[[int], float]:
    from fairseq.optim.lr_scheduler import inverse_square_root_schedule as schedule

    config = schedule.InverseSquareRootLRScheduleConfig(warmup_updates=warmup, lr=[lr])
    return schedule.InverseSquareRootSchedule(config, _rate_holder()).step_update


def _rate_holder():
    """An optimizer that has a learning rate and nothing to optimise."""
    from fairseq.optim import FairseqOptimizer

    class RateHolder(FairseqOptimizer):
        rate = 0.0

        def get_lr(self) -> float:
            return self.rate

        def set_lr(self, lr: float) -> None:
            self.rate = lr

    return RateHolder(None)


def _sample(count: int, corners: Sequence[int]) -> list[int]:
    """Updates 1 … `count`, thinned; the neighbours of the corners, where schedules bend, stay."""
    step = max(1, count // _POINTS)
    chosen = {*range(1, count + 1, step), count}
    chosen.update(k for corner in corners for k in (corner, corner + 1, corner + 2))
    return sorted(k for k in chosen if k <= count)


if __name__ == "__main__":
    run(main)

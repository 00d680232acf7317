"""Pictures: learning curves from fairseq's own log, confusion matrices, 2-D projections.

python -m ext_common.plots LOG OUT.png
"""

import io
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ext_common.cli import Parser, UserError, run
from ext_common.manifest import atomic_write
from ext_common.trainlog import collect_curves, parse_log

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise UserError(
        "pictures need the package matplotlib, which is not installed: pip install 'matplotlib>=3.8'"
    ) from None

MAX_LEGEND = 20  # as many colours as tab20 has
_MAX_NUMBERS = 30  # classes up to which a confusion matrix has room for its numbers
_WORST_PAIRS = 15
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a speaker may be called a$b
}


def learning_curve(
    log: str | os.PathLike[str] | Iterable[str],
    out_png: str | os.PathLike[str],
    metric: str | None = None,
) -> None:
    """Draw loss, `metric` and learning rate against updates from fairseq's log (path or lines).

    metric: a statistic; None: the one that chose the best checkpoint, which the log names.

    Reads `--log-format json`, `simple` and `tqdm`, on stdout or in `--log-file`. Of an
    update logged twice (a resumed run) the last counts. Raises UserError where nothing is found.
    """
    name = "the log"
    if isinstance(log, str | os.PathLike):
        name = os.fspath(log)
        try:
            log = Path(log).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
    log = list(log)
    curves = collect_curves(parse_log(log))
    if metric is None:
        metric = next(
            (key.removeprefix("best_") for key in curves if key.startswith("best_")), "loss"
        )
    panels = [key for key in dict.fromkeys(("loss", metric, "lr")) if curves.get(key)]
    if not panels:
        raise UserError(
            f"{name} holds no training line of fairseq: give the output of fairseq-train,"
            " written with --log-format json or simple"
        )
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 2.6 * len(panels) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, key in zip(axes, panels, strict=True):
            best = {subset: p[-1][1] for subset, p in curves.get(f"best_{key}", {}).items()}
            _draw_curves(axis, key, curves[key], best)
        axes[-1].set_xlabel("updates")
        _save(figure, out_png)


def _that_chooses(log: Iterable[str], curves: Iterable[str]) -> str:
    """The metric that chose the best checkpoint; fairseq names it from the second validation on."""
    told = (re.search(r"the best checkpoint is the one with the \w+ (\w+)", line) for line in log)
    names = [key.removeprefix("best_") for key in curves if key.startswith("best_")]
    return next(iter([*names, *(found[1] for found in told if found)]), "loss")


def _draw_curves(
    axis: Axes, key: str, subsets: dict[str, list[tuple[int, float]]], chosen: dict[str, float]
) -> None:
    """chosen: subset → the best value by the log, which may be the least; else the largest is marked."""
    colours = {"train": "tab:blue", "valid": "tab:orange"}
    for subset, points in sorted(subsets.items()):
        x, y = zip(*points, strict=True)
        # Validation happens rarely: its points are marked so that one alone is seen too.
        marker = "o" if subset != "train" or len(x) == 1 else None
        axis.plot(x, y, marker=marker, ms=4, lw=1.4, label=subset, color=colours.get(subset))
        if (chosen or key not in ("loss", "lr")) and subset != "train":
            best = int(np.argmin(np.abs(np.subtract(y, chosen.get(subset, max(y))))))
            axis.annotate(
                f"{y[best]:.4g}",
                (x[best], y[best]),
                textcoords="offset points",
                xytext=(0, -13),
                ha="center",
            )
    axis.set_ylabel({"lr": "learning rate"}.get(key, key))
    axis.grid(alpha=0.3)
    if key == "lr":
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    else:
        axis.legend(frameon=False)


def confusion_matrix(
    matrix: np.ndarray, names: Sequence[str], out_png: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw counts (C, C), row = true, column = predicted class, and list the most confused pairs.

    Up to 30 classes every count is written; above, each error is a dot whose area is its count,
    because a single cell of 251 × 251 is smaller than a pixel of a printed page.
    """
    matrix = np.asarray(matrix)
    count = len(names)
    if matrix.shape != (count, count) or count == 0:
        raise ValueError(f"matrix has the shape {matrix.shape}, names are {count}")
    pairs = most_confused(matrix, names, _WORST_PAIRS)
    with matplotlib.rc_context(_STYLE):
        side = min(max(4.5, 0.42 * count), 8.5)
        # A flat strip when nothing is confused would be an empty half of the picture.
        figure = Figure(figsize=(side + (4.0 if pairs else 0.5), side), layout="constrained")
        if pairs:
            axis, beside = figure.subplots(1, 2, width_ratios=[side, 3.0])
            _draw_pairs(beside, pairs)
        else:
            axis = figure.subplots()
        (_draw_counts if count <= _MAX_NUMBERS else _draw_errors)(axis, matrix, names)
        total = matrix.sum()
        right = np.trace(matrix)
        share = f"{100 * right / total:.1f} % of {total:g} right" if total else "no utterances"
        axis.set_title(f"{title}: {share}" if title else share)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        _save(figure, out_png)


def _draw_counts(axis: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    on_diagonal = np.eye(len(names), dtype=bool)
    colours = np.where(
        on_diagonal[..., None],
        matplotlib.colormaps["Blues"](0.75 * share),
        # Square root: an error of 3 % must differ from none.
        matplotlib.colormaps["Reds"](0.85 * np.sqrt(share)),
    )
    colours[matrix == 0] = 1.0
    axis.imshow(colours)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        dark = share[row, column] > (0.7 if row == column else 0.5)
        axis.text(
            column,
            row,
            f"{matrix[row, column]:g}",
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=max(6, 11 - len(names) // 6),
        )
    ticks = [_short(name) for name in names]
    axis.set_xticks(range(len(names)), ticks, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), ticks)
    for edge in axis.spines.values():
        edge.set_visible(False)


def _draw_errors(axis: Axes, matrix: np.ndarray, names: Sequence[str]) -> None:
    count = len(names)
    totals = matrix.sum(1)
    tested = np.nonzero(totals)[0]
    recall = np.diagonal(matrix)[tested] / totals[tested]
    dots = axis.scatter(
        tested, tested, c=recall, cmap="Blues", vmin=-0.3, vmax=1.0, s=9, marker="s", linewidths=0
    )
    errors = matrix * ~np.eye(count, dtype=bool)
    rows, columns = np.nonzero(errors)
    values = errors[rows, columns]
    order = np.argsort(values, kind="stable")  # the frequent ones on top
    largest = max(values.max(initial=1), 1)
    axis.scatter(
        columns[order],
        rows[order],
        s=10 + 70 * (values[order] - 1) / max(largest - 1, 1),
        c="tab:red",
        alpha=0.6,
        linewidths=0,
    )
    step = math.ceil(count / 25)
    shown = range(0, count, step)
    ticks = [_short(names[index]) for index in shown]
    axis.set_xticks(shown, ticks, rotation=90, fontsize=7)
    axis.set_yticks(shown, ticks, fontsize=7)
    axis.set_xlim(-1, count)
    axis.set_ylim(count, -1)
    axis.set_aspect("equal")
    axis.grid(alpha=0.2)
    axis.set_axisbelow(True)
    bar = axis.figure.colorbar(dots, ax=axis, shrink=0.4, pad=0.01, label="recall on the diagonal")
    bar.ax.set_ylim(0, 1)


def _draw_pairs(axis: Axes, pairs: list[tuple[str, str, float]]) -> None:
    places = np.arange(len(pairs))
    bars = axis.barh(places, [count for *_, count in pairs], color="tab:red", alpha=0.6)
    axis.bar_label(bars, fmt="%g", padding=2)
    axis.set_yticks(
        places, [f"{_short(true)} → {_short(predicted)}" for true, predicted, _ in pairs]
    )
    # Bars of the same thickness whether there are three pairs or fifteen.
    axis.set_ylim(max(len(pairs), _WORST_PAIRS) - 0.5, -0.5)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.margins(x=0.15)
    axis.set_title("most confused: true → predicted", loc="right", fontsize=10)


def scatter_2d(
    points: np.ndarray, labels: Sequence[Any], out_png: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw `points` (N, 2) coloured by `labels` (N,): a legend for up to 20, else names in the picture."""
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) != len(labels):
        raise ValueError(f"points must be (N, 2) with N labels, got {points.shape}, {len(labels)}")
    names = sorted(set(map(str, labels)))
    indices = np.searchsorted(names, list(map(str, labels))) if names else np.empty(0, int)
    legend = 1 <= len(names) <= MAX_LEGEND
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.5 if legend else 7, 6.5), layout="constrained")
        axis = figure.subplots()
        size = float(np.clip(6000 / max(len(points), 1), 6, 36))
        for index, name in enumerate(names):
            chosen = points[indices == index]
            colour = _colour(index, len(names))
            axis.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=size,
                color=colour,
                alpha=0.8,
                linewidths=0,
                label=_short(name),
            )
            if not legend:
                place = np.median(chosen, axis=0)
                axis.annotate(_short(name), place, fontsize=6, color=colour, ha="center")
        if legend:
            axis.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=1.5
            )
        counted = f"{len(points)} utterances, {len(names)} speakers"
        axis.set_title(f"{title}: {counted}" if title else counted)
        axis.set_xticks([])
        axis.set_yticks([])
        _save(figure, out_png)


def curves(
    named: Mapping[str, tuple[np.ndarray, np.ndarray]],
    out_png: str | os.PathLike[str],
    title: str,
    axes: tuple[str, str],
    ticks: Sequence[tuple[float, str]] = (),
) -> None:
    """Draw named (x, y) as lines; axes: names of x and y; ticks: (place, text) of both, else matplotlib's."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.5, 5), layout="constrained")
        axis = figure.subplots()
        for name, (x, y) in named.items():
            axis.plot(x, y, lw=1.5, label=_short(name, 40))
        if ticks:
            places, texts = zip(*ticks, strict=True)
            axis.set_xticks(places, texts)
            axis.set_yticks(places, texts)
        axis.set_xlabel(axes[0])
        axis.set_ylabel(axes[1])
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        _save(figure, out_png)


def histograms(
    named: Mapping[str, np.ndarray], out_png: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw the densities of named values (N,) over each other, in the same 80 bins."""
    ends = [float(end) for values in named.values() for end in (values.min(), values.max())]
    bins = np.linspace(min(ends), max(ends) if max(ends) > min(ends) else min(ends) + 1, 81)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        axis = figure.subplots()
        for name, values in named.items():
            axis.hist(
                values,
                bins.tolist(),
                density=True,
                alpha=0.6,
                label=f"{_short(name)}, {len(values):,}",
            )
        axis.set_xlabel("score")
        axis.set_yticks([])
        axis.set_title(title)
        axis.legend(frameon=False)
        _save(figure, out_png)


def _colour(index: int, count: int) -> tuple[float, float, float, float]:
    if count <= 10:
        return matplotlib.colormaps["tab10"](index)
    if count <= MAX_LEGEND:
        return matplotlib.colormaps["tab20"](index)
    # Golden ratio: names that follow one another get hues far apart.
    return matplotlib.colormaps["hsv"](index * 0.618034 % 1.0)


def _save(figure: Figure, out: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    kind = Path(out).suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    with warnings.catch_warnings():
        # Names in a script the font lacks are drawn as boxes; the picture is still worth having.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind if kind in known else "png", dpi=120)
    with atomic_write(out, "wb") as file:
        file.write(buffer.getvalue())


def most_confused(
    matrix: np.ndarray, names: Sequence[str], top: int
) -> list[tuple[str, str, float]]:
    """The `top` largest off-diagonal counts as (true, predicted, count), largest first."""
    errors = np.array(matrix)
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:top]
    found = (np.unravel_index(index, errors.shape) for index in order)
    return [(names[i], names[j], errors[i, j].item()) for i, j in found if errors[i, j] > 0]


def _short(name: str, length: int = 18) -> str:
    # Cut in the middle: names of one corpus often differ at the end only.
    name = str(name)
    half = length // 2
    return name if len(name) <= length else f"{name[: length - half]}…{name[-half + 1 :]}"


def main(argv: list[str]) -> int:
    """Draw the learning curve of a run."""
    parser = Parser(prog="python -m ext_common.plots", description=main.__doc__)
    parser.add_argument("log", metavar="LOG", help="output of fairseq-train (a file)")
    parser.add_argument("out", metavar="OUT.png", help="picture to write (png, pdf or svg)")
    parser.add_argument(
        "--metric",
        help="statistic under the loss (default: the one that chose the best checkpoint)",
    )
    args = parser.parse_args(argv)
    learning_curve(args.log, args.out, args.metric)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)

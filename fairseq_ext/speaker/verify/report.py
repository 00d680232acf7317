"""How good scores are, as a record, as lines for the screen and as pictures."""

import os
from typing import Any

import numpy as np

from ext_common.cli import progress
from fairseq_ext.speaker.verify.metrics import (
    Ladder,
    actual_dcf,
    bayes_threshold,
    bootstrap,
    cllr,
    corrected_interval,
    equal_error_rate,
    min_cllr,
    min_dcf,
    normalised_cost,
)

PRIORS = (0.01, 0.05)


def measure(scores: np.ndarray, targets: np.ndarray, calibrated: bool) -> dict[str, float]:
    """Metrics of scores (N,) with targets bool (N,); those of the scale only where they are calibrated."""
    found = of_ladder(Ladder.of(scores, targets))
    if calibrated:
        found |= {f"act_dcf_{p:g}": actual_dcf(scores, targets, p) for p in PRIORS}
        found["cllr"] = cllr(scores, targets)
    return found


def of_ladder(ladder: Ladder) -> dict[str, float]:
    """The metrics that do not depend on the scale of the scores."""
    found = {"eer": equal_error_rate(ladder)}
    found |= {f"min_dcf_{p:g}": min_dcf(ladder, p) for p in PRIORS}
    found["min_cllr"] = min_cllr(ladder)
    return found


def resampled(
    scores: np.ndarray,
    targets: np.ndarray,
    sides: tuple[np.ndarray, np.ndarray],
    calibrated: bool,
    draws: int,
    seed: int,
) -> np.ndarray:
    """What `measure` gives of resampled speakers, numbered in `sides` (each N,): float64 (draws, metrics).

    The draws depend on the seed and the number of speakers alone: those of two models are paired.
    """
    accepted = [scores >= bayes_threshold(prior) for prior in PRIORS] if calibrated else []
    signs = np.where(targets, -1.0, 1.0)
    costs = np.logaddexp(0.0, signs * scores) if calibrated else signs
    with progress(draws, "intervals", "draws") as bar:

        def means(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
            """Over the targets and over the others."""
            both, one = weights @ values, (weights * targets) @ values
            total, of_targets = weights.sum(), weights @ targets
            return float(one / of_targets), float((both - one) / (total - of_targets))

        def statistics(ladder: Ladder, weights: np.ndarray) -> np.ndarray:
            bar.update(1)
            found = list(of_ladder(ladder).values())
            for prior, passed in zip(PRIORS, accepted, strict=False):
                reached, accepts = means(passed, weights)
                found.append(float(normalised_cost(1 - reached, accepts, prior)))
            if calibrated:
                found.append(sum(means(costs, weights)) / (2 * np.log(2)))
            return np.array(found)

        return bootstrap(statistics, scores, targets, sides, draws, seed)


def intervals(found: dict[str, float], drawn: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % intervals of what `measure` found, from what `resampled` gave."""
    return {
        name: corrected_interval(drawn[:, i], value)
        for i, (name, value) in enumerate(found.items())
    }


TITLES = {
    "eer": "equal error rate",
    "min_cllr": "minimum Cllr",
    "cllr": "Cllr",
    **{f"min_dcf_{p:g}": f"minimum DCF at {p:g}" for p in PRIORS},
    **{f"act_dcf_{p:g}": f"actual DCF at {p:g}" for p in PRIORS},
}


def lines(record: dict[str, Any]) -> list[str]:
    """What the screen says of a record of the command."""
    speakers = f", {record['speakers']} speakers" if record["speakers"] else ""
    found = [f"{record['trials']:,} trials, {record['targets']:,} of one person{speakers}"]
    for name, value in record["metrics"].items():
        percent = name == "eer"
        shown = f"{100 * value:.2f} %" if percent else f"{value:.3f}"
        if name in record["interval95"]:
            low, high = (100 * end if percent else end for end in record["interval95"][name])
            digits = 2 if percent else 3
            shown += f" (95 % interval {low:.{digits}f} to {high:.{digits}f})"
        found.append(f"{TITLES[name]} {shown}")
    if "threshold" in record:
        at = record["threshold"]
        rates = (
            f"misses {100 * at['misses']:.2f} %, false accepts {100 * at['false_accepts']:.2f} %"
        )
        found.append(f"threshold {at['value']:.4g}: {rates}")
    return found


def pictures(
    scores: np.ndarray,
    targets: np.ndarray,
    score: str,
    det: os.PathLike[str],
    histogram: os.PathLike[str],
) -> None:
    """The DET curve and the histogram of both classes."""
    from scipy.special import ndtri

    # matplotlib costs half a second that --help should not.
    from ext_common.plots import curves, histograms

    ladder = Ladder.of(scores, targets)
    misses, accepts = ladder.error_rates()
    shown = np.unique(np.linspace(0, len(misses) - 1, 2000).astype(int))
    least = 0.5 / max(int((~targets).sum()), 1), 0.5 / max(int(targets.sum()), 1)
    x = np.clip(accepts[shown], least[0], 1 - least[0])
    y = np.clip(misses[shown], least[1], 1 - least[1])
    marks = [0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99]
    ticks = [(float(ndtri(mark)), f"{100 * mark:g}") for mark in marks]
    curves(
        {score: (ndtri(x), ndtri(y))},
        det,
        f"equal error rate {100 * equal_error_rate(ladder):.2f} %",
        ("false accepts, %", "misses, %"),
        ticks,
    )
    histograms({"same": scores[targets], "different": scores[~targets]}, histogram, score)

"""The statistics in fairseq's own training log, in each of its formats."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

_JSON = re.compile(r"\{\"epoch\": .*\}")
_SUMMARY = re.compile(r"epoch (\d+) \| (?:valid on '([^']*)' subset \| )?(\w[^|]* .*)")
_INNER = re.compile(r"epoch (\d+):\s.*?(\w+=.*)")


class Point(NamedTuple):
    """One logged line: `subset` is "train", "train_inner" or the validation subset's name."""

    subset: str
    epoch: int
    update: int | None
    stats: dict[str, float]


def parse_log(lines: Iterable[str]) -> Iterator[Point]:
    """The statistics in fairseq's log lines, in any of its three formats; other lines are passed.

    Formats: fairseq/logging/progress_bar.py, JsonProgressBar, SimpleProgressBar, TqdmProgressBar.
    """
    for line in lines:
        if found := _JSON.search(line):
            point = _parse_json(found.group())
        elif found := _SUMMARY.search(line):
            parts = (part.strip().rpartition(" ") for part in found[3].split("|"))
            pairs = [(key, value) for key, _, value in parts]
            point = _point(found[2] or "train", found[1], pairs)
        elif found := _INNER.search(line):
            pairs = re.findall(r"(\w+)=\s*([^,\]\s]+)", found[2])
            point = _point("train_inner", found[1], pairs)
        else:
            continue
        if point is not None and point.stats:
            yield point


def collect_curves(points: Iterable[Point]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{statistic: {subset: [(update, value), ...] by update}}, without what is not finite.

    For training the lines inside epochs are used where there are any, else the epochs' means.
    """
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for point in points:
        if point.update is None:
            continue
        for key, value in point.stats.items():
            if math.isfinite(value):
                found[key][point.subset][point.update] = value
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key, subsets in found.items():
        inner = subsets.pop("train_inner", None)
        if inner and len(inner) >= len(subsets.get("train", ())):
            subsets["train"] = inner
        curves[key] = {name: sorted(values.items()) for name, values in subsets.items()}
    return curves


def _parse_json(text: str) -> Point | None:
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        return None
    epoch = record.pop("epoch")
    # The summary's keys carry the subset's name, those inside an epoch do not.
    subset = "train_inner"
    if "update" not in record:
        marks = [key for key in record if key.endswith("_num_updates")]
        if not marks:
            return None
        subset = marks[0].removesuffix("_num_updates")
        record = {key.removeprefix(subset + "_"): value for key, value in record.items()}
    return _point(subset, epoch, record.items())


def _point(subset: str, epoch: int | str, pairs: Iterable[tuple[str, Any]]) -> Point:
    stats = {}
    for key, value in pairs:
        try:
            stats[key] = float(value)
        except (TypeError, ValueError):
            continue
    update = stats.pop("num_updates", None)
    return Point(subset, int(epoch), None if update is None else int(update), stats)

"""The arithmetic of the start-up benchmark; the commands themselves take minutes."""

from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.startup import Case, measure, table


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """What `measure` finds for 2, 3, 9 s of torch, 4, 5, 6 s of ours and 7, 8, 13 s before, half as CPU."""
    walls = {"torch": [99, 2, 9, 3], "/ours": [99, 4, 5, 6], "/before": [99, 8, 13, 7]}
    walls = {name: iter(found) for name, found in walls.items()}

    def timed(command, side, text, folder):
        wall = next(walls["torch" if command[1] == "-c" else str(side)])
        assert wall == 99 or text == ("" if command[1] == "-c" else "line")
        return wall, wall / 2

    monkeypatch.setattr(startup, "timed", timed)
    sides = {"ours": Path("/ours"), "before": Path("/before")}
    return measure([Case("draw", ["module"], 0.4, "line")], sides, 3, tmp_path)


def test_shares_are_of_medians_above_torch_without_the_first_round(figures):
    (row,) = figures["commands"]
    assert figures["torch"] == {"wall": 3, "cpu": 1.5}
    assert row["sides"]["ours"] == {
        "wall": 5,
        "cpu": 2.5,
        "above_torch": 2,
        "cpu_above_torch": 1,
    }
    assert row["share"] == pytest.approx(2 / 5) and row["cpu_share"] == pytest.approx(1 / 2.5)
    said = "draw, above torch: ours 2.00 s (1.00 s CPU), before 5.00 s (2.50 s CPU): 40% (40% CPU), goal 40%"
    assert table(figures).splitlines()[1] == said

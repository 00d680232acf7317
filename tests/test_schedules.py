"""Drawing schedules: what is drawn is what the scheduler classes set."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_common.cli import OptionError
from fairseq_ext.draw_rates import ScheduleOptions, curves, main, table
from tests import processes


def test_curves_are_the_rates_of_the_schedulers():
    """Closed forms: the paper's for noam, and lr · min(n / w, sqrt(w / n)) for inverse_sqrt."""
    options = ScheduleOptions(
        d_model=16, noam_factor=2.0, noam_warmups=[5, 9], inverse_sqrt_warmups=[5], updates=40
    )
    five, nine, other = curves(options)
    assert five.updates == nine.updates == other.updates == list(range(1, 41))
    for curve, warmup in ((five, 5), (nine, 9)):
        expected = [2 * 16**-0.5 * min(k**-0.5, k * warmup**-1.5) for k in range(1, 41)]
        assert curve.rates == pytest.approx(expected, rel=1e-12)
        assert curve.peak == (warmup, pytest.approx(2 * (16 * warmup) ** -0.5))
    lr = 2 * (16 * 5) ** -0.5
    # update k is made with what inverse_sqrt gives for k - 1 updates
    expected = [lr * min(n / 5, (5 / max(n, 1)) ** 0.5) for n in range(40)]
    assert other.rates == pytest.approx(expected, rel=1e-12)
    assert other.peak == (6, pytest.approx(lr))
    assert other.rates[1:] == pytest.approx(five.rates[:-1], rel=1e-9)


@given(
    updates=st.integers(1, 10**6),
    warmups=st.lists(st.integers(1, 10**6), min_size=1, max_size=4),
)
def test_a_thinned_curve_keeps_its_peak_and_its_ends(updates, warmups):
    options = ScheduleOptions(noam_warmups=warmups, inverse_sqrt_warmups=[], updates=updates)
    for warmup, curve in zip(warmups, curves(options), strict=True):
        assert curve.updates[0] == 1 and curve.updates[-1] == updates
        assert curve.updates == sorted(set(curve.updates)) and len(curve.updates) < 2100
        assert curve.peak[0] == min(warmup, updates)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(noam_warmups=[4, 0]), "warm-up of 0"),
        (dict(noam_warmups=[], inverse_sqrt_warmups=[]), "nothing to draw"),
        (dict(d_model=0), "--d-model 0"),
        (dict(noam_factor=-1.0), "--noam-factor -1"),
        (dict(updates=0), "--updates 0"),
    ],
)
def test_refused_in_words(given, said):
    with pytest.raises(OptionError, match=said):
        ScheduleOptions(**given)


def test_the_command_draws_and_prints_the_peaks(tmp_path, capsys):
    out = tmp_path / "schedules.png"
    assert main([str(out), "--noam-factor", "2", "--noam-warmups", "1000,4000"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    lines = capsys.readouterr().out.splitlines()
    # the number of the course: d_model 512, warm-up 4000, factor 2
    assert lines[2].startswith("noam, warm-up 4000") and "1.3975e-03     4000" in lines[2]
    assert "inverse_sqrt, warm-up 4000, --lr 0.00139754" in lines[3] and " 4001 " in lines[3]
    assert "update 16000" in lines[0]


def test_table_says_what_the_curves_are():
    options = ScheduleOptions(d_model=1, noam_warmups=[4], inverse_sqrt_warmups=[], updates=16)
    head, row = table(curves(options)).splitlines()
    assert head.split() == ["update", "1", "peak", "at", "update", "16"]
    assert row.split() == ["noam,", "warm-up", "4", "1.2500e-01", "5.0000e-01", "4", "2.5000e-01"]


def test_bad_usage_ends_in_one_sentence(tmp_path):
    command = [sys.executable, "-m", "fairseq_ext.draw_rates", str(tmp_path / "x.png")]
    ended = processes.run([*command, "--noam-warmups", "0"], capture_output=True, text=True)
    assert ended.returncode == 2 and "at least 1" in ended.stderr
    assert "Traceback" not in ended.stderr and not list(tmp_path.iterdir())

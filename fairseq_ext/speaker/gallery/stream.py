"""Who speaks when, one speaker at a time: names of short windows become turns."""

from collections.abc import Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """Somebody speaks from `start` for `length` seconds."""

    start: float
    length: float
    name: str


def turns(starts: Sequence[float], names: Sequence[str], window: float, every: float) -> list[Turn]:
    """Turns of windows that start at `starts` (seconds, ascending), each named.

    A window of `window` seconds speaks for the `every` seconds in its middle; windows next to each other with
    the same name are one turn. Where a window was left out, as silence, the turn ends.
    """
    found: list[Turn] = []
    before = (window - every) / 2
    for start, name in zip(starts, names, strict=True):
        at = start + before
        last = found[-1] if found else None
        if last and last.name == name and at - (last.start + last.length) < every / 2:
            found[-1] = last._replace(length=at + every - last.start)
        else:
            found.append(Turn(at, every, name))
    return found


def rttm(recording: str, found: Sequence[Turn]) -> str:
    """Lines of NIST's Rich Transcription Time Marked format."""
    recording = "_".join(recording.split())
    return "".join(
        f"SPEAKER {recording} 1 {turn.start:.3f} {turn.length:.3f} <NA> <NA> {turn.name} <NA> <NA>\n"
        for turn in found
    )

"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing for short work.

Of a training, which has validations and no end until its length is known: `Pace` and `training_line`.
"""

import statistics
import sys
import time
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any


class Progress:
    """What :func:`progress` returns: an iterable, or a counter with `update(n)`; a context."""

    def __init__(
        self,
        items: Iterable[Any],
        total: int | None,
        desc: str,
        unit: str,
        stream: typing.TextIO,
        after: float,
        every: float,
        clock: Callable[[], float],
    ) -> None:
        self._items, self._total, self._desc, self._unit = items, total, desc, unit
        self._stream, self._every, self._clock = stream, every, clock
        self._start = clock()
        self._next = self._start + after
        self._done = 0
        self._spoken = False
        self._bar = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=desc, unit=f" {unit}", file=stream, delay=after, smoothing=0.1
            )

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._clock() >= self._next:
            self._speak()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._spoken:
            took = minutes(self._clock() - self._start)
            self._write(f"{self._done} {self._unit} in {took}")
            self._spoken = False

    def _speak(self) -> None:
        now = self._clock()
        rate = self._done / max(now - self._start, 1e-9)
        text = f"{self._done}"
        if self._total:
            text += f"/{self._total} {self._unit} ({100 * self._done / self._total:.0f} %)"
        else:
            text += f" {self._unit}"
        text += f", {rate:.3g} {self._unit}/s"
        if self._total and rate:
            text += f", {minutes((self._total - self._done) / rate)} left"
        self._write(text)
        self._spoken = True
        self._next = now + self._every

    def _write(self, text: str) -> None:
        prefix = f"{self._desc}: " if self._desc else ""
        print(prefix + text, file=self._stream, flush=True)


def progress(
    items: Iterable[Any] | int,
    desc: str = "",
    unit: str = "items",
    *,
    total: int | None = None,
    stream: typing.TextIO | None = None,
    after: float = 3.0,
    every: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Progress over an iterable, or over `items` steps reported with `update(n)`.

    On a terminal a bar with rate and time left; elsewhere a plain line every `every` seconds;
    nothing at all for work that ends within `after` seconds.
    """
    if isinstance(items, int):
        total, items = items, range(items)
    elif total is None:
        total = len(items) if isinstance(items, Sized) else None
    return Progress(items, total, desc, unit, stream or sys.stderr, after, every, clock)


class Pace:
    """How long a training's updates and validations take, in seconds.

    The first updates are slower than the rest, and some have a preview in them: an update takes what
    the middle one of the recent ones took, a validation what the last one took.
    """

    def __init__(self, recent: int = 100) -> None:
        self._updates: deque[float] = deque(maxlen=recent)
        self._validation = 0.0

    def updated(self, seconds: float) -> None:
        self._updates.append(seconds)

    def validated(self, seconds: float) -> None:
        self._validation = seconds

    @property
    def update(self) -> float | None:
        """Seconds an update takes; None before the first."""
        return statistics.median_low(self._updates) if self._updates else None

    def left(self, updates: int, validations: int) -> float | None:
        """Seconds that so many more of them will take; None before the second update.

        The first can take a hundred times as long as a usual one.
        """
        if len(self._updates) < 2:
            return None
        return updates * statistics.median_low(self._updates) + validations * self._validation


def validations_left(done: int, total: int, every: int) -> int:
    """Validations after `done` updates of `total`: at each multiple of `every` and at the end."""
    if done >= total:
        return 0
    multiples = total // every - done // every if every else 0
    return multiples + bool(not every or total % every)


def training_line(
    done: int,
    total: int | None,
    values: dict[str, float],
    speed: float | None = None,
    unit: str = "samples",
    left: float | None = None,
) -> str:
    """One line on where a training is, as "update 120 of 2,500 · loss 1.234 · 310 images/s · 3:12 left".

    values: name → what is shown of it, to four digits; speed: units a second; left: seconds.
    """
    parts = [f"update {done:,}" + (f" of {total:,}" if total else "")]
    parts += [f"{name} {value:.4g}" for name, value in values.items()]
    if speed is not None:
        parts.append(f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s")
    if left is not None:
        parts.append(f"{minutes(left)} left")
    return " · ".join(parts)


def minutes(seconds: float) -> str:
    """3:12, or 1:03:12."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

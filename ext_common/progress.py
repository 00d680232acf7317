"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing for short work."""

import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any


class Progress:
    """What :func:`progress` returns: an iterable, or a counter with ``update(n)``; a context."""

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
            took = _minutes(self._clock() - self._start)
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
            text += f", {_minutes((self._total - self._done) / rate)} left"
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
    """Progress over an iterable, or over ``items`` steps reported with ``update(n)``.

    On a terminal a bar with rate and time left; elsewhere a plain line every ``every`` seconds;
    nothing at all for work that ends within ``after`` seconds.
    """
    if isinstance(items, int):
        total, items = items, range(items)
    elif total is None:
        total = len(items) if isinstance(items, Sized) else None
    return Progress(items, total, desc, unit, stream or sys.stderr, after, every, clock)


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

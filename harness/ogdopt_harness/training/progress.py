"""How a run is watched and stopped: a bar or plain lines, speed, signals."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from ogdopt_harness.common import keys
from ogdopt_harness.common.ranks import Ranks

EVERY = 30.0  # seconds between plain lines
HEED = 5.0  # seconds, about, from a signal to the step that is the last; batch systems give a minute or more to save in


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, by `signal`, and its state is saved: an interrupt of what called it, not an error."""

    def __init__(self, text: str = "", signal: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.signal = signal


class Speed:
    """Seconds between steps, and since a step was logged."""

    def __init__(self) -> None:
        self.last = self.logged = time.perf_counter()
        self.steps = 0

    def lap(self) -> float:
        """Seconds since the last step ended; counts one more."""
        before, self.last = self.last, time.perf_counter()
        self.steps += 1
        return self.last - before

    def seconds_a_step(self) -> float:
        """Of the steps since this was last asked."""
        spent, self.logged = self.last - self.logged, self.last
        count, self.steps = max(1, self.steps), 0
        return spent / count


class Bar:
    """One line of progress: a bar with the time left on a terminal, and elsewhere a plain line now and then."""

    def __init__(self, label: str, total: int, start: int, shown: bool = True) -> None:
        out: TextIO = sys.stderr  # as it is now, not when this module was read
        self.label, self.total, self.shown, self.out = label, total, shown, out
        live = shown and out.isatty()
        options: dict[str, Any] = {"unit": "step", "leave": False, "dynamic_ncols": True, "file": out, "disable": not live}
        self.bar = tqdm(total=total, initial=start, desc=label, **options)
        self.live, self.start, self.step = live, start, start
        self.began = self.spoke = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def advance(self, step: int) -> None:
        """Another step is done."""
        self.bar.update(step - self.step)
        self.step = step

    def show(self, step: int, line: dict[str, float]) -> None:
        """Another step is done, and its figures are known."""
        self.advance(step)
        told = {name: f"{line[name]:,.4g}" for name in (keys.LOSS, keys.SPEED) if name in line}
        if self.live:
            self.bar.set_postfix({name.replace(keys.SPEED, "tok/s"): text for name, text in told.items()}, refresh=False)
        elif self.shown and (time.monotonic() - self.spoke >= EVERY or step == self.total):
            self.spoke = time.monotonic()
            left = (self.spoke - self.began) / (step - self.start) * (self.total - step)
            words = ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in told.items())
            print(f"{self.label}: step {step:,} of {self.total:,}, {words}, {clock(left)} left", file=self.out, flush=True)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(3725.4), clock(59)
    ('1:02:05', '0:00:59')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Signals:
    """What asks a run to stop, and when its processes agree on it: at logged steps, and between these every few seconds.

    How many steps are a few seconds all of them compute from the same figures, those of the last message, so that steps between
    messages need none. The first step ends with one.
    """

    def __init__(self, ranks: Ranks, asked: list[int]) -> None:
        self.ranks, self.asked = ranks, asked
        self.steps, self.due, self.told = 0, 1, time.perf_counter()

    def news(self) -> list[float]:
        """A step is done, and this is for its message, which adds up: signal and seconds of each process, in its place."""
        self.steps += 1
        mine, size = [0.0] * (2 * self.ranks.size), self.ranks.size
        mine[self.ranks.rank :: size] = [float(self.asked[0] if self.asked else 0), time.perf_counter() - self.told]
        return mine

    def heard(self, news: list[float]) -> int:
        """The signal that asked a process to stop, of all processes' news; 0 for none."""
        signals, seconds = news[: self.ranks.size], max(news[self.ranks.size :])
        self.due = max(1, int(HEED * self.steps / seconds))
        self.steps, self.told = 0, time.perf_counter()
        return int(max(signals))

    def look(self) -> int:
        """A step is done that has no message: the signal, if it is time to ask for it or this process is alone."""
        news = self.news()
        if self.ranks.size > 1 and self.steps < self.due:
            return 0
        return self.heard([sum(parts) for parts in zip(*self.ranks.gather(news))])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM asks the loop to stop after its step; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signals can be handled in the main thread alone; elsewhere its handlers stay
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

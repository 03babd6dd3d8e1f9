"""Searches for inputs that break a run: each tries many and counts how they end.

Tests sample them, `python -m benchmarks.soak NAME` walks all. An input ends well if it is refused by name, or means something.
All else is a finding: an error that is no message, a message that does not name its cause, work without end.
"""

import signal
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO

from ogdopt_harness.common.crash import of_system

REFUSED, MEANINGFUL, UNNAMED, TRACEBACK, HUNG = "refused by name", "meaningful", "unnamed", "traceback", "hung"
WELL = (REFUSED, MEANINGFUL)


class Hung(BaseException):
    """The time of one attempt is over."""


@contextmanager
def limited(seconds):
    """Raises Hung where the work takes longer; main thread only."""

    def over(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(work, names, seconds=60.0):
    """(how it ended, what it said). A refusal has to hold one of `names`."""
    said = StringIO()
    try:
        with limited(seconds), redirect_stdout(said), redirect_stderr(said):
            work()
    except Hung:
        return HUNG, f"not done after {seconds:.0f} s"
    except (ValueError, SystemExit) as error:
        text = said.getvalue() if isinstance(error, SystemExit) else str(error)
        ended = REFUSED if any(name in text for name in names) else UNNAMED
        return ended, text[-600:]
    except OSError as error:  # the command tells it in these words
        text = of_system(error)
        return (REFUSED if any(name in text for name in names) else UNNAMED), text
    except Exception as error:
        return TRACEBACK, f"{type(error).__name__}: {error}"[:600]
    return MEANINGFUL, said.getvalue()[-200:]


@dataclass
class Found:
    """What a search has tried, and all that did not end well."""

    name: str
    counts: Counter = field(default_factory=Counter)
    findings: list = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, what, ended, text=""):
        """Count one attempt."""
        self.counts[ended] += 1
        if ended not in WELL:
            self.findings.append((what, ended, text))

    @property
    def tried(self):
        """How many attempts there were."""
        return sum(self.counts.values())

    def __str__(self):
        counts = ", ".join(f"{n} {ended}" for ended, n in self.counts.most_common())
        lines = [f"{self.name}: {self.tried} tried in {time.monotonic() - self.began:.0f} s: {counts}"]
        return "\n".join(lines + [f"  {what}: {ended}: {' '.join(text.split())[-400:]}" for what, ended, text in self.findings])

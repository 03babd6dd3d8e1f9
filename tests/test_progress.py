"""How a run is watched: one live line on a terminal, plain lines elsewhere, with speed and the time that is left."""

import io
import re

import pytest

from ogdopt_harness.training import progress
from ogdopt_harness.training.progress import Bar, Speed


class Screen(io.StringIO):
    def __init__(self, live):
        super().__init__()
        self.live = live

    def isatty(self):
        return self.live


def watched(monkeypatch, live, every=0.0, shown=True, start=0):
    """What a bar of ten steps, three of which are logged, wrote."""
    screen = Screen(live)
    monkeypatch.setattr(progress.sys, "stderr", screen)
    monkeypatch.setattr(progress, "EVERY", every)
    with Bar("seed 0, ogd", 10, start, shown) as bar:
        for step in range(start + 1, 11):
            if step % 3 == 1:
                bar.show(step, {"loss": 0.51234, "tokens_per_second": 12345.6, "ogd/cosine": 0.1})
            else:
                bar.advance(step)
    return screen.getvalue()


def test_elsewhere_than_on_a_terminal_it_is_plain_lines(monkeypatch):
    lines = watched(monkeypatch, live=False).splitlines()
    assert len(lines) == 4 and all("\r" not in line for line in lines)
    told = r"seed 0, ogd: step 4 of 10, loss 0.5123, tokens per second 1.235e\+04, \d:\d\d:\d\d left"
    assert re.fullmatch(told, lines[1]) and lines[-1].endswith("0:00:00 left")


def test_plain_lines_come_now_and_then_and_at_the_end(monkeypatch):
    assert [line.split(",")[1] for line in watched(monkeypatch, live=False, every=60.0).splitlines()] == [" ogd: step 10 of 10"]


@pytest.mark.parametrize("start", [0, 6])
def test_on_a_terminal_it_is_one_line_that_goes(start, monkeypatch):
    said = watched(monkeypatch, live=True, start=start)
    assert "seed 0, ogd" in said and f"{start}/10" in said and "\r" in said and "left" not in said
    assert said.count("\n") == 0  # it is written over, and nothing of it stays


def test_other_processes_are_silent(monkeypatch):
    assert watched(monkeypatch, live=False, shown=False) == watched(monkeypatch, live=True, shown=False) == ""


def test_speed_is_of_the_steps_since_it_was_asked(monkeypatch):
    times = iter([0.0, 1.0, 4.0, 6.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    speed = Speed()
    assert (speed.lap(), speed.lap()) == (1.0, 3.0) and speed.seconds_a_step() == 2.0
    assert speed.lap() == 2.0 and speed.seconds_a_step() == 2.0

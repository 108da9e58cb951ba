"""Plain lines where there is no terminal, a bar where there is one; stdout is left alone."""

import io

import pytest
from rich.console import Console

from entangle_fast import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines(capsys, clock):
    with progress.shown(True, "scrub", 100, done=10, text="stage1") as advance:
        for step in range(11, 101):
            clock[0] += 0.25
            advance(step, "stage1" if step < 21 else "stage2")
    out, lines = capsys.readouterr()
    assert not out and lines.splitlines() == [
        "scrub: 10 of 100 steps, 0 s, stage1",
        "scrub: 21 of 100 steps, 3 s, stage2",  # another text
        "scrub: 61 of 100 steps, 13 s, stage2",  # ten seconds later
        "scrub: 100 of 100 steps, 22 s, done",
    ]


def test_nothing_where_nothing_is_wanted_or_left(capsys):
    for wanted, done in ((False, 0), (True, 3)):
        with progress.shown(wanted, "x", 3, done=done) as advance:
            advance(3, "y")
    progress.say(False, "z")
    assert capsys.readouterr() == ("", "")
    progress.say(True, "z")
    assert capsys.readouterr() == ("", "z\n")


def test_a_job_that_fails_is_not_done(capsys):
    with pytest.raises(KeyboardInterrupt), progress.shown(True, "x", 3) as advance:
        advance(1, "y")
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["x: 0 of 3 steps, 0 s", "x: 1 of 3 steps, 0 s, y"]


def test_a_bar_on_a_terminal(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=text, force_terminal=True, width=100))
    with progress.shown(True, "scrub", 4, text="stage1") as advance:
        advance(3, "stage2")
    assert "━" in text.getvalue() and "3/4" in text.getvalue() and "stage2" in text.getvalue() and "steps" not in text.getvalue()

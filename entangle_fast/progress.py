"""How far a job is: a bar on a terminal, plain lines elsewhere. Both go to stderr; stdout is for results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

Advance = Callable[[int, str], object]
EVERY = 10.0  # seconds from one plain line to the next, while the text stays the same


@contextmanager
def shown(wanted: bool, name: str, total: int, *, done: int = 0, text: str = "", unit: str = "steps") -> Iterator[Advance]:
    """Gives advance(done, text), to be called as often as one likes; ``text`` is what is being done."""
    console = Console(stderr=True)
    if not wanted or done >= total:
        yield lambda done, text: None
    elif console.is_interactive or console.is_jupyter:
        with _bar(console, name, total, done, text) as advance:
            yield advance
    else:
        lines = _Lines(console, name, total, unit)
        lines.say(done, text)
        yield lines.advance
        lines.say(lines.done, "done")


def say(wanted: bool, line: str) -> None:
    """One line beside the progress, if there is something to say."""
    if wanted and line:
        Console(stderr=True).print(Text(line), soft_wrap=True)


@contextmanager
def _bar(console: Console, name: str, total: int, done: int, text: str) -> Iterator[Advance]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total, completed=done)
        yield lambda done, text: bar.update(task, completed=done, description=text)


class _Lines:
    def __init__(self, console: Console, name: str, total: int, unit: str):
        self.console, self.name, self.total, self.unit = console, name, total, unit
        self.start = self.last = time.monotonic()
        self.done, self.text = 0, ""

    def advance(self, done: int, text: str) -> None:
        self.done = done
        # the last step has the line that ends them all
        if done < self.total and (text != self.text or time.monotonic() - self.last >= EVERY):
            self.say(done, text)

    def say(self, done: int, text: str) -> None:
        self.done, self.text, self.last = done, text, time.monotonic()
        line = f"{self.name}: {done} of {self.total} {self.unit}, {self.last - self.start:.0f} s{f', {text}' if text else ''}"
        self.console.print(Text(line), soft_wrap=True)

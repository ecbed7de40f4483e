"""Talk on stderr: lines for every step, and a bar on anything that takes over two seconds.

Where stderr is no terminal, a long step says when it starts and when it ends instead.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

DELAY_S = 2.0  # quicker than this needs no bar
Item = TypeVar("Item")
Advance = Callable[[], None]


class _Screen:
    """The bars on the terminal: one ``rich`` display for all of them, since a terminal holds one only."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._display: Progress | None = None
        self._open = 0

    def add(self, label: str, total: int | None, done: int) -> TaskID:
        with self._lock:
            if self._display is None:
                self._display = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TextColumn("left"),
                    TimeRemainingColumn(),
                    console=Console(stderr=True),
                    transient=True,
                )
                self._display.start()
            self._open += 1
            return self._display.add_task(escape(label), total=total, completed=done)

    def move(self, task: TaskID, done: int) -> None:
        with self._lock:
            if self._display is not None:
                self._display.update(task, completed=done)

    def remove(self, task: TaskID) -> None:
        with self._lock:
            assert self._display is not None
            self._display.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._display.stop()
                self._display = None

    def line(self, text: str) -> None:
        with self._lock:
            if self._display is not None:
                self._display.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)


_SCREEN = _Screen()


class _Step:
    """One long piece of work; it becomes visible ``DELAY_S`` seconds after its start."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label, self.total, self.done = label, total, 0
        self._task: TaskID | None = None
        self._shown = self._over = False
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._timer = threading.Timer(DELAY_S, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._over:
                return
            self._shown = True
            if sys.stderr.isatty():
                self._task = _SCREEN.add(self.label, self.total, self.done)
            else:
                _SCREEN.line(f"{self.label} ...")

    def advance(self) -> None:
        self.done += 1
        if self._task is not None:
            _SCREEN.move(self._task, self.done)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
        if self._task is not None:
            _SCREEN.remove(self._task)
        elif self._shown:
            _SCREEN.line(f"{self.label}: done in {time.monotonic() - self._start:.1f} s")


def say(text: str) -> None:
    """One line on stderr, above the bars if there are any."""
    _SCREEN.line(text)


def warn(text: str) -> None:
    """A warning on stderr: something the user should know and that stops nothing."""
    _SCREEN.line(f"warning: {text}")


@contextlib.contextmanager
def step(label: str, total: int | None = None) -> Iterator[Advance]:
    """Mark a block of work that may be long; call the value once for each of the ``total`` pieces done."""
    running = _Step(label, total)
    try:
        yield running.advance
    finally:
        running.close()


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """``items``, with a bar that moves as they are taken; ``total`` defaults to their number if known."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with step(label, total) as advance:
        for item in items:
            yield item
            advance()

"""Progress of long work: a live bar with an estimate on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Reporter = Callable[[str, int, int], None]
"""Called with the name of a task, how many of its steps are done, and how many there are."""


def silent(task: str, done: int, total: int) -> None:
    """Report nothing."""


class ConsoleProgress:
    """A reporter that writes to standard error, so that standard output stays free for results.

    Use it as a context manager; calling it is reporting.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._task_ids: dict[str, object] = {}
        self._started: dict[str, float] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal and not self._quiet:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, task: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `task` are finished."""
        if self._quiet:
            return
        if self._bars is not None:
            if task not in self._task_ids:
                self._task_ids[task] = self._bars.add_task(task, total=total)
            self._bars.update(self._task_ids[task], completed=done, total=total)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        started = self._started.setdefault(task, now)
        # A line every few seconds is enough for a log; the first and the last are always written.
        if 0 < done < total and now - self._last_line.get(task, 0.0) < 5.0:
            return
        self._last_line[task] = now
        elapsed = now - started
        remaining = f", about {elapsed / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{task}: {done}/{total} ({elapsed:.0f} s{remaining})", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Write one line beside the progress."""
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

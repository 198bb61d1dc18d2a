"""What a user sees while training: a line an epoch, and in between a bar on a terminal or a line a minute in a log."""

from __future__ import annotations

import logging
import time
import warnings

from rich import console, progress

__all__ = ["Console", "hush"]

SECONDS_BETWEEN_LINES = 60


class Console:
    """Prints from one process only; the bar appears on a terminal only."""

    def __init__(self, speaks: bool) -> None:
        self.console = console.Console(highlight=False, markup=False, soft_wrap=True, quiet=not speaks)
        self._bar: progress.Progress | None = None
        self._task = progress.TaskID(0)
        self._counted, self._total, self._what, self._spoken = 0, 0, "", time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether something is being counted."""
        return self._what != ""

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(line)

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin a bar of `total` steps, `done` of them behind us, in place of the one before."""
        self.stop()
        self._what, self._counted, self._total, self._spoken = what, done, total, time.monotonic()
        if not self.console.is_terminal or self.console.quiet:
            return
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        self._bar = progress.Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._bar.start()

    def advance(self, steps: int = 1) -> None:
        """Some steps further."""
        self._counted += steps
        if self._bar is not None:
            self._bar.advance(self._task, steps)
        elif time.monotonic() - self._spoken >= SECONDS_BETWEEN_LINES:
            self.say(f"{self._what}: {self._counted} of {self._total}")
            self._spoken = time.monotonic()

    def stop(self) -> None:
        """Take the bar away."""
        self._what = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def hush() -> None:
    """Silence Lightning's advice, and warnings about what this package does on purpose."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    # Of channels-last 1×1 weights, whose two layouts are the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")

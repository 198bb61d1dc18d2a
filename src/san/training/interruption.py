"""Ctrl-C and SIGTERM as a wish, which the training loop fulfils at the end of a step, where its state is whole."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was asked to stop. Not an `Exception`: code that survives broken images must not swallow it."""


class StopRequest:
    """Context in which the two signals set `made`; a second one, or any while not `patient`, raises `Interrupted`."""

    def __init__(self) -> None:
        self.made = False
        self.patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Install the handlers; to be repeated where somebody else may have replaced them."""
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.made or not self.patient:
            raise Interrupted
        self.made = True

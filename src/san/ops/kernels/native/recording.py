"""Kernel calls recorded once and repeated on other memory, because Python between two kernels costs as much as one.

`record` runs what calls kernels on places instead of tensors: a `Place` has a shape and will lie in one of the memories
that `Recording.repeat` is given. Whatever else the calls name, weights for instance, is repeated as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from san.ops.kernels.native import library

__all__ = ["Place", "Recording", "active", "record"]

# Places are negative among the arguments of kernels, which sizes, addresses and bits of positive numbers are not:
# −1 − byte − SPAN · memory.
_SPAN = 1 << 48
_LINE = 64
_running = threading.local()


def active() -> Recording | None:
    """The recording that this Python thread is making."""
    return getattr(_running, "recording", None)


class Place:
    """Where a contiguous float32 tensor will lie; knows what kernels' callers ask of a tensor."""

    def __init__(self, recording: Recording, shape: Sequence[int], memory: int, start: int = 0) -> None:
        self.shape = tuple(shape)
        self._recording, self._memory, self._start = recording, memory, start

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """How many axes the tensor has."""
        return len(self.shape)

    def numel(self) -> int:
        """How many numbers the tensor has."""
        return int(np.prod(self.shape))

    def data_ptr(self) -> int:
        """What stands for the address among the arguments."""
        return -1 - self._start - _SPAN * self._memory

    def new_empty(self, *shape: Any) -> Place:
        """Another tensor, in the recording's own room."""
        return self._recording.room(shape[0] if isinstance(shape[0], tuple) else shape)

    def reshape(self, *shape: int) -> Place:
        """The beginning of the same memory in another shape."""
        return Place(self._recording, shape, self._memory, self._start)

    @contextmanager
    def scratch(self) -> Generator[None]:
        """What is placed inside gives its room back at the end."""
        used = self._recording.used
        yield
        self._recording.used = used


class Recording:
    """Kernel calls. `bytes` is the size of the room, memory 0, in which what they make on the way lies."""

    def __init__(self) -> None:
        self.bytes = 0
        self.used = 0
        self._calls: list[tuple[str, tuple[int, ...]]] = []

    def room(self, shape: Sequence[int]) -> Place:
        """A place in the room, on cache lines of its own."""
        place = Place(self, shape, 0, self.used)
        self.used += (4 * place.numel() + _LINE - 1) // _LINE * _LINE
        self.bytes = max(self.bytes, self.used)
        return place

    def call(self, kernel: str, *arguments: int) -> None:
        """Note a call."""
        self._calls.append((kernel, arguments))

    def finish(self) -> Recording:
        """Make ready for `repeat`."""
        loaded: Any = library.load()
        self._arguments = np.array([value for _, values in self._calls for value in values], np.int64)
        self._where = np.flatnonzero(self._arguments < 0)
        self._memory, self._arguments[self._where] = np.divmod(-1 - self._arguments[self._where], _SPAN)
        counts = [len(values) for _, values in self._calls]
        functions = [loaded.address(name) for name, _ in self._calls]
        self._steps = np.array([functions, [0, *accumulate(counts[:-1])], counts], np.int64).T.copy()
        return self

    def repeat(self, *memories: int) -> None:
        """Run the calls on memories at these addresses: the room, then those of the places given to `record`.

        The caller keeps all memory alive; that of the weights lies where it lay. Raises as the kernels' calls do.
        """
        loaded: Any = library.load()
        arguments = self._arguments.copy()
        arguments[self._where] += np.array(memories)[self._memory]
        failure = loaded.run_sequence(self._steps.ctypes.data, len(self._steps), arguments.ctypes.data)
        if failure:
            raise library.failure(self._calls[failure // 256][0], failure % 256)


def record(run: Callable[..., object], *shapes: Sequence[int]) -> Recording:
    """What `run` calls on places of these shapes, which lie in memories 1, 2, …; nothing is computed."""
    recording = _running.recording = Recording()
    try:
        run(*(Place(recording, shape, memory) for memory, shape in enumerate(shapes, start=1)))
    finally:
        _running.recording = None
    return recording.finish()

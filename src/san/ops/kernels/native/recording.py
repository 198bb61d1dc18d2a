"""Kernel calls recorded once and repeated on other memory, because Python between two kernels costs as much as one.

`record` runs what calls kernels on places instead of tensors: a `Place` has a shape and will lie in one of the memories
that `Recording.repeat` is given. Whatever else the calls name, weights for instance, is repeated as it was.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from san.ops.kernels.native import library

__all__ = ["Place", "Recording", "active", "record"]

# Places are negative among the arguments of kernels, which sizes, addresses and bits of non-negative numbers are not:
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
        return math.prod(self.shape)

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
        arguments = [value for _, values in self._calls for value in values]
        places = [number for number, value in enumerate(arguments) if value < 0]
        moved = []
        for number in places:
            memory, arguments[number] = divmod(-1 - arguments[number], _SPAN)
            moved += [number, memory]
        counts = [len(values) for _, values in self._calls]
        firsts = [0, *accumulate(counts[:-1])]
        functions = [loaded.address(name) for name, _ in self._calls]
        steps = [x for step in zip(functions, firsts, counts, strict=True) for x in step]
        self._tables = [array("q", table) for table in (steps, arguments, moved)]
        return self

    def apart(self) -> list[tuple[str, Recording]]:
        """Every call's kernel, and the call as a recording of its own on the same memories, to be timed alone."""
        single = []
        for kernel, arguments in self._calls:
            one = Recording()
            one.call(kernel, *arguments)
            one.bytes = self.bytes
            single.append((kernel, one.finish()))
        return single

    def repeat(self, *memories: int) -> None:
        """Run the calls on memories at these addresses: the room, then those of the places given to `record`.

        The caller keeps all memory alive; that of the weights lies where it lay. Raises as the kernels' calls do.
        """
        loaded: Any = library.load()
        (steps, arguments, moved), given = self._tables, array("q", memories)
        failure = loaded.run_sequence(
            *(steps.buffer_info()[0], len(self._calls)),
            *arguments.buffer_info(),
            *(moved.buffer_info()[0], len(moved) // 2),
            given.buffer_info()[0],
        )
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

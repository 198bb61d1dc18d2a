"""Recorded runs of a module's kernels, kept for the sizes of image that it saw last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from san.ops.kernels.native import library
from san.ops.kernels.native.recording import Recording, record

__all__ = ["Recordings"]


class Recordings:
    """Runs from a map to another, valid while what its parts hold is the same."""

    most = 16

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[list[Any], Recording]] = {}

    def repeat(
        self, run: Callable[..., None], held: list[Any], tensors: Sequence[Tensor], x: Tensor, output: Tensor
    ) -> None:
        """Do `run(x, output)` as it was recorded, or record it first if anything that `held` tells has changed.

        `tensors` are those that the kernels read: another thread may put others in their places meanwhile, and they
        must not be freed before the kernels end.
        """
        recording = self._get(held, (*x.shape, library.threads()), lambda: record(run, x.shape, output.shape))
        room = x.new_empty(recording.bytes, dtype=torch.uint8)
        recording.repeat(room.data_ptr(), x.data_ptr(), output.data_ptr())

    def of_shapes(self) -> dict[tuple[int, ...], Recording]:
        """The recordings by the shapes of their input maps; of several numbers of threads, the one used last."""
        return {key[:-1]: recording for key, (_, recording) in self._found.items()}

    def _get(self, held: list[Any], key: tuple[int, ...], record: Callable[[], Recording]) -> Recording:
        before, found = self._found.pop(key, (None, None))
        if found is None or before != held:
            found = record()
        self._found[key] = held, found
        while len(self._found) > self.most:
            self._found.pop(next(iter(self._found)), None)
        return found

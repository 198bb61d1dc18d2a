"""Two small parts that Lightning asks for: how checkpoint files are written, and where training batches come from."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.plugins import CheckpointIO

from san.data import make_loader
from san.errors import UserError
from san.training.folder import replacing

__all__ = ["AtomicCheckpoints", "Batches"]


class AtomicCheckpoints(CheckpointIO):
    """Checkpoint files that are whole at every moment, and hold nothing but plain values and tensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside `path`, then rename."""
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read tensors and plain values; raises `UserError` for anything else, which could run code."""
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{path} is damaged or foreign: the run cannot go on from it, start a new one") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete the file."""
        Path(path).unlink(missing_ok=True)


class _Position(Protocol):
    @property
    def epoch(self) -> int: ...

    batches: int


class Batches:
    """The training loader as Lightning wants it: always as long as an epoch, beginning where `position` stands.

    Lightning asks for an iterator before it knows the epoch, so the loader is made when the first batch is wanted.
    `arguments` are those of `make_loader`.
    """

    def __init__(self, position: _Position, **arguments: Any) -> None:
        self.position = position
        self.arguments = arguments
        self.loader: Any = None
        self.length = len(make_loader(**arguments))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        if self.loader is None:
            self.loader = make_loader(**self.arguments, epoch=self.position.epoch, start=self.position.batches)
        yield from self.loader

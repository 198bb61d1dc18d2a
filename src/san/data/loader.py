"""Batches that depend on seed, epoch and image alone.

One random order per (seed, epoch) is cut into global batches, of which every process takes its slice, and the
augmentation of an image is seeded by (seed, epoch, index). So neither the number of processes and workers nor
an interruption changes what the network sees.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from san.data.augmentation import Augmentation, transform
from san.data.images import BrokenImage, ImageSet
from san.errors import UserError

__all__ = ["Batch", "Loader", "make_loader"]

REPLACEMENTS = 100
"""How many of the following images may replace a broken one before its place is left out of the batch."""


class Batch(NamedTuple):
    """One micro-batch of one process.

    images: float32 [B, 3, H, W], normalised. B is smaller than asked for, down to 0, where broken images are
        left out and at the end of an evaluation.
    labels: int64 [B]; −1 where unknown.
    broken: Indices of the broken images that were met.
    indices: int64 [B], the images' places in their set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    broken: list[int]
    indices: torch.Tensor


class Loader:
    """Iterable over `Batch`es that can be saved after any of them and continued there.

    Every `iter(loader)` begins an epoch: first the one that it was made for (or that `load_state_dict` named,
    at the batch where that one stopped), from then on the next one. `len(loader)` counts the batches of a
    whole epoch. It is no `DataLoader`, for trainers take those apart to put in a sampler of their own.
    """

    batch_sampler = None
    """Lightning asks for it beside `sampler`."""

    def __init__(self, images: ImageSet, order: _Order, batches: DataLoader):
        self.images, self.epoch, self.position = images, order.epoch, order.start
        self._order, self._batches, self._begun = order, batches, False

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        if self._begun:
            self.epoch, self.position = self.epoch + 1, 0
        self._begun = True
        self._order.epoch, self._order.start = self.epoch, self.position
        for batch in self._batches:
            self.position += 1
            yield batch

    @property
    def sampler(self) -> Loader:
        """Where Lightning looks for `set_epoch`, to call it before every epoch.

        A state that was saved at the end of an epoch is not loaded by Lightning; this call replaces that.
        """
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter` begin `epoch`, unless it does so anyway, perhaps in its middle."""
        if epoch != self.epoch + self._begun:
            self.epoch, self.position, self._begun = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Plain numbers: epoch, batches of it handed out (not those read ahead), and what fixes the order."""
        return {"epoch": self.epoch, "position": self.position, **self._order.identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next `iter` go on behind the last batch that was handed out when `state` was taken.

        An evaluation is not continued; it starts anew.

        Raises:
            UserError: The state belongs to another number of images, batch size or seed.
        """
        if not self._order.shuffled:
            return
        for key, value in self._order.identity().items():
            if state[key] != value:
                raise UserError(f"an interrupted run needs the same {key} to go on: it had {state[key]}, not {value}")
        finished = state["position"] >= len(self)
        self.epoch = state["epoch"] + finished
        self.position = 0 if finished else state["position"]
        self._begun = False


def make_loader(
    images: ImageSet,
    preprocessing: Mapping[str, Any],
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    augmentation: Augmentation | None = None,
) -> Loader:
    """Batches of `images` for one process.

    Args:
        images: What to read.
        preprocessing: See `transform`.
        batch_size: Images per optimiser step, over all processes and micro-batches.
        training: Shuffle, augment, drop the incomplete last global batch and replace a broken image by the
            next readable one. Otherwise keep the order and all images, and leave broken ones out.
        seed: Of order and augmentation, together with the epoch.
        epoch: Epoch to begin with.
        start: Micro-batch of that epoch to begin with.
        rank: This process among `ranks`.
        ranks: Number of processes. All of them get equally many batches.
        accumulate: Micro-batches per optimiser step.
        workers: Processes that read ahead; 0 reads in this one.
        augmentation: How to vary training images; None does not vary them.

    Raises:
        UserError: A training batch is not divisible by ranks · accumulate, or larger than the set.
    """
    order = _Order(len(images), batch_size, accumulate, rank, ranks, seed, training, epoch, start)
    prepare = transform(preprocessing, training=training, augmentation=augmentation)
    batches = DataLoader(
        _Examples(images, prepare, seed, training),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_Collate(tuple(preprocessing["input_size"])),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # DataLoader draws from it at every start; the default one belongs to the network.
        generator=torch.Generator(),
    )
    return Loader(images, order, batches)


@dataclass(eq=False)
class _Order(Sampler[list[tuple[int, int]]]):
    """Which (epoch, index) make up each micro-batch of this process, from number `start` of `epoch` on."""

    images: int
    batch_size: int
    accumulate: int
    rank: int
    ranks: int
    seed: int
    shuffled: bool
    epoch: int
    start: int

    def __post_init__(self) -> None:
        parts = self.ranks * self.accumulate
        if self.shuffled and self.batch_size % parts:
            raise UserError(
                f"a batch of {self.batch_size} images cannot be divided among {self.ranks} processes with "
                f"{self.accumulate} micro-batches each: choose a multiple of {parts}"
            )
        if self.shuffled and self.images < self.batch_size:
            raise UserError(
                f"{self.images} training images do not fill a batch of {self.batch_size}: take a smaller one"
            )

    def __len__(self) -> int:
        steps = self.images // self.batch_size if self.shuffled else -(-self.images // self.batch_size)
        return steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        order = np.random.default_rng([self.seed, epoch]).permutation(self.images) if self.shuffled else None
        for number in range(start, len(self)):
            places = self._places(number)
            yield [(epoch, int(index)) for index in (places if order is None else order[places])]

    def _places(self, number: int) -> np.ndarray:
        """Places in the epoch's order that micro-batch `number` of this process takes."""
        step, micro = divmod(number, self.accumulate)
        first = step * self.batch_size
        size = min(self.batch_size, self.images - first)
        part, parts = self.rank * self.accumulate + micro, self.ranks * self.accumulate
        return np.arange(first + size * part // parts, first + size * (part + 1) // parts)

    def identity(self) -> dict[str, int]:
        """What a position in an epoch means nothing without."""
        return {key: getattr(self, key) for key in ("images", "batch_size", "accumulate", "seed")}


class _Example(NamedTuple):
    """Input and index of one image, or None and −1 if it is broken; and the broken indices met on the way."""

    image: torch.Tensor | None
    label: int
    index: int
    broken: list[int]


class _Examples(TorchDataset):
    """What workers do for each (epoch, index)."""

    def __init__(self, images: ImageSet, prepare: Callable[[Image.Image], torch.Tensor], seed: int, training: bool):
        self.images, self.prepare, self.seed = images, prepare, seed
        self.candidates = min(1 + REPLACEMENTS, len(images)) if training else 1

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[_Example]:
        with _random_numbers_kept():
            return [self[key] for key in keys]

    def __getitem__(self, index: tuple[int, int]) -> _Example:
        epoch, place = index
        broken: list[int] = []
        for step in range(self.candidates):
            candidate = (place + step) % len(self.images)
            try:
                image = self.images.load(candidate)
            except BrokenImage:
                broken.append(candidate)
                continue
            _seed_random_numbers(self.seed, epoch, place)
            return _Example(self.prepare(image), int(self.images.labels[candidate]), candidate, broken)
        return _Example(None, -1, -1, broken)


class _Collate:
    """Examples to a `Batch`, empty ones included: then the shape has to come from the preprocessing."""

    def __init__(self, input_size: tuple[int, ...]):
        self.input_size = input_size

    def __call__(self, examples: list[_Example]) -> Batch:
        readable = [example for example in examples if example.index >= 0]
        inputs = [example.image for example in readable if example.image is not None]
        return Batch(
            images=torch.stack(inputs) if inputs else torch.empty(0, *self.input_size),
            labels=torch.tensor([example.label for example in readable], dtype=torch.int64),
            broken=[index for example in examples for index in example.broken],
            indices=torch.tensor([example.index for example in readable], dtype=torch.int64),
        )


@contextmanager
def _random_numbers_kept() -> Generator[None]:
    """Leave the generators of augmentations as they were; without workers they are also the trainer's."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_random_numbers(seed: int, epoch: int, index: int) -> None:
    random.seed(f"{seed} {epoch} {index}")
    np.random.seed(random.getrandbits(32))
    # Not torch.manual_seed, which would also reset the GPU's generator.
    torch.default_generator.manual_seed(random.getrandbits(63))


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, but the parent still needs batches to finish and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

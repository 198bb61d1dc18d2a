"""Sets of labelled images with random access, and the one place where images are decoded.

Collections from the wild hold truncated files, 16-bit scans, CMYK prints and photographs on their side. Here
all of them become upright 8-bit RGB, or a `BrokenImage` that names the file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from san.data.labels import first
from san.errors import UserError

__all__ = [
    "BrokenImage",
    "BrokenImages",
    "ImageArrays",
    "ImageFiles",
    "ImageItems",
    "ImageSet",
    "ImageSubset",
    "Splits",
    "to_rgb",
]


class BrokenImage(Exception):
    """An image that cannot be read; the message names it and says why."""


class ImageSet(ABC):
    """Images with labels, by index. `labels` holds the class numbers, int64 [N]; −1 where unknown."""

    labels: np.ndarray

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, broken ones included."""

    @abstractmethod
    def names(self, index: int) -> str:
        """What to call image `index` in a report: its path, or its set and number."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Open image `index` in whatever mode it has; may fail with any exception."""

    def load(self, index: int) -> Image.Image:
        """Image `index`, decoded, upright, in mode RGB.

        Raises:
            BrokenImage: The image cannot be decoded.
        """
        try:
            with self.read(index) as image:
                return to_rgb(image)
        # Decoders of damaged files raise whatever they stumble over: OSError, SyntaxError, IndexError, …
        except Exception as problem:
            raise BrokenImage(f"{self.names(index)}: {problem}") from problem


class ImageFiles(ImageSet):
    """Image files, with labels where they are known; names are relative to `root` if that is given."""

    def __init__(self, paths: Iterable[str | Path], labels: Sequence[int] | None = None, root: str | Path = ""):
        self.paths = [str(path) for path in paths]
        self.labels = np.asarray([-1] * len(self.paths) if labels is None else labels, dtype=np.int64)
        self.root = str(root)

    def __len__(self) -> int:
        return len(self.paths)

    def names(self, index: int) -> str:
        path = Path(self.paths[index])
        return str(path.relative_to(self.root)) if self.root else str(path)

    def read(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


class ImageArrays(ImageSet):
    """Images in memory: uint8 [N, H, W] (grey) or [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, name: str):
        self.pixels, self.labels, self.name = pixels, labels.astype(np.int64), name

    def __len__(self) -> int:
        return len(self.pixels)

    def names(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


class ImageItems(ImageSet):
    """Images that `open_image(index)` returns: the bridge to other libraries' data sets."""

    def __init__(self, open_image: Callable[[int], Image.Image], labels: np.ndarray, name: str):
        self.open_image, self.labels, self.name = open_image, labels.astype(np.int64), name

    def __len__(self) -> int:
        return len(self.labels)

    def names(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def read(self, index: int) -> Image.Image:
        return self.open_image(index)


class ImageSubset(ImageSet):
    """The images of `parent` at `indices`, in that order."""

    def __init__(self, parent: ImageSet, indices: np.ndarray):
        self.parent, self.indices = parent, indices
        self.labels = parent.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def names(self, index: int) -> str:
        return self.parent.names(int(self.indices[index]))

    def read(self, index: int) -> Image.Image:
        return self.parent.read(int(self.indices[index]))


class Splits(NamedTuple):
    """What a source holds: its class names, and its images by split (`train`, `val`, `test`)."""

    class_names: list[str]
    sets: dict[str, ImageSet]


class BrokenImages:
    """The broken images that a run has met: each counted once and named; too many of them are an error."""

    def __init__(self, images: ImageSet):
        self.images = images
        self.indices: set[int] = set()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def names(self) -> list[str]:
        """Their names, in the order of the set."""
        return [self.images.names(index) for index in sorted(self.indices)]

    def add(self, indices: Iterable[int]) -> None:
        """Note the broken images of one batch (`Batch.broken`)."""
        self.indices.update(indices)

    def check(self, max_share: float = 0.01) -> None:
        """Raise `UserError` where more than `max_share` of the whole set, rounded up to whole images, is broken."""
        if len(self) > math.ceil(max_share * len(self.images)):
            raise UserError(
                f"{len(self)} of {len(self.images)} images cannot be read ({first(self.names)}), more than "
                f"the allowed share of {max_share:.3g}: repair or remove them, or allow more with --max-broken"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """First frame of any PIL image, upright (EXIF orientation applied), as 8-bit RGB without transparency."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # PIL would clip 16-bit grey at 255
        grey = np.clip(np.asarray(upright, dtype=np.int64) // 257, 0, 255)
        upright = Image.fromarray(grey.astype(np.uint8))
    return upright if upright.mode == "RGB" else upright.convert("RGB")

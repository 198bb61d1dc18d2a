"""What is said about images, whoever judges them: they are read as they are needed, and judged in batches.

Needs neither torch nor timm, so that exported networks are used where neither is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from san.data.images import BrokenImage, ImageFiles
from san.errors import UserError

__all__ = ["Prediction", "answer"]

Input = TypeVar("Input")


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Args:
        image: The image's path.
        classes: Names of the likeliest classes, best first; empty where there is an error.
        numbers: Of these classes, from 0, in the order of the model's scores.
        probabilities: Of these classes, in [0, 1].
        error: A sentence that says why the image could not be read or judged, else None.
    """

    image: str
    classes: list[str]
    numbers: list[int]
    probabilities: list[float]
    error: str | None = None


def answer(
    paths: Iterable[str | Path],
    prepare: Callable[[Image.Image], Input],
    judge: Callable[[list[Input], int], tuple[list[list[float]], list[list[int]]]],
    names: list[str],
    *,
    top: int,
    batch_size: int,
    threads: int,
) -> Iterator[Prediction]:
    """Yield a `Prediction` for every path, in order; a file that is no image yields one with an `error`.

    Args:
        paths: Image files, of which only one batch is held at a time.
        prepare: From an RGB image to the network's input.
        judge: From some inputs and a number n to the probabilities and the numbers of the n likeliest classes of each.
        names: Of the classes, by number.
        top: How many classes to name; all of them where there are fewer.
        batch_size: Images at a time.
        threads: Images that are decoded at the same time.

    Raises:
        UserError: `top` or `batch_size` is not positive.
    """
    if min(top, batch_size) < 1:
        raise UserError(f"top and batch size must be at least 1, not {top} and {batch_size}")
    paths, count = iter(paths), min(top, len(names))

    def read(path: str | Path) -> Input | _Unreadable:
        try:
            return prepare(ImageFiles([path]).load(0))
        except BrokenImage as problem:
            return _Unreadable(_sentence(path, problem.__cause__))

    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(paths, batch_size)):
            images = list(pool.map(read, chunk))
            readable = [image for image in images if not isinstance(image, _Unreadable)]
            found = zip(*judge(readable, count), strict=True) if readable else iter(())
            for path, image in zip(chunk, images, strict=True):
                yield _prediction(path, image, found, names)


@dataclass(frozen=True)
class _Unreadable:
    """Stands where an image could not be read."""

    sentence: str


def _prediction(path: str | Path, image: Any, found: Iterator[Any], names: list[str]) -> Prediction:
    if isinstance(image, _Unreadable):
        return Prediction(str(path), [], [], [], error=image.sentence)
    probabilities, numbers = next(found)
    if not all(map(math.isfinite, probabilities)):
        return Prediction(str(path), [], [], [], error=f"the network gives {path} no finite scores")
    return Prediction(str(path), [names[number] for number in numbers], numbers, probabilities)


def _sentence(path: str | Path, cause: Any) -> str:
    """Why a path gave no image, without the error numbers of the system."""
    if Path(path).is_dir():
        return f"{path} is a folder, not an image"
    if isinstance(cause, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(cause, UnidentifiedImageError):
        return f"{path} is not a readable image"
    return f"{path} is not a readable image: {getattr(cause, 'strerror', None) or cause}"

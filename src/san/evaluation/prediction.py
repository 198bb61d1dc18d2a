"""The likeliest classes of any number of images, read as they are needed and judged in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import UnidentifiedImageError
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from san.data import BrokenImage, ImageFiles, transform
from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.evaluation.classes import class_words

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """What a model says about one image.

    Args:
        image: The image's path.
        classes: Names of the likeliest classes, best first; empty for a broken image.
        probabilities: Of these classes, in [0, 1].
        error: A sentence that says why the image could not be read, else None.
    """

    image: str
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


def predict(
    model: nn.Module, paths: Iterable[str | Path], *, top: int = 5, batch_size: int = 32, threads: int = 2
) -> Iterator[Prediction]:
    """Yield a `Prediction` for every path, in order; a file that is no image yields one with an `error`.

    Only one batch of images is held at a time, so `paths` may be of any length.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it; used in eval mode, where it is.
        paths: Image files.
        top: How many classes to name; all of them where the model has fewer.
        batch_size: Images at a time.
        threads: Images that are decoded at the same time.

    Raises:
        UserError: `top` or `batch_size` is not positive.
    """
    if min(top, batch_size) < 1:
        raise UserError(f"top and batch size must be at least 1, not {top} and {batch_size}")
    prepare, names, paths = transform(resolve_model_data_config(model), training=False), class_words(model), iter(paths)

    def read(path: str | Path) -> Tensor | str:
        try:
            return prepare(ImageFiles([path]).load(0))
        except BrokenImage as problem:
            return _sentence(path, problem.__cause__)

    with ThreadPoolExecutor(threads) as pool, eval_mode(model):
        while chunk := list(islice(paths, batch_size)):
            yield from _judge(model, chunk, list(pool.map(read, chunk)), names, top)


def _sentence(path: str | Path, cause: Any) -> str:
    """Why a path gave no image, without the error numbers of the system."""
    if Path(path).is_dir():
        return f"{path} is a folder, not an image"
    if isinstance(cause, FileNotFoundError):
        return f"{path} does not exist"
    if isinstance(cause, UnidentifiedImageError):
        return f"{path} is not a readable image"
    return f"{path} is not a readable image: {getattr(cause, 'strerror', None) or cause}"


def _judge(
    model: nn.Module, paths: list[Any], images: list[Tensor | str], names: list[str], top: int
) -> Iterator[Prediction]:
    readable = [image for image in images if isinstance(image, Tensor)]
    answers = zip(*_best(model, torch.stack(readable), top), strict=True) if readable else iter(())
    for path, image in zip(paths, images, strict=True):
        if isinstance(image, str):
            yield Prediction(str(path), [], [], error=image)
        else:
            probabilities, numbers = next(answers)
            yield Prediction(str(path), [names[number] for number in numbers], probabilities)


@torch.inference_mode()
def _best(model: nn.Module, images: Tensor, top: int) -> tuple[list[list[float]], list[list[int]]]:
    scores = model(images.to(next(model.parameters()).device)).float().softmax(1)
    probabilities, numbers = scores.topk(min(top, scores.shape[1]))
    return probabilities.tolist(), numbers.tolist()

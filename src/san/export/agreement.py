"""How well an exported network agrees with PyTorch, image by image, from the decoded image on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from san.data import BrokenImage, ImageSet, transform
from san.data.images import ImageArrays
from san.errors import UserError
from san.export.description import Description
from san.export.formats import Run
from san.export.preparation import prepare

__all__ = ["TOLERANCE", "Agreement", "compare", "random_images"]

TOLERANCE = 1e-4
"""How far scores may differ, as a share of the largest of them or of 1, whichever is more."""
_BATCH = 8


@dataclass(frozen=True)
class Agreement:
    """Scores of an exported network beside PyTorch's.

    images: How many were compared.
    max_error: Largest difference of a score.
    largest_score: Of PyTorch, by its size.
    same_top1: Images with the same likeliest class.
    smallest_margin: Between an image's likeliest class and the next, as scores of PyTorch; None with one class.
    """

    images: int
    max_error: float
    largest_score: float
    same_top1: int
    smallest_margin: float | None

    @property
    def allowed(self) -> float:
        """What `max_error` may be."""
        return TOLERANCE * max(1.0, self.largest_score)

    @property
    def holds(self) -> bool:
        """Whether no score differs by more than that and every image has the same likeliest class."""
        # NaN is at most nothing.
        return self.max_error <= self.allowed and self.same_top1 == self.images


def random_images(count: int) -> ImageSet:
    """Coloured blotches, the same ones every time, for networks whose images are not at hand."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return ImageArrays(pixels, np.full(count, -1), "random")


def compare(model: nn.Module, run: Run, description: Description, images: ImageSet) -> Agreement:
    """Compare an exported network, fed as its description says, with PyTorch, fed as ever.

    The first image goes alone and the others eight at a time, which shows that the batch is free.

    Args:
        model: In eval mode on the CPU, with its preprocessing.
        run: The exported network.
        description: What its file says.
        images: What to compare on; those that cannot be read are left out.

    Raises:
        UserError: No image can be read.
    """
    transformed = transform(resolve_model_data_config(model), training=False)
    starts = [0, *range(1, len(images), _BATCH), len(images)]
    scores, others = [], []
    for start, stop in pairwise(starts):
        pictures = _readable(images, range(start, stop))
        if pictures:
            others.append(run(np.stack([prepare(picture, description) for picture in pictures])))
            with torch.inference_mode():
                scores.append(model(torch.stack([transformed(picture) for picture in pictures])).numpy())
    if not scores:
        raise UserError("none of the images to check the export on can be read; name others with --check")
    return _agreement(np.concatenate(scores), np.concatenate(others))


def _readable(images: ImageSet, indices: Iterable[int]) -> list[Image.Image]:
    found = []
    for index in indices:
        with suppress(BrokenImage):
            found.append(images.load(index))
    return found


def _agreement(scores: np.ndarray, others: np.ndarray) -> Agreement:
    ranked = np.sort(scores, axis=1)
    return Agreement(
        images=len(scores),
        max_error=float(np.abs(scores - others).max()),
        largest_score=float(np.abs(scores).max()),
        same_top1=int((scores.argmax(1) == others.argmax(1)).sum()),
        smallest_margin=float((ranked[:, -1] - ranked[:, -2]).min()) if scores.shape[1] > 1 else None,
    )

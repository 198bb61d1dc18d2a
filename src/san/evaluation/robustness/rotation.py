"""Rotation: accuracy on images that are turned or flipped, without training for it (the paper's section 5).

The network's input is turned, after resize and crop. Quarter turns and the flip only move pixels; other angles are
interpolated. Everything turns clockwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from san.evaluation.accuracy import eval_mode
from san.evaluation.robustness.inputs import LabelledImages, PixelModel, best_classes, percent

__all__ = ["VIEWS", "rotate", "rotation_accuracy", "turn"]


def turn(images: Tensor, quarters: int) -> Tensor:
    """Images [..., H, W] turned clockwise by `quarters`·90°; every pixel keeps its value. H and W swap if odd."""
    return torch.rot90(images, -quarters, dims=(-2, -1))


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Images [B, C, H, W] turned clockwise by any angle around their centre.

    Multiples of 90° are those of `turn`, exactly. Other angles keep H×W, interpolate bilinearly, and fill the corners
    with 0, which is the mean colour of normalised images.
    """
    quarters, rest = divmod(degrees, 90)
    if not rest:
        return turn(images, int(quarters))
    # torchvision turns the other way round.
    return transforms.rotate(images, -degrees, InterpolationMode.BILINEAR)


VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "0°": partial(turn, quarters=0),
        "90°": partial(turn, quarters=1),
        "180°": partial(turn, quarters=2),
        "270°": partial(turn, quarters=3),
        "upside-down": partial(torch.flip, dims=(-2,)),
    }
)
"""The paper's five: clockwise turns, and the flip that swaps top and bottom; from images [B, C, H, W] to such."""


def rotation_accuracy(
    model: nn.Module, examples: LabelledImages, angles: Sequence[float] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy on each of `VIEWS`, and on the images turned clockwise by each of `angles` (degrees, see `rotate`).

    "0°" is what `san.evaluation.accuracy.evaluate` gives for the same images. The model runs in eval mode, where it
    is, and is left in the mode it had.

    Returns:
        `views`, rows of `view`, `top1`, `top5` (percent), and `angles`, rows of `angle`, `top1`, `top5`.

    Raises:
        UserError: As `LabelledImages.batches`.
    """
    network, names = PixelModel(model), [f"{angle % 360:.12g}°" for angle in angles]
    # Quarter turns among the angles have the names of their views, so they are judged once.
    ways = {**{name: partial(rotate, degrees=angle) for name, angle in zip(names, angles, strict=True)}, **VIEWS}
    hits, images = torch.zeros(len(ways), 2, dtype=torch.int64), 0
    with eval_mode(model):
        for batch in examples.batches(network, "rotation"):
            images += len(batch.labels)
            hits += torch.stack([_hits(network, way, batch.images, batch.labels) for way in ways.values()]).cpu()
    shares = [{"top1": percent(top1, images), "top5": percent(top5, images)} for top1, top5 in hits.tolist()]
    found = dict(zip(ways, shares, strict=True))
    return {
        "views": [{"view": view, **found[view]} for view in VIEWS],
        "angles": [{"angle": float(angle), **found[name]} for angle, name in zip(angles, names, strict=True)],
    }


@torch.inference_mode()
def _hits(network: PixelModel, way: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor) -> Tensor:
    """How many images of a batch have their class first, and among the five first: int64 [2]."""
    # Turned behind the normalisation, whose mean is what corners are filled with.
    right = best_classes(network.network(way(network.normalise(pixels)))) == labels[:, None]
    return torch.stack([right[:, 0].sum(), right.any(1).sum()])

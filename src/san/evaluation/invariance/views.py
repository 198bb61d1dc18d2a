"""Ways of altering images by which a network's invariance is measured; nothing is clipped or trained for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from san.evaluation.robustness import turn

__all__ = ["SHIFTS", "VIEWS", "View", "resize", "shift"]

SHIFTS = range(1, 9)
"""Pixels by which images are shifted; 8 are one pixel of the last map of a network that halves its maps three times."""


@dataclass(frozen=True)
class View:
    """Functions from pixels in [0, 1] [B, 3, H, W] to altered ones, whose results are averaged.

    `caveat` says what the altered images no longer have in common with the others.
    """

    alterations: tuple[Callable[[Tensor], Tensor], ...]
    caveat: str = ""


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """Images [B, C, H, W] moved by whole pixels; what comes in repeats the edge that it comes from."""
    height, width = images.shape[2:]
    reach = max(abs(down), abs(right))
    bordered = F.pad(images, [reach] * 4, mode="replicate")
    return bordered[:, :, reach - down : reach - down + height, reach - right : reach - right + width]


def resize(images: Tensor, factor: float) -> Tensor:
    """Images [B, C, H, W] of `factor` times the height and width, to the nearest pixel; bilinear, antialiased."""
    size = [round(factor * side) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _plus(images: Tensor, values: tuple[float, ...]) -> Tensor:
    return images + torch.tensor(values).to(images)[:, None, None]


def _times(images: Tensor, values: tuple[float, ...]) -> Tensor:
    return images * torch.tensor(values).to(images)[:, None, None]


def _contrast(images: Tensor, factor: float) -> Tensor:
    return (images - 0.5) * factor + 0.5


def _shifted(pixels: int) -> View:
    ways = ((pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels))
    caveat = "cuts off what is near the border" if pixels > 4 else ""
    return View(tuple(partial(shift, down=down, right=right) for down, right in ways), caveat)


VIEWS: Mapping[str, View] = MappingProxyType(
    {
        "unchanged": View((lambda images: images,)),
        "turned 90°": View((partial(turn, quarters=1),), "few digits keep their meaning"),
        "turned 180°": View((partial(turn, quarters=2),), "6 and 9 become each other"),
        "turned 270°": View((partial(turn, quarters=3),), "few digits keep their meaning"),
        "mirrored": View((partial(torch.flip, dims=(-1,)),), "no digit but 0, 1, 8 keeps its shape"),
        "upside down": View((partial(torch.flip, dims=(-2,)),), "no digit but 0, 1, 3, 8 keeps its shape"),
        **{f"shifted {pixels} px": _shifted(pixels) for pixels in SHIFTS},
        "all pixels + 0.2": View((partial(_plus, values=(0.2,)),)),
        "all pixels − 0.2": View((partial(_plus, values=(-0.2,)),)),
        "channels + 0.2, 0, − 0.2": View((partial(_plus, values=(0.2, 0.0, -0.2)),), "grey becomes coloured"),
        "contrast × 0.5": View((partial(_contrast, factor=0.5),)),
        "contrast × 1.5": View((partial(_contrast, factor=1.5),)),
        "channels × 1.5, 1, 0.5": View((partial(_times, values=(1.5, 1.0, 0.5)),), "grey becomes coloured"),
        "size × 0.75": View((partial(resize, factor=0.75),), "strokes become thinner"),
        "size × 1.25": View((partial(resize, factor=1.25),), "strokes become thicker"),
        "size × 1.5": View((partial(resize, factor=1.5),), "strokes become thicker"),
        "another image": View((partial(torch.roll, shifts=1, dims=0),), "how alike unlike images are"),
    }
)
"""What is done to the images, by name. "another image" is the next one of a batch: how alike unlike images are."""

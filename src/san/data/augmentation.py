"""From an image to the network's input: timm's transforms, chosen by plain values that fit into a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from san.errors import UserError

__all__ = ["Augmentation", "transform"]


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied. The defaults are the paper's.

    scale: Range of the random crop's share of the area; the crop is resized to the input size.
    ratio: Range of its width / height.
    horizontal_flip: Probability of mirroring.
    color_jitter: Largest change of brightness, contrast and saturation; 0 for none.
    rand_augment: A policy in timm's notation, such as `rand-m9-mstd0.5-inc1`, or None. It replaces
        `color_jitter`.
    random_erasing: Probability that noise replaces a random box.

    Raises:
        UserError: A value is out of range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    color_jitter: float = 0.0
    rand_augment: str | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"the crop's scale is {self.scale}: give two ascending numbers above 0 and up to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"the crop's ratio is {self.ratio}: give two ascending numbers above 0")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a probability from 0 to 1")
        if self.color_jitter < 0:
            raise UserError(f"color_jitter is {self.color_jitter}: give 0 for none, or a positive strength")


def transform(
    preprocessing: Mapping[str, Any], *, training: bool, augmentation: Augmentation | None = None
) -> Callable[[Image.Image], torch.Tensor]:
    """Function from an RGB image to the network's input: normalised, float32 [3, H, W].

    Args:
        preprocessing: timm's data configuration; its `input_size`, `mean`, `std`, `interpolation`, `crop_pct`
            and `crop_mode` count.
        training: Whether to vary the image by `augmentation`. Its crop then replaces `crop_pct` and
            `crop_mode`.
        augmentation: None varies nothing, in training too: resize and centre crop.

    Raises:
        UserError: timm does not know the policy of `rand_augment`.
    """
    from timm.data import create_transform

    known = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    common = {key: preprocessing[key] for key in known if key in preprocessing}
    if not training or augmentation is None:
        return create_transform(**common, is_training=False)
    variation: dict[str, Any] = {
        "scale": augmentation.scale,
        "ratio": augmentation.ratio,
        "hflip": augmentation.horizontal_flip,
        "color_jitter": augmentation.color_jitter or None,
        "auto_augment": augmentation.rand_augment,
        "re_prob": augmentation.random_erasing,
        "re_mode": "pixel",
    }
    try:
        return create_transform(**common, **variation, is_training=True)
    except AssertionError as problem:  # timm's answer to a policy that it cannot parse
        raise UserError(
            f"timm does not know the policy {augmentation.rand_augment!r}: give one like 'rand-m9-mstd0.5'"
        ) from problem

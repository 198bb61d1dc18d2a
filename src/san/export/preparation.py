"""From an image to the network's input with Pillow and NumPy alone: what timm's evaluation transform does."""

from __future__ import annotations

import numpy as np
from PIL import Image

from san.export.description import Description

__all__ = ["prepare"]


def prepare(image: Image.Image, description: Description) -> np.ndarray:
    """Resize, crop and normalise an RGB image: float32 [3, H, W], (pixel / 255 − mean) / std.

    Equal to `san.data.transform` (timm's transform for evaluation) for every `crop_mode` and `interpolation`.
    """
    height, width = description.input_size[1:]
    image = image.resize(_size(image, description), _filter(description))
    border = (0, 0, 0)
    if description.crop_mode == "border":
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in description.mean)
        border = (red, green, blue)
    pixels = np.asarray(_centre(image, height, width, border), dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (description.mean, description.std))
    # Row by row, as what is compiled takes its input to lie.
    return np.ascontiguousarray((pixels - mean) / std)


def _size(image: Image.Image, description: Description) -> tuple[int, int]:
    """Width and height to resize an image to."""
    height, width = description.scale_size
    if description.crop_mode == "squash":
        return width, height
    if description.crop_mode == "center" and height == width:
        # torchvision's rule for the shorter side, which rounds down.
        shorter = min(image.size)
        return int(height * image.width / shorter), int(height * image.height / shorter)
    ratios = image.height / height, image.width / width
    ratio = max(ratios) if description.crop_mode == "border" else min(ratios)
    # What is thinner than a pixel stays one.
    return max(round(image.width / ratio), 1), max(round(image.height / ratio), 1)


def _filter(description: Description) -> Image.Resampling:
    height, width = description.scale_size
    if description.crop_mode == "center" and height != width:
        # timm does not hand the interpolation on in this case.
        return Image.Resampling.BILINEAR
    return Image.Resampling[description.interpolation.upper()]


def _centre(image: Image.Image, height: int, width: int, border: tuple[int, int, int]) -> Image.Image:
    """The middle of an image, with a border where it is too small."""
    right, below = max(width - image.width, 0), max(height - image.height, 0)
    if right or below:
        bordered = Image.new("RGB", (image.width + right, image.height + below), border)
        bordered.paste(image, (right // 2, below // 2))
        image = bordered
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))

"""Pictures of the page as SVG: an image pixel by pixel, and over it what is marked there, in the image's coordinates.

They stay sharp at any size, need no file, and a click on one has its place in the image. What a browser is given is
made of numbers and of our own words only. Legend: H W the network's input, h w a layer's map.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageOps
from torch import Tensor

from san.attention_maps import PixelAttention

__all__ = ["Weighing", "draw_attention", "draw_group", "draw_pixels", "gradient", "pixels_of", "thumbnail"]

# As in the figures of san.attention_maps: shares are 0 or more; weights have a sign in patchwise attention.
_SEQUENTIAL, _DIVERGING = "viridis", "RdBu_r"
_CROSS = 2.5
_ZOOM = 3.0


@dataclass(frozen=True)
class Weighing:
    """Numbers on a layer's map and their colours.

    Args:
        laid: float [h, w], NaN where the footprint does not read.
        most: What has the last colour of the scale.
        signed: Whether the scale goes from −most, or else from 0.
    """

    laid: np.ndarray
    most: float
    signed: bool

    def colours(self, alpha: float) -> np.ndarray:
        """RGBA, uint8 [h, w, 4]; nothing is seen where nothing is read."""
        lowest = -self.most if self.signed else 0.0
        scaled = (np.nan_to_num(self.laid) - lowest) / (self.most - lowest)
        found = colormaps[_DIVERGING if self.signed else _SEQUENTIAL](scaled)
        found[..., 3] = np.where(np.isnan(self.laid), 0, alpha)
        return np.round(found * 255).astype(np.uint8)


def gradient(signed: bool) -> str:
    """The scale's colours from left to right, for a style sheet."""
    stops = colormaps[_DIVERGING if signed else _SEQUENTIAL](np.linspace(0, 1, 9))[:, :3]
    return "linear-gradient(90deg," + ",".join(_colour(stop) for stop in stops) + ")"


def _colour(stop: np.ndarray) -> str:
    return "rgb(" + " ".join(str(round(255 * part)) for part in stop) + ")"


def pixels_of(image: Tensor) -> np.ndarray:
    """An image [1, 3, H, W] in [0, 1] as uint8 [H, W, 3]."""
    colours = image[0].detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    return np.round(colours * 255).astype(np.uint8)


def _data_uri(pixels: np.ndarray) -> str:
    """Pixels uint8 [H, W, 3] or [H, W, 4] as a PNG inside a page."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_pixels(
    pixels: np.ndarray, words: str, pixel: tuple[int, int] | None = None, attention: PixelAttention | None = None
) -> str:
    """An image [H, W, 3]; with a `pixel` it may be clicked and has a cross there, with `attention` its footprint."""
    height, width = pixels.shape[:2]
    marks = "" if attention is None else _frame(attention.box())
    if pixel is not None:
        marks += _cross(pixel, max(width, height) / 64)
    size = None if pixel is None else (width, height)
    return _svg(_image(pixels, width, height) + marks, (0, 0, width, height), words, size)


def draw_attention(pixels: np.ndarray, attention: PixelAttention, weighing: Weighing, pixel: tuple[int, int]) -> str:
    """What a pixel attends to, over the pale grey image, enlarged where the footprint is small."""
    height, width = pixels.shape[:2]
    view = _view(attention.box(), width, height)
    content = _image(_grey(pixels), width, height) + _overlay(attention, weighing, 0.85) + _frame(attention.box())
    return _svg(content + _cross(pixel, view[2] / 64), view, "what the pixel attends to", (width, height))


def draw_group(attention: PixelAttention, weighing: Weighing) -> str:
    """The weights of one group alone, as large as the footprint."""
    return _svg(_overlay(attention, weighing, 1.0), attention.box())


def _svg(
    content: str, view: tuple[float, float, float, float], words: str = "", size: tuple[int, int] | None = None
) -> str:
    """The part `view` of a picture; with the `size` of the whole it may be clicked."""
    pick = f' data-width="{size[0]}" data-height="{size[1]}"' if size else ""
    box = " ".join(f"{part:g}" for part in view)
    label = f' role="img" aria-label="{escape(words)}"' if words else ' aria-hidden="true"'
    return f'<svg class="san-picture" viewBox="{box}"{pick}{label}>{content}</svg>'


def _image(pixels: np.ndarray, width: float, height: float) -> str:
    return f'<image href="{_data_uri(pixels)}" width="{width:g}" height="{height:g}" preserveAspectRatio="none"/>'


def _overlay(attention: PixelAttention, weighing: Weighing, alpha: float) -> str:
    (rows, columns), (down, across) = attention.observed.size, attention.observed.stride
    return _image(weighing.colours(alpha), columns * across, rows * down)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """The image without colours, which belong to what lies over it, and pale."""
    grey = 127.5 + 0.5 * pixels @ np.array([0.299, 0.587, 0.114])
    return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=2)


def _view(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """The part of the image to show around a footprint: three times as large, moved so that it lies on the image."""
    left, top, across, down = box
    side = min(_ZOOM * max(across, down), float(min(width, height)))
    x, y = left + across / 2 - side / 2, top + down / 2 - side / 2
    return min(max(x, 0.0), width - side), min(max(y, 0.0), height - side), side, side


def _frame(box: tuple[float, float, float, float]) -> str:
    left, top, width, height = box
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<rect class="san-halo" {place}/><rect class="san-mark" {place}/>'


def _cross(pixel: tuple[int, int], scale: float) -> str:
    """A cross through the middle of a pixel, of the same size on every picture."""
    x, y, arm = pixel[0] + 0.5, pixel[1] + 0.5, _CROSS * scale
    path = f'd="M{x - arm:g} {y:g}H{x + arm:g}M{x:g} {y - arm:g}V{y + arm:g}"'
    return f'<path class="san-halo" {path}/><path class="san-mark san-cross" {path}/>'


def thumbnail(image: Image.Image, side: int = 96) -> str:
    """The middle of an image, small, as a PNG inside a page."""
    return _data_uri(np.asarray(ImageOps.fit(image, (side, side))))

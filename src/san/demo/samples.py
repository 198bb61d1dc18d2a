"""Pictures to begin with: drawn here, and one photograph in the public domain that comes with matplotlib.

The images that networks learn from belong to others, so none of them is in the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from san.data import ImageFiles

__all__ = ["Sample", "samples_for"]

_SIDE = 256
# Drawn larger and made smaller, so that edges are smooth.
_FINE = 4
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Sample:
    """A picture with its name, RGB."""

    name: str
    image: Image.Image


def samples_for(words: Sequence[str]) -> list[Sample]:
    """Pictures for networks that know the classes `words`: digits for those that know digits, else things."""
    if {"0", "3", "8"} <= set(words):
        return [Sample(f"a drawn {digit}", _digit(digit)) for digit in "380"]
    first, *others = [Sample(name, _drawn(*ground, draw)) for name, ground, draw in (_GOLDFISH, *_OTHERS)]
    return [first, *_photographs(), *others]


def _photographs() -> list[Sample]:
    """Grace Hopper, by the United States Navy: the public domain. Some builds of matplotlib leave it out."""
    path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return [Sample("Grace Hopper, 1984", ImageFiles([path]).load(0))] if path.is_file() else []


def _digit(digit: str) -> Image.Image:
    """White on black, as in MNIST, of which the middle is filled."""
    image = Image.new("L", (_SIDE, _SIDE))
    font = ImageFont.load_default(size=200)
    ImageDraw.Draw(image).text((_SIDE / 2, _SIDE / 2), digit, 255, font, anchor="mm", stroke_width=4)
    return image.filter(ImageFilter.GaussianBlur(4)).convert("RGB")


def _drawn(above: Colour, below: Colour, draw: Callable[[Any], None]) -> Image.Image:
    """A drawing in units of 1/100 of the side, on a ground that goes from one colour to another, slightly blurred."""
    side = _SIDE * _FINE
    part = np.linspace(0, 1, side)[:, None, None]
    ground = (1 - part) * np.array(above) + part * np.array(below)
    image = Image.fromarray(np.broadcast_to(ground, (side, side, 3)).astype(np.uint8))
    draw(_Pen(image))
    return image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.8))


class _Pen:
    """Shapes in units of 1/100 of the side of an image."""

    def __init__(self, image: Image.Image) -> None:
        self._draw, self._unit = ImageDraw.Draw(image), image.width / 100

    def shape(self, colour: Colour, *points: tuple[float, float]) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * self._unit, y * self._unit) for x, y in points], colour)

    def oval(self, colour: Colour, x: float, y: float, across: float, down: float) -> None:
        """A filled ellipse around (x, y)."""
        self._draw.ellipse([part * self._unit for part in (x - across, y - down, x + across, y + down)], colour)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float, round_by: float = 0) -> None:
        """A filled rectangle."""
        edges = [part * self._unit for part in (left, top, right, bottom)]
        self._draw.rounded_rectangle(edges, round_by * self._unit, colour)

    def line(self, colour: Colour, width: float, *points: tuple[float, float]) -> None:
        """A line with round joints."""
        places = [(x * self._unit, y * self._unit) for x, y in points]
        self._draw.line(places, colour, round(width * self._unit), joint="curve")

    def ring(self, colour: Colour, x: float, y: float, radius: float, width: float) -> None:
        """A circle's outline."""
        edges = [part * self._unit for part in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(edges, outline=colour, width=round(width * self._unit))


def _goldfish(pen: _Pen) -> None:
    fin, body, light, belly = (236, 120, 24), (240, 104, 16), (252, 160, 48), (255, 196, 96)
    pen.shape(fin, (66, 50), (92, 26), (88, 46), (96, 60), (86, 76))
    pen.shape(fin, (34, 36), (46, 18), (64, 26), (66, 40))
    pen.shape(fin, (40, 64), (50, 82), (60, 66))
    pen.oval(body, 44, 51, 30, 20)
    pen.oval(light, 42, 53, 26, 15)
    pen.oval(belly, 40, 60, 20, 8)
    for x, y in ((48, 44), (56, 48), (50, 54), (60, 54), (42, 48), (54, 60)):
        pen.ring(body, x, y, 3.5, 0.8)
    pen.oval((250, 250, 240), 25, 46, 4.2, 4.2)
    pen.oval((10, 10, 10), 24.4, 46, 2.4, 2.4)
    pen.shape(fin, (42, 56), (54, 66), (44, 68))


def _pill_bottle(pen: _Pen) -> None:
    orange, light, paper, ink = (226, 110, 24), (244, 150, 60), (240, 240, 236), (120, 120, 120)
    pen.box((150, 110, 80), 0, 80, 100, 100)
    pen.oval((100, 74, 54), 52, 90, 26, 4)
    pen.box(orange, 32, 34, 68, 90, 4)
    pen.box(light, 35, 36, 42, 88, 2)
    pen.box(paper, 32, 48, 68, 78)
    for top, right in ((54, 63), (60, 63), (66, 63), (72, 52)):
        pen.box(ink, 37, top, right, top + 1.6)
    pen.box((236, 236, 232), 29, 14, 71, 34, 4)
    pen.box((206, 206, 202), 29, 28, 71, 34, 3)
    for left in range(33, 70, 4):
        pen.box((200, 200, 196), left, 16, left + 1, 32)


def _refrigerator(pen: _Pen) -> None:
    white, shade, steel = (236, 238, 240), (206, 210, 214), (120, 124, 128)
    pen.box((170, 140, 110), 0, 86, 100, 100)
    pen.box(white, 28, 8, 72, 90, 3)
    pen.box(shade, 28, 36, 72, 37.5)
    pen.box(shade, 66, 8, 72, 90, 3)
    pen.box(white, 28, 8, 69, 35)
    pen.box(white, 28, 38, 69, 90, 2)
    pen.box(steel, 32, 24, 34.5, 34, 1)
    pen.box(steel, 32, 40, 34.5, 58, 1)


def _bucket(pen: _Pen) -> None:
    pen.box((120, 150, 84), 0, 74, 100, 100)
    pen.ring((130, 130, 134), 50, 36, 32, 2.5)
    pen.shape((90, 130, 190), (20, 34), (80, 34), (70, 88), (30, 88))
    pen.shape((120, 160, 214), (26, 34), (40, 34), (42, 88), (33, 88))
    pen.oval((60, 92, 140), 50, 34, 30, 8)
    pen.oval((40, 66, 104), 50, 36, 26, 6)


def _lolly(pen: _Pen) -> None:
    pen.box((222, 184, 132), 45.5, 66, 54.5, 97, 4)
    pen.box((200, 30, 60), 32, 6, 68, 74, 16)
    pen.box((224, 60, 90), 35, 10, 48, 70, 8)
    pen.box((246, 150, 170), 37, 14, 41, 60, 2)


_GOLDFISH = "a drawn goldfish", ((40, 92, 110), (14, 40, 56)), _goldfish
_OTHERS = (
    ("a drawn pill bottle", ((214, 206, 196), (190, 180, 168)), _pill_bottle),
    ("a drawn refrigerator", ((216, 204, 180), (200, 186, 160)), _refrigerator),
    ("a drawn bucket", ((150, 190, 226), (206, 224, 236)), _bucket),
    ("a drawn ice lolly", ((70, 130, 70), (110, 160, 90)), _lolly),
)

"""Opening what somebody uploads: any file may come, and gets a picture or one sentence."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from san.data import BrokenImage, ImageFiles
from san.errors import UserError

__all__ = ["MOST_MEGABYTES", "MOST_PIXELS", "read_upload"]

MOST_MEGABYTES = 50
"""Larger files are refused before they are read."""
MOST_PIXELS = 64_000_000
"""Of an image; decoded, each takes three bytes."""
_MOST_RATIO = 20
# Pillow would also read forms that start other programs, such as PostScript, or that nobody shows in a browser.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")


class _Upload(ImageFiles):
    """One file, whose form and size are looked at before its pixels are decoded."""

    def read(self, index: int) -> Image.Image:
        image = Image.open(self.paths[index], formats=_FORMATS)
        if image.width * image.height > MOST_PIXELS:
            image.close()
            raise Image.DecompressionBombError
        return image


def read_upload(path: str | Path) -> Image.Image:
    """An uploaded image: the first frame, upright, in RGB.

    Raises `UserError`, whose sentence begins with the file's name, for a file that is no image of a usual form, is
    damaged, has more than `MOST_PIXELS`, or is more than 20 times as long as wide.
    """
    name = Path(path).name
    try:
        image = _Upload([path]).load(0)
    except BrokenImage as problem:
        raise UserError(f"{name} {_reason(problem.__cause__)}") from None
    if max(image.size) > _MOST_RATIO * min(image.size):
        raise UserError(f"{name} has {image.width}×{image.height} pixels; at most {_MOST_RATIO} to 1 can be shown")
    return image


def _reason(cause: BaseException | None) -> str:
    if isinstance(cause, Image.DecompressionBombError):
        return f"has more than {MOST_PIXELS // 10**6} million pixels; make it smaller first"
    if isinstance(cause, UnidentifiedImageError):
        return "is not an image in one of the forms that are read here: JPEG, PNG, GIF, WebP, BMP, TIFF or PPM"
    return "is a damaged image that cannot be read to its end; give a whole one"

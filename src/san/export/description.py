"""What an exported file says about itself, so that it can be used without the checkpoint: one JSON text.

It tells how an image becomes the network's input and what its scores are called. Needs neither torch nor timm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from san.errors import UserError

__all__ = ["FORMAT_VERSION", "INPUT", "KEY", "OUTPUT", "Description"]

FORMAT_VERSION = 1
KEY = "san"
"""Under which key a file's metadata hold the text."""
INPUT, OUTPUT = "images", "scores"
"""Names of the graph's input [B, 3, H, W], float32, and output [B, classes], before softmax."""

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")
# An image is resized to its side / crop_pct: a file must not make its reader run out of memory.
_LARGEST_SIDE = 8192


def _are_numbers(values: Any, low: float, high: float = 1e9) -> bool:
    """Whether these are three numbers with low < number ≤ high; not NaN, and no truth values."""
    plain = isinstance(values, list | tuple) and [type(each) in (int, float) for each in values] == [True] * 3
    return plain and all(low < each <= high for each in values)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "architecture": lambda name: isinstance(name, str),
    "label_names": lambda names: isinstance(names, list | tuple) and {type(name) for name in names} == {str},
    "input_size": lambda size: (
        _are_numbers(size, 0, _LARGEST_SIDE) and {type(side) for side in size} == {int} and size[0] == 3
    ),
    "mean": lambda mean: _are_numbers(mean, -1e9),
    "std": lambda std: _are_numbers(std, 0),
    "interpolation": lambda name: name in _INTERPOLATIONS,
    "crop_pct": lambda share: type(share) in (int, float) and 0 < share <= 1,
    "crop_mode": lambda name: name in _CROP_MODES,
}


@dataclass(frozen=True)
class Description:
    """What must be known to use an exported network.

    Args:
        architecture: The network's name.
        label_names: What to call the classes, in the order of the scores.
        input_size: Channels (3: red, green, blue), height and width of the network's input.
        mean: Of every channel, for pixels in [0, 1]; subtracted.
        std: Of every channel; divided by.
        interpolation: Of resizing: nearest, bilinear, bicubic, box, hamming or lanczos.
        crop_pct: Share of the resized image's side that is used.
        crop_mode: center (cut from the middle), squash (aspect not kept) or border (all of it, with borders).

    Raises:
        UserError: A value is not of its kind or out of range; sides may have up to 8192 pixels, before cropping too.
    """

    architecture: str
    label_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str

    def __post_init__(self) -> None:
        wrong = [name for name, makes_sense in _CHECKS.items() if not makes_sense(getattr(self, name))]
        if not wrong and max(self.scale_size) > _LARGEST_SIDE:
            wrong = ["crop_pct"]
        if wrong:
            value = str(getattr(self, wrong[0]))
            raise UserError(
                f"{wrong[0]} of the network is {value[:80]}, but exported files are for RGB images: "
                f"{', '.join(list(_CHECKS)[2:])} as in timm's data config, with sides up to {_LARGEST_SIDE}, "
                "and a name for every class"
            )

    @property
    def scale_size(self) -> tuple[int, int]:
        """Height and width that an image is resized to before it is cropped."""
        height, width = (math.floor(side / self.crop_pct) for side in self.input_size[1:])
        return height, width

    def text(self) -> str:
        """As it stands in a file."""
        values = asdict(self)
        preprocessing = {key: values.pop(key) for key in list(values)[2:]}
        return json.dumps(
            {"format_version": FORMAT_VERSION, **values, "preprocessing": {"channels": "RGB", **preprocessing}}
        )

    @classmethod
    def from_text(cls, text: str | None, source: str | Path) -> Description:
        """Read what `text` made.

        Args:
            text: From a file's metadata; None where there is none.
            source: The file, for messages.

        Raises:
            UserError: There is no text, it is damaged, or newer than this version.
        """
        if text is None:
            raise UserError(f"{source} does not say how to prepare images; give a file that `san export` wrote")
        try:
            found = json.loads(text)
            version = found["format_version"]
            newer = isinstance(version, int) and version > FORMAT_VERSION
            description = None if newer else _described(found)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise UserError(f"{source} carries metadata that cannot be read; export it again") from None
        if description is None:
            raise UserError(
                f"{source} has format version {version}, but this version of SAN reads up to {FORMAT_VERSION}; "
                "update SAN"
            )
        return description


def _described(found: dict[str, Any]) -> Description:
    if found["format_version"] != FORMAT_VERSION or found["preprocessing"]["channels"] != "RGB":
        raise ValueError
    values: dict[str, Any] = {key: found[key] for key in ("architecture", "label_names")}
    values |= {key: found["preprocessing"][key] for key in list(_CHECKS)[2:]}
    values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Description(**values)

"""What several commands make of their arguments: lists and fractions, devices, the images behind a run."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from san.errors import UserError

__all__ = ["chosen_device", "fraction", "images_below", "listed", "numbers", "trained_on"]

_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def listed(words: str) -> tuple[str, ...]:
    """The words between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in words.split(",")))


def numbers(name: str, words: int | str) -> tuple[int, ...]:
    """The whole numbers between commas that option `name` was given; `UserError` where something else stands."""
    try:
        return tuple(map(int, listed(str(words))))
    except ValueError:
        raise UserError(f"--{name} must be whole numbers separated by commas, such as 1,4, not {words}") from None


def fraction(name: str, word: float | str) -> float:
    """The number, such as 0.5 or 8/255, that option `name` was given; `UserError` where it is none."""
    try:
        return float(Fraction(str(word)))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--{name} takes numbers and fractions such as 8/255, not {word}") from None


def images_below(folder: str | Path) -> list[str]:
    """Every image file in a folder and the folders in it, by its suffix, sorted."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in _IMAGES)


def chosen_device(name: str | None) -> Any:
    """The `torch.device` of that name, by default the GPU if there is one; `UserError` where it is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Only using a device shows whether it is there.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"there is no device {name} here; choose cpu, or cuda:0 on a machine with a GPU") from None


def trained_on(checkpoint: str, data: str | None) -> dict[str, Any]:
    """What `load_dataset` is to be asked for: where a run is named, its data, and the very split that it used."""
    config = Path(checkpoint) / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if data is None and "data" not in settings:
        raise UserError(f"{checkpoint} does not say which images to use: add --data digits, a folder or an archive")
    split = {key: settings[key] for key in ("validation_share", "seed") if key in settings}
    return {"where": data or settings["data"], **split}

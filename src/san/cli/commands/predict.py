"""`san predict`: the likeliest classes of images."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from san.cli.arguments import chosen_device
from san.errors import UserError

__all__ = ["predict"]


_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def predict(
    checkpoint: str, *images: str, top: int = 5, batch_size: int = 32, device: str | None = None, json: bool = False
) -> None:
    """Name the likeliest classes of images.

    Prints a line for each image: its path, then classes and probabilities, best first; with --json an object a line.
    A file that is no image is reported on standard error and skipped; the others are still judged, and the exit code
    is 2 then. The classes of a model of 1000 classes without names are called by ImageNet's words.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth.
        images: Image files, folders (every image below), or - for a list of paths on standard input.
        top: How many classes to name.
        batch_size: Images at a time.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        json: Print JSON lines.
    """
    from san.checkpoints import load_model
    from san.evaluation.prediction import predict

    if not images:
        raise UserError("there is nothing to predict: name image files, folders, or - for a list on standard input")
    paths = _paths(images)
    model = load_model(checkpoint).to(chosen_device(device))
    broken = judged = 0
    for prediction in predict(model, paths, top=top, batch_size=batch_size):
        judged += 1
        broken += prediction.error is not None
        if prediction.error is not None:
            print(f"san: {prediction.error}; skipped", file=sys.stderr)
        if json:
            print(jsonlib.dumps(asdict(prediction), ensure_ascii=False), flush=True)
        elif prediction.error is None:
            answers = zip(prediction.classes, prediction.probabilities, strict=True)
            print(prediction.image, *(f"{name} {100 * share:.1f} %" for name, share in answers), sep="\t", flush=True)
    if broken:
        raise UserError(f"{broken} of {judged} images could not be read and were skipped; they are named above")


def _paths(images: Iterable[str]) -> Iterator[str]:
    """Every image that was named; what was named but is not there is a mistake, noticed before the first is read."""
    missing = [image for image in images if image != "-" and not Path(image).exists()]
    if missing:
        raise UserError(f"there is no file {missing[0]}; name image files, folders, or - for a list on standard input")
    return (path for image in images for path in _below(image))


def _below(image: str) -> Iterator[str]:
    if image == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
    elif Path(image).is_dir():
        yield from sorted(str(path) for path in Path(image).rglob("*") if path.suffix.lower() in _IMAGES)
    else:
        yield image

"""`san predict`: the likeliest classes of images."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san.cli.arguments import chosen_device, images_below
from san.errors import UserError

if TYPE_CHECKING:
    from san.evaluation.answers import Prediction

__all__ = ["predict"]


def predict(
    checkpoint: str, *images: str, top: int = 5, batch_size: int = 32, device: str | None = None, json: bool = False
) -> None:
    """Name the likeliest classes of images.

    Prints a line for each image: its path, then classes and probabilities, best first; with --json an object a line.
    A file that is no image, or that the network gives no finite scores, is reported on standard error and skipped; the
    others are still judged, and the exit code is 2 then. WordNet ids such as n01440764, and the classes of a model of
    1000 without names, are called by ImageNet's words.

    Args:
        checkpoint: A run folder, a .safetensors file, a published .pth, or an .onnx file that `san export` wrote, which
            needs ONNX Runtime but not torch.
        images: Image files, folders (every image below), or - for a list of paths on standard input.
        top: How many classes to name.
        batch_size: Images at a time.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        json: Print JSON lines.
    """
    if not images:
        raise UserError("there is nothing to predict: name image files, folders, or - for a list on standard input")
    paths = _paths(images)
    broken = judged = 0
    for prediction in _predictions(checkpoint, paths, device, top=top, batch_size=batch_size):
        judged += 1
        broken += prediction.error is not None
        if prediction.error is not None:
            print(f"san: {prediction.error}; skipped", file=sys.stderr)
        if json:
            print(jsonlib.dumps(asdict(prediction), ensure_ascii=False), flush=True)
        elif prediction.error is None:
            answers = zip(prediction.classes, prediction.probabilities, strict=True)
            print(prediction.image, *(f"{name}: {100 * share:.1f} %" for name, share in answers), sep="\t", flush=True)
    if not judged:
        places = ", ".join("standard input" if image == "-" else image for image in images)
        raise UserError(f"there is no image in {places}; name image files or folders that hold some")
    if broken:
        raise UserError(f"{broken} of {judged} images could not be judged and were skipped; they are named above")


def _predictions(checkpoint: str, paths: Iterable[str], device: str | None, **options: Any) -> Iterator[Prediction]:
    """By ONNX Runtime or by PyTorch, of which only the one that is used is imported."""
    if Path(checkpoint).suffix == ".onnx":
        from san.export import OnnxModel

        if device not in (None, "cpu"):
            raise UserError(f"an .onnx file runs on the CPU, not on {device}; leave --device out")
        return OnnxModel(checkpoint).predict(paths, **options)

    from san.checkpoints import load_model
    from san.evaluation.prediction import predict

    return predict(load_model(checkpoint).to(chosen_device(device)), paths, **options)


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
        yield from images_below(image)
    else:
        yield image

"""Write a network for use elsewhere: described, compared with PyTorch, and in its place only if it agrees."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from torch import nn

from san.data import ImageSet
from san.errors import UserError
from san.evaluation.classes import class_words
from san.evaluation.robustness import spread
from san.export.agreement import Agreement, compare, random_images
from san.export.description import Description
from san.export.formats import FORMATS, OPSET

__all__ = ["Exported", "describe", "export_model"]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how well it agrees with PyTorch.

    opset: Of an ONNX file, else None.
    """

    path: Path
    format: str
    opset: int | None
    bytes: int
    description: Description
    agreement: Agreement

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            "file": str(self.path),
            "format": self.format,
            "opset": self.opset,
            "bytes": self.bytes,
            "model": self.description.architecture,
            "classes": len(self.description.label_names),
            "input_size": list(self.description.input_size),
            "check": {**asdict(self.agreement), "allowed_error": self.agreement.allowed},
        }


def export_model(
    model: nn.Module,
    path: str | Path,
    format: str = "onnx",
    *,
    input_size: int | None = None,
    images: ImageSet | None = None,
    limit: int = 64,
    overwrite: bool = False,
) -> Exported:
    """Write a network for use elsewhere, for any number of images at a time, and compare it with PyTorch.

    The file takes prepared images [B, 3, H, W] and gives scores [B, classes] before softmax, in float32, on the CPU. It
    carries its `Description`. The model itself is not changed.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it, for RGB images.
        path: The file to write, with the format's suffix.
        format: onnx; torch-export, for PyTorch, whole and portable; aot-inductor, compiled for processors like this
            one; safetensors, the checkpoint itself.
        input_size: Side of the square images that the file is for; default what the model carries.
        images: What to compare on; default random ones.
        limit: How many of them at most, spread over the set.
        overwrite: Whether to replace a file.

    Raises:
        UserError: An unknown format, a path that is taken or has another suffix, a model without classes, images too
            small for it, a compiler that is missing, or a result that differs from PyTorch's; nothing is written then.
    """
    path = _target(path, format, overwrite)
    shown = spread(random_images(max(limit, 1)) if images is None else images, limit)
    model = _plain(model, input_size)
    description = describe(model)
    # What is too small for the network is told before anything is compiled.
    with torch.inference_mode():
        model(torch.zeros(1, *description.input_size))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that moving it there is one step.
        with TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            FORMATS[format].write(model, description, unfinished)
            agreement = compare(model, FORMATS[format].load(unfinished), description, shown)
            _require(agreement, path)
            os.replace(unfinished, path)
            size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return Exported(path, format, OPSET if format == "onnx" else None, size, description, agreement)


def describe(model: nn.Module) -> Description:
    """What a file of this model says about itself; `UserError` for a model that takes no RGB images."""
    data: dict[str, Any] = resolve_model_data_config(model)
    data |= {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    return Description(str(model.architecture), tuple(class_words(model)), **data)


def _target(path: str | Path, format: str, overwrite: bool) -> Path:
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of: {', '.join(FORMATS)}")
    path, suffix = Path(path), FORMATS[format].suffix
    if path.suffix != suffix:
        raise UserError(f"{path} is no name for {format}: it must end in {suffix}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another name with --out, or replace it with --overwrite")
    return path


def _plain(model: nn.Module, input_size: int | None) -> nn.Module:
    """A copy in float32 on the CPU, in eval mode, that carries the chosen input size."""
    if not hasattr(model, "architecture"):
        raise UserError("only a model made by san.create_model can be exported, because the file must say what it is")
    if input_size is not None and input_size < 1:
        raise UserError(f"the input size is {input_size}, but it must be at least 1")
    plain = copy.deepcopy(model).cpu().float().eval()
    if input_size is not None:
        carried = cast("dict[str, Any]", plain.pretrained_cfg)
        carried["input_size"] = (carried["input_size"][0], input_size, input_size)
    return plain


def _require(agreement: Agreement, path: Path) -> None:
    if not agreement.holds:
        raise UserError(
            f"the exported network differs from PyTorch: scores by up to {agreement.max_error:.2g} where "
            f"{agreement.allowed:.2g} is allowed, and top-1 is the same on {agreement.same_top1} of "
            f"{agreement.images} images; {path} was not written"
        )

"""Reads weights from a file without running anything in it, and recognises the network that they belong to.

Two forms: ours, safetensors with everything that rebuilds the model in its metadata; and the authors' `.pth`, a pickle
that is read by PyTorch's restricted unpickler, so that a file which would run code is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from san.errors import UserError

__all__ = ["FORMAT_VERSION", "NETWORKS", "PREPROCESSING", "Weights", "identify", "is_sound", "read_weights"]

FORMAT_VERSION = 1
# Blocks, width and kernel size of every stage (paper §4.2, table 1); san4 is ours, for images of about 28 pixels.
_PAPER = {"widths": (64, 256, 512, 1024, 2048), "kernels": (3, 7, 7, 7, 7)}
NETWORKS: dict[str, dict[str, tuple[int, ...]]] = {
    "san4": {"blocks": (1, 2, 1), "widths": (64, 128, 256), "kernels": (3, 5, 5), "pools": (False, True, True)},
    "san10": {"blocks": (2, 1, 2, 4, 1), **_PAPER},
    "san15": {"blocks": (3, 2, 3, 5, 2), **_PAPER},
    "san19": {"blocks": (3, 3, 4, 6, 3), **_PAPER},
}


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: tensors by our state dict's keys, their file, and the metadata of files of ours.

    Metadata: `architecture`, `options`, `num_classes`, and `preprocessing` and `label_names` as in timm's data config.
    """

    tensors: dict[str, Tensor]
    source: Path
    metadata: dict[str, Any] | None = None


def read_weights(path: str | Path) -> Weights:
    """Read a run folder (its model.safetensors), a safetensors file, or a published `.pth`, on the CPU.

    Raises `UserError` if the file is missing, broken, newer than this version, or would run code.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        if (path / "checkpoints" / "last.ckpt").exists():
            raise UserError(f"the run in {path} has not ended; go on with: san train --resume {path}")
        what = f"{path} is a folder without model.safetensors" if path.is_dir() else f"checkpoint {path} does not exist"
        raise UserError(f"{what}; give a run folder, a .safetensors file or a published .pth")
    if file.suffix in (".onnx", ".pt2"):
        raise UserError(
            f"{file} is an exported file, which is no checkpoint; give the checkpoint that it was made from (`san "
            "predict` alone takes an .onnx file)"
        )
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_published(file)


def _read_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            stored = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error
    odd = [key for key, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise UserError(f"{file} holds {odd[0]} as {tensors[odd[0]].dtype}, but weights must be real numbers")
    return Weights(tensors, file, _metadata(stored["san"], file) if "san" in stored else None)


def _is_number(value: Any, low: float, high: float = 1e9) -> bool:
    """Whether `value` is a number with low < value ≤ high; not NaN, and not a truth value."""
    return type(value) in (int, float) and low < value <= high


def _are_numbers(values: Any, low: float = -1e9) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(_is_number(each, low) for each in values)


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# What travels with a model, as in timm's data config, and how to tell that a value makes sense.
PREPROCESSING: dict[str, Callable[[Any], bool]] = {
    "input_size": lambda size: _are_numbers(size, low=0) and [type(each) for each in size] == [int] * 3,
    "mean": _are_numbers,
    "std": lambda std: _are_numbers(std, low=0),
    "interpolation": lambda name: name in _INTERPOLATIONS,
    "crop_pct": lambda share: _is_number(share, low=0, high=1),
    "crop_mode": lambda name: name in ("center", "squash", "border"),
}
_METADATA: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda version: version == FORMAT_VERSION,
    "architecture": lambda name: isinstance(name, str),
    "options": lambda options: isinstance(options, dict),
    "num_classes": lambda number: type(number) is int and number >= 0,
    "preprocessing": lambda found: isinstance(found, dict),
    "label_names": lambda names: names is None or isinstance(names, list),
}


def _metadata(text: str, file: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
        version = metadata["format_version"]
        # A newer format may have other fields, so its version is judged before them.
        newer = isinstance(version, int) and version > FORMAT_VERSION
        sound = newer or is_sound(metadata)
    except (ValueError, LookupError, TypeError, RecursionError):
        sound = newer = False
    if not sound:
        raise UserError(
            f"{file} carries metadata that cannot be read; make the file again from the checkpoint it is of"
        )
    if newer:
        raise UserError(
            f"{file} has format version {version}, but this version of SAN reads up to {FORMAT_VERSION}; update SAN"
        )
    return metadata


def is_sound(metadata: dict[str, Any]) -> bool:
    """Whether every field is of its kind and in its range; what is left of the preprocessing may be None or missing.

    Raises `LookupError` if another field is missing.
    """
    if not all(makes_sense(metadata[key]) for key, makes_sense in _METADATA.items()):
        return False
    names, preprocessing = metadata["label_names"], metadata["preprocessing"]
    return all(
        preprocessing.get(key) is None or makes_sense(preprocessing[key]) for key, makes_sense in PREPROCESSING.items()
    ) and (names is None or (len(names) == metadata["num_classes"] and all(isinstance(name, str) for name in names)))


class _Ignored:
    """Takes the place of what a checkpoint may hold beside tensors, so that reading it runs nothing of numpy's."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# The authors' accuracies may be numpy scalars. They are not needed, and numpy trusts the bytes that it is given.
_IGNORED = [
    (_Ignored, name) for name in ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
]


def _read_published(file: Path) -> Weights:
    try:
        with safe_globals(_IGNORED):  # ty: ignore[invalid-argument-type] (pairs are documented)
            content = torch.load(file, map_location="cpu", weights_only=True)
    # Damaged pickles fail in every way that there is.
    except Exception as error:
        raise UserError(
            f"{file} is refused because it is damaged or holds more than tensors and plain values, which could run "
            "code when read; give a .safetensors file or a checkpoint as torch.save writes it"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(map(_is_plain, state.values())):
        raise UserError(f"{file} holds no state_dict of plain tensors, so it is not a published checkpoint")
    return Weights({str(key).removeprefix("module."): value for key, value in state.items()}, file)


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of real numbers that are all there: a view may repeat one of them for ever."""
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type, value.is_nested) == (torch.strided, "cpu", False)
        and value.dtype in _FLOATS + _INTEGERS
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def identify(weights: Weights) -> tuple[str, int, dict[str, Any]]:
    """Name, number of classes and options of the network that tensors with the authors' keys belong to.

    Pairwise weights do not reveal the kernel sizes; the name's are assumed. Raises `UserError` for foreign weights.
    """
    size = _size(weights.tensors)
    channels, classes = (_shape(weights.tensors, key) for key in ("conv_in.weight", "fc.weight"))
    form = "pairwise" if "layer0.0.sam.conv_p.weight" in weights.tensors else "patchwise"
    kernels = _kernels(weights.tensors, size, form) if size else ()
    if size is None or 0 in kernels or len(channels) != 4 or len(classes) != 2:
        raise UserError(
            f"{weights.source} holds no network that its weights alone reveal; those are "
            f"{', '.join(f'{size}_{form}' for size in NETWORKS for form in ('pairwise', 'patchwise'))}"
        )
    options = {"kernels": kernels, "in_chans": channels[1]}
    usual = {"kernels": NETWORKS[size]["kernels"], "in_chans": 3}
    return f"{size}_{form}", classes[0], {name: value for name, value in options.items() if value != usual[name]}


def _shape(tensors: dict[str, Tensor], key: str) -> tuple[int, ...]:
    return tuple(tensors[key].shape) if key in tensors else ()


def _size(tensors: dict[str, Tensor]) -> str | None:
    """The entry of `NETWORKS` that has as many blocks in every stage."""
    places = {match.groups() for key in tensors if (match := re.match(r"layer(\d)\.(\d+)\.sam\.", key))}
    counts = Counter(stage for stage, _ in places)
    blocks = tuple(counts[stage] for stage in sorted(counts))
    return next((size for size, network in NETWORKS.items() if network["blocks"] == blocks), None)


def _kernels(tensors: dict[str, Tensor], size: str, form: str) -> tuple[int, ...]:
    """k of every stage; for patchwise weights from γ's widths G and k²·G, 0 where they have no such form."""
    if form == "pairwise":
        return NETWORKS[size]["kernels"]
    found = []
    for stage in range(len(NETWORKS[size]["blocks"])):
        groups, outputs = (_shape(tensors, f"layer{stage}.0.sam.conv_w.{place}.weight")[:1] for place in (2, 5))
        side = isqrt(outputs[0] // groups[0]) if groups > (0,) and outputs else 0
        found.append(side if side % 2 and (side * side * groups[0],) == outputs else 0)
    return tuple(found)

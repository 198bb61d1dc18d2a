"""Reads weights from a file without running anything in it, and recognises the network that they belong to.

Two forms: ours, safetensors with everything that rebuilds the model in its metadata; and the authors' `.pth`, a pickle
that is read by PyTorch's restricted unpickler, so that a file which would run code is refused.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from san.errors import UserError

__all__ = ["FORMAT_VERSION", "Weights", "identify", "read_weights"]

FORMAT_VERSION = 1
_BLOCKS = {(2, 1, 2, 4, 1): "san10", (3, 2, 3, 5, 2): "san15", (3, 3, 4, 6, 3): "san19"}
_KERNELS = [3, 7, 7, 7, 7]


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: tensors by our state dict's keys, and the metadata of our own files (else empty).

    Metadata: `architecture`, `options`, `num_classes`, and the preprocessing and `label_names` as timm's data config.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)


def read_weights(path: str | Path) -> Weights:
    """Read a run folder (its model.safetensors), a safetensors file, or a published `.pth`, on the CPU.

    Raises `UserError` if the file is missing, broken, newer than this version, or would run code.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        what = f"{path} is a folder without model.safetensors" if path.is_dir() else f"checkpoint {path} does not exist"
        raise UserError(f"{what}; give a run folder, a .safetensors file or a published .pth")
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_published(file)


def _read_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            stored = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error
    if "san" not in stored:
        return Weights(tensors)
    try:
        metadata = json.loads(stored["san"])
        version = int(metadata["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} carries metadata that cannot be read; save it again with san convert") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version}, but this version of SAN reads up to {FORMAT_VERSION}; update SAN"
        )
    return Weights(tensors, metadata)


def _read_published(file: Path) -> Weights:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is refused: it is not a plain checkpoint, and reading it in full could run code; "
            "give a .safetensors file or a .pth with tensors and plain values only"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is not a readable PyTorch checkpoint: it is damaged or of another kind") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise UserError(f"{file} holds no state_dict of tensors, so it is not a published checkpoint")
    return Weights({str(key).removeprefix("module."): value for key, value in state.items()})


def identify(tensors: dict[str, Tensor]) -> tuple[str, int, dict[str, Any]]:
    """Name, number of classes and options of the network that tensors with the authors' keys belong to.

    Pairwise weights do not reveal the kernel sizes; the paper's are assumed. Raises `UserError` if they fit no SAN.
    """
    stages = sum(f"conv{stage}.weight" in tensors for stage in range(5))
    blocks = tuple(_count(tensors, stage) for stage in range(stages))
    if blocks not in _BLOCKS or "fc.weight" not in tensors:
        raise UserError(
            f"these weights belong to no published network: stages have {list(blocks)} blocks, but "
            + ", ".join(f"{name} has {list(found)}" for found, name in _BLOCKS.items())
        )
    options: dict[str, Any] = {}
    form = "pairwise" if "layer0.0.sam.conv_p.weight" in tensors else "patchwise"
    if form == "patchwise":
        kernels = [_patchwise_kernel(tensors, stage) for stage in range(stages)]
        options = {} if kernels == _KERNELS else {"kernels": kernels}
    return f"{_BLOCKS[blocks]}_{form}", len(tensors["fc.weight"]), options


def _count(tensors: dict[str, Tensor], stage: int) -> int:
    prefix = f"layer{stage}."
    return len({key.split(".")[1] for key in tensors if key.startswith(prefix)})


def _patchwise_kernel(tensors: dict[str, Tensor], stage: int) -> int:
    prefix = f"layer{stage}.0.sam.conv_w."
    if f"{prefix}5.weight" not in tensors or f"{prefix}2.weight" not in tensors:
        raise UserError("these weights belong to no published network: the mapping is not BN, ReLU, Linear twice")
    return round((len(tensors[f"{prefix}5.weight"]) / len(tensors[f"{prefix}2.weight"])) ** 0.5)

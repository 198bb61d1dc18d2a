"""Whole models in files: ours, which carry all that rebuilds the model, and the authors', which are recognised.

A file of ours is safetensors whose metadata holds one JSON text under "san": format version, architecture, options,
number of classes, preprocessing and class names. A file is written beside its place and then moved there, so that an
interruption never leaves half a file.
"""

from __future__ import annotations

import copy
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from timm.models import push_to_hf_hub
from torch import nn

from san.errors import UserError
from san.models import build_model, check_weights, create_model, load_weights, outline
from san.weights import FORMAT_VERSION, PREPROCESSING, identify, is_sound, read_weights

__all__ = ["convert", "hub_form", "load_model", "push_to_hub", "save_model"]


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model made by `create_model`, with its preprocessing and class names, to a .safetensors file.

    The preprocessing and `label_names` are those in `model.pretrained_cfg`. Parameters keep their dtype. Raises
    `UserError` for a foreign model, class names or preprocessing that do not fit, another suffix, or a place that
    cannot be written.
    """
    path = _target(path)
    metadata = _describe(model)
    unfinished = path.with_name(path.name + ".part")
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not save_file, which makes files that only their owner can read.
        unfinished.write_bytes(save(tensors, {"format": "pt", "san": json.dumps(metadata)}))
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        # What made the writing fail may make this fail too, and is the one to report.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def load_model(path: str | Path) -> nn.Module:
    """Rebuild the model of a run folder, a .safetensors file of ours or a published `.pth`.

    In evaluation mode, in float32, on the CPU. A folder as `push_to_hub` publishes it is taken too.
    Raises `UserError` if the file is missing, foreign or damaged, or would run code.
    """
    if (Path(path) / "config.json").is_file():
        return create_model(f"local-dir:{path}").eval()
    weights = read_weights(path)
    if weights.metadata is None:
        name, classes, options = identify(weights)
    else:
        name, classes, options = (weights.metadata[key] for key in ("architecture", "num_classes", "options"))
    try:
        planned = outline(name, classes, options, weights)
    except UserError as error:
        raise UserError(f"{weights.source} holds a network that cannot be built: {error}") from error
    check_weights(planned, weights)
    model = build_model(name, classes, options)
    load_weights(model, weights)
    return model.eval()


def convert(source: str | Path, target: str | Path) -> str:
    """Write a published checkpoint (or any that `load_model` reads) as a .safetensors file; return the network's name.

    Raises `UserError` as `load_model` and `save_model` do.
    """
    _target(target)
    model = load_model(source)
    save_model(model, target)
    return str(model.architecture)


def push_to_hub(model: nn.Module, repo_id: str, **options: Any) -> str:
    """Publish a model on the Hugging Face hub through timm; `create_model("hf-hub:" + repo_id)` loads it again.

    Only safetensors are published, unless `safe_serialization` says otherwise. timm itself loads the model too, after
    `import san.models`, which registers the architecture. `options` as `timm.models.push_to_hf_hub`.
    """
    published, description = hub_form(model)
    return str(push_to_hf_hub(published, repo_id, **description, **{"safe_serialization": True, **options}))


def hub_form(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a model as timm publishes it, and the arguments of timm's `save_for_hf` that tell how to build it."""
    metadata = _describe(model)
    published: Any = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    if metadata["options"].get("in_chans", 3) != 3:
        # timm takes published first convolutions to be for colour and would adapt this one, or drop it.
        published.pretrained_cfg["first_conv"] = None
    return published, {"model_args": metadata["options"], "model_config": {"label_names": metadata["label_names"]}}


def _target(path: str | Path) -> Path:
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} is no place for a model: its name must end in .safetensors")
    return Path(path)


def _describe(model: nn.Module) -> dict[str, Any]:
    """The metadata of a file."""
    if not hasattr(model, "architecture"):
        raise UserError("only a model made by san.create_model can be saved, because the file must say how to build it")
    described: Any = model
    names, classes = described.pretrained_cfg.get("label_names"), described.num_classes
    if names is not None and len(names) != classes:
        raise UserError(
            f"the model tells {classes} classes apart, but pretrained_cfg['label_names'] has {len(names)} names; "
            "set it to as many, or to None"
        )
    try:
        json.dumps(described.options)
    except TypeError as error:
        raise UserError(f"an option of the model is not a plain value, so no file can hold it: {error}") from error
    metadata = {
        "format_version": FORMAT_VERSION,
        "architecture": described.architecture,
        "options": described.options,
        "num_classes": classes,
        "preprocessing": {key: described.pretrained_cfg.get(key) for key in PREPROCESSING},
        "label_names": None if names is None else list(names),
    }
    if not is_sound(metadata):
        raise UserError(
            "the model's pretrained_cfg is not what files hold: label_names must be strings, and "
            f"{', '.join(PREPROCESSING)} as in timm's data config"
        )
    return metadata

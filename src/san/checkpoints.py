"""Whole models in files: ours, which carry all that rebuilds the model, and the authors', which are recognised.

A file of ours is safetensors whose metadata holds one JSON text under "san": format version, architecture, options,
number of classes, preprocessing and class names. A file is written beside its place and then moved there, so that an
interruption never leaves half a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models import push_to_hf_hub
from torch import nn

from san.errors import UserError
from san.models import create_model, default_cfgs, load_weights
from san.weights import FORMAT_VERSION, identify, read_weights

__all__ = ["PREPROCESSING", "convert", "load_model", "push_to_hub", "save_model"]

PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a model made by `create_model`, with its preprocessing and class names, to a safetensors file.

    The preprocessing and `label_names` are those in `model.pretrained_cfg`. Raises `UserError` for a foreign model.
    """
    if not hasattr(model, "architecture"):
        raise UserError("only a model made by san.create_model can be saved, because the file must say how to build it")
    metadata = {
        "format_version": FORMAT_VERSION,
        "architecture": model.architecture,
        "options": model.options,
        "num_classes": model.num_classes,
        "preprocessing": {key: model.pretrained_cfg.get(key) for key in PREPROCESSING},
        "label_names": model.pretrained_cfg.get("label_names"),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, unfinished, {"format": "pt", "san": json.dumps(metadata)})
    os.replace(unfinished, path)


def load_model(path: str | Path) -> nn.Module:
    """Rebuild the model of a run folder, a safetensors file of ours or a published `.pth`, in evaluation mode on the CPU.

    Raises `UserError` if the file is missing, foreign or damaged, or would run code.
    """
    weights = read_weights(path)
    metadata = weights.metadata
    if metadata:
        name, classes, options = _described(metadata, path)
    else:
        name, classes, options = identify(weights.tensors)
    model = create_model(name, classes, **options)
    load_weights(model, path)
    preprocessing = {key: value for key, value in metadata.get("preprocessing", {}).items() if value is not None}
    model.pretrained_cfg.update(preprocessing, num_classes=classes, label_names=metadata.get("label_names"))
    return model.eval()


def convert(source: str | Path, target: str | Path) -> str:
    """Write a published checkpoint (or any that `load_model` reads) as a safetensors file; return the network's name."""
    if Path(target).suffix != ".safetensors":
        raise UserError(f"{target} must end in .safetensors")
    model = load_model(source)
    save_model(model, target)
    return str(model.architecture)


def push_to_hub(model: nn.Module, repo_id: str, **options: Any) -> str:
    """Publish a model on the Hugging Face hub through timm; `create_model("hf-hub:" + repo_id)` loads it again.

    The other side needs `import san.models`, which registers the architecture. `options` as `timm.models.push_to_hf_hub`.
    """
    config = {**model.pretrained_cfg, "architecture": model.architecture}
    return str(push_to_hf_hub(model, repo_id, model_config=config, model_args=model.options, **options))


def _described(metadata: dict[str, Any], path: str | Path) -> tuple[str, int, dict[str, Any]]:
    try:
        name, classes, options = metadata["architecture"], int(metadata["num_classes"]), dict(metadata["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say which network it holds; save it again with san.checkpoints.save_model") from error
    if name not in default_cfgs:
        raise UserError(f"{path} holds a {name!r}, which this version of SAN does not know; update SAN")
    return name, classes, options

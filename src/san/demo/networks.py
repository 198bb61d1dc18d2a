"""The networks that the page shows: the one that the package carries, or checkpoints of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from san.attention_maps import attention_layers
from san.checkpoints import load_model
from san.errors import UserError
from san.evaluation.classes import class_words
from san.evaluation.robustness import PixelModel
from san.layers import ScalarAttention

__all__ = ["PACKAGED", "Network", "load_networks"]

PACKAGED = Path(__file__).parent / "networks" / "san4_pairwise.safetensors"
"""The network that comes with the package; the card beside it tells what it is."""


@dataclass(frozen=True)
class Network:
    """A trained network with what the page says about it.

    Args:
        name: What to call it.
        model: As `san.checkpoints.load_model` gives it, in eval mode.
        pixel_model: The same with its normalisation inside, for pixels in [0, 1].
        words: Its classes in words, by number.
        groups: How many weight groups each attention layer has, by the layer's name, in order; often empty.
        about: A line that tells its architecture, size, and input.
    """

    name: str
    model: nn.Module
    pixel_model: PixelModel
    words: list[str]
    groups: dict[str, int]
    about: str

    @property
    def first_layer(self) -> str | None:
        """The layer to look at first, one in the middle: the first ones look at a few pixels, the last at all."""
        layers = list(self.groups)
        return layers[len(layers) // 2] if layers else None


def load_networks(checkpoints: Sequence[str | Path] = (), device: Any = "cpu") -> list[Network]:
    """The named checkpoints, or the network of the package where none is named, on a device.

    Raises `UserError` for a checkpoint that is named twice, is none, or holds a network without classes or not for
    colour images.
    """
    paths = [str(path) for path in checkpoints] or [str(PACKAGED)]
    if twice := [path for place, path in enumerate(paths) if path in paths[:place]]:
        raise UserError(f"{twice[0]} is named twice; name each checkpoint once")
    return [_network(name, load_model(path).to(device)) for name, path in zip(_names(paths), paths, strict=True)]


def _names(paths: list[str]) -> list[str]:
    """The last part of each path, or the whole where others end alike; the package's own by its architecture."""
    short = ["SAN4 pairwise" if path == str(PACKAGED) else Path(path).resolve().name for path in paths]
    return [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]


def _network(name: str, model: nn.Module) -> Network:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    described = cast("Any", model)
    words = class_words(model, short=True)
    if not words:
        raise UserError(f"{name} has no classifier, so there is no answer to show; name a network that has one")
    if described.options.get("in_chans", 3) != 3:
        raise UserError(f"{name} is not for colour images of three channels; name a network that is")
    layers = attention_layers(model)
    groups = {key: 1 if isinstance(layer, ScalarAttention) else layer.groups for key, layer in layers.items()}
    pixel_model = PixelModel(model)
    _, height, width = pixel_model.preprocessing["input_size"]
    count = sum(parameter.numel() for parameter in model.parameters())
    about = f"{described.architecture} · {count:,} parameters · {len(words)} classes · {width}×{height} pixels"
    return Network(name, model, pixel_model, words, groups, about)

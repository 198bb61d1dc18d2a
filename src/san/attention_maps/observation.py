"""A network's attention layers, and what each was given when the network ran on some images.

Layers are heard through hooks, before which the fused passes of `san.fused` step aside for that one run; another
thread's run of the same network is left out. Legend: B batch, R relation width, C value channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.layers import ATTENTIONS, PairwiseAttention, PatchwiseAttention, ScalarAttention

__all__ = [
    "AttentionLayer",
    "ObservedLayer",
    "attention_layers",
    "check_pixel",
    "find_layers",
    "observe",
    "pixels_per_place",
]

AttentionLayer = PairwiseAttention | PatchwiseAttention | ScalarAttention


@dataclass(frozen=True)
class ObservedLayer:
    """An attention layer as it ran: its query and key [B, R, H, W] and value [B, C, H, W].

    `name` is the layer's in `model.named_modules()`, `image_size` the height and width of the network's input.
    """

    name: str
    layer: AttentionLayer
    query: Tensor
    key: Tensor
    value: Tensor
    image_size: tuple[int, int]

    @property
    def form(self) -> str:
        """pairwise, patchwise or scalar."""
        return next(name for name, kind in ATTENTIONS.items() if isinstance(self.layer, kind))

    @property
    def groups(self) -> int:
        """G, the number of weight groups; scalar attention has one."""
        return 1 if isinstance(self.layer, ScalarAttention) else self.layer.groups

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map that the layer looks at."""
        return self.value.shape[2], self.value.shape[3]

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the map that the layer gives."""
        return self.layer.footprint.output_size(*self.size)

    @property
    def stride(self) -> tuple[float, float]:
        """How many pixels of the image, down and across, one place of the map stands for."""
        down, across = map(pixels_per_place, self.image_size, self.size)
        return down, across

    def pixel_at(self, x: int, y: int) -> tuple[int, int]:
        """Row and column of the output pixel for pixel (x, y) of the image: the one whose centre lies nearest.

        Poolings drop the last rows of maps of odd size; pixels there belong to the last row that is kept.
        Raises `UserError` for a pixel outside the image.
        """
        check_pixel((x, y), self.image_size)
        apart = self.layer.footprint.stride
        sides = zip((y, x), self.stride, self.size, self.output_size, strict=True)
        row, column = (
            min((min(int(at / stride), size - 1) + apart // 2) // apart, last - 1) for at, stride, size, last in sides
        )
        return row, column


def check_pixel(pixel: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise `UserError` if pixel (x, y) lies outside an image of `size`, height and width."""
    (x, y), (height, width) = pixel, size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"pixel {x},{y} lies outside the preprocessed image of {width}×{height} pixels: x must be 0 to "
            f"{width - 1} and y 0 to {height - 1}"
        )


def pixels_per_place(pixels: int, places: int) -> float:
    """How many of `pixels` one of `places` stands for, on one side of a map made from another.

    The smallest power of two that leads from one to the other by halvings that round down, as poolings do, whose last
    pixels no place stands for; else the quotient, as if places shared all pixels evenly.
    """
    power = 1
    while pixels // power > places:
        power *= 2
    return power if pixels // power == places else pixels / places


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """The attention layers of a network by their names in `model.named_modules()`, in that order; often none."""
    return {name: part for name, part in model.named_modules() if isinstance(part, AttentionLayer)}


def find_layers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, AttentionLayer]:
    """The attention layers that are meant by `names`: a layer's, or that of a block or stage around several.

    None means all. Raises `UserError` for a name that means none, with those that there are.
    """
    layers = attention_layers(model)
    if names is None:
        return layers
    names = list(names)
    for name in names:
        if not any(_is_within(layer, name) for layer in layers):
            known = f"; choose among: {', '.join(layers)}" if layers else ": the network has none at all"
            raise UserError(f"there is no attention layer {name!r}{known}")
    return {layer: part for layer, part in layers.items() if any(_is_within(layer, name) for name in names)}


def _is_within(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")


def observe(model: nn.Module, images: Tensor, names: Iterable[str] | None = None) -> dict[str, ObservedLayer]:
    """Run a network once on `images` [B, channels, H, W] and keep what its attention layers were given.

    In eval mode and without gradients, on the device where network and images are; the network is left as it was. By
    name, in the order in which the layers ran; of a layer that runs several times, the last run. `names` as
    `find_layers` takes them: one layer of many costs less memory, as query, key and value of each stay as long as the
    result. Raises `UserError` for unknown names, and for a layer that does not run.
    """
    layers, found = find_layers(model, names), dict[str, ObservedLayer]()
    size = (images.shape[-2], images.shape[-1])
    hooks = [part.register_forward_pre_hook(_keeper(name, size, found)) for name, part in layers.items()]
    try:
        with eval_mode(model), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [name for name in layers if name not in found]:
        raise UserError(f"layer {silent[0]} did not run; give the network as it is before torch.compile")
    return found


def _keeper(name: str, size: tuple[int, int], found: dict[str, ObservedLayer]) -> Callable[..., None]:
    """A hook that keeps what a layer is given, in the thread that calls this."""
    thread = get_ident()

    def keep(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if get_ident() == thread:
            found.pop(name, None)
            found[name] = ObservedLayer(name, layer, *layer.transform(inputs[0]), size)

    return keep

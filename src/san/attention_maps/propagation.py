"""Attention roll-out: what a pixel of the last map draws on, followed back through all layers to the image.

Legend: B batch, G weight groups, K places, H W a layer's map.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from san.attention_maps.observation import ObservedLayer, observe, pixels_per_place
from san.attention_maps.weights import bands, reading, shares
from san.errors import UserError
from san.ops.normalization import widened

__all__ = ["middle_rollout", "rollout"]


@torch.no_grad()
def rollout(
    observed: Mapping[str, ObservedLayer], pixel: tuple[int, int], *, residual: float = 0.5
) -> dict[str, Tensor]:
    """Follow a pixel's attention from the last layer's output back to the image.

    r starts as 1 at the last layer's output pixel at `pixel` (x, y) of the image. Each layer, from the last to the
    first, hands r of an output pixel i on to its input: r'_j = residual·[i = j]·r_i + (1 − residual)·Σ_i r_i ā_ij,
    where ā is the mean over weight groups of the shares |α_ij| / Σ_l |α_il|. Where maps differ in size between layers
    (poolings), and at last from the first layer's map to the image, a pixel hands r on in equal parts to the pixels
    that it stands for. 1×1 convolutions, BatchNorm and ReLU keep r where it is.

    Gives by name what arrives at each layer's input, [B, H, W], from the last layer to the first, and under "image"
    what arrives at the image; each sums to 1 over the map. Channels and the size of what is added play no part, so it
    tells where information may come from, not what it does.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers (2020), where residual is 0.5. The layers
    are taken to run one after the other, each with a shortcut around it, as in SAN's blocks; without shortcuts,
    residual is 0. `observed` holds all of them, as `observe` gives them.

    Raises `UserError` for a pixel outside the image, no layer, or a residual outside [0, 1].
    """
    if not observed or not 0 <= residual <= 1:
        raise UserError(f"roll-out needs attention layers and a residual from 0 to 1, not {len(observed)}, {residual}")
    layers = list(observed.values())[::-1]
    row, column = layers[0].pixel_at(*pixel)
    arriving = widened(layers[0].value).new_zeros(len(layers[0].value), *layers[0].output_size)
    arriving[:, row, column] = 1
    found = {}
    for layer in layers:
        arriving = _through(layer, _resized(arriving, layer.output_size), residual)
        found[layer.name] = arriving
    return {**found, "image": _resized(arriving, layers[-1].image_size)}


def middle_rollout(model: nn.Module, images: Tensor) -> Tensor | None:
    """What the middle pixel of normalised images [B, 3, H, W] draws on: [B, H, W], its sum 1; see `rollout`.

    None for a network without attention layers.
    """
    observed = observe(model, images)
    height, width = images.shape[2:]
    return rollout(observed, (width // 2, height // 2))["image"] if observed else None


def _through(observed: ObservedLayer, arriving: Tensor, residual: float) -> Tensor:
    """r at a layer's output [B, H_out, W_out] → r at its input [B, H, W]."""
    height, width = observed.size
    step = observed.layer.footprint.stride
    found = arriving.new_zeros(len(arriving), height, width)
    found[:, ::step, ::step] = residual * arriving
    found = found.flatten(1)
    for window, weights in bands(observed, *_extent(arriving.amax((0, 2)))):
        rows, columns = reading(window, weights.device)
        share = shares(weights, rows).mean(1).to(found.dtype)
        handed = (1 - residual) * share * arriving[:, window.row : window.row_stop].flatten(1).unsqueeze(1)
        # Where zeros are read, the share is 0 and the index only has to exist.
        index = (rows * width + columns).clamp_min(0)
        found.scatter_add_(1, index.flatten().expand(len(found), -1), handed.flatten(1))
    return found.unflatten(1, (height, width))


def _extent(amounts: Tensor) -> tuple[int, int]:
    """The first of the rows that have something, and the one behind the last."""
    rows: list[int] = amounts.nonzero().flatten().tolist()
    return rows[0], rows[-1] + 1


def _resized(arriving: Tensor, size: Iterable[int]) -> Tensor:
    """Hand r on to a map of another size: [B, h, w] → [B, *size]."""
    (down, across) = (_parts(*sides).to(arriving) for sides in zip(arriving.shape[1:], size, strict=True))
    return down.mT @ arriving @ across


def _parts(places: int, pixels: int) -> Tensor:
    """What part of each of `places` each of `pixels` gets on one side of a map, by how far they overlap."""
    step = pixels_per_place(pixels, places)
    start, pixel = torch.arange(places)[:, None] * step, torch.arange(pixels)
    overlap = (torch.minimum(start + step, pixel + 1.0) - torch.maximum(start, pixel)).clamp_min(0)
    return overlap / overlap.sum(1, keepdim=True)

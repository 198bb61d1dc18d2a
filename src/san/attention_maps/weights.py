"""Attention weights α, computed from query and key through the reference formulas, for a pixel or band by band.

Legend: B batch, C value channels, G weight groups, K = k·k places of a footprint (row-major), H W map that the layer
looks at, P output pixels (row-major).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from san.attention_maps.observation import ObservedLayer
from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.layers import PatchwiseAttention, ScalarAttention
from san.ops import Position, make_call
from san.ops.footprint import Window
from san.ops.normalization import widened, without_autocast

__all__ = ["PixelAttention", "attention_weights", "bands", "pixel_attention", "reading", "shares"]

# Elements of a band's largest array.
_BAND_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class PixelAttention:
    """What one output pixel of a layer attends to: y = Σ_j α_j ⊙ β_j, in every image of the batch.

    `row` and `column` are the pixel's in the layer's output; `weights` [B, G, K] are α, in at least float32, and
    `values` [B, C, K] what they weigh, whose channel c uses group c mod G. `rows` and `columns`, int64 [K], say which
    pixel of the layer's map each place reads, −1 where zeros are read; `outside`, bool [K], which places lie outside
    the map, where the border rule decides.
    """

    observed: ObservedLayer
    row: int
    column: int
    weights: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor
    outside: Tensor

    def output(self) -> Tensor:
        """y of this pixel, rebuilt from weights and values: [B, C]."""
        values = self.values.unflatten(1, (-1, self.weights.shape[1]))
        return (self.weights.unsqueeze(1) * values).sum(-1).flatten(1)

    def shares(self) -> Tensor:
        """|α| of the places that read the map, normalised to sum 1: [B, G, K]; pairwise weights are that already."""
        return shares(self.weights.unsqueeze(3), self.rows.unsqueeze(1)).squeeze(3)

    def distance(self) -> Tensor:
        """Mean attended distance, Σ_j share_j |p − p_j|, in pixels of the image: [B, G]; see `effective_footprint`."""
        step, (down, across) = self.observed.layer.footprint.stride, self.observed.stride
        share = self.shares()
        rows, columns = self.rows.to(share) - self.row * step, self.columns.to(share) - self.column * step
        return share @ torch.hypot(rows * down, columns * across)

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of what the footprint reads, in pixels of the image from its corner."""
        down, across = self.observed.stride
        inside = self.rows >= 0
        (top, bottom), (left, right) = (map(int, each[inside].aminmax()) for each in (self.rows, self.columns))
        return left * across, top * down, (right + 1 - left) * across, (bottom + 1 - top) * down

    def on_map(self, quantity: Tensor) -> Tensor:
        """Lay a quantity of every place [..., K] onto the map [..., H, W] that is read.

        Places that the border mirrors onto the same pixel are summed; NaN where no place reads.
        """
        height, width = self.observed.size
        inside = self.rows >= 0
        index = (self.rows * width + self.columns)[inside]
        laid = quantity.new_zeros(*quantity.shape[:-1], height * width)
        laid.index_add_(-1, index, quantity[..., inside])
        seen = torch.zeros(height * width, dtype=torch.bool, device=index.device).index_fill_(0, index, True)
        return laid.masked_fill_(~seen, float("nan")).unflatten(-1, (height, width))


def attention_weights(observed: ObservedLayer) -> Tensor:
    """α of every output pixel of a layer: [B, G, K, P], in at least float32.

    `san.ops.aggregation(observed.value, weights, **observed.layer.geometry())` gives the layer's output again. Large:
    K times the layer's output over `share`; `bands` in this module gives the same in pieces, `pixel_attention` of one
    pixel. Raises `UserError` if γ's BatchNorm keeps no running averages.
    """
    return torch.cat([weights for _, weights in bands(observed)], dim=3)


def pixel_attention(observed: ObservedLayer, pixel: tuple[int, int]) -> PixelAttention:
    """What the layer's output pixel at `pixel` (x, y) of the image attends to; only its row of the map is computed.

    Raises `UserError` for a pixel outside the image, or if γ's BatchNorm keeps no running averages.
    """
    row, column = observed.pixel_at(*pixel)
    ((window, weights),) = bands(observed, row, row + 1)
    # The same place counts as outside whatever the border rule makes of it.
    beyond = replace(window.footprint, border="zeros").band(*observed.size, row, row + 1)
    rows, columns = reading(window, observed.value.device)
    values = window.gather(widened(observed.value)[:, :, window.first : window.stop])
    return PixelAttention(
        observed,
        row,
        column,
        weights=weights[..., column],
        values=values[..., column],
        rows=rows[:, column],
        columns=columns[:, column],
        outside=reading(beyond, observed.value.device)[0][:, column] < 0,
    )


def bands(observed: ObservedLayer, row: int = 0, row_stop: int | None = None) -> Iterator[tuple[Window, Tensor]]:
    """α of output rows [row, row_stop), by default of all, a few rows at a time: windows and [B, G, K, P] of each."""
    _check_averages(observed)
    call = _call(observed)
    maps = tuple(map(widened, call.maps()))
    rows, columns = observed.output_size
    stop = rows if row_stop is None else row_stop
    step = max(_BAND_ELEMENTS // max(len(call.value) * columns * call.elements_per_pixel(), 1), 1)
    for first in range(row, stop, step):
        window = call.footprint.band(*observed.size, first, min(first + step, stop))
        yield window, _weights(observed.layer, call, maps, window)


@torch.no_grad()
def _weights(layer: Any, call: Any, maps: tuple[Tensor, ...], window: Window) -> Tensor:
    with eval_mode(layer), without_autocast(call.value):
        relations = call.relate(tuple(x[:, :, window.first : window.stop] for x in maps), window)
        scores = relations if call.mapping is None else widened(call.mapping(relations))
    if isinstance(layer, PatchwiseAttention):
        return scores.squeeze(2).unflatten(1, (-1, window.footprint.places))
    return scores.softmax(dim=2)


def _call(observed: ObservedLayer) -> Any:
    """The layer's operator call, whose γ is the layer's own modules: whatever was done to them counts."""
    layer: Any = observed.layer
    maps, geometry = (observed.query, observed.key, observed.value), layer.geometry()
    if isinstance(layer, ScalarAttention):
        return make_call("pairwise_attention", *maps, relation="dot", **geometry)
    gamma = partial(_mapped, layer.conv_w)
    if isinstance(layer, PatchwiseAttention):
        return make_call("patchwise_attention", *maps, gamma, relation=layer.relation, **geometry)
    position = None
    if layer.position != "none":
        position = Position(layer.position, layer.conv_p.weight.flatten(1), layer.conv_p.bias)
    return make_call("pairwise_attention", *maps, gamma, relation=layer.relation, position=position, **geometry)


def _mapped(gamma: Any, relations: Tensor) -> Tensor:
    return gamma(relations.to(next((each.dtype for each in gamma.parameters()), relations.dtype)))


def _check_averages(observed: ObservedLayer) -> None:
    for part in observed.layer.modules():
        if isinstance(part, torch.nn.BatchNorm2d) and part.running_mean is None:
            raise UserError(
                f"γ of {observed.name} normalises by the batch that it sees, so weights of some pixels alone cannot be "
                "told; its BatchNorm must keep running averages"
            )


def reading(window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the map that the places of a window's footprints read, −1 for zeros: int64 [K, P] each."""
    rows = torch.arange(window.first, window.stop, device=device)[:, None].expand(-1, window.width)
    columns = torch.arange(window.width, device=device).expand(len(rows), -1)
    # Counted from 1, so that the border's zeros differ from the first row and column.
    places = window.gather(torch.stack([rows, columns])[None].float() + 1)
    rows, columns = (places[0].round().long() - 1).unbind(0)
    return rows, columns


def shares(weights: Tensor, rows: Tensor) -> Tensor:
    """|α| of places that read the map, divided by its sum over the footprint: [B, G, K, P] → the same.

    `rows` [K, P] as `reading` gives them; what lies on a border of zeros has no share. Where all weights of a
    footprint are 0, which only patchwise attention can have, shares are equal.
    """
    inside = (rows >= 0).to(weights.dtype)
    size = weights.abs() * inside
    size = torch.where(size.sum(2, keepdim=True) == 0, inside, size)
    return size / size.sum(2, keepdim=True)

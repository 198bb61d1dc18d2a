"""Runs any reference tile by tile: a band of output rows, or several small images, at a time.

Portable and exact, in memory that does not grow with the footprint: forward keeps maps only, backward recomputes each
tile. BatchNorm inside γ takes its moments tile by tile in a pass of its own and merges them, so training is exact too.
Autograd sees three kinds of node: a pass that maps tiles to parts of the output, a pass that maps tiles to moments, and
plain arithmetic on per-channel vectors between them; the chain rule through the statistics is therefore autograd's.
Legend: B batch, C channels, D δ's width, K places, P output pixels, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Footprint, Window
from san.ops.kernels import attention
from san.ops.kernels.aggregation import reference as aggregation
from san.ops.kernels.aggregation.reference import AggregationCall, attend
from san.ops.kernels.attention import AttentionCall
from san.ops.mapping import Mapping, linear
from san.ops.normalization import Moments, merge_moments, moments, scale_and_shift, widened, without_autocast

__all__ = ["TILE_ELEMENTS", "TRAINING_ELEMENTS", "pays", "run_aggregation", "run_attention", "supports"]

# Elements of a tile's largest array: small enough to stay in a core's cache, large enough to hide the cost of a call.
TILE_ELEMENTS = 1 << 20

# Below this size of its largest array the reference trains faster, having nothing to recompute (64 MiB in float32).
TRAINING_ELEMENTS = 1 << 24


class _Tile(NamedTuple):
    """Images [image, image_stop) of the batch and a window onto their rows."""

    image: int
    image_stop: int
    window: Window

    def take(self, x: Tensor, rows: str) -> Tensor:
        """This tile's part of x [B or 1, …, rows, W], which has `rows` "input" or "output"; "all" takes x whole."""
        if rows == "all":
            return x
        if len(x) > 1:
            x = x[self.image : self.image_stop]
        window = self.window
        start, stop = (window.first, window.stop) if rows == "input" else (window.row, window.row_stop)
        return x.narrow(-2, start, stop - start)


def _tiles(footprint: Footprint, batch: int, height: int, width: int, elements_per_pixel: int) -> list[_Tile]:
    """Cut a batch of maps into tiles of about `TILE_ELEMENTS` elements."""
    rows, columns = footprint.output_size(height, width)
    budget = max(TILE_ELEMENTS // max(columns * elements_per_pixel, 1), 1)
    images, band = max(budget // max(rows, 1), 1), min(budget, rows)
    return [
        _Tile(image, min(image + images, batch), footprint.band(height, width, row, min(row + band, rows)))
        for image in range(0, batch, images)
        for row in range(0, rows, band)
    ]


TileFunction = Callable[..., Tensor]


class _Pass(torch.autograd.Function):
    """Apply `function(window, *parts)` to every tile and join the results; backward recomputes tile by tile.

    `rows` says for every tensor how a tile takes its part. With `size` the results are parts of an output
    [B, C, *size]; without, they are stacked as [T, …].
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: TileFunction,
        tiles: list[_Tile],
        size: tuple[int, int, int] | None,
        rows: Sequence[str],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.function, ctx.tiles, ctx.size, ctx.rows = function, tiles, size, rows
        ctx.save_for_backward(*tensors)
        results = (function(tile.window, *map(tile.take, tensors, rows)) for tile in tiles)
        return torch.stack(list(results)) if size is None else _join(results, tiles, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        totals: dict[int, Tensor] = {index: torch.zeros_like(tensors[index]) for index in wanted}
        for number, tile in enumerate(ctx.tiles):
            parts = [tile.take(x, rows).detach() for x, rows in zip(tensors, ctx.rows, strict=True)]
            for index in wanted:
                parts[index].requires_grad_()
            with torch.enable_grad(), without_autocast(gradients[0]):
                result = ctx.function(tile.window, *parts)
            gradient = gradients[0][number] if ctx.size is None else _part(gradients[0], tile)
            found = torch.autograd.grad(result, [parts[index] for index in wanted], gradient, allow_unused=True)
            for index, part in zip(wanted, found, strict=True):
                if part is not None:
                    tile.take(totals[index], ctx.rows[index]).add_(part)
        return None, None, None, None, *(totals.get(index) for index in range(len(tensors)))


def _part(output: Tensor, tile: _Tile) -> Tensor:
    """A tile's part of an output [B, C, H, W], as [b, C, P]."""
    return tile.take(output, "output").flatten(2)


def _join(results: Iterable[Tensor], tiles: list[_Tile], size: tuple[int, int, int]) -> Tensor:
    batch, height, width = size
    output = torch.empty(0)
    for tile, result in zip(tiles, results, strict=True):
        if tile is tiles[0]:
            output = result.new_empty(batch, result.shape[1], height, width)
        tile.take(output, "output").copy_(result.unflatten(2, (-1, width)))
    return output


def supports(call: AttentionCall | AggregationCall) -> str | None:
    """None, or why the call cannot run in tiles."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "tiled loops over tiles in Python, which a tracer would unroll into one graph per map size"
    if isinstance(call, AttentionCall) and not isinstance(call.mapping, Mapping | None):
        return "tiled needs the mapping's layers to take statistics between them, but the mapping is an opaque callable"
    return None


def pays(call: AttentionCall | AggregationCall) -> bool:
    """Whether tiles are worth it: more than one of them in inference, large arrays in training."""
    batch, _, height, width = call.value.shape
    rows, columns = call.footprint.output_size(height, width)
    elements = batch * rows * columns * call.elements_per_pixel()
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in call.tensors())
    return elements > (TRAINING_ELEMENTS if trains else TILE_ELEMENTS)


def run_aggregation(call: AggregationCall) -> Tensor:
    """Aggregation in tiles; see `kernels/aggregation/reference.py`."""
    value, weight = widened(call.value), widened(call.weight)
    batch, _, height, width = value.shape
    size = call.footprint.output_size(height, width)
    tiles = _tiles(call.footprint, batch, height, width, call.elements_per_pixel())
    if not tiles:
        return aggregation.run(call)

    def aggregate(window: Window, value: Tensor, weight: Tensor) -> Tensor:
        return attend(weight.flatten(3), value, window)

    y = _Pass.apply(aggregate, tiles, (batch, *size), ("input", "output"), value, weight.unflatten(3, size))
    return y.to(call.value.dtype)


def run_attention(call: AttentionCall) -> Tensor:
    """Pairwise or patchwise attention in tiles; see their `reference.py`."""
    maps, value = call.maps(), widened(call.value)
    batch, _, height, width = value.shape
    tiles = _tiles(call.footprint, batch, height, width, call.elements_per_pixel())
    if not tiles:
        return attention.run(call)
    layers: list[Tensor] = []
    for layer in call.mapping.layers if isinstance(call.mapping, Mapping) else ():
        local = _moments(call, tiles, maps, layers) if layer.norm.uses_batch else None
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        layers = [*layers, *layer.norm.scale_and_shift(local), layer.weight, bias]

    def output(window: Window, *parts: Tensor) -> Tensor:
        maps, layers = parts[1 : 1 + count], parts[1 + count :]
        return call.attend(_scores(call, window, maps, layers), parts[0], window)

    count = len(maps)
    rows = ["input"] * (1 + count) + ["all"] * len(layers)
    size = (batch, *call.footprint.output_size(height, width))
    return _Pass.apply(output, tiles, size, rows, value, *maps, *layers).to(call.value.dtype)


def _scores(call: AttentionCall, window: Window, maps: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    """γ of a tile; `layers` are scale, shift, weight and bias of each layer so far."""
    x = call.relate(tuple(maps), window)
    for index in range(0, len(layers), 4):
        scale, shift, weight, bias = layers[index : index + 4]
        x = linear(scale_and_shift(x, scale, shift).relu_(), weight, bias)
    return x


def _moments(call: AttentionCall, tiles: list[_Tile], maps: Sequence[Tensor], layers: Sequence[Tensor]) -> Moments:
    """Moments of what the next layer of γ normalises, over all tiles."""
    count = len(maps)

    def packed(window: Window, *parts: Tensor) -> Tensor:
        found = moments(_scores(call, window, parts[:count], parts[count:]))
        return torch.stack([found.count.expand_as(found.mean), found.mean, found.deviation])

    rows = ["input"] * count + ["all"] * len(layers)
    parts = _Pass.apply(packed, tiles, None, rows, *maps, *layers)
    return merge_moments(Moments(parts[:, 0, 0], parts[:, 1], parts[:, 2]))


for _operator, _run in (
    ("aggregation", run_aggregation),
    ("pairwise_attention", run_attention),
    ("patchwise_attention", run_attention),
):
    dispatch.register(_operator, "tiled", supports=supports, run=_run, pays=pays)

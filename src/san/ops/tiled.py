"""Runs any reference tile by tile: a band of output rows, or several small images, at a time.

Portable and exact, in memory that does not grow with the footprint: forward keeps maps only, in at least float32, and
backward recomputes each tile. BatchNorm inside γ takes its moments tile by tile in a pass of its own and merges them,
so training is exact too. Autograd sees three kinds of node: a pass that maps tiles to parts of the output, a pass that
maps tiles to moments, and plain arithmetic on per-channel vectors between them; the chain rule through the statistics
is therefore autograd's.
Legend: B batch, C channels, D δ's width, K places, P output pixels, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

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


class _OutputPass(torch.autograd.Function):
    """Apply `function(window, *parts)` to every tile and join the results to an output [B, C, *size].

    `rows` says for every tensor how a tile takes its part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: TileFunction,
        tiles: list[_Tile],
        rows: Sequence[str],
        size: tuple[int, int],
        *tensors: Tensor,
    ) -> Tensor:
        _remember(ctx, function, tiles, rows, tensors)
        output = torch.empty(0)
        for tile in tiles:
            result = function(tile.window, *map(tile.take, tensors, rows)).unflatten(2, (-1, size[1]))
            if tile is tiles[0]:
                output = result.new_empty(tiles[-1].image_stop, result.shape[1], *size)
            tile.take(output, "output").copy_(result)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _pulled_back(ctx, ctx.saved_tensors, lambda tile, result: tile.take(gradients[0], "output").flatten(2))


class _MomentsPass(torch.autograd.Function):
    """Mean [D] and squared deviations [D] over all tiles of what `function(window, *parts)` gives, [b, D, …] each."""

    @staticmethod
    def forward(
        ctx: Any, function: TileFunction, tiles: list[_Tile], rows: Sequence[str], count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = (moments(function(tile.window, *map(tile.take, tensors, rows))) for tile in tiles)
        _, mean, deviation = reduce(_merged, parts)
        ctx.count = count
        _remember(ctx, function, tiles, rows, (*tensors, mean))
        return mean, deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The mean's derivative is 1/n; the deviation's is 2(x − mean), which the mean's own motion leaves alone.
        # Asked for once: activation checkpointing hands out saved tensors only once.
        *tensors, mean = ctx.saved_tensors
        scale, shift = 2 * gradients[1], gradients[0] / ctx.count - 2 * gradients[1] * mean
        return _pulled_back(ctx, tensors, lambda tile, result: scale_and_shift(result, scale, shift))


def _merged(first: Moments, second: Moments) -> Moments:
    return merge_moments(Moments(*map(torch.stack, zip(first, second, strict=True))))


def _remember(
    ctx: Any, function: TileFunction, tiles: list[_Tile], rows: Sequence[str], tensors: Sequence[Tensor]
) -> None:
    ctx.function, ctx.tiles, ctx.rows = function, tiles, rows
    ctx.save_for_backward(*tensors)


def _pulled_back(
    ctx: Any, tensors: Sequence[Tensor], gradient_of: Callable[[_Tile, Tensor], Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of a pass, tile by tile: recompute a result, ask for its gradient, add what parts derive from it."""
    wanted = [index for index, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
    totals = {index: torch.zeros_like(tensors[index]) for index in wanted}
    for tile in ctx.tiles:
        parts = [tile.take(x, rows).detach() for x, rows in zip(tensors, ctx.rows, strict=True)]
        for index in wanted:
            parts[index].requires_grad_()
        with torch.enable_grad(), without_autocast(parts[0]):
            result = ctx.function(tile.window, *parts)
        gradient = gradient_of(tile, result.detach())
        found = torch.autograd.grad(result, [parts[index] for index in wanted], gradient, allow_unused=True)
        for index, part in zip(wanted, found, strict=True):
            if part is not None:
                tile.take(totals[index], ctx.rows[index]).add_(part)
    return None, None, None, None, *(totals.get(index) for index in range(len(tensors)))


def supports(call: AttentionCall | AggregationCall) -> str | None:
    """None, or why the call cannot run in tiles."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "tiled loops over tiles in Python, which a tracer would unroll into one graph per map size"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "tiled has a backward of its own, which torch.func and forward-mode differentiation cannot transform"
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

    y = _OutputPass.apply(aggregate, tiles, ("input", "output"), size, value, weight.unflatten(3, size))
    return y.to(call.value.dtype)


def run_attention(call: AttentionCall) -> Tensor:
    """Pairwise or patchwise attention in tiles; see their `reference.py`."""
    maps, formulas = [widened(x) for x in call.maps()], call.without_tensors()
    batch, _, height, width = call.value.shape
    tiles = _tiles(call.footprint, batch, height, width, call.elements_per_pixel())
    if not tiles:
        return attention.run(call)
    size = call.footprint.output_size(height, width)
    samples = batch * size[0] * size[1] * call.samples_per_pixel()
    layers: list[Tensor] = []
    for layer in call.mapping.layers if isinstance(call.mapping, Mapping) else ():
        local = _moments(formulas, tiles, samples, maps, layers) if layer.norm.uses_batch else None
        weight = widened(layer.weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else widened(layer.bias)
        layers = [*layers, *layer.norm.scale_and_shift(local), weight, bias]
    count = len(maps)  # not the maps themselves: what a pass captures lives as long as its output

    def output(window: Window, *parts: Tensor) -> Tensor:
        scores = _scores(formulas, window, parts[1 : 1 + count], parts[1 + count :])
        return formulas.attend(scores, parts[0], window)

    rows = ["input"] * (1 + count) + ["all"] * len(layers)
    return _OutputPass.apply(output, tiles, rows, size, widened(call.value), *maps, *layers).to(call.value.dtype)


def _scores(formulas: AttentionCall, window: Window, maps: Sequence[Tensor], layers: Sequence[Tensor]) -> Tensor:
    """γ of a tile; `layers` are scale, shift, weight and bias of each layer so far."""
    x = formulas.relate(tuple(maps), window)
    for index in range(0, len(layers), 4):
        scale, shift, weight, bias = layers[index : index + 4]
        x = linear(scale_and_shift(x, scale, shift).relu_(), weight, bias)
    return x


def _moments(
    formulas: AttentionCall, tiles: list[_Tile], samples: int, maps: Sequence[Tensor], layers: Sequence[Tensor]
) -> Moments:
    """Moments of what the next layer of γ normalises, over all tiles."""
    count = len(maps)

    def normalised(window: Window, *parts: Tensor) -> Tensor:
        return _scores(formulas, window, parts[:count], parts[count:])

    rows = ["input"] * count + ["all"] * len(layers)
    mean, deviation = _MomentsPass.apply(normalised, tiles, rows, samples, *maps, *layers)
    return Moments(mean.new_full((), samples), mean, deviation)


for _operator, _run in (
    ("aggregation", run_aggregation),
    ("pairwise_attention", run_attention),
    ("patchwise_attention", run_attention),
):
    dispatch.register(_operator, "tiled", supports=supports, run=_run, pays=pays)

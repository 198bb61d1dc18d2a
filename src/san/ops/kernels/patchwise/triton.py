"""Patchwise attention on GPUs by the Triton kernels of `device.py`, as custom operators that autograd and tracers know.

γ's first Linear over δ = [φ_i, ψ_R(i)] is that over the query, a footprint of one place, and that over the keys: two
calls of one operator, which takes BatchNorm's moments, folds it, and in backward goes back through it. What it gives is
a map [B, P, O] in float32; layers between are PyTorch's; the last one meets aggregation in `aggregation/triton.py`.
Legend: B batch, R relation width, K places, D δ's width, O what a Linear gives, P output pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from san.ops import dispatch
from san.ops.footprint import Footprint
from san.ops.kernels.aggregation.triton import aggregate_hidden, attend_hidden
from san.ops.kernels.gpu import launch, normalization
from san.ops.kernels.gpu.launch import as_map, block, floats, is_last, laid_out, mode, programs, shares
from san.ops.kernels.gpu.plan import Plan
from san.ops.kernels.patchwise.reference import PatchwiseCall
from san.ops.mapping import Mapping, MappingLayer
from san.ops.normalization import BatchNorm

__all__ = ["run", "supports"]


@dataclass(frozen=True)
class _Plan(Plan):
    """Sizes and constants of a call on key [B, R, H, W]; `given` is O, 0 where no Linear takes part."""

    given: int = 0

    @property
    def channels(self) -> int:
        return self.map.shape[1]

    @property
    def block(self) -> int:
        """Channels of O that a program takes."""
        return min(block(self.given), 64)

    def constants(self, *, backward: bool = False) -> dict[str, Any]:
        found = {
            "R": self.channels,
            "LAST": is_last(self.map),
            "LANES": self.lanes(),
            "num_warps": 4 if self.channels <= 64 else 8,
            "BLOCK_R": block(self.channels),
            **launch.geometry(self.footprint, *self.map.shape[2:]),
        }
        if not self.given:
            return found
        return found | {"GIVEN": self.given, "BLOCK_O": self.block, "MODE": mode(self.map, backward=backward)}


def _by_channel(x: Tensor) -> Tensor:
    """[n, K, R] as [n, R · K], columns c · K + j."""
    return x.transpose(1, 2).flatten(1)


@torch.library.custom_op("san::triton_patchwise_hidden", mutates_args=())
def _forward(
    key: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    matrix: Tensor,
    averages: list[Tensor],
    eps: float,
    batch: bool,
    group: str,
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """matrix · relu(BatchNorm([ψ_j]_j)) [B, P, O] of a matrix [O, R · K]; scale and shift [2, R · K] by place, and
    BatchNorm's statistics [3, R · K]."""
    from san.ops.kernels.patchwise.device import hidden

    key = laid_out(key, is_last(key))
    plan = _Plan(key, geometry, len(matrix))
    places = plan.footprint.places
    statistics, affine = _observe(plan, group) if batch else None, floats(key, 2, places, key.shape[1])
    statistics = normalization.fold(statistics, averages, norm_weight, norm_bias, eps, affine, places)
    output = floats(key, len(key), plan.size[0] * plan.size[1], plan.given)
    if plan.total:
        grid = (programs(plan.total, plan.lanes()), programs(plan.given, plan.block))
        launch.start(hidden, grid, key, affine, _layer(matrix, places), output, *plan.sizes, **plan.constants())
    return output, affine, statistics


def _layer(matrix: Tensor, places: int) -> Tensor:
    """W [O, R · K] as [K, R, O]."""
    return launch.single(matrix.detach().view(len(matrix), -1, places).permute(2, 1, 0))


def _observe(plan: _Plan, group: str) -> Tensor:
    """Statistics of every channel at every place."""
    from san.ops.kernels.patchwise.device import observe

    places, lanes = plan.footprint.places, plan.lanes()
    tiles = programs(plan.total, lanes)
    count, each = shares(tiles, places)
    parts = torch.zeros((count, 2, places, plan.channels), dtype=torch.float32, device=plan.map.device)
    if plan.total:
        constants = replace(plan, given=0).constants()
        launch.start(observe, (places, count), plan.map, parts, *plan.sizes, each, **constants)
    return normalization.merged(parts.flatten(2), plan.total, each * lanes, group, places=places)


@_forward.register_fake
def _fake_forward(key: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    matrix, geometry = rest[2], rest[-1]
    rows, columns = Footprint.from_numbers(geometry).output_size(*key.shape[2:])
    width = matrix.shape[1]
    output, affine = floats(key, len(key), rows * columns, len(matrix)), floats(key, 2, geometry[0] ** 2, key.shape[1])
    return output, affine, key.new_empty((3, width), dtype=torch.float64)


@torch.library.custom_op("san::triton_patchwise_hidden_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    key: Tensor,
    affine: Tensor,
    statistics: Tensor,
    norm_weight: Tensor,
    matrix: Tensor,
    eps: float,
    batch: bool,
    group: str,
    geometry: list[int],
    of_mapping: bool,
) -> list[Tensor]:
    """Gradients of key, BatchNorm's weight and bias, and matrix; zeros instead of those of γ where nothing needs them,
    without `of_mapping` and without a batch's statistics."""
    from san.ops.kernels.patchwise.device import hidden_backward_key

    key, gradient = laid_out(key, is_last(key)), gradient.contiguous()
    plan = _Plan(key, geometry, len(matrix))
    layer = _layer(matrix, plan.footprint.places)
    if of_mapping or batch:
        of_matrix, of_affine = _parameter_gradients(plan, gradient, affine, layer)
    else:
        of_matrix, of_affine = torch.zeros_like(matrix), statistics.new_zeros(2, matrix.shape[1])
    places = plan.footprint.places
    back = normalization.back(statistics, norm_weight, eps, of_affine, batch=batch, group=group, places=places)
    arguments = (hidden_backward_key, gradient, key, affine, layer, back.slopes)
    of_key = plan.launch_bordered(*arguments, **plan.constants(backward=True), SLOPES=batch)
    own = back.parameters.to(norm_weight.dtype)
    return [of_key, *map(torch.clone, own), of_matrix.to(matrix.dtype)]


def _parameter_gradients(plan: _Plan, gradient: Tensor, affine: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
    """Of the matrix [O, R · K], and of scale and shift [2, R · K] in float64."""
    from san.ops.kernels.patchwise.device import hidden_backward_parameters

    places, blocks = plan.footprint.places, programs(plan.given, plan.block)
    count, each = shares(programs(plan.total, plan.lanes()), places)
    size = places * plan.channels
    sums = floats(gradient, count * size * (plan.given + 2 * blocks))
    if plan.total:
        tensors = (gradient, plan.map, affine, layer, sums)
        grid = (places, count, blocks)
        launch.start(hidden_backward_parameters, grid, *tensors, *plan.sizes, each, **plan.constants(backward=True))
    else:
        sums.zero_()
    of_layer, of_affine = sums.split([count * size * plan.given, count * size * 2 * blocks])
    of_layer = of_layer.view(count, places, plan.channels, plan.given).sum(0)
    of_affine = of_affine.view(blocks * count, 2, places, plan.channels).sum(0, dtype=torch.float64)
    return of_layer.permute(2, 1, 0).flatten(1), _by_channel(of_affine)


@_backward.register_fake
def _fake_backward(gradient: Tensor, key: Tensor, *rest: Any) -> list[Tensor]:
    norm_weight, matrix = rest[2:4]
    like = torch.empty_like(key, memory_format=torch.channels_last if is_last(key) else torch.contiguous_format)
    return [like, torch.empty_like(norm_weight), torch.empty_like(norm_weight), matrix.new_empty(matrix.shape)]


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    key, norm_weight, _, matrix, averages, *ctx.options = inputs
    ctx.averages = len(averages)
    _, affine, statistics = output
    ctx.mark_non_differentiable(affine, statistics)
    ctx.save_for_backward(key, affine, statistics, norm_weight, matrix)


def _gradients(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    of_mapping = any(ctx.needs_input_grad[1:4])
    return *_backward(gradient, *ctx.saved_tensors, *ctx.options, of_mapping), [None] * ctx.averages, *[None] * 4


_forward.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("san::triton_patchwise_star", mutates_args=())
def _star(query: Tensor, key: Tensor, geometry: list[int]) -> Tensor:
    """δ = [φ_iᵀψ_j]_j as a map [B, P, K] in float32."""
    from san.ops.kernels.patchwise.device import star

    last = is_last(key)
    query, key = laid_out(query, last), laid_out(key, last)
    plan = _Plan(key, geometry)
    output = _fake_star(query, key, geometry)
    if plan.total:
        launch.start(star, (programs(plan.total, plan.lanes()),), query, key, output, *plan.sizes, **plan.constants())
    return output


@_star.register_fake
def _fake_star(query: Tensor, key: Tensor, geometry: list[int]) -> Tensor:
    rows, columns = Footprint.from_numbers(geometry).output_size(*key.shape[2:])
    return floats(key, len(key), rows * columns, geometry[0] ** 2)


@torch.library.custom_op("san::triton_patchwise_star_backward", mutates_args=())
def _star_backward(gradient: Tensor, query: Tensor, key: Tensor, geometry: list[int]) -> tuple[Tensor, Tensor]:
    from san.ops.kernels.patchwise.device import star_backward_key, star_backward_query

    last = is_last(key)
    query, key, gradient = laid_out(query, last), laid_out(key, last), gradient.contiguous()
    plan = _Plan(key, geometry)
    of_query = floats(key, len(key), plan.size[0] * plan.size[1], plan.channels)
    if plan.total:
        grid = (programs(plan.total, plan.lanes()),)
        launch.start(star_backward_query, grid, gradient, key, of_query, *plan.sizes, **plan.constants())
    of_key = plan.launch_bordered(star_backward_key, gradient, query, **plan.constants())
    return as_map(of_query, plan.size, query, plan.footprint.stride), of_key


@_star_backward.register_fake
def _fake_star_backward(gradient: Tensor, query: Tensor, key: Tensor, geometry: list[int]) -> tuple[Tensor, Tensor]:
    last = torch.channels_last if is_last(key) else torch.contiguous_format
    return torch.empty_like(query, memory_format=last), torch.empty_like(key, memory_format=last)


def _remember_star(ctx: Any, inputs: Any, output: Tensor) -> None:
    query, key, ctx.geometry = inputs
    ctx.save_for_backward(query, key)


def _star_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_star_backward(gradient, *ctx.saved_tensors, ctx.geometry), None


_star.register_autograd(_star_gradients, setup_context=_remember_star)


def supports(call: PatchwiseCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    if call.relation not in ("concatenation", "star"):
        return f"triton knows the relations concatenation and star, but not {call.relation!r}"
    if call.relation == "concatenation" and call.mapping is None:
        return "triton never writes concatenation out, so it needs a mapping to fuse with"
    refusal = launch.refusal(call)
    if refusal:
        return refusal
    layers = call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    groups = layers[-1].weight.shape[0] // call.footprint.places if layers else 1
    widths, relation = [*(len(layer.weight) for layer in layers[:-1]), groups], call.key.shape[1]
    return launch.width_refusal(relation, widths, call.value.shape[1]) or launch.memory_refusal(
        call, max(relation, *widths)
    )


def run(call: PatchwiseCall) -> Tensor:
    """Patchwise attention; see `reference.py`."""
    layers = call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    numbers = call.footprint.numbers()
    if call.relation == "star":
        x = _star(call.query, call.key, numbers)
    else:
        x, layers = _first(call, layers[0]), layers[1:]
    for layer in layers[:-1]:
        x = _between(x, layer)
    return attend_hidden(x, call.value, layers[-1], numbers) if layers else aggregate_hidden(x, call.value, numbers)


def _first(call: PatchwiseCall, layer: MappingLayer) -> Tensor:
    """γ's first layer on δ: [B, P, O]."""
    own, width = call.query.shape[1], layer.weight.shape[1]
    alone = [1, call.footprint.stride, 1, 0]
    parts = [(call.query, slice(0, own), alone), (call.key, slice(own, width), call.footprint.numbers())]
    statistics, z = [], layer.weight.new_zeros((), dtype=torch.float32)
    norm_weight, norm_bias, matrix, bias = normalization.parameters(layer)
    for map_, part, geometry in parts:
        averages = [x[part] for x in normalization.averages(layer.norm)]
        options = (layer.norm.eps, layer.norm.uses_batch, normalization.group_name(layer.norm), geometry)
        columns = matrix[:, part].contiguous()
        found, _, seen = _forward(map_, norm_weight[part], norm_bias[part], columns, averages, *options)
        statistics.append(seen.detach())
        z = z + found
    normalization.move_running(layer.norm, torch.cat(statistics, dim=1))
    return z + bias.float()


def _between(x: Tensor, layer: MappingLayer) -> Tensor:
    """A layer of γ that takes a map and gives one, [B, P, ·]."""
    norm: BatchNorm = layer.norm
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(F.relu(norm(x.transpose(1, 2))).transpose(1, 2), layer.weight.float(), bias)


if launch.installed():
    dispatch.register("patchwise_attention", "triton", supports=supports, run=run, pays=launch.pays)

"""Aggregation on GPUs by the Triton kernels of `device.py`, as custom operators that autograd and tracers know.

`attend_hidden` is aggregation with patchwise γ's last layer, BatchNorm included, so that its weights never lie in
memory. Legend: B batch, C value channels, G weight groups, K places, P output pixels, N = B · P, H width of a hidden
map [B, P, H] in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Footprint
from san.ops.kernels.aggregation.reference import AggregationCall
from san.ops.kernels.gpu import launch, normalization
from san.ops.kernels.gpu.launch import block, is_last, laid_out, like_value, mode, programs, shares
from san.ops.kernels.gpu.plan import Plan
from san.ops.mapping import MappingLayer

__all__ = ["aggregate_hidden", "attend_hidden", "run", "supports"]


@dataclass(frozen=True)
class _Plan(Plan):
    """Sizes and constants of a call on value; `hidden` is H, 0 where α comes from memory."""

    groups: int
    hidden: int = 0
    pixels_first: bool = False

    @property
    def most_lanes(self) -> int:
        return 16 if self.map.shape[1] > 256 else 32

    def constants(self, *, backward: bool = False, in_memory: bool = True) -> dict[str, Any]:
        share = self.map.shape[1] // self.groups
        found = {
            "G": self.groups,
            "SHARE": share,
            "WIDTH": self.hidden,
            "LAST": is_last(self.map),
            "MODE": mode(self.map, backward=backward),
            "LANES": self.lanes(),
            "BLOCK_G": block(self.groups),
            "BLOCK_S": launch.members(share),
            "BLOCK_H": block(self.hidden),
            **launch.geometry(self.footprint, *self.map.shape[2:]),
        }
        return found | ({"PIXELS_FIRST": self.pixels_first} if in_memory else {})

    def launch(self, kernel: Any, *arguments: Any, backward: bool = False) -> None:
        """Over all looking pixels."""
        if self.total:
            grid = (programs(self.total, self.lanes()),)
            launch.start(kernel, grid, *arguments, *self.sizes, **self.constants(backward=backward))


@torch.library.custom_op("san::triton_aggregation", mutates_args=())
def _forward(value: Tensor, weight: Tensor, groups: int, geometry: list[int], pixels_first: bool) -> Tensor:
    """y of value [B, C, H, W] and α [B, G, K, P], or with `pixels_first` [B, P, G · K]."""
    from san.ops.kernels.aggregation.device import aggregate

    value, weight = laid_out(value, is_last(value)), weight.contiguous().resolve_neg()
    plan = _Plan(value, geometry, groups, pixels_first=pixels_first)
    output = like_value(value, plan.size)
    plan.launch(aggregate, value, *[weight] * 5, output)
    return output


@_forward.register_fake
def _fake_forward(value: Tensor, weight: Tensor, groups: int, geometry: list[int], pixels_first: bool) -> Tensor:
    return like_value(value, _Plan(value, geometry, groups).size)


@torch.library.custom_op("san::triton_aggregation_backward", mutates_args=())
def _backward(
    gradient: Tensor, value: Tensor, weight: Tensor, groups: int, geometry: list[int], pixels_first: bool
) -> tuple[Tensor, Tensor]:
    from san.ops.kernels.aggregation.device import aggregate_backward_value, aggregate_backward_weight

    last = is_last(value)
    value, gradient, weight = laid_out(value, last), laid_out(gradient, last), weight.contiguous().resolve_neg()
    plan = _Plan(value, geometry, groups, pixels_first=pixels_first)
    of_weight = torch.empty_like(weight)
    plan.launch(aggregate_backward_weight, value, gradient, *[weight] * 3, of_weight, *[of_weight] * 2, backward=True)
    of_value = plan.launch_bordered(aggregate_backward_value, gradient, *[weight] * 5, **plan.constants(backward=True))
    return of_value, of_weight


@_backward.register_fake
def _fake_backward(gradient: Tensor, value: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_value(value, value.shape[2:]), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    value, weight, *ctx.options = inputs
    ctx.save_for_backward(value, weight)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


_forward.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("san::triton_attend_hidden", mutates_args=())
def _attend(
    hidden: Tensor,
    value: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    matrix: Tensor,
    bias: Tensor,
    averages: list[Tensor],
    eps: float,
    batch: bool,
    group: str,
    geometry: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """y of α = matrix · relu(BatchNorm(hidden)) + bias, scale and shift [2, H], and BatchNorm's statistics [3, H]."""
    from san.ops.kernels.aggregation.device import aggregate

    value, hidden = laid_out(value, is_last(value)), hidden.contiguous()
    plan = _hidden_plan(hidden, value, matrix, geometry)
    statistics, affine = None, launch.floats(hidden, 2, plan.hidden)
    if batch:
        statistics = normalization.of_rows(hidden, plan.hidden, group)
    statistics = normalization.fold(statistics, averages, norm_weight, norm_bias, eps, affine)
    output = like_value(value, plan.size)
    plan.launch(aggregate, value, value, hidden, affine, *_by_place(matrix, bias, plan), output)
    return output, affine, statistics


def _hidden_plan(hidden: Tensor, value: Tensor, matrix: Tensor, geometry: list[int]) -> _Plan:
    return _Plan(value, geometry, matrix.shape[0] // geometry[0] ** 2, hidden.shape[2])


def _by_place(matrix: Tensor, bias: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """W [G · K, H] as [K, H, G] and b as [K, G]."""
    places = plan.footprint.places
    weight = matrix.detach().view(plan.groups, places, plan.hidden).permute(1, 2, 0)
    return launch.single(weight), launch.single(bias.detach().view(plan.groups, places).T)


@_attend.register_fake
def _fake_attend(hidden: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    width, size = hidden.shape[2], Footprint.from_numbers(rest[-1]).output_size(*value.shape[2:])
    statistics = hidden.new_empty((3, width), dtype=torch.float64)
    return like_value(value, size), launch.floats(hidden, 2, width), statistics


@torch.library.custom_op("san::triton_attend_hidden_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    hidden: Tensor,
    value: Tensor,
    affine: Tensor,
    statistics: Tensor,
    norm_weight: Tensor,
    matrix: Tensor,
    bias: Tensor,
    eps: float,
    batch: bool,
    group: str,
    geometry: list[int],
) -> list[Tensor]:
    """Gradients of hidden, value, BatchNorm's weight and bias, matrix and bias."""
    from san.ops.kernels.aggregation.device import aggregate_backward_value, aggregate_backward_weight

    last = is_last(value)
    value, gradient, hidden = laid_out(value, last), laid_out(gradient, last), hidden.contiguous()
    plan = _hidden_plan(hidden, value, matrix, geometry)
    weight, offset = _by_place(matrix, bias, plan)
    of_hidden = torch.empty_like(hidden)
    sums = launch.floats(hidden, programs(plan.total, plan.lanes()), 2, plan.hidden)
    tensors = (value, gradient, hidden, affine, weight, value, of_hidden, sums)
    plan.launch(aggregate_backward_weight, *tensors, backward=True)
    of_affine = sums.sum(0, dtype=torch.float64)
    back = normalization.back(statistics, norm_weight, eps, of_affine, batch=batch, group=group)
    if batch:
        slope, intercept = back.slopes
        of_hidden += torch.addcmul(intercept, hidden, slope)
    tensors = (gradient, value, hidden, affine, weight, offset)
    of_value = plan.launch_bordered(aggregate_backward_value, *tensors, **plan.constants(backward=True))
    of_matrix, of_bias = _parameter_gradients(plan, value, gradient, hidden, affine)
    own = back.parameters.to(norm_weight.dtype)
    return [of_hidden, of_value, *map(torch.clone, own), of_matrix.to(matrix.dtype), of_bias.to(bias.dtype)]


def _parameter_gradients(
    plan: _Plan, value: Tensor, gradient: Tensor, hidden: Tensor, affine: Tensor
) -> tuple[Tensor, Tensor]:
    """Of W [G · K, H] and b [G · K]."""
    from san.ops.kernels.aggregation.device import aggregate_backward_parameters

    places, lanes = plan.footprint.places, plan.lanes()
    count, tiles = shares(programs(plan.total, lanes), places)
    sums = torch.zeros((count, places, plan.hidden + 1, plan.groups), dtype=torch.float32, device=value.device)
    if plan.total:
        constants = plan.constants(backward=True, in_memory=False)
        launch.start(
            aggregate_backward_parameters,
            (places, count),
            value,
            gradient,
            hidden,
            affine,
            sums,
            *plan.sizes,
            tiles,
            **constants,
        )
    total = sums.sum(0)
    of_matrix, of_bias = total[:, :-1].permute(2, 0, 1), total[:, -1].T
    # Clones, because what an operator gives may not share memory.
    return of_matrix.reshape(-1, plan.hidden).clone(), of_bias.reshape(-1).clone()


@_attend_backward.register_fake
def _fake_attend_backward(gradient: Tensor, hidden: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    norm_weight, matrix, bias = rest[2:5]
    maps = [torch.empty_like(hidden, memory_format=torch.contiguous_format), like_value(value, value.shape[2:])]
    return [*maps, *(torch.empty_like(x) for x in (norm_weight, norm_weight, matrix, bias))]


def _remember_attend(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, value, norm_weight, _, matrix, bias, averages, *ctx.options = inputs
    ctx.averages = len(averages)
    _, affine, statistics = output
    ctx.mark_non_differentiable(affine, statistics)
    ctx.save_for_backward(hidden, value, affine, statistics, norm_weight, matrix, bias)


def _attend_gradients(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    of_hidden, of_value, *parameters = _attend_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return of_hidden, of_value, *parameters, [None] * ctx.averages, *[None] * 4


_attend.register_autograd(_attend_gradients, setup_context=_remember_attend)


def attend_hidden(hidden: Tensor, value: Tensor, layer: MappingLayer, geometry: list[int]) -> Tensor:
    """Aggregation of value [B, C, H, W] by γ's last layer on a hidden map [B, P, H] in float32."""
    norm = layer.norm
    parameters, averages = normalization.parameters(layer), normalization.averages(norm)
    options = (norm.eps, norm.uses_batch, normalization.group_name(norm), geometry)
    output, _, statistics = _attend(hidden, value, *parameters, averages, *options)
    normalization.move_running(norm, statistics.detach())
    return output


def aggregate_hidden(hidden: Tensor, value: Tensor, geometry: list[int]) -> Tensor:
    """Aggregation by weights [B, P, G · K]."""
    return _forward(value, hidden, hidden.shape[2] // geometry[0] ** 2, geometry, True)


def supports(call: AggregationCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    groups = call.weight.shape[1]
    return (
        launch.refusal(call)
        or launch.width_refusal(1, [groups], call.value.shape[1])
        or launch.memory_refusal(call, groups)
    )


def run(call: AggregationCall) -> Tensor:
    """Aggregation; see `reference.py`."""
    return _forward(call.value, call.weight, call.weight.shape[1], call.footprint.numbers(), False)


if launch.installed():
    dispatch.register("aggregation", "triton", supports=supports, run=run, pays=launch.pays)

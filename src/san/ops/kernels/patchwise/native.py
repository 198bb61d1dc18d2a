"""Patchwise attention on the CPU by the C++ kernels of `native.cpp`, as custom operators that autograd knows.

Only δ is too wide to keep: [B, R (K + 1), P]. What lies behind γ's first Linear is a map of few channels. So the
operators are δ with the first Linear, the last Linear with aggregation, and δ's moments for the first BatchNorm. The
first and the last also serve the layers between, on maps; the chain rule through BatchNorm's statistics is autograd's.
The star relation is a map of K channels to begin with. Tensors are float32 and contiguous, and `plan` is everywhere
kernel size, stride, dilation, zeros.
Legend: B batch, R relation width, K places, D δ's width, C value channels, G weight groups, H W map, P output pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Footprint
from san.ops.kernels.aggregation.native import aggregate, aggregate_places
from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import address, output_size, refusal, single
from san.ops.kernels.patchwise.reference import PatchwiseCall
from san.ops.kernels.pointwise.native import Affine, Linear, products
from san.ops.mapping import Mapping, MappingLayer
from san.ops.normalization import Moments

__all__ = ["attend_folded", "run", "supports"]


def _call(kernel: str, map_: Tensor, plan: list[int], sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    """Call `san_patchwise_<kernel>`; `sizes` and `tensors` in the order of its arguments in native.cpp."""
    per_pixel = max((x.numel() for x in tensors if x is not None and x.dim() == 2), default=0)
    work = map_.shape[0] * map_.shape[2] * map_.shape[3] * (per_pixel + sizes[-1] * plan[0] ** 2)
    arguments = (map_.shape[0], *map_.shape[2:], *plan, *sizes, *map(address, tensors))
    operators.call(f"patchwise_{kernel}", *arguments, work=work)


def _hidden_sizes(query: Tensor, key: Tensor, weight: Tensor) -> tuple[int, ...]:
    return query.shape[1], key.shape[1], len(weight)


@torch.library.custom_op("san::patchwise_hidden", mutates_args=())
def _hidden(
    query: Tensor, key: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, plan: list[int]
) -> Tensor:
    """weight · relu(scale · δ + shift) + bias of concatenation: [B, O, H_out, W_out] for a weight [O, D].

    With a key of no channels δ is the query alone: the layer of a map.
    """
    output = _fake_hidden(query, key, scale, shift, weight, bias, plan)
    if output.numel():
        gradients = [None] * 7
        tensors = (query, key, scale, shift, weight, bias, output, *gradients)
        _call("hidden", query, plan, _hidden_sizes(query, key, weight), *tensors)
    return output


@_hidden.register_fake
def _fake_hidden(query: Tensor, key: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], len(weight), *output_size(query, rest[-1]))


@torch.library.custom_op("san::patchwise_hidden_backward", mutates_args=())
def _hidden_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    plan: list[int],
) -> list[Tensor]:
    found = _fake_hidden_backward(gradient, query, key, scale, shift, weight, plan)
    if gradient.numel():
        inputs = (query, key, scale, shift, weight, None, None, gradient)
        _call("hidden_backward", query, plan, _hidden_sizes(query, key, weight), *inputs, *found)
    return found


@_hidden_backward.register_fake
def _fake_hidden_backward(gradient: Tensor, *inputs: Any) -> list[Tensor]:
    weight = inputs[4]
    return [*map(torch.zeros_like, inputs[:5]), weight.new_zeros(len(weight))]


def _remember_hidden(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, _, ctx.plan = inputs
    ctx.save_for_backward(*tensors)


def _hidden_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_hidden_backward(single(gradient), *ctx.saved_tensors, ctx.plan), None


def _output_sizes(hidden: Tensor, weight: Tensor, value: Tensor, plan: list[int]) -> tuple[int, ...]:
    return hidden.shape[1], len(weight) // plan[0] ** 2, value.shape[1]


@torch.library.custom_op("san::patchwise_output", mutates_args=())
def _output(
    hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, value: Tensor, plan: list[int]
) -> Tensor:
    """Aggregation of value by α = weight · relu(scale · hidden + shift) + bias, whose channel g·K + j is α_gj."""
    output = _fake_output(hidden, scale, shift, weight, bias, value, plan)
    if output.numel():
        tensors = (hidden, scale, shift, weight, bias, value, output, *[None] * 7)
        _call("output", value, plan, _output_sizes(hidden, weight, value, plan), *tensors)
    return output


@_output.register_fake
def _fake_output(hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, value, plan = rest
    return value.new_empty(*value.shape[:2], *output_size(value, plan))


@torch.library.custom_op("san::patchwise_output_backward", mutates_args=())
def _output_backward(
    gradient: Tensor,
    hidden: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    value: Tensor,
    plan: list[int],
) -> list[Tensor]:
    found = _fake_output_backward(gradient, hidden, scale, shift, weight, bias, value, plan)
    if gradient.numel():
        tensors = (hidden, scale, shift, weight, bias, value, None, gradient, *found)
        _call("output_backward", value, plan, _output_sizes(hidden, weight, value, plan), *tensors)
    return found


@_output_backward.register_fake
def _fake_output_backward(gradient: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.zeros_like(x) for x in inputs[:-1]]


def _remember_output(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.plan = inputs
    ctx.save_for_backward(*tensors)


def _output_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_output_backward(single(gradient), *ctx.saved_tensors, ctx.plan), None


@torch.library.custom_op("san::patchwise_moments", mutates_args=())
def _moments(query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    """Mean [D] and sum of squared deviations [D] of concatenation's δ, in float64; of a map if key has no channels."""
    mean, deviation = _fake_moments(query, key, plan)
    if query.numel():
        sizes = (query.shape[1], key.shape[1])
        _call("moments", query, plan, sizes, query, key, mean, deviation, *[None] * 4)
    return mean, deviation


@_moments.register_fake
def _fake_moments(query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    width = query.shape[1] + key.shape[1] * plan[0] ** 2
    return query.new_zeros(width, dtype=torch.float64), query.new_zeros(width, dtype=torch.float64)


@torch.library.custom_op("san::patchwise_moments_backward", mutates_args=())
def _moments_backward(
    slope: Tensor, intercept: Tensor, query: Tensor, key: Tensor, plan: list[int]
) -> tuple[Tensor, Tensor]:
    found = _fake_moments_backward(slope, intercept, query, key, plan)
    if query.numel():
        sizes = (query.shape[1], key.shape[1])
        _call("moments_backward", query, plan, sizes, query, key, None, None, slope, intercept, *found)
    return found


@_moments_backward.register_fake
def _fake_moments_backward(
    slope: Tensor, intercept: Tensor, query: Tensor, key: Tensor, plan: list[int]
) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key)


def _remember_moments(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    query, key, ctx.plan = inputs
    ctx.save_for_backward(output[0], query, key)


def _moments_gradients(ctx: Any, of_mean: Tensor, of_deviation: Tensor) -> tuple[Any, ...]:
    # The mean's derivative is 1/n; the deviations' is 2 (x − mean), and the mean's own motion does not count.
    mean, query, key = ctx.saved_tensors
    slope = 2 * of_deviation
    intercept = of_mean / max(_samples(query, ctx.plan), 1) - slope * mean
    return *_moments_backward(slope.contiguous(), intercept.contiguous(), query, key, ctx.plan), None


@torch.library.custom_op("san::patchwise_star", mutates_args=())
def _star(query: Tensor, key: Tensor, plan: list[int]) -> Tensor:
    """δ = [φ_iᵀψ_j]_j as a map [B, K, H_out, W_out]."""
    output = _fake_star(query, key, plan)
    if output.numel():
        _call("star", key, plan, (key.shape[1],), query, key, output, *[None] * 3)
    return output


@_star.register_fake
def _fake_star(query: Tensor, key: Tensor, plan: list[int]) -> Tensor:
    return key.new_empty(key.shape[0], plan[0] ** 2, *output_size(key, plan))


@torch.library.custom_op("san::patchwise_star_backward", mutates_args=())
def _star_backward(gradient: Tensor, query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    found = _fake_star_backward(gradient, query, key, plan)
    if gradient.numel():
        _call("star_backward", key, plan, (key.shape[1],), query, key, None, gradient, *found)
    return found


@_star_backward.register_fake
def _fake_star_backward(gradient: Tensor, query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key)


def _remember_star(ctx: Any, inputs: Any, output: Tensor) -> None:
    query, key, ctx.plan = inputs
    ctx.save_for_backward(query, key)


def _star_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_star_backward(single(gradient), *ctx.saved_tensors, ctx.plan), None


_hidden.register_autograd(_hidden_gradients, setup_context=_remember_hidden)
_output.register_autograd(_output_gradients, setup_context=_remember_output)
_moments.register_autograd(_moments_gradients, setup_context=_remember_moments)
_star.register_autograd(_star_gradients, setup_context=_remember_star)


def _samples(map_: Tensor, plan: list[int]) -> int:
    rows, columns = output_size(map_, plan)
    return map_.shape[0] * rows * columns


def supports(call: PatchwiseCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    if call.relation not in ("concatenation", "star"):
        return f"native knows the relations concatenation and star, but not {call.relation!r}"
    if call.relation == "concatenation" and call.mapping is None:
        return "native never writes concatenation out, so it needs a mapping to fuse with"
    return refusal(call)


def run(call: PatchwiseCall) -> Tensor:
    """Patchwise attention; see `reference.py`."""
    query, key, value = map(single, (call.query, call.key, call.value))
    rule, layers = call.footprint, call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    plan = [rule.kernel_size, rule.stride, rule.dilation, int(rule.border == "zeros")]
    if call.relation == "star":
        x = _star(query, key, plan)
    else:
        x, layers = _hidden(query, key, *_folded(layers[0], query, key, plan), plan), layers[1:]
    # A layer on a map is δ's of a footprint of one place, without keys.
    nothing, alone = x.new_empty(x.shape[0], 0, *x.shape[2:]), [1, 1, 1, 0]
    for layer in layers[:-1]:
        x = _hidden(x, nothing, *_folded(layer, x, nothing, alone), alone)
    if layers:
        y = _output(x, *_folded(layers[-1], x, nothing, alone), value, plan)
    else:
        y = aggregate(value, x.flatten(2).unflatten(1, (-1, rule.places)), plan)
    return y.to(call.value.dtype)


def _folded(layer: MappingLayer, query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and shift of a layer's BatchNorm, which sees δ of query and key, and weight and bias of its Linear."""
    weight, local = single(layer.weight), None
    bias = weight.new_zeros(len(weight)) if layer.bias is None else single(layer.bias)
    if layer.norm.uses_batch:
        count = query.new_full((), _samples(query, plan), dtype=torch.float64)
        local = Moments(count, *_moments(query, key, plan))
    scale, shift = map(single, layer.norm.scale_and_shift(local))
    return scale, shift, weight, bias


def attend_folded(
    query: Any, key: Any, value: Any, layers: Sequence[tuple[Affine, Linear]], relation: str, footprint: Footprint
) -> Any:
    """Patchwise attention of contiguous float32 maps or places without gradients.

    A layer of γ is its BatchNorm, folded, and its Linear with a weight [O, D, 1, 1].
    """
    plan = [footprint.kernel_size, footprint.stride, footprint.dilation, int(footprint.border == "zeros")]
    if relation == "star":
        x = _fake_star(query, key, plan)
        _call("star", key, plan, (key.shape[1],), query, key, x, *[None] * 3)
    else:
        ((scale, shift), (weight, bias)), *layers = layers
        weight = weight.flatten(1)
        x = _fake_hidden(query, key, scale, shift, weight, bias, plan)
        tensors = (query, key, scale, shift, weight, bias, x, *[None] * 7)
        _call("hidden", query, plan, _hidden_sizes(query, key, weight), *tensors)
    for norm, linear in layers[:-1]:
        (x,) = products(x, [linear], norm=norm)
    if not layers:
        return aggregate_places(
            value,
            x.reshape(x.shape[0], x.shape[1] // footprint.places, footprint.places, x.shape[2] * x.shape[3]),
            plan,
        )
    norm, (weight, bias) = layers[-1]
    weight = weight.flatten(1)
    output = _fake_output(x, *norm, weight, bias, value, plan)
    tensors = (x, *norm, weight, bias, value, output, *[None] * 7)
    _call("output", value, plan, _output_sizes(x, weight, value, plan), *tensors)
    return output


dispatch.register("patchwise_attention", "native", supports=supports, run=run)

"""Patchwise attention on the CPU by the C++ kernels of `native.cpp`, as custom operators that autograd knows.

Only δ is too wide to keep: [B, R (K + 1), P]. What lies behind γ's first Linear is a map of few channels. So the
operators are δ with the first Linear, the last Linear with aggregation, and δ's moments for the first BatchNorm. The
first and the last also serve the layers between, on maps; the chain rule through BatchNorm's statistics is autograd's.
The star relation is a map of K channels to begin with. Tensors are float32 and contiguous, and `plan` is everywhere
kernel size, stride, dilation, zeros.

Where nothing traces or transforms a call, each layer of γ is one function of autograd instead, `_HiddenLayer` or
`_OutputLayer`, which calls the same kernels and BatchNorm's own: operators on small vectors take longer than these.
Legend: B batch, R relation width, K places, D δ's width, C value channels, G weight groups, H W map, P output pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from san.ops import dispatch
from san.ops.footprint import Footprint
from san.ops.kernels.aggregation.native import aggregate, aggregate_places
from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import address, check, fake, operator, output_size, refusal, single
from san.ops.kernels.normalization.native import Folded, Gradients, Samples, fold, fold_backward, suits
from san.ops.kernels.patchwise.reference import PatchwiseCall
from san.ops.kernels.pointwise.native import Affine, products
from san.ops.mapping import Mapping, MappingLayer
from san.ops.normalization import BatchNorm, Moments

__all__ = ["RELATIONS", "attend_folded", "run", "supports"]

# What the kernels know.
RELATIONS = ("concatenation", "star")


def _call(kernel: str, map_: Tensor, plan: list[int], sizes: tuple[int, ...], *tensors: Tensor | None) -> None:
    """Call `san_patchwise_<kernel>`; `sizes` and `tensors` in the order of its arguments in native.cpp."""
    per_pixel = max((x.numel() for x in tensors if x is not None and x.dim() == 2), default=0)
    work = map_.shape[0] * map_.shape[2] * map_.shape[3] * (per_pixel + sizes[-1] * plan[0] ** 2)
    arguments = (map_.shape[0], *map_.shape[2:], *plan, *sizes, *map(address, tensors))
    operators.call(f"patchwise_{kernel}", *arguments, work=work)


def _hidden_sizes(query: Tensor, key: Tensor, weight: Tensor) -> tuple[int, ...]:
    return query.shape[1], key.shape[1], len(weight)


def _give_hidden(
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


def _check_hidden(
    query: Tensor, key: Any, scale: Any, shift: Any, weight: Any, bias: Any, plan: list[int], gradient: Any = None
) -> None:
    batch, channels = query.shape[:2]
    width, given = channels + key.shape[1] * plan[0] ** 2, len(weight)
    _check_maps(query, key)
    check(scale=(scale, (width,)), shift=(shift, (width,)), bias=(bias, (given,)))
    check(weight=(weight.flatten(1), (given, width)), gradient=(gradient, (batch, given, *output_size(query, plan))))


def _check_hidden_backward(gradient: Tensor, *inputs: Any) -> None:
    *tensors, plan = inputs
    _check_hidden(*tensors, None, plan, gradient)


_hidden = operator("san::patchwise_hidden", _check_hidden)(_give_hidden)


@fake(_hidden)
def _fake_hidden(query: Tensor, key: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], len(weight), *output_size(query, rest[-1]))


def _give_hidden_backward(
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


_hidden_backward = operator("san::patchwise_hidden_backward", _check_hidden_backward)(_give_hidden_backward)


@fake(_hidden_backward)
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


def _give_output(
    hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, value: Tensor, plan: list[int]
) -> Tensor:
    """Aggregation of value by α = weight · relu(scale · hidden + shift) + bias, whose channel g·K + j is α_gj."""
    output = _fake_output(hidden, scale, shift, weight, bias, value, plan)
    if output.numel():
        tensors = (hidden, scale, shift, weight, bias, value, output, *[None] * 7)
        _call("output", value, plan, _output_sizes(hidden, weight, value, plan), *tensors)
    return output


def _check_output(
    hidden: Any, scale: Any, shift: Any, weight: Any, bias: Any, value: Tensor, plan: list[int], gradient: Any = None
) -> None:
    batch, channels, *_ = value.shape
    size, width = output_size(value, plan), hidden.shape[1]
    check(
        value=(value, value.shape),
        hidden=(hidden, (batch, width, *size)),
        gradient=(gradient, (batch, channels, *size)),
    )
    check(scale=(scale, (width,)), shift=(shift, (width,)), bias=(bias, (len(weight),)))
    check(weight=(weight, (len(weight) // plan[0] ** 2 * plan[0] ** 2, width)))


def _check_output_backward(gradient: Tensor, *inputs: Any) -> None:
    _check_output(*inputs, gradient)


_output = operator("san::patchwise_output", _check_output)(_give_output)


@fake(_output)
def _fake_output(hidden: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    _, value, plan = rest
    return value.new_empty(*value.shape[:2], *output_size(value, plan))


def _give_output_backward(
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


_output_backward = operator("san::patchwise_output_backward", _check_output_backward)(_give_output_backward)


@fake(_output_backward)
def _fake_output_backward(gradient: Tensor, *inputs: Any) -> list[Tensor]:
    return [torch.zeros_like(x) for x in inputs[:-1]]


def _remember_output(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.plan = inputs
    ctx.save_for_backward(*tensors)


def _output_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_output_backward(single(gradient), *ctx.saved_tensors, ctx.plan), None


def _give_moments(query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    """Mean [D] and sum of squared deviations [D] of concatenation's δ, in float64; of a map if key has no channels."""
    mean, deviation = _fake_moments(query, key, plan)
    if query.numel():
        sizes = (query.shape[1], key.shape[1])
        _call("moments", query, plan, sizes, query, key, mean, deviation, *[None] * 4)
    return mean, deviation


def _check_maps(query: Tensor, key: Tensor, plan: list[int] | None = None) -> None:
    batch, channels, *size = query.shape
    check(query=(query, query.shape), key=(key, (batch, min(key.shape[1], channels), *size)))


_moments = operator("san::patchwise_moments", _check_maps)(_give_moments)


@fake(_moments)
def _fake_moments(query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    width = query.shape[1] + key.shape[1] * plan[0] ** 2
    return query.new_zeros(width, dtype=torch.float64), query.new_zeros(width, dtype=torch.float64)


def _add_moments_backward(
    slope: Tensor, intercept: Tensor, query: Tensor, key: Tensor, plan: list[int], found: tuple[Tensor, Tensor]
) -> None:
    """Add slope · x + intercept at every x of δ to the gradients `found` of query and key."""
    if query.numel():
        sizes = (query.shape[1], key.shape[1])
        _call("moments_backward", query, plan, sizes, query, key, None, None, slope, intercept, *found)


@operator("san::patchwise_moments_backward")
def _moments_backward(
    slope: Tensor, intercept: Tensor, query: Tensor, key: Tensor, plan: list[int]
) -> tuple[Tensor, Tensor]:
    _check_maps(query, key)
    width = query.shape[1] + key.shape[1] * plan[0] ** 2
    check(torch.float64, slope=(slope, (width,)), intercept=(intercept, (width,)))
    found = _fake_moments_backward(slope, intercept, query, key, plan)
    _add_moments_backward(slope, intercept, query, key, plan, found)
    return found


@fake(_moments_backward)
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


@operator("san::patchwise_star")
def _star(query: Tensor, key: Tensor, plan: list[int]) -> Tensor:
    """δ = [φ_iᵀψ_j]_j as a map [B, K, H_out, W_out]."""
    check(query=(query, key.shape), key=(key, key.shape))
    output = _fake_star(query, key, plan)
    if output.numel():
        _call("star", key, plan, (key.shape[1],), query, key, output, *[None] * 3)
    return output


@fake(_star)
def _fake_star(query: Tensor, key: Tensor, plan: list[int]) -> Tensor:
    return key.new_empty(key.shape[0], plan[0] ** 2, *output_size(key, plan))


@operator("san::patchwise_star_backward")
def _star_backward(gradient: Tensor, query: Tensor, key: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    check(query=(query, key.shape), key=(key, key.shape))
    check(gradient=(gradient, (len(key), plan[0] ** 2, *output_size(key, plan))))
    found = _fake_star_backward(gradient, query, key, plan)
    if gradient.numel():
        _call("star_backward", key, plan, (key.shape[1],), query, key, None, gradient, *found)
    return found


@fake(_star_backward)
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


def _without_keys(map_: Tensor) -> tuple[Tensor, list[int]]:
    """Key and plan with which δ is the map: that of a footprint of one place, without keys."""
    return map_.new_empty(map_.shape[0], 0, *map_.shape[2:]), [1, 1, 1, 0]


def _fold(norm: BatchNorm, query: Tensor, key: Tensor, plan: list[int]) -> Folded:
    """A layer's BatchNorm, which sees δ of query and key."""
    if not norm.uses_batch:
        return fold(norm, None)
    return fold(norm, Samples(_samples(query, plan), *_give_moments(query, key, plan)))


def _fold_backward(ctx: Any, query: Tensor, key: Tensor, plan: list[int], found: Sequence[Tensor]) -> Gradients:
    """From the gradients `found` of query, key, scale and shift, to the first two of which moments' are added."""
    back = fold_backward(ctx.norm, ctx.folded, found[2].double(), found[3].double())
    if back.slope is not None and back.intercept is not None:
        _add_moments_backward(back.slope, back.intercept, query, key, plan, (found[0], found[1]))
    return back


def _wanted(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=True))


class _HiddenLayer(torch.autograd.Function):
    """A layer of γ that gives a map, its BatchNorm's moments and running averages included."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        norm: BatchNorm,
        plan: list[int],
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.norm, ctx.plan, ctx.folded = norm, plan, _fold(norm, query, key, plan)
        ctx.save_for_backward(query, key, weight)
        return _give_hidden(query, key, *ctx.folded.affine, weight, _bias(weight, bias), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, weight = ctx.saved_tensors
        found = _give_hidden_backward(single(gradient), query, key, *ctx.folded.affine, weight, ctx.plan)
        back = _fold_backward(ctx, query, key, ctx.plan, found)
        return _wanted(ctx, found[0], found[1], None, None, back.weight, back.bias, found[4], found[5])


class _OutputLayer(torch.autograd.Function):
    """The last layer of γ with aggregation, its BatchNorm's moments and running averages included."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        value: Tensor,
        norm: BatchNorm,
        plan: list[int],
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.norm, ctx.plan, ctx.folded = norm, plan, _fold(norm, hidden, *_without_keys(hidden))
        bias = _bias(weight, bias)
        ctx.save_for_backward(hidden, value, weight, bias)
        return _give_output(hidden, *ctx.folded.affine, weight, bias, value, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, value, weight, bias = ctx.saved_tensors
        of_hidden, of_scale, of_shift, of_weight, of_bias, of_value = _give_output_backward(
            single(gradient), hidden, *ctx.folded.affine, weight, bias, value, ctx.plan
        )
        nothing, alone = _without_keys(hidden)
        back = _fold_backward(ctx, hidden, nothing, alone, (of_hidden, nothing, of_scale, of_shift))
        return _wanted(ctx, of_hidden, of_value, None, None, back.weight, back.bias, of_weight, of_bias)


def supports(call: PatchwiseCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    if call.relation not in RELATIONS:
        return f"native knows the relations {', '.join(RELATIONS)}, but not {call.relation!r}"
    if call.relation == "concatenation" and call.mapping is None:
        return "native never writes concatenation out, so it needs a mapping to fuse with"
    return refusal(call)


def run(call: PatchwiseCall) -> Tensor:
    """Patchwise attention; see `reference.py`."""
    query, key, value = map(single, (call.query, call.key, call.value))
    rule, layers = call.footprint, call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    plan = rule.numbers()
    if call.relation == "star":
        x = _star(query, key, plan)
    else:
        x, layers = _hidden_layer(query, key, layers[0], plan), layers[1:]
    for layer in layers[:-1]:
        nothing, alone = _without_keys(x)
        x = _hidden_layer(x, nothing, layer, alone)
    if layers:
        y = _output_layer(x, layers[-1], value, plan)
    else:
        y = aggregate(value, x.flatten(2).unflatten(1, (-1, rule.places)), plan)
    return y.to(call.value.dtype)


def _hidden_layer(query: Tensor, key: Tensor, layer: MappingLayer, plan: list[int]) -> Tensor:
    parameters = (layer.norm.weight, layer.norm.bias, layer.weight, layer.bias)
    if query.numel() and suits([layer.norm], query, key, *parameters):
        return _HiddenLayer.apply(query, key, layer.norm, plan, *parameters)
    return _hidden(query, key, *_folded(query, key, layer, plan), plan)


def _output_layer(hidden: Tensor, layer: MappingLayer, value: Tensor, plan: list[int]) -> Tensor:
    parameters = (layer.norm.weight, layer.norm.bias, layer.weight, layer.bias)
    if hidden.numel() and suits([layer.norm], hidden, value, *parameters):
        return _OutputLayer.apply(hidden, value, layer.norm, plan, *parameters)
    nothing, alone = _without_keys(hidden)
    return _output(hidden, *_folded(hidden, nothing, layer, alone), value, plan)


def _folded(query: Tensor, key: Tensor, layer: MappingLayer, plan: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and shift of a layer's BatchNorm, which sees δ of query and key, and weight and bias of its Linear."""
    weight, local = single(layer.weight), None
    bias = weight.new_zeros(len(weight)) if layer.bias is None else single(layer.bias)
    if layer.norm.uses_batch:
        count = query.new_full((), _samples(query, plan), dtype=torch.float64)
        local = Moments(count, *_moments(query, key, plan))
    scale, shift = map(single, layer.norm.scale_and_shift(local))
    return scale, shift, weight, bias


def attend_folded(
    query: Any, key: Any, value: Any, layers: Sequence[tuple[Affine, Any]], relation: str, footprint: Footprint
) -> Any:
    """Patchwise attention of contiguous float32 maps or places without gradients.

    A layer of γ is its BatchNorm, folded, and its Linear with a weight [O, D, 1, 1].
    """
    plan = footprint.numbers()
    if relation == "star":
        x = _fake_star(query, key, plan)
        _call("star", key, plan, (key.shape[1],), query, key, x, *[None] * 3)
    else:
        (norm, (weight, bias)), *layers = layers
        x = _give_hidden(query, key, *norm, weight.flatten(1), bias, plan)
    for norm, linear in layers[:-1]:
        (x,) = products(x, [linear], norm=norm)
    if not layers:
        groups, pixels = x.shape[1] // footprint.places, x.shape[2] * x.shape[3]
        return aggregate_places(value, x.reshape(x.shape[0], groups, footprint.places, pixels), plan)
    norm, (weight, bias) = layers[-1]
    return _give_output(x, *norm, weight.flatten(1), bias, value, plan)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias.detach()


dispatch.register("patchwise_attention", "native", supports=supports, run=run)

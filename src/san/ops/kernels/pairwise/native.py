"""Pairwise attention on the CPU by the C++ kernels of `native.cpp`, as custom operators that autograd and tracers know.

γ arrives folded: BatchNorm of a layer is scale and shift of δ for the first, else part of the weights before it. What
training needs of the batch, the moments that BatchNorm asks for, are operators too, so the chain rule through the
statistics, their synchronisation and the folding are plain PyTorch on per-channel tensors. The second and later
BatchNorms follow from mean and co-deviations C of the activations before the Linear, W·mean and diag(W·C·Wᵀ): that
costs half a product, and its backward needs no second look at what comes behind.
Legend: B batch, R relation width, D δ's width, C value channels, G weight groups, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Footprint
from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import MAX_LAYERS, address, addresses, output_size, refusal, single
from san.ops.kernels.pairwise.reference import PairwiseCall
from san.ops.kernels.pointwise.native import Affine, Linear
from san.ops.mapping import Mapping
from san.ops.normalization import Moments
from san.ops.relations import Position

__all__ = ["attend_folded", "run", "supports"]

_RELATIONS = {"subtraction": 0, "summation": 1, "hadamard": 2, "concatenation": 3, "dot": 4}
_POSITIONS = {"relative": 1, "absolute": 2}


class _Inputs(NamedTuple):
    """What every operator here takes. Maps are float32 and contiguous: query, key [B, R, H, W], position [1, 2, H, W].

    `scale` and `shift` [D] are the first BatchNorm's, `weights` and `biases` those of γ's layers with the next one's
    folded in; `plan` is kernel size, stride, dilation, zeros, relation, position, D.
    """

    query: Tensor
    key: Tensor
    position: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    plan: list[int]

    def tensors(self) -> list[Tensor | None]:
        return [self.query, self.key, self.position, self.scale, self.shift, *self.weights, *self.biases]

    @classmethod
    def of(cls, tensors: Any, plan: list[int]) -> _Inputs:
        """Undo `tensors`."""
        layers = (len(tensors) - 5) // 2
        return cls(*tensors[:5], list(tensors[5 : 5 + layers]), list(tensors[5 + layers :]), plan)

    def gradients(self) -> list[Tensor]:
        """Zeros for query, key, position of every image [B, 2, H, W], scale, shift, weights and biases."""
        query, width = self.query, self.plan[-1]
        position = query.new_zeros(query.shape[0], 2, *query.shape[2:])
        vectors = [query.new_zeros(width), query.new_zeros(width)]
        maps = [torch.zeros_like(query), torch.zeros_like(query), position]
        return [*maps, *vectors, *map(torch.zeros_like, [*self.weights, *self.biases])]

    def shaped(self, gradients: list[Tensor]) -> tuple[Any, ...]:
        """Gradients in the structure of the inputs."""
        query, key, position, scale, shift = gradients[:5]
        position = None if self.position is None else position.sum(0, keepdim=True)
        vectors = (None, None) if self.scale is None else (scale, shift)
        layers = len(self.weights)
        return query, key, position, *vectors, gradients[5 : 5 + layers], gradients[5 + layers :], None

    def observed_width(self) -> int:
        """Channels whose moments are taken: δ's, or those of the activations that the last weights give."""
        return len(self.weights[-1]) if self.weights else self.plan[-1]


def _call(
    kernel: str,
    inputs: _Inputs,
    *,
    layers: int,
    value: Tensor | None = None,
    groups: int = 0,
    output: Tensor | None = None,
    gradient: Tensor | None = None,
    gradients: list[Tensor] | None = None,
    value_gradient: Tensor | None = None,
    moments: tuple[Tensor | None, ...] = (None, None, None, None),
) -> None:
    """Call `san_pairwise_<kernel>`; the order is that of `Arguments` in native.cpp."""
    query, key, position, scale, shift, weights, biases, (*geometry, relation, kind, width) = inputs
    given: Any = gradients or [None] * (5 + 2 * len(weights))
    parameters = 5 + len(weights)
    operators.call(
        f"pairwise_{kernel}",
        *(query.shape[0], *query.shape[2:], *geometry, relation, kind, query.shape[1]),
        *(0 if value is None else value.shape[1], groups, layers),
        *addresses(query, key, value, position, scale, shift),
        *(width, *(len(weight) for weight in weights), *[0] * (MAX_LAYERS - len(weights))),
        *addresses(*weights, room=MAX_LAYERS),
        *addresses(*biases, room=MAX_LAYERS),
        *addresses(output, gradient, given[0], given[1], value_gradient, *given[2:5]),
        *addresses(*given[5:parameters], room=MAX_LAYERS),
        *addresses(*given[parameters:], room=MAX_LAYERS),
        *map(address, moments),
        work=_pairs(inputs) * (sum(weight.numel() for weight in weights) + 4 * width),
    )


@torch.library.custom_op("san::pairwise_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: int,
    position: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> Tensor:
    output = value.new_empty(*value.shape[:2], *output_size(value, plan))
    if output.numel():
        inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan)
        _call("forward", inputs, layers=len(weights), value=value, groups=groups, output=output)
    return output


@_forward.register_fake
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, groups: int, *inputs: Any) -> Tensor:
    return value.new_empty(*value.shape[:2], *output_size(value, inputs[-1]))


@torch.library.custom_op("san::pairwise_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    value: Tensor,
    groups: int,
    query: Tensor,
    key: Tensor,
    position: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> list[Tensor]:
    inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan)
    found, of_value = inputs.gradients(), torch.zeros_like(value)
    if gradient.numel():
        given: Any = {"value": value, "groups": groups, "gradient": gradient, "value_gradient": of_value}
        _call("backward", inputs, layers=len(weights), gradients=found, **given)
    return [of_value, *found]


@_backward.register_fake
def _fake_backward(gradient: Tensor, value: Tensor, groups: int, *inputs: Any) -> list[Tensor]:
    return [torch.zeros_like(value), *_Inputs(*inputs).gradients()]


@torch.library.custom_op("san::pairwise_moments", mutates_args=())
def _moments(
    query: Tensor,
    key: Tensor,
    position: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan)
    mean, deviation = _fake_moments(*inputs)
    if query.numel():
        layers = 0 if scale is None else len(weights) + 1
        _call("moments", inputs, layers=layers, moments=(mean, deviation, None, None))
    return mean, deviation


@_moments.register_fake
def _fake_moments(*inputs: Any) -> tuple[Tensor, Tensor]:
    found = _Inputs(*inputs)
    width, double = found.observed_width(), torch.float64
    shape = [width] if found.scale is None else [width, width]
    return found.query.new_zeros(width, dtype=double), found.query.new_zeros(shape, dtype=double)


@torch.library.custom_op("san::pairwise_moments_backward", mutates_args=())
def _moments_backward(
    slope: Tensor,
    intercept: Tensor,
    query: Tensor,
    key: Tensor,
    position: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    plan: list[int],
) -> list[Tensor]:
    inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan)
    found = inputs.gradients()
    if query.numel():
        layers = 0 if scale is None else len(weights) + 1
        moments = (None, None, slope, intercept)
        _call("moments_backward", inputs, layers=layers, gradients=found, moments=moments)
    return found


@_moments_backward.register_fake
def _fake_moments_backward(slope: Tensor, intercept: Tensor, *inputs: Any) -> list[Tensor]:
    return _Inputs(*inputs).gradients()


def _remember_forward(ctx: Any, inputs: Any, output: Tensor) -> None:
    query, key, value, groups, *rest = inputs
    given = _Inputs(query, key, *rest)
    ctx.groups, ctx.plan = groups, given.plan
    ctx.save_for_backward(value, *given.tensors())


def _forward_gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    value, *tensors = ctx.saved_tensors
    inputs = _Inputs.of(tensors, ctx.plan)
    of_value, *found = _backward(single(gradient), value, ctx.groups, *inputs)
    query, key, *rest = inputs.shaped(found)
    return query, key, of_value, None, *rest


def _remember_moments(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    given = _Inputs(*inputs)
    ctx.plan = given.plan
    ctx.save_for_backward(output[0], *given.tensors())


def _moments_gradients(ctx: Any, of_mean: Tensor, of_deviation: Tensor) -> tuple[Any, ...]:
    # The mean's derivative is 1/n; the deviations' is linear in x − mean, and the mean's own motion does not count.
    mean, *tensors = ctx.saved_tensors
    inputs = _Inputs.of(tensors, ctx.plan)
    samples = inputs.query.shape[0] * ctx.plan[0] ** 2 * _pixels(inputs)
    square = inputs.scale is not None
    slope = of_deviation + of_deviation.T if square else 2 * of_deviation
    intercept = of_mean / max(samples, 1) - (slope @ mean if square else slope * mean)
    return inputs.shaped(_moments_backward(single(slope), single(intercept), *inputs))


def _pairs(inputs: _Inputs) -> int:
    return inputs.query.shape[0] * _pixels(inputs) * inputs.plan[0] ** 2


def _pixels(inputs: _Inputs) -> int:
    rows, columns = output_size(inputs.query, inputs.plan)
    return rows * columns


_forward.register_autograd(_forward_gradients, setup_context=_remember_forward)
_moments.register_autograd(_moments_gradients, setup_context=_remember_moments)


def supports(call: PairwiseCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    if call.relation not in _RELATIONS:
        return f"native knows the relations {', '.join(_RELATIONS)}, but not {call.relation!r}"
    return refusal(call)


def run(call: PairwiseCall) -> Tensor:
    """Pairwise attention; see `reference.py`."""
    query, key, *position = map(single, call.maps())
    value = single(call.value)
    width = call.mapping.widths()[0] if isinstance(call.mapping, Mapping) else _identity_width(call)
    plan = _plan(call.relation, call.footprint, call.position, width)
    inputs = _Inputs(query, key, position[0] if position else None, None, None, [], [], plan)
    if isinstance(call.mapping, Mapping):
        inputs = _with_mapping(inputs, call.mapping)
    groups = len(inputs.weights[-1]) if inputs.weights else width
    return _forward(query, key, value, groups, *inputs[2:]).to(call.value.dtype)


def attend_folded(
    query: Any,
    key: Any,
    value: Any,
    position: Position | None,
    norm: Affine | None,
    layers: Sequence[Affine | Linear],
    relation: str,
    footprint: Footprint,
) -> Any:
    """Pairwise attention of contiguous float32 maps or places without gradients, BatchNorm folded: γ's first into
    `norm`, which scales and shifts δ, every other into the weight and bias before it."""
    weights: Any = [layer[0] for layer in layers]
    biases: Any = [layer[1] for layer in layers]
    width = 1 if norm is None else len(norm.scale)
    plan = _plan(relation, footprint, position, width)
    output = value.new_empty(*value.shape[:2], *output_size(value, plan))
    inputs = _Inputs(query, key, _position_map(position, key), *(norm or (None, None)), weights, biases, plan)
    groups = len(weights[-1]) if weights else width
    _call("forward", inputs, layers=len(weights), value=value, groups=groups, output=output)
    return output


def _position_map(position: Position | None, like: Any) -> Any:
    """`Position.map` by a kernel, for a map or place `like` [B, C, H, W]."""
    if position is None:
        return None
    found = like.new_empty(1, 2, *like.shape[2:])
    operators.call("position_map", *like.shape[2:], *addresses(position.weight, position.bias, found), work=0)
    return found


def _plan(relation: str, rule: Footprint, position: Position | None, width: int) -> list[int]:
    geometry = [rule.kernel_size, rule.stride, rule.dilation, int(rule.border == "zeros")]
    return [
        *geometry,
        _RELATIONS[relation],
        _POSITIONS[position.kind] if position else 0,
        int(width),
    ]  # a tensor in jit.trace


def _identity_width(call: PairwiseCall) -> int:
    width = {"concatenation": 2 * call.key.shape[1], "dot": 1}.get(call.relation, call.key.shape[1])
    return width + (call.position.width if call.position else 0)


def _with_mapping(inputs: _Inputs, mapping: Mapping) -> _Inputs:
    """The inputs with γ's layers folded in, one after the other, because each BatchNorm's moments need those before."""
    samples = inputs.query.shape[0] * inputs.plan[0] ** 2 * _pixels(inputs)
    for layer in mapping.layers:
        local = _local_moments(inputs, samples) if layer.norm.uses_batch else None
        scale, shift = map(single, layer.norm.scale_and_shift(local))
        if inputs.scale is None:
            inputs = inputs._replace(scale=scale, shift=shift)
        else:
            *weights, weight = inputs.weights
            *biases, bias = inputs.biases
            weights, biases = [*weights, weight * scale.unsqueeze(1)], [*biases, bias * scale + shift]
            inputs = inputs._replace(weights=weights, biases=biases)
        weight = single(layer.weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else single(layer.bias)
        inputs = inputs._replace(weights=[*inputs.weights, weight], biases=[*inputs.biases, bias])
    return inputs


def _local_moments(inputs: _Inputs, samples: int) -> Moments:
    """Moments of what the next BatchNorm normalises: δ, or the last weights' product."""
    count = inputs.query.new_full((), samples, dtype=torch.float64)
    if inputs.scale is None:
        return Moments(count, *_moments(*inputs))
    *weights, last = inputs.weights
    *biases, bias = inputs.biases
    mean, deviation = _moments(*inputs._replace(weights=weights, biases=biases))
    weight = last.to(torch.float64)
    return Moments(count, weight @ mean + bias, ((weight @ deviation) * weight).sum(1).clamp_min(0))


dispatch.register("pairwise_attention", "native", supports=supports, run=run)

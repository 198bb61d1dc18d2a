"""Pairwise attention on the CPU by the C++ kernels of `native.cpp`, as custom operators that autograd and tracers know.

γ arrives folded: BatchNorm of a layer is scale and shift of δ for the first, else part of the weights before it. What
training needs of the batch, the moments that BatchNorm asks for, are operators too, so the chain rule through the
statistics, their synchronisation and the folding are plain PyTorch on per-channel tensors. The second and later
BatchNorms follow from mean and co-deviations C of the activations before the Linear, W·mean and diag(W·C·Wᵀ): that
costs half a product, and its backward needs no second look at what comes behind.

Where nothing traces or transforms a call, all this is one function of autograd instead, `_Attention`, which calls the
same kernels: hundreds of operators on vectors of a few channels take longer than the kernels on small maps.
Legend: B batch, R relation width, D δ's width, C value channels, G weight groups, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from san.ops import dispatch
from san.ops.footprint import Footprint, coordinates
from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import (
    MAX_LAYERS,
    address,
    addresses,
    check,
    fake,
    operator,
    output_size,
    refusal,
    single,
)
from san.ops.kernels.normalization.native import Samples, fold, fold_backward, suits
from san.ops.kernels.pairwise.reference import PairwiseCall
from san.ops.kernels.pointwise.native import Affine, Linear
from san.ops.mapping import Mapping, MappingLayer
from san.ops.normalization import BatchNorm, Moments
from san.ops.relations import Position

__all__ = ["RELATIONS", "attend_folded", "run", "supports"]

# What the kernels know, by their own numbers.
RELATIONS = {"subtraction": 0, "summation": 1, "hadamard": 2, "concatenation": 3, "dot": 4}
_POSITIONS = {"relative": 1, "absolute": 2}

# Relating a pair's channel, and back, takes as long as so many multiply-adds.
_RELATING = 32


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

    def extended(self, norm: Affine, weight: Tensor, bias: Tensor | None) -> _Inputs:
        """With one more layer of γ: its BatchNorm, folded into the Linear before it if there is one, and its Linear."""
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        if self.scale is None:
            return self._replace(scale=norm.scale, shift=norm.shift, weights=[weight], biases=[bias])
        weights, biases = [*self.weights[:-1], norm.scale, weight], [*self.biases[:-1], norm.shift, bias]
        return self._replace(weights=weights, biases=biases)

    def check(self, value: Tensor | None = None, gradient: Tensor | None = None) -> _Inputs:
        """The same, if all tensors are of shapes that go together; raises `UserError`."""
        batch, _, height, width = self.query.shape
        check(query=(self.query, self.query.shape), key=(self.key, self.query.shape))
        check(position=(self.position, (1, 2, height, width)))
        widths = [self.plan[-1], *map(len, self.weights)]
        check(scale=(self.scale, widths[:1]), shift=(self.shift, widths[:1]))
        for weight, bias, taken, given in zip(self.weights, self.biases, widths, widths[1:], strict=False):
            check(weight=(weight, (given, taken)), bias=(bias, (given,)))
        if value is not None:
            channels = value.shape[1]
            size = output_size(self.query, self.plan)
            check(value=(value, (batch, channels, height, width)), gradient=(gradient, (batch, channels, *size)))
        return self

    def observed(self) -> _Inputs:
        """What gives the samples behind the next BatchNorm's moments: δ, or what enters the last Linear."""
        return self._replace(weights=self.weights[:-1], biases=self.biases[:-1])

    def samples(self) -> int:
        """How many samples BatchNorm has: pixels times places."""
        return self.query.shape[0] * self.plan[0] ** 2 * _pixels(self)

    def given_width(self) -> int:
        """Channels that γ gives so far: the last weights', or δ's."""
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
        work=_pairs(inputs) * (sum(weight.numel() for weight in weights) + _RELATING * width),
    )


def _attend(inputs: _Inputs, value: Tensor, groups: int) -> Tensor:
    output = value.new_empty(*value.shape[:2], *output_size(value, inputs.plan))
    if output.numel():
        _call("forward", inputs, layers=len(inputs.weights), value=value, groups=groups, output=output)
    return output


def _attend_backward(inputs: _Inputs, value: Tensor, groups: int, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of value and of the inputs."""
    found, of_value = inputs.gradients(), torch.zeros_like(value)
    if gradient.numel():
        given: Any = {"value": value, "groups": groups, "gradient": gradient, "value_gradient": of_value}
        _call("backward", inputs, layers=len(inputs.weights), gradients=found, **given)
    return of_value, found


def _observe(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Mean [D] and deviations [D] of δ; with its BatchNorm, mean and co-deviations [D, D] of what γ gives so far."""
    mean, deviation = _fake_moments(*inputs)
    if inputs.query.numel():
        layers = 0 if inputs.scale is None else len(inputs.weights) + 1
        _call("moments", inputs, layers=layers, moments=(mean, deviation, None, None))
    return mean, deviation


def _observe_backward(inputs: _Inputs, slope: Tensor, intercept: Tensor, found: list[Tensor]) -> None:
    """Add to the gradients of the inputs what slope · x + intercept at every sample x gives."""
    if inputs.query.numel():
        layers = 0 if inputs.scale is None else len(inputs.weights) + 1
        moments = (None, None, slope, intercept)
        _call("moments_backward", inputs, layers=layers, gradients=found, moments=moments)


@operator("san::pairwise_forward")
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
    inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan).check(value)
    return _attend(inputs, value, groups)


@fake(_forward)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, groups: int, *inputs: Any) -> Tensor:
    return value.new_empty(*value.shape[:2], *output_size(value, inputs[-1]))


@operator("san::pairwise_backward")
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
    inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan).check(value, gradient)
    of_value, found = _attend_backward(inputs, value, groups, gradient)
    return [of_value, *found]


@fake(_backward)
def _fake_backward(gradient: Tensor, value: Tensor, groups: int, *inputs: Any) -> list[Tensor]:
    return [torch.zeros_like(value), *_Inputs(*inputs).gradients()]


@operator("san::pairwise_moments")
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
    return _observe(_Inputs(query, key, position, scale, shift, weights, biases, plan).check())


@fake(_moments)
def _fake_moments(*inputs: Any) -> tuple[Tensor, Tensor]:
    found = _Inputs(*inputs)
    width, double = found.given_width(), torch.float64
    shape = [width] if found.scale is None else [width, width]
    return found.query.new_zeros(width, dtype=double), found.query.new_zeros(shape, dtype=double)


@operator("san::pairwise_moments_backward")
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
    inputs = _Inputs(query, key, position, scale, shift, weights, biases, plan).check()
    given = inputs.given_width()
    check(slope=(slope, (given,) if scale is None else (given, given)), intercept=(intercept, (given,)))
    found = inputs.gradients()
    _observe_backward(inputs, slope, intercept, found)
    return found


@fake(_moments_backward)
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
    samples = inputs.samples()
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
    if call.relation not in RELATIONS:
        return f"native knows the relations {', '.join(RELATIONS)}, but not {call.relation!r}"
    return refusal(call)


class _Attention(torch.autograd.Function):
    """All of pairwise attention, moments and BatchNorm's running averages included; `norms` are those of γ's layers.

    `parameters` are weight and bias of the position, then, layer by layer, of BatchNorm and of the Linear.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        norms: list[BatchNorm],
        plan: list[int],
        *parameters: Tensor | None,
    ) -> Tensor:
        weight, bias, *_ = parameters
        position = None if weight is None else _places(weight, bias, *key.shape[2:])
        inputs = _Inputs(query, key, position, None, None, [], [], plan)
        ctx.norms, ctx.plan, ctx.position, ctx.folded = norms, plan, position, []
        for norm, linear in zip(norms, _linears(parameters), strict=True):
            samples = Samples(inputs.samples(), *_observe(inputs.observed())) if norm.uses_batch else None
            found = fold(norm, samples, _last(inputs))
            ctx.folded.append(found)
            inputs = inputs.extended(found.affine, *linear)
        ctx.save_for_backward(query, key, value, *parameters)
        return _attend(inputs, value, inputs.given_width())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, *parameters = ctx.saved_tensors
        stages = [_Inputs(query, key, ctx.position, None, None, [], [], ctx.plan)]
        for found, linear in zip(ctx.folded, _linears(parameters), strict=True):
            stages.append(stages[-1].extended(found.affine, *linear))
        inputs = stages.pop()
        of_value, given = _attend_backward(inputs, value, inputs.given_width(), single(gradient))
        of_parameters = _through_layers(ctx.norms, ctx.folded, stages, given)
        of_position = (None, None) if ctx.position is None else _places_backward(given[2])
        found = (*given[:2], of_value, None, None, *of_position, *of_parameters)
        return tuple(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=True))


def _parameters(position: Position | None, layers: Sequence[MappingLayer]) -> list[Tensor | None]:
    """What `_Attention` calls so."""
    places = (None, None) if position is None else (position.weight, position.bias)
    return [*places, *(x for layer in layers for x in (layer.norm.weight, layer.norm.bias, layer.weight, layer.bias))]


def _linears(parameters: Any) -> list[Linear]:
    return [Linear(*pair) for pair in zip(parameters[4::4], parameters[5::4], strict=True)]


def _last(inputs: _Inputs) -> Linear | None:
    """The last Linear so far."""
    return Linear(inputs.weights[-1], inputs.biases[-1]) if inputs.weights else None


def _through_layers(norms: Any, folded: Any, stages: Any, given: list[Any]) -> list[Tensor]:
    """Gradients of BatchNorm's weight and bias and the Linear's, layer by layer, from those `given` to folded inputs.

    `stages` are the inputs before each layer joined them. What moments give to query, key and position is added.
    """
    weights, biases = given[5 : 5 + len(norms)], given[5 + len(norms) :]
    made: list[Tensor] = []
    for i in reversed(range(len(norms))):
        ends = [x.double() for x in ((weights[i - 1], biases[i - 1]) if i else given[3:5])]
        back = fold_backward(norms[i], folded[i], *ends, _last(stages[i]))
        made = [back.weight, back.bias, weights[i], biases[i], *made]
        if back.linear is not None:
            weights[i - 1], biases[i - 1] = back.linear
        if back.slope is not None and back.intercept is not None:
            before = stages[i].observed()
            to = [*given[:5], *weights[: len(before.weights)], *biases[: len(before.weights)]]
            _observe_backward(before, back.slope.float(), back.intercept.float(), to)
    return made


@lru_cache(maxsize=16)
def _coordinates(height: int, width: int) -> Tensor:
    """Coordinates of every pixel of a map: [2, H·W]."""
    # Kept for later calls, of which some may record gradients.
    with torch.inference_mode(False):
        return coordinates(height, width, like=torch.empty(0, dtype=torch.float32, device="cpu"))[0].flatten(1)


def _places(weight: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    """`Position.map`."""
    places = weight @ _coordinates(height, width)
    return (places if bias is None else places.add_(bias.unsqueeze(1))).view(1, 2, height, width)


def _places_backward(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the position's weight and bias from those of every image's places [B, 2, H, W]."""
    total = gradient.sum(0).flatten(1)
    return total @ _coordinates(*gradient.shape[2:]).T, total.sum(1)


def run(call: PairwiseCall) -> Tensor:
    """Pairwise attention; see `reference.py`."""
    query, key, value = map(single, (call.query, call.key, call.value))
    layers = call.mapping.layers if isinstance(call.mapping, Mapping) else ()
    width = layers[0].weight.shape[1] if layers else _identity_width(call)
    plan = _plan(call.relation, call.footprint, call.position, width)
    norms, parameters = [layer.norm for layer in layers], _parameters(call.position, layers)
    if query.numel() and suits(norms, query, key, value, *parameters):
        y = _Attention.apply(query, key, value, norms, plan, *parameters)
    else:
        position = None if call.position is None else single(call.position.map(*key.shape[2:]))
        inputs = _with_mapping(_Inputs(query, key, position, None, None, [], [], plan), layers)
        y = _forward(query, key, value, inputs.given_width(), *inputs[2:])
    return y.to(call.value.dtype)


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
    kind = _POSITIONS[position.kind] if position else 0
    # In jit.trace the width is a tensor.
    return [*rule.numbers(), RELATIONS[relation], kind, int(width)]


def _identity_width(call: PairwiseCall) -> int:
    width = {"concatenation": 2 * call.key.shape[1], "dot": 1}.get(call.relation, call.key.shape[1])
    return width + (call.position.width if call.position else 0)


def _with_mapping(inputs: _Inputs, layers: Sequence[MappingLayer]) -> _Inputs:
    """The inputs with γ's layers folded in, one after the other, because each BatchNorm's moments need those before."""
    for layer in layers:
        local = _local_moments(inputs) if layer.norm.uses_batch else None
        norm, last = Affine(*map(single, layer.norm.scale_and_shift(local))), _last(inputs)
        if last is not None and last.bias is not None:
            norm = Affine(last.weight * norm.scale.unsqueeze(1), last.bias * norm.scale + norm.shift)
        inputs = inputs.extended(norm, single(layer.weight), None if layer.bias is None else single(layer.bias))
    return inputs


def _local_moments(inputs: _Inputs) -> Moments:
    """Moments of what the next BatchNorm normalises: δ, or the last weights' product."""
    count, last = inputs.query.new_full((), inputs.samples(), dtype=torch.float64), _last(inputs)
    mean, deviation = _moments(*inputs.observed())
    if last is None:
        return Moments(count, mean, deviation)
    weight = last.weight.to(torch.float64)
    return Moments(count, weight @ mean + last.bias, ((weight @ deviation) * weight).sum(1).clamp_min(0))


dispatch.register("pairwise_attention", "native", supports=supports, run=run)

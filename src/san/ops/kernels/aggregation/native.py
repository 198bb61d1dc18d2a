"""Aggregation on the CPU by the C++ kernels of `native.cpp`, as custom operators that autograd and tracers know.

Legend: B batch, C value channels, G weight groups, K places, P output pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.kernels.aggregation.reference import AggregationCall
from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import address, check, fake, operator, output_size, refusal, single

__all__ = ["aggregate", "aggregate_places", "run", "supports"]


@operator("san::aggregation_forward")
def aggregate(value: Tensor, weight: Tensor, plan: list[int]) -> Tensor:
    """y [B, C, H_out, W_out] of value [B, C, H, W] and weight [B, G, K, P], both float32 and contiguous.

    `plan` is kernel size, stride, dilation, zeros.
    """
    _check(value, weight, plan)
    output = _fake_forward(value, weight, plan)
    if output.numel():
        _call("forward", value, weight, plan, output=output)
    return output


def _check(value: Tensor, weight: Tensor, plan: list[int]) -> None:
    rows, columns = output_size(value, plan)
    check(value=(value, value.shape), weight=(weight, (len(value), weight.shape[1], plan[0] ** 2, rows * columns)))


@fake(aggregate)
def _fake_forward(value: Tensor, weight: Tensor, plan: list[int]) -> Tensor:
    return value.new_empty(*value.shape[:2], *output_size(value, plan))


@operator("san::aggregation_backward")
def _backward(gradient: Tensor, value: Tensor, weight: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    _check(value, weight, plan)
    check(gradient=(gradient, (*value.shape[:2], *output_size(value, plan))))
    of_value, of_weight = _fake_backward(gradient, value, weight, plan)
    if gradient.numel():
        _call("backward", value, weight, plan, gradient=gradient, of_value=of_value, of_weight=of_weight)
    return of_value, of_weight


@fake(_backward)
def _fake_backward(gradient: Tensor, value: Tensor, weight: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(value), torch.empty_like(weight)


def _call(
    kernel: str,
    value: Tensor,
    weight: Tensor,
    plan: list[int],
    *,
    output: Tensor | None = None,
    gradient: Tensor | None = None,
    of_value: Tensor | None = None,
    of_weight: Tensor | None = None,
) -> None:
    """Call `san_aggregation_<kernel>`; the order is that of `Arguments` in native.cpp."""
    sizes = (value.shape[0], *value.shape[2:], *plan, value.shape[1], weight.shape[1])
    tensors = (value, weight, output, gradient, of_value, of_weight)
    operators.call(f"aggregation_{kernel}", *sizes, *map(address, tensors), work=value.numel() * plan[0] ** 2)


def _remember(ctx: Any, inputs: Any, output: Tensor) -> None:
    value, weight, ctx.plan = inputs
    ctx.save_for_backward(value, weight)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *_backward(single(gradient), *ctx.saved_tensors, ctx.plan), None


def aggregate_places(value: Any, weight: Any, plan: list[int]) -> Any:
    """`aggregate` for maps or places, without gradients."""
    output = _fake_forward(value, weight, plan)
    _call("forward", value, weight, plan, output=output)
    return output


aggregate.register_autograd(_gradients, setup_context=_remember)


def supports(call: AggregationCall) -> str | None:
    """None, or why the kernels cannot run the call."""
    return refusal(call)


def run(call: AggregationCall) -> Tensor:
    """Aggregation; see `reference.py`."""
    plan = call.footprint.numbers()
    return aggregate(single(call.value), single(call.weight), plan).to(call.value.dtype)


dispatch.register("aggregation", "native", supports=supports, run=run)

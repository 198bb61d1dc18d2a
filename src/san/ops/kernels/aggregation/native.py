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
from san.ops.kernels.native.operators import address, output_size, refusal, single

__all__ = ["aggregate", "aggregate_places", "run", "supports"]


@torch.library.custom_op("san::aggregation_forward", mutates_args=())
def aggregate(value: Tensor, weight: Tensor, plan: list[int]) -> Tensor:
    """y [B, C, H_out, W_out] of value [B, C, H, W] and weight [B, G, K, P], both float32 and contiguous.

    `plan` is kernel size, stride, dilation, zeros.
    """
    output = _fake_forward(value, weight, plan)
    if output.numel():
        _call("forward", value, weight, plan, output=output)
    return output


@aggregate.register_fake
def _fake_forward(value: Tensor, weight: Tensor, plan: list[int]) -> Tensor:
    return value.new_empty(*value.shape[:2], *output_size(value, plan))


@torch.library.custom_op("san::aggregation_backward", mutates_args=())
def _backward(gradient: Tensor, value: Tensor, weight: Tensor, plan: list[int]) -> tuple[Tensor, Tensor]:
    of_value, of_weight = _fake_backward(gradient, value, weight, plan)
    if gradient.numel():
        _call("backward", value, weight, plan, gradient=gradient, of_value=of_value, of_weight=of_weight)
    return of_value, of_weight


@_backward.register_fake
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
    rule = call.footprint
    plan = [rule.kernel_size, rule.stride, rule.dilation, int(rule.border == "zeros")]
    return aggregate(single(call.value), single(call.weight), plan).to(call.value.dtype)


dispatch.register("aggregation", "native", supports=supports, run=run)

"""Aggregation y_i = Σ_{j∈R(i)} α_ij ⊙ β(x_j), as the formula reads: the definition that every backend is held to.

Legend: B batch, C value channels, G weight groups, S = C/G channels that share a weight, K places, P output pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Footprint, Window
from san.ops.normalization import widened

__all__ = ["AggregationCall", "attend", "run"]


@dataclass(frozen=True)
class AggregationCall:
    """Validated arguments of one aggregation: value [B, C, H, W], weight [B, G, K, P]."""

    value: Tensor
    weight: Tensor
    footprint: Footprint

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that may need a gradient."""
        return self.value, self.weight

    def elements_per_pixel(self) -> int:
        """Elements of the largest array that the formula writes out, for one output pixel."""
        return self.value.shape[1] * self.footprint.places


def attend(weight: Tensor, value: Tensor, window: Window) -> Tensor:
    """weight [B, G, K, P] and the value rows of a window → [B, C, P]; value channel c uses weight group c mod G."""
    groups = weight.shape[1]
    value = window.gather(value).unflatten(1, (-1, groups))
    return (weight.unsqueeze(1) * value).sum(3).flatten(1, 2)


def run(call: AggregationCall) -> Tensor:
    """y [B, C, H_out, W_out] in the value's dtype, accumulated in at least float32."""
    size = call.value.shape[2:]
    y = attend(widened(call.weight), widened(call.value), call.footprint.window(*size))
    return y.unflatten(2, call.footprint.output_size(*size)).to(call.value.dtype)


dispatch.register("aggregation", "reference", supports=lambda call: None, run=run)

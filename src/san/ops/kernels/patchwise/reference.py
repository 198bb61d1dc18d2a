"""Patchwise attention α_i = γ(δ(x_R(i))), y_i = Σ_j α_ij ⊙ β(x_j), without softmax or position (paper §3.2).

Written as the formula reads: the definition that every backend is held to.
Legend: B batch, D δ's width, G weight groups, K places, P output pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Window
from san.ops.kernels import attention
from san.ops.kernels.aggregation.reference import attend
from san.ops.relations import PATCHWISE_RELATIONS

__all__ = ["PatchwiseCall"]


@dataclass(frozen=True)
class PatchwiseCall(attention.AttentionCall):
    """One call of patchwise attention; γ maps D to G·K channels."""

    def relate(self, maps: tuple[Tensor, ...], window: Window) -> Tensor:
        """δ(x_R(i)) of every pixel: [B, D, 1, P]."""
        found = PATCHWISE_RELATIONS[self.relation]
        return found.formula(found.queries(maps[0], window), window.gather(maps[1])).unsqueeze(2)

    def samples_per_pixel(self) -> int:
        """1: γ sees one column per footprint."""
        return 1

    def attend(self, scores: Tensor, value: Tensor, window: Window) -> Tensor:
        """Aggregation by scores [B, G·K, 1, P], whose channel g·K + j is group g's weight at place j: [B, C, P]."""
        weight = scores.squeeze(2).unflatten(1, (-1, window.footprint.places))
        return attend(weight, value, window)


dispatch.register("patchwise_attention", "reference", supports=lambda call: None, run=attention.run)

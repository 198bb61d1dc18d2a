"""Pairwise attention α_ij = softmax_j γ([δ(φ(x_i), ψ(x_j)), position]), y_i = Σ_j α_ij ⊙ β(x_j) (paper §3.1).

Written as the formula reads, with every array of pixel pairs in memory: the definition that every backend is held to.
Legend: B batch, D δ's width, G weight groups, K places, P output pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from san.ops import dispatch
from san.ops.footprint import Window
from san.ops.kernels import attention
from san.ops.kernels.aggregation.reference import attend
from san.ops.relations import PAIRWISE_RELATIONS, Position

__all__ = ["PairwiseCall"]


@dataclass(frozen=True)
class PairwiseCall(attention.AttentionCall):
    """One call of pairwise attention; γ maps D to G channels."""

    position: Position | None

    def maps(self) -> tuple[Tensor, ...]:
        """Query, key and, where it is used, position p [1, 2, H, W]."""
        query, key = super().maps()
        if self.position is None:
            return query, key
        return query, key, self.position.map(*key.shape[2:])

    def relate(self, maps: tuple[Tensor, ...], window: Window) -> Tensor:
        """[δ(φ(x_i), ψ(x_j)), position] of every pair: [B, D, K, P]."""
        query, key, *position = maps
        pairs = PAIRWISE_RELATIONS[self.relation].formula(window.centre(query), window.gather(key))
        if self.position is None:
            return pairs
        places = self.position.relate(position[0].to(pairs.dtype), window)
        return torch.cat([pairs, places.expand(pairs.shape[0], -1, -1, -1)], dim=1)

    def without_tensors(self) -> Self:
        """The formulas alone; of position, only its kind is used from here on."""
        position = self.position and replace(self.position, weight=self.position.weight.detach(), bias=None)
        return replace(super().without_tensors(), position=position)

    def samples_per_pixel(self) -> int:
        """K: γ sees one column per pair."""
        return self.footprint.places

    def attend(self, scores: Tensor, value: Tensor, window: Window) -> Tensor:
        """Softmax of the scores [B, G, K, P] over the footprint, then aggregation: [B, C, P]."""
        return attend(scores.softmax(dim=2), value, window)


dispatch.register("pairwise_attention", "reference", supports=lambda call: None, run=attention.run)

"""What pairwise and patchwise attention share: their arguments, and the definition relation → mapping → aggregation.

Legend: B batch, R relation width, C value channels, D δ's width, K places (1 in patchwise relations), P output pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from san.errors import UserError
from san.ops.footprint import Footprint, Window
from san.ops.mapping import AnyMapping, Mapping
from san.ops.normalization import widened

__all__ = ["AttentionCall", "run"]


@dataclass(frozen=True)
class AttentionCall(ABC):
    """Validated arguments of one attention call, and its formulas on any window.

    query, key [B, R, H, W], value [B, C, H, W]; `mapping` is γ, `relation` names δ.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mapping: AnyMapping
    relation: str
    footprint: Footprint

    def maps(self) -> tuple[Tensor, ...]:
        """The maps that `relate` compares: query, key and what else the operator needs."""
        return self.query, self.key

    @abstractmethod
    def relate(self, maps: tuple[Tensor, ...], window: Window) -> Tensor:
        """δ for the pixels of a window, from the rows of `maps` that it reads, in at least float32: [B, D, K, P]."""

    @abstractmethod
    def samples_per_pixel(self) -> int:
        """How many columns of D channels γ sees for one output pixel: K in pairwise attention, 1 in patchwise."""

    @abstractmethod
    def attend(self, scores: Tensor, value: Tensor, window: Window) -> Tensor:
        """Turn γ's output into weights and aggregate the value rows that the window reads: [B, C, P]."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that may need a gradient, γ's and the position's left out."""
        return self.query, self.key, self.value

    def without_tensors(self) -> Self:
        """The formulas alone: what a backward pass may keep without keeping any map alive."""
        nothing = self.value.new_empty(0)
        return replace(self, query=nothing, key=nothing, value=nothing, mapping=None)

    def elements_per_pixel(self) -> int:
        """Elements of the largest array that the formulas write out, for one output pixel."""
        layers = self.mapping.layers if isinstance(self.mapping, Mapping) else ()
        widest = max((max(layer.weight.shape) for layer in layers), default=1)
        return max(widest * self.samples_per_pixel(), self.value.shape[1] * self.footprint.places)


def run(call: AttentionCall) -> Tensor:
    """y [B, C, H_out, W_out] in the value's dtype, computed in at least float32, as the formulas read."""
    size = call.value.shape[2:]
    window = call.footprint.window(*size)
    relations = call.relate(tuple(map(widened, call.maps())), window)
    scores = _scores(call, relations)
    y = call.attend(scores, widened(call.value), window)
    return y.unflatten(2, call.footprint.output_size(*size)).to(call.value.dtype)


def _scores(call: AttentionCall, relations: Tensor) -> Tensor:
    """γ's output; what an opaque γ gives is checked here, because only now it is known."""
    scores = call.mapping(relations) if call.mapping is not None else relations
    columns = call.footprint.places // call.samples_per_pixel()
    fits = scores.shape[::2] == relations.shape[::2] and scores.shape[3] == relations.shape[3]
    if not fits or scores.shape[1] % columns or call.value.shape[1] % max(scores.shape[1] // columns, 1):
        raise UserError(
            f"the mapping turned {list(relations.shape)} into {list(scores.shape)}, but it must keep all but the "
            f"channels and give {columns}·G of these, for a G that divides the {call.value.shape[1]} channels of value"
        )
    return scores

"""δ, the relation functions that compare a query with the keys of its footprint, and the position that joins them.

Two registries, one per form of attention; adding an entry adds a relation to every operator, layer and network, on the
reference and tiled backends. Legend: B batch, R relation width, D δ's width, K places, P output pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from san.errors import UserError
from san.ops.footprint import Footprint, Window, coordinates
from san.ops.normalization import widened

__all__ = [
    "PAIRWISE_RELATIONS",
    "PATCHWISE_RELATIONS",
    "POSITION_WIDTHS",
    "Position",
    "Relation",
    "find_relation",
    "relation",
]

POSITION_WIDTHS = {"none": 0, "relative": 2, "absolute": 4}


@dataclass(frozen=True)
class Relation:
    """δ, of one pair (pairwise, paper §3.1) or of a whole footprint (patchwise, §3.2).

    `formula` maps queries [B, R, 1, P] and keys [B, R, K, P] to [B, D, K, P] (pairwise) or [B, D, P] (patchwise); with
    `query_everywhere` queries come as [B, R, K, P] too. `width` maps (R, K) to D.
    """

    formula: Callable[[Tensor, Tensor], Tensor]
    width: Callable[[int, int], int]
    query_everywhere: bool = False

    def queries(self, query: Tensor, window: Window) -> Tensor:
        """The queries to compare: at every place if `query_everywhere`, else at the centres."""
        return window.gather(query) if self.query_everywhere else window.centre(query)


def _pairwise_concatenation(query: Tensor, key: Tensor) -> Tensor:
    return torch.cat([query.expand_as(key), key], dim=1)


def _patchwise_concatenation(query: Tensor, key: Tensor) -> Tensor:
    return torch.cat([query.flatten(1, 2), key.flatten(1, 2)], dim=1)


def _clique(query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("brjp,brlp->bjlp", query, key).flatten(1, 2)


PAIRWISE_RELATIONS = {
    "subtraction": Relation(lambda query, key: query - key, lambda r, k: r),
    "summation": Relation(lambda query, key: query + key, lambda r, k: r),
    "hadamard": Relation(lambda query, key: query * key, lambda r, k: r),
    "concatenation": Relation(_pairwise_concatenation, lambda r, k: 2 * r),
    "dot": Relation(lambda query, key: (query * key).sum(1, keepdim=True), lambda r, k: 1),
}

PATCHWISE_RELATIONS = {
    "concatenation": Relation(_patchwise_concatenation, lambda r, k: r * (k + 1)),
    "star": Relation(lambda query, key: (query * key).sum(1), lambda r, k: k),
    "clique": Relation(_clique, lambda r, k: k * k, query_everywhere=True),
}


@dataclass(frozen=True)
class Position:
    """Position p = weight · coordinates + bias, joined to δ behind it (paper §3.1).

    `kind` "relative" joins p_i − p_j, "absolute" joins [p_i, p_j]; `weight` is [2, 2], `bias` [2] or None; coordinates
    run from −1 to 1, x first. With the "zeros" border p_j is 0 outside. The paper does not spell out "absolute".
    """

    kind: str
    weight: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        if self.kind not in POSITION_WIDTHS or self.kind == "none":
            raise UserError(f"position {self.kind!r} is unknown; choose relative or absolute, or pass None for none")
        if self.weight.shape != (2, 2) or (self.bias is not None and self.bias.shape != (2,)):
            raise UserError(f"position's weight is {list(self.weight.shape)}, but it must be [2, 2], and its bias [2]")

    @property
    def width(self) -> int:
        """How many channels the position adds to δ."""
        return POSITION_WIDTHS[self.kind]

    def map(self, height: int, width: int) -> Tensor:
        """p of every pixel of a map, in at least float32, because p_i − p_j cancels: [1, 2, H, W]."""
        weight = widened(self.weight)
        x, y = coordinates(height, width, like=weight).unbind(1)
        # Not a convolution or matrix product, which GPUs may compute in TF32.
        position = weight[:, :1, None] * x + weight[:, 1:, None] * y
        return (position if self.bias is None else position + widened(self.bias)[:, None, None])[None]

    def relate(self, position: Tensor, window: Window) -> Tensor:
        """Channels to join to δ, from the map p: [1, 2 or 4, K, P]."""
        centre, places = window.centre(position), window.gather(position)
        return centre - places if self.kind == "relative" else _pairwise_concatenation(centre, places)


def find_relation(form: str, kind: str) -> Relation:
    """The relation named `kind` of `form` "pairwise" or "patchwise"; `UserError` lists the valid names."""
    forms = {"pairwise": PAIRWISE_RELATIONS, "patchwise": PATCHWISE_RELATIONS}
    if form not in forms:
        raise UserError(f"form {form!r} is unknown; choose one of: {', '.join(forms)}")
    if kind not in forms[form]:
        raise UserError(f"{form} relation {kind!r} is unknown; choose one of: {', '.join(forms[form])}")
    return forms[form][kind]


def relation(
    query: Tensor,
    key: Tensor,
    kind: str = "subtraction",
    *,
    form: str = "pairwise",
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    border: str = "reflect",
) -> Tensor:
    """δ between every pixel's query and the keys of its footprint, written out (paper §3.1, §3.2).

    Pairwise kinds: `subtraction` φ−ψ, `summation` φ+ψ, `hadamard` φ⊙ψ, `concatenation` [φ, ψ], `dot` φᵀψ; the result
    is [B, D, K, P]. Patchwise kinds: `concatenation` [φ_i, [ψ_j]_j], `star` [φ_iᵀψ_j]_j, `clique` [φ_jᵀψ_l]_{j,l};
    the result is [B, D, P]. `query` and `key` are [B, R, H, W] of one floating dtype, contiguous or channels-last; the
    formula runs in their dtype.

    Raises `UserError` for an unknown kind or form, unequal shapes, or a bad footprint.
    """
    if query.dim() != 4 or query.shape != key.shape or 0 in query.shape[1:]:
        raise UserError(
            f"query {list(query.shape)} and key {list(key.shape)} must have one shape [B, R, H, W], none of R, H, W 0"
        )
    window = Footprint(kernel_size, stride, dilation, border).window(*query.shape[2:])
    found = find_relation(form, kind)
    return found.formula(found.queries(query, window), window.gather(key))

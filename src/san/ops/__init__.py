"""Vector self-attention on images as functions: relation, aggregation, pairwise and patchwise attention.

Every operator runs on several backends behind one contract; `backends()` lists them, `support()` asks them, and
`use_backend()` (or the environment variable `SAN_BACKEND`) forces one. Needs torch alone.
Shapes: B batch, R relation width, C value channels, G weight groups, H W map, K = k·k places, P output pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from san.errors import UserError
from san.ops import dispatch
from san.ops import tiled as _tiled  # noqa: F401 (registers the backend)
from san.ops.dispatch import backends, use_backend
from san.ops.footprint import Footprint
from san.ops.kernels.aggregation import native as _aggregation_native  # noqa: F401 (registers the backend)
from san.ops.kernels.aggregation import triton as _aggregation_triton  # noqa: F401 (registers the backend)
from san.ops.kernels.aggregation.reference import AggregationCall
from san.ops.kernels.pairwise import native as _pairwise_native  # noqa: F401 (registers the backend)
from san.ops.kernels.pairwise import triton as _pairwise_triton  # noqa: F401 (registers the backend)
from san.ops.kernels.pairwise.reference import PairwiseCall
from san.ops.kernels.patchwise import native as _patchwise_native  # noqa: F401 (registers the backend)
from san.ops.kernels.patchwise import triton as _patchwise_triton  # noqa: F401 (registers the backend)
from san.ops.kernels.patchwise.reference import PatchwiseCall
from san.ops.mapping import AnyMapping, Mapping, MappingLayer
from san.ops.normalization import BatchNorm, without_autocast
from san.ops.relations import Position, find_relation, relation
from san.ops.validation import check_groups, check_mapping, check_maps, check_position

__all__ = [
    "BatchNorm",
    "Footprint",
    "Mapping",
    "MappingLayer",
    "Position",
    "aggregation",
    "backends",
    "make_call",
    "pairwise_attention",
    "patchwise_attention",
    "relation",
    "support",
    "use_backend",
]


def aggregation(
    value: Tensor,
    weight: Tensor,
    *,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    border: str = "reflect",
) -> Tensor:
    """y_i = Σ_{j∈R(i)} α_ij ⊙ β(x_j): weights that differ at every pixel, applied to the footprint (paper §3).

    `value` [B, C, H, W] and `weight` [B, G, K, P] give y [B, C, ⌈H/s⌉, ⌈W/s⌉] in the value's dtype; G divides C, and
    value channel c uses weight group c mod G. Any floating dtype and memory format; sums in at least float32.

    Raises `UserError` for shapes that do not fit, an even kernel size, an unknown border.
    """
    call = _aggregation_call(value, weight, kernel_size=kernel_size, stride=stride, dilation=dilation, border=border)
    return _run("aggregation", call, value)


def pairwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: AnyMapping = None,
    *,
    kernel_size: int,
    relation: str = "subtraction",
    position: Position | None = None,
    stride: int = 1,
    dilation: int = 1,
    border: str = "reflect",
) -> Tensor:
    """y_i = Σ_j α_ij ⊙ β(x_j) with α_ij = softmax_j γ([δ(φ(x_i), ψ(x_j)), position]) (paper §3.1).

    `query` φ(x) and `key` ψ(x) are [B, R, H, W], `value` β(x) is [B, C, H, W]; y is [B, C, ⌈H/s⌉, ⌈W/s⌉] in the
    value's dtype. `relation` δ is `subtraction`, `summation`, `hadamard`, `concatenation` or `dot`, of width D = R, R,
    R, 2R or 1; `position` adds 2 (relative) or 4 (absolute) channels behind it. `mapping` γ takes D to G channels, G
    divides C, and value channel c uses weight group c mod G; None is the identity (G = D), and `dot` with None and no
    position is scalar attention. With stride, the centres are input pixels 0, s, 2s, …. Any floating dtype, contiguous
    or channels-last; sums in at least float32. A mapping whose BatchNorm uses the batch moves its running averages.
    Second derivatives, torch.func and forward-mode differentiation need `use_backend("reference")`.

    Raises `UserError` for shapes that do not fit or unknown names, and when a forced backend refuses.
    """
    call = _pairwise_call(
        query,
        key,
        value,
        mapping,
        kernel_size=kernel_size,
        relation=relation,
        position=position,
        stride=stride,
        dilation=dilation,
        border=border,
    )
    return _run("pairwise_attention", call, value)


def patchwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: AnyMapping = None,
    *,
    kernel_size: int,
    relation: str = "concatenation",
    stride: int = 1,
    dilation: int = 1,
    border: str = "reflect",
) -> Tensor:
    """y_i = Σ_j α_ij ⊙ β(x_j) with all of a footprint's weights from one look: α_i = γ(δ(x_R(i))) (paper §3.2).

    `query` φ(x) and `key` ψ(x) are [B, R, H, W], `value` β(x) is [B, C, H, W]; y is [B, C, ⌈H/s⌉, ⌈W/s⌉] in the
    value's dtype. `relation` δ is `concatenation` [φ_i, [ψ_j]_j] of width D = R(K+1), `star` [φ_iᵀψ_j]_j of width K, or
    `clique` [φ_jᵀψ_l]_{j,l} of width K². `mapping` γ takes D to G·K channels, of which g·K + j is group g's weight at
    place j; None is the identity (G = D/K). No softmax, no position. Otherwise as `pairwise_attention`.

    Raises `UserError` for shapes that do not fit or unknown names, and when a forced backend refuses. Departure: the
    authors' patchwise form ignores dilation when padding; here it reaches as far as the footprint.
    """
    call = _patchwise_call(
        query,
        key,
        value,
        mapping,
        kernel_size=kernel_size,
        relation=relation,
        stride=stride,
        dilation=dilation,
        border=border,
    )
    return _run("patchwise_attention", call, value)


def support(operator: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Ask every backend whether it runs `operator` on these arguments; print and return the answers.

    `san.ops.support("pairwise_attention", query, key, value, mapping, kernel_size=7)`: a backend's answer is None where
    it accepts, else one sentence that says why not. Raises `UserError` for an unknown operator.
    """
    found = dispatch.answers(operator, make_call(operator, *args, **kwargs))
    for backend, refusal in found.items():
        print(f"{backend}: {refusal or 'yes'}")
    return found


def make_call(operator: str, *args: Any, **kwargs: Any) -> Any:
    """The validated call of an operator, as backends take it; `UserError` for an unknown operator or bad shapes."""
    if operator not in _CALLS:
        raise UserError(f"operator {operator!r} is unknown; choose one of: {', '.join(_CALLS)}")
    return _CALLS[operator](*args, **kwargs)


def _run(operator: str, call: Any, value: Tensor) -> Tensor:
    with without_autocast(value):
        return dispatch.run(operator, call)


def _aggregation_call(value: Tensor, weight: Tensor, **geometry: Any) -> AggregationCall:
    footprint = Footprint(**geometry)
    check_maps(value=value)
    if weight.device != value.device or not weight.is_floating_point():
        raise UserError(
            f"weight is {weight.dtype} on {weight.device}, but it must be a floating tensor on {value.device}"
        )
    rows, columns = footprint.output_size(*value.shape[2:])
    expected = [value.shape[0], "G", footprint.places, rows * columns]
    if weight.dim() != 4 or [*weight.shape[:1], *weight.shape[2:]] != [expected[0], *expected[2:]]:
        raise UserError(
            f"weight has shape {list(weight.shape)}, but it must be [{', '.join(map(str, expected))}] for a value of "
            f"shape {list(value.shape)} and kernel size {footprint.kernel_size}"
        )
    check_groups(value, weight.shape[1])
    return AggregationCall(value, weight, footprint)


def _pairwise_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: AnyMapping = None,
    *,
    relation: str = "subtraction",
    position: Position | None = None,
    **geometry: Any,
) -> PairwiseCall:
    check_maps(query=query, key=key, value=value)
    footprint = Footprint(**geometry)
    width = find_relation("pairwise", relation).width(key.shape[1], footprint.places)
    call = PairwiseCall(query, key, value, mapping, relation, footprint, position)
    check_mapping(call, width + (position.width if position else 0))
    check_position(value, position)
    return call


def _patchwise_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: AnyMapping = None,
    *,
    relation: str = "concatenation",
    **geometry: Any,
) -> PatchwiseCall:
    check_maps(query=query, key=key, value=value)
    footprint = Footprint(**geometry)
    width = find_relation("patchwise", relation).width(key.shape[1], footprint.places)
    call = PatchwiseCall(query, key, value, mapping, relation, footprint)
    check_mapping(call, width)
    return call


_CALLS: dict[str, Callable[..., Any]] = {
    "aggregation": _aggregation_call,
    "pairwise_attention": _pairwise_call,
    "patchwise_attention": _patchwise_call,
}

"""Products on the channel axis by the kernels of `native.cpp`: BatchNorm, ReLU, pooling and residual joined to them.

These are not operators that autograd knows: `san.fused` calls them where it has checked that it may. All may be given
places instead of tensors, to be recorded.
Legend: B batch, C channels, O output channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from san.ops.kernels.native import operators

__all__ = ["MAX_PRODUCTS", "MAX_STEM_CHANNELS", "Affine", "Linear", "Norm", "fold", "products"]

MAX_STEM_CHANNELS = 4
MAX_PRODUCTS = 3
_MAX_NORMS = 6


class Linear(NamedTuple):
    """A pointwise convolution: weight [O, C] or [O, C, 1, 1], bias [O] or None."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """BatchNorm with fixed statistics, all [C]."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float


class Affine(NamedTuple):
    """What a BatchNorm is folded into: scale and shift [C]; or, with the Linear before it, weight [O, C], bias [O]."""

    scale: Tensor
    shift: Tensor


def fold(norms: Sequence[tuple[Norm, Linear | None]], like: Any) -> list[Affine]:
    """Fold up to six BatchNorms, each alone or with the Linear before it, into tensors or places like `like`."""
    arguments: list[int] = []
    folded = []
    for (weight, bias, mean, variance, eps), linear in norms:
        channels, columns = mean.shape[0], linear.weight.shape[1] if linear else 0
        shape = (channels, columns) if linear else (channels,)
        found = Affine(like.new_empty(*shape), like.new_empty(channels))
        folded.append(found)
        arguments += (channels, *operators.addresses(weight, bias, mean, variance), operators.bits(eps), columns)
        arguments += operators.addresses(*linear) if linear else (0, 0)
        arguments += operators.addresses(*found)
    operators.call("fold", *arguments, *[0] * (11 * (_MAX_NORMS - len(norms))), work=0)
    return folded


def products(
    x: Tensor,
    linears: Sequence[Linear],
    *,
    norm: Affine | None = None,
    pooled: bool = False,
    stem: Affine | None = None,
    residual: Tensor | None = None,
    output: Tensor | None = None,
) -> list[Tensor]:
    """W·f(x) + b of up to three Linears, x [B, C, H, W] contiguous float32 → [B, O, H, W] each.

    f is ReLU(scale·x + shift) with a `norm`, then 2×2 max pooling if `pooled`. With a `stem`, whose scale is a weight
    [C, image channels], f is ReLU(scale·x + shift) of an image x, pooled likewise. `residual` is added to the first,
    which goes to `output` if given; that may be the residual itself.
    """
    batch, channels, height, width = x.shape
    size = (height // 2, width // 2) if pooled else (height, width)
    made = linears if output is None else linears[1:]
    outputs = [x.new_empty(batch, linear.weight.shape[0], *size) for linear in made]
    outputs = outputs if output is None else [output, *outputs]
    if residual is not None and residual.shape != outputs[0].shape:
        raise ValueError(f"the residual is {list(residual.shape)}, but the product it joins {list(outputs[0].shape)}")
    room = [0] * (MAX_PRODUCTS - len(linears))
    scale, shift = stem or norm or (None, None)
    entering = stem.scale.shape[0] if stem else channels
    operators.call(
        "pointwise_forward",
        *(batch, entering, height, width, int(pooled)),
        *(channels if stem else 0, operators.address(x)),
        *operators.addresses(None if stem else scale, shift, scale if stem else None),
        *(*(output.shape[1] for output in outputs), *room),
        *operators.addresses(*(linear.weight for linear in linears), room=MAX_PRODUCTS),
        *operators.addresses(*(linear.bias for linear in linears), room=MAX_PRODUCTS),
        *operators.addresses(*outputs, room=MAX_PRODUCTS),
        operators.address(residual),
        work=batch * size[0] * size[1] * entering * sum(output.shape[1] for output in outputs),
    )
    return outputs

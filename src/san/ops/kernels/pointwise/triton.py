"""Products on the channel axis on GPUs by the Triton kernel of `device.py`, for networks without gradients.

These are not operators that autograd knows: `san.fused` calls them where it has checked that it may.
Legend: B batch, C channels that enter, O output channels, K image channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from san.ops.kernels.gpu import launch, normalization
from san.ops.kernels.gpu.launch import block, is_last, laid_out, programs
from san.ops.kernels.pointwise.native import MAX_PRODUCTS, Linear, Norm

__all__ = ["folded", "outputs_of", "product_mode", "products", "runs", "stacked"]


def runs(x: Tensor, widths: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the kernel takes a map with channels last, or an image, for products in `dtype` of these widths.

    In float32 it multiplies as TF32 does, where PyTorch lets convolutions do so. AMD's GPUs have too little shared
    memory for its tiles.
    """
    return (
        launch.installed()
        and torch.version.hip is None
        and launch.map_refusal(x) is None
        and launch.gpu_refusal(x) is None
        and max(widths) * prod(x.shape[2:]) <= launch.IMAGE_NUMBERS
        and (dtype is not torch.float32 or launch.interpreting() or _multiplies_in_tf32())
    )


def _multiplies_in_tf32() -> bool:
    convolutions: Any = torch.backends.cudnn
    return convolutions.conv.fp32_precision == "tf32"


def product_mode(dtype: torch.dtype) -> str:
    """How the kernels multiply; see `geometry.product`."""
    return launch.half_mode(dtype) or ("ieee" if launch.interpreting() else "tf32")


def folded(norm: Norm) -> Tensor:
    """Scale and shift [2, C] in float32 of BatchNorm by its running averages."""
    affine = launch.floats(norm.mean, 2, len(norm.mean))
    normalization.fold(None, (norm.mean, norm.variance), norm.weight, norm.bias, norm.eps, affine)
    return affine


def products(
    x: Tensor,
    linears: Sequence[Linear],
    affine: Tensor,
    dtype: torch.dtype,
    *,
    stem: Tensor | None = None,
    pooled: bool = False,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """W·f(x) + b of up to three Linears, x [B, C, H, W] with channels last → [B, O, H, W] likewise, in `dtype`.

    f is ReLU(scale · x + shift) of `affine` [2, C], then 2×2 max pooling if `pooled`; with a `stem` [C, K] x is an
    image [B, K, H, W] of any memory format, and f that of stem · x. `residual`, channels last, is added to the first
    output, in the dtype to which both promote.
    """
    x = laid_out(x, stem is None or is_last(x))
    size = tuple(side // 2 for side in x.shape[2:]) if pooled else tuple(x.shape[2:])
    first = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    widths, total = [len(linear.weight) for linear in linears], len(x) * prod(size)
    options: Any = {"device": x.device, "memory_format": torch.channels_last}
    dtypes = [first, *[dtype] * (len(widths) - 1)]
    outputs = [
        torch.empty((len(x), width, *size), dtype=own, **options) for width, own in zip(widths, dtypes, strict=True)
    ]
    constants = _constants(affine.shape[1], stem, widths, dtype, total, pooled)
    grid = (programs(sum(widths), constants["BLOCK_O"]) * programs(total, constants["LANES"]),)
    room: list[Any] = [None] * (MAX_PRODUCTS - len(linears))
    stem = stem if stem is None else stem.contiguous()
    tensors = (x, stem, affine, *stacked(linears), residual, *outputs, *room)
    launch.start(
        _kernel(), grid, *tensors, total, *x.shape[2:], *size, **constants, LAST=stem is not None and is_last(x)
    )
    return outputs


def _kernel() -> Any:
    from san.ops.kernels.pointwise.device import products as kernel

    return kernel


def _constants(
    channels: int, stem: Tensor | None, widths: list[int], dtype: torch.dtype, total: int, pooled: bool
) -> dict[str, Any]:
    """Tiles are as large as compile without spilling registers, see gpu_compile.py.

    Pooling reads four pixels for one, so a program makes more channels of them, and sums over fewer at a time.
    """
    most, made = (32, 256) if pooled else (64, 128)
    return {
        "C": channels,
        "K": 0 if stem is None else stem.shape[1],
        **outputs_of(widths),
        "POOLED": pooled,
        "MODE": product_mode(dtype),
        "LANES": launch.lanes(total, 64 if pooled else 128),
        "BLOCK_C": min(block(channels), most // 2 if dtype is torch.float32 else most),
        "BLOCK_O": min(block(sum(widths)), made),
        "num_warps": 8,
        "num_stages": 3,
    }


def outputs_of(widths: Sequence[int]) -> dict[str, int]:
    """The kernels' constants for the widths of up to three Linears."""
    return {f"O{n + 1}": width for n, width in enumerate([*widths, 0, 0][:MAX_PRODUCTS])}


def stacked(linears: Sequence[Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight [O, C] and one bias [O] of all, None if there is none."""
    weights = [linear.weight.flatten(1) for linear in linears]
    weight = weights[0].contiguous() if len(weights) == 1 else torch.cat(weights)
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return weight, None
    known = [weight.new_zeros(len(rows)) if bias is None else bias for rows, bias in zip(weights, biases, strict=True)]
    return weight, known[0].contiguous() if len(known) == 1 else torch.cat(known)

"""Training through a network's stem on GPUs by the Triton kernels of `device.py`, which never make its full-size map.

The same node of autograd as in `portable_stem.py`, which keeps the image alone, for images that need no gradient.
Legend: B batch, K image channels, C channels of the stem, O output channels, H W map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from san.ops.kernels.gpu import launch
from san.ops.kernels.gpu.launch import block, floats, is_last, laid_out, programs, shares
from san.ops.kernels.pointwise.native import Linear
from san.ops.kernels.pointwise.triton import product_mode, products
from san.ops.kernels.pointwise_training import triton
from san.ops.kernels.pointwise_training.portable import Statistics, check_samples, product_dtype
from san.ops.kernels.pointwise_training.portable_stem import (
    Call,
    Pixels,
    Sums,
    like_parameters,
    parameter_gradients,
    statistics_of,
)
from san.ops.normalization import BatchNorm, without_autocast

__all__ = ["MAX_CHANNELS", "stem"]

# Of the stem, and of the product behind it: a program holds all of both.
MAX_CHANNELS = 64


def _dense(call: Call) -> Tensor:
    """The image as the product sees it."""
    image = call.image.to(call.dtype)
    return laid_out(image, is_last(image))


def _pixels(image: Tensor, uses_batch: bool) -> Pixels:
    """Moments of the pixels."""
    from san.ops.kernels.pointwise_training.device import image_moments

    batch, channels, height, width = image.shape
    total = batch * height * width
    lanes = launch.lanes(total, 1024)
    count = programs(total, lanes)
    if not uses_batch:
        nothing = image.new_zeros(channels, dtype=torch.float64)
        return Pixels(nothing, nothing.expand(channels, channels))
    parts = floats(image, count, channels + channels**2)
    constants = {"K": channels, "LAST": is_last(image), "LANES": lanes}
    launch.start(image_moments, (count,), image, parts, total, height, width, **constants)
    means, deviations = parts.double().split([channels, channels**2], 1)
    samples = (total - torch.arange(count, device=image.device) * lanes).clamp(max=lanes).double()[:, None]
    mean = (means * samples).sum(0) / total
    away = means - mean
    between = (away[:, :, None] * (away * samples)[:, None]).sum(0)
    return Pixels(mean, deviations.sum(0).view(channels, channels) + between)


def _affine(call: Call, statistics: Statistics) -> Tensor:
    """Scale and shift [2, C] in float32."""
    scale = statistics.scale(call.norm_weight).double()
    shift = -statistics.mean.double() * scale
    return torch.stack([scale, shift if call.norm_bias is None else shift + call.norm_bias]).float()


def _sums(call: Call, affine: Tensor, pixels: Pixels, outer: Tensor) -> Sums:
    """What backward adds up over all pixels."""
    from san.ops.kernels.pointwise_training.device import stem_backward

    image, weight = _dense(call), call.behind.flatten(1).contiguous()
    (given, channels), colours = weight.shape, image.shape[1]
    total = len(image) * outer.shape[2] * outer.shape[3]
    lanes = launch.lanes(total, 16)
    count, each = shares(programs(total, lanes), 1, most=triton.PROGRAMS)
    sums = floats(image, count, 1 + colours + given, channels)
    tensors = (
        image,
        call.filters.flatten(1).contiguous(),
        affine,
        pixels.mean.float(),
        weight,
        laid_out(outer, last=True),
        sums,
    )
    launch.start(
        *(stem_backward, (count,), *tensors, total, *image.shape[2:], *outer.shape[2:], each),
        C=channels,
        K=colours,
        O1=given,
        POOLED=call.pooled,
        LAST=is_last(image),
        MODE=product_mode(call.dtype),
        LANES=lanes,
        BLOCK_C=block(channels),
        BLOCK_O=block(given),
        num_warps=8,
    )
    of_norm, of_colours, of_weight = sums.sum(0, dtype=torch.float64).split([1, colours, given])
    return Sums(of_norm[0], of_colours.T, of_weight, None)


class _Stem(torch.autograd.Function):
    """W₀ · pool(ReLU(BatchNorm(W · image)))."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        norm: BatchNorm,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        behind: Tensor,
        pooled: bool,
    ) -> Tensor:
        check_samples(image, norm)
        call = Call(product_dtype(image), pooled, image, weight, norm_weight, norm_bias, behind)
        with without_autocast(image):
            dense = _dense(call)
            pixels = _pixels(dense, norm.uses_batch)
            statistics = statistics_of(call, norm, pixels)
            affine = _affine(call, statistics)
            options: Any = {"stem": call.filters.flatten(1), "pooled": pooled}
            (output,) = products(dense, [Linear(behind, None)], affine, call.dtype, **options)
        ctx.call, ctx.statistics = call[:2], statistics[2:]
        ctx.save_for_backward(*call[2:], *statistics[:2], *pixels, affine)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mean, spread, centre, deviation, affine = ctx.saved_tensors
        call, statistics = Call(*ctx.call, *tensors), Statistics(mean, spread, *ctx.statistics)
        pixels, needed = Pixels(centre, deviation), ctx.needs_input_grad
        with without_autocast(call.image):
            sums = _sums(call, affine, pixels, outer[0])
            of_weight, *of_norm = parameter_gradients(call, statistics, pixels, sums)
        behind = sums.behind.view_as(call.behind) if needed[5] and sums.behind is not None else None
        return None, *like_parameters(call, (of_weight, None, *of_norm), needed[1:5]), behind, None


def stem(image: Tensor, weight: Tensor, norm: BatchNorm, behind: Tensor, *, pooled: bool) -> Tensor:
    """As `portable_stem.stem`, with channels last, for images that `pointwise.triton.runs` takes and that need no
    gradient, and up to `MAX_CHANNELS` channels of the stem and of the output."""
    return _Stem.apply(image, weight, norm, norm.weight, norm.bias, behind, pooled)

"""Training through BatchNorm · ReLU · pooling · products on the channel axis, keeping the input map alone.

Each function is one node of autograd: forward takes the batch's moments, folds BatchNorm and multiplies; backward
recomputes what entered the products, and joins the three terms of BatchNorm's gradient in one pass over the map.
Legend: B batch, C channels, O output channels, K image channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import address, single
from san.ops.kernels.normalization.native import Folded, Gradients, Samples, fold, fold_backward
from san.ops.kernels.pointwise.native import MAX_PRODUCTS, Affine, Linear, products
from san.ops.normalization import BatchNorm

__all__ = ["norm_products", "stem"]

# Reading a number from memory takes as long as so many multiply-adds.
_PASS = 16


class _Made(NamedTuple):
    """Of every Linear's weight and bias, of the input before BatchNorm, and Σ g [C], Σ g·x [C] or [C, K]."""

    weights: list[Tensor | None]
    biases: list[Tensor | None]
    input: Tensor | None
    total: Tensor
    product: Tensor


def _samples(x: Tensor) -> Samples:
    """Moments of every channel of x [B, C, H, W], in float64."""
    batch, channels, height, width = x.shape
    mean, deviation = (x.new_empty(channels, dtype=torch.float64) for _ in range(2))
    sizes, addresses = (batch, channels, height * width), operators.addresses(x, mean, deviation)
    operators.call("channel_moments", *sizes, *addresses, work=_PASS * x.numel())
    return Samples(batch * height * width, mean, deviation)


def _backward(
    x: Tensor,
    linears: Sequence[Linear],
    outer: Sequence[Tensor],
    affine: Affine,
    *,
    pooled: bool,
    is_stem: bool,
    wanted: Sequence[bool],
    wants_input: bool,
) -> _Made:
    """Back through products of one input; `wanted` says for every weight and bias whether its gradient is."""
    batch, channels, height, width = x.shape
    tensors = [each for linear in linears for each in linear]
    made: Any = [
        torch.empty_like(each) if want and each is not None else None
        for each, want in zip(tensors, wanted, strict=True)
    ]
    taken = len(affine.scale)
    total = x.new_empty(taken, dtype=torch.float64)
    product = x.new_empty((taken, channels) if is_stem else taken, dtype=torch.float64)
    gradient = torch.empty_like(x) if wants_input else None
    stem = (channels, address(x), 0, address(affine.shift), address(affine.scale))
    plain = (0, address(x), *operators.addresses(*affine), 0)
    operators.call(
        "pointwise_backward",
        *(batch, taken, height, width, int(pooled), *(stem if is_stem else plain)),
        *(*(linear.weight.shape[0] for linear in linears), *[0] * (MAX_PRODUCTS - len(linears))),
        *operators.addresses(*(linear.weight for linear in linears), room=MAX_PRODUCTS),
        *operators.addresses(*outer, room=MAX_PRODUCTS),
        *operators.addresses(*made[0::2], room=MAX_PRODUCTS),
        *operators.addresses(*made[1::2], room=MAX_PRODUCTS),
        *operators.addresses(gradient, total, product),
        work=2 * batch * height * width * taken * sum(linear.weight.shape[0] for linear in linears),
    )
    return _Made(made[0::2], made[1::2], gradient, total, product)


def _through_norm(gradient: Tensor, x: Tensor, found: Folded, back: Gradients, residual: Tensor | None) -> Tensor:
    """scale · gradient + slope · x + intercept + residual, in the gradient's place."""
    slope, intercept = back.slope, back.intercept
    if slope is None or intercept is None:
        slope = intercept = torch.zeros_like(found.affine.scale)
    batch, channels, height, width = x.shape
    factors = (found.affine.scale, slope.float(), intercept.float())
    addresses = operators.addresses(gradient, x, *factors, residual)
    operators.call("norm_input_gradient", batch, channels, height * width, *addresses, work=_PASS * x.numel())
    return gradient


def _paired(tensors: Any) -> list[Linear]:
    """Weights and biases in turn, as Linears."""
    return [Linear(*pair) for pair in zip(tensors[0::2], tensors[1::2], strict=True)]


class _NormProducts(torch.autograd.Function):
    """Products of ReLU(BatchNorm(x)); with `passes`, x is handed on as last output, so that its gradients meet here."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm: BatchNorm,
        pooled: bool,
        passes: bool,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        linears = _paired(tensors)
        found = fold(norm, _samples(x) if norm.uses_batch else None)
        outputs = products(x, linears, norm=found.affine, pooled=pooled, residual=residual)
        ctx.norm, ctx.pooled, ctx.passes, ctx.found = norm, pooled, passes, found
        ctx.save_for_backward(x, *tensors)
        return (*outputs, x.view_as(x)) if passes else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        linears = _paired(tensors)
        given = list(map(single, outer))
        passed = given.pop() if ctx.passes else None
        found, needed = ctx.found, ctx.needs_input_grad
        options: Any = {"pooled": ctx.pooled, "is_stem": False, "wanted": needed[7:], "wants_input": needed[0]}
        made = _backward(x, linears, given, found.affine, **options)
        back = fold_backward(ctx.norm, found, made.product, made.total)
        of_x = None if made.input is None else _through_norm(made.input, x, found, back, passed)
        parameters = [each for pair in zip(made.weights, made.biases, strict=True) for each in pair]
        of_norm = [each if want else None for each, want in zip(back[:2], needed[5:7], strict=True)]
        return of_x, given[0] if needed[1] else None, None, None, None, *of_norm, *parameters


def norm_products(
    x: Tensor,
    norm: BatchNorm,
    linears: Sequence[Linear],
    *,
    pooled: bool = False,
    residual: Tensor | None = None,
    passes: bool = False,
) -> tuple[Tensor, ...]:
    """W·f(x) + b of up to three Linears, f = ReLU(BatchNorm(x)), then 2×2 max pooling if `pooled`; [B, O, H, W] each.

    x [B, C, H, W] is contiguous float32. `residual` is added to the first. With `passes` x comes back as last output:
    where it is used again, as a residual for instance, its gradient then joins this one's without a pass of its own.
    """
    tensors = [each for linear in linears for each in linear]
    return _NormProducts.apply(x, residual, norm, pooled, passes, norm.weight, norm.bias, *tensors)


class _Stem(torch.autograd.Function):
    """W₀ · pool(ReLU(BatchNorm(W · image))): BatchNorm's moments and gradients follow from few sums over the image."""

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
        linear = Linear(weight, None)
        found = fold(norm, _image_samples(image) if norm.uses_batch else None, linear)
        ctx.norm, ctx.pooled, ctx.found = norm, pooled, found
        ctx.save_for_backward(image, weight, behind)
        return products(image, [Linear(behind, None)], stem=found.affine, pooled=pooled)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        image, weight, behind = ctx.saved_tensors
        found, needed = ctx.found, ctx.needs_input_grad
        options: Any = {"pooled": ctx.pooled, "is_stem": True, "wanted": (needed[5], False), "wants_input": needed[0]}
        made = _backward(image, [Linear(behind, None)], [single(outer[0])], found.affine, **options)
        back = fold_backward(ctx.norm, found, made.product, made.total, Linear(weight, None))
        of_weight = None if back.linear is None else back.linear.weight
        own = [x if want else None for x, want in zip(back[:2], needed[3:5], strict=True)]
        return made.input, of_weight, None, *own, made.weights[0], None


def _image_samples(image: Tensor) -> Samples:
    """Moments of the pixels of an image [B, K, H, W], in float64."""
    batch, channels, height, width = image.shape
    mean = image.new_empty(channels, dtype=torch.float64)
    deviation = image.new_empty(channels, channels, dtype=torch.float64)
    addresses = operators.addresses(image, mean, deviation)
    operators.call("image_moments", batch, channels, height * width, *addresses, work=_PASS * image.numel())
    return Samples(batch * height * width, mean, deviation)


def stem(image: Tensor, weight: Tensor, norm: BatchNorm, behind: Tensor, *, pooled: bool) -> Tensor:
    """behind · f(image), f = ReLU(BatchNorm(weight · image)), then 2×2 max pooling if `pooled`: [B, O, H, W].

    `image` [B, K, H, W] has at most `MAX_STEM_CHANNELS` channels, is contiguous float32, and gets a gradient only with
    fixed statistics.
    """
    return _Stem.apply(image, weight, norm, norm.weight, norm.bias, behind, pooled)

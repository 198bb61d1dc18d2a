"""Training through BatchNorm · ReLU · pooling · products on GPUs by the Triton kernels of `device.py`.

The same node of autograd as in `portable.py`, for maps with channels last: it keeps its input, and reads it five times
in a step where PyTorch's own operators read and write it some thirty times. BatchNorm is not synchronised.
The stem is in `triton_stem.py`. Legend: B batch, C channels, O output channels, H W map, N pixels of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from san.ops.kernels.gpu import launch, normalization
from san.ops.kernels.gpu.launch import block, floats, laid_out, programs, shares
from san.ops.kernels.pointwise.native import MAX_PRODUCTS, Linear
from san.ops.kernels.pointwise.triton import outputs_of, product_mode, products, stacked
from san.ops.kernels.pointwise_training.portable import check_samples, product_dtype
from san.ops.normalization import BatchNorm, without_autocast

__all__ = ["PROGRAMS", "norm_products"]

# Of kernels of which one program fits a multiprocessor at a time, and each writes a tile of sums.
PROGRAMS = 528


def _normal(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift [2, C] and statistics [3, C] of BatchNorm, whose running averages move."""
    check_samples(x, norm)
    affine = floats(x, 2, x.shape[1])
    found = normalization.of_rows(x, x.shape[1], "") if norm.uses_batch else None
    options = (normalization.averages(norm), norm.weight, norm.bias, norm.eps, affine)
    statistics = normalization.fold(found, *options)
    normalization.move_running(norm, statistics)
    return affine, statistics


class _Back(NamedTuple):
    """Tensors of a backward pass: the input, scale and shift, all products' weight [O, C], and their gradients."""

    x: Tensor
    affine: Tensor
    weight: Tensor
    outer: list[Tensor]
    dtype: torch.dtype
    pooled: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels of the products, and the sides of the maps."""
        size = self.outer[0].shape[2:]
        return len(self.x) * prod(size), *self.x.shape[2:], *size

    def constants(self, most: int, made: int) -> dict[str, Any]:
        """For tiles of `most` channels that enter and `made` that leave."""
        given, channels = self.weight.shape
        return {
            "C": channels,
            **outputs_of([x.shape[1] for x in self.outer]),
            "POOLED": self.pooled,
            "MODE": product_mode(self.dtype),
            "BLOCK_C": min(block(channels), most),
            "BLOCK_O": min(block(given), made),
            "num_warps": 8,
            # Within the 99 kB of shared memory that a multiprocessor has at least.
            "num_stages": 2,
        }

    def gradients(self) -> list[Any]:
        """Those of the products, as kernels take them."""
        return [*self.outer, *[None] * (MAX_PRODUCTS - len(self.outer))]

    def to_norm(self) -> tuple[Tensor, Tensor]:
        """Gradient behind BatchNorm, like x, and those of its scale and shift [2, C] in float64."""
        from san.ops.kernels.pointwise_training.device import back_to_norm

        total, constants = self.sizes[0], self.constants(128, 32)
        lanes = launch.lanes(total, 32 if self.pooled else 64)
        count, channels = programs(total, lanes), self.x.shape[1]
        odd = self.pooled and any(side % 2 for side in self.x.shape[2:])
        gradient = torch.zeros_like(self.x) if odd else torch.empty_like(self.x)
        sums = floats(self.x, count, 2, channels)
        tensors = (self.x, self.affine, self.weight, *self.gradients(), gradient, sums)
        grid = (programs(channels, constants["BLOCK_C"]) * count,)
        launch.start(back_to_norm, grid, *tensors, *self.sizes, **constants, LANES=lanes)
        return gradient, sums.sum(0, dtype=torch.float64)

    def of_products(self) -> tuple[Tensor, Tensor]:
        """Gradients of the weight [O, C] and of the biases [O], in float32."""
        from san.ops.kernels.pointwise_training.device import of_products

        given, channels = self.weight.shape
        total, constants = self.sizes[0], self.constants(128, 128)
        lanes = launch.lanes(total, (32 if self.pooled else 64) // (self.dtype.itemsize // 2))
        blocks = programs(given, constants["BLOCK_O"]) * programs(channels, constants["BLOCK_C"])
        count, each = shares(programs(total, lanes), blocks, most=PROGRAMS)
        sums = floats(self.x, count, given, channels + 1)
        tensors = (self.x, self.affine, *self.gradients(), sums)
        launch.start(of_products, (blocks, count), *tensors, *self.sizes, each, **constants, LANES=lanes)
        found = sums.sum(0)
        return found[:, :-1], found[:, -1]

    def to_input(self, gradient: Tensor, slopes: Tensor | None, passed: Tensor | None) -> Tensor:
        """Gradient of x, in the memory of that behind BatchNorm, from its statistics and from where else x goes."""
        from san.ops.kernels.pointwise_training.device import back_to_input

        channels, total = self.x.shape[1], self.x.numel() // self.x.shape[1]
        constants = {"C": channels, "LANES": launch.lanes(total, 32), "BLOCK_C": min(block(channels), 128)}
        grid = (programs(channels, constants["BLOCK_C"]) * programs(total, constants["LANES"]),)
        tensors = (gradient, self.x, passed, self.affine, slopes)
        launch.start(back_to_input, grid, *tensors, total, **constants)
        return gradient


def _parameter_gradients(back: _Back, weights: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Of every Linear's weight and bias in turn, as far as they are wanted."""
    if not any(wanted):
        return [None] * len(wanted)
    of_weight, of_bias = back.of_products()
    sizes = [len(each) for each in weights]
    split = zip(weights, of_weight.split(sizes), of_bias.split(sizes), strict=True)
    found = [x for like, matrix, vector in split for x in (matrix.reshape(like.shape), vector)]
    return [x if want else None for x, want in zip(found, wanted, strict=True)]


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
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        dtype, x = product_dtype(x), laid_out(x, last=True)
        with without_autocast(x):
            affine, statistics = _normal(x, norm)
            linears = [Linear(*pair) for pair in zip(tensors[0::2], tensors[1::2], strict=True)]
            behind = None if residual is None else laid_out(residual, last=True)
            outputs = products(x, linears, affine, dtype, pooled=pooled, residual=behind)
        ctx.dtype, ctx.pooled, ctx.passes = dtype, pooled, passes
        ctx.norm = norm.eps, norm.uses_batch
        # Without the Linears' biases, which may change before backward: it does not need them.
        ctx.save_for_backward(x, affine, statistics, norm_weight, *tensors[0::2])
        ctx.residual = None if residual is None else residual.dtype
        return (*outputs, x.view_as(x)) if passes else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, affine, statistics, norm_weight, *weights = ctx.saved_tensors
        given, needed = [laid_out(each, last=True) for each in outer], ctx.needs_input_grad
        passed = given.pop() if ctx.passes else None
        weight, _ = stacked([Linear(each, None) for each in weights])
        back, (eps, batch) = _Back(x, affine, weight, given, ctx.dtype, ctx.pooled), ctx.norm
        with without_autocast(x):
            of_parameters = _parameter_gradients(back, weights, needed[7:])
            of_x, of_norm_weight, of_norm_bias = None, None, None
            if needed[0] or any(needed[5:7]):
                gradient, sums = back.to_norm()
                own = normalization.back(statistics, norm_weight, eps, sums, batch=batch, group="")
                of_x = back.to_input(gradient, own.slopes if batch else None, passed) if needed[0] else None
                of_norm_weight, of_norm_bias = own.parameters
        of_norm = [x if want else None for x, want in zip((of_norm_weight, of_norm_bias), needed[5:7], strict=True)]
        of_residual = given[0].to(ctx.residual) if needed[1] else None
        return of_x, of_residual, None, None, None, *of_norm, *of_parameters


def norm_products(
    x: Tensor,
    norm: BatchNorm,
    linears: Sequence[Linear],
    *,
    pooled: bool = False,
    residual: Tensor | None = None,
    passes: bool = False,
) -> tuple[Tensor, ...]:
    """As `portable.norm_products`, for maps with channels last that `pointwise.triton.runs` takes."""
    tensors = [each for linear in linears for each in linear]
    return _NormProducts.apply(x, residual, norm, pooled, passes, norm.weight, norm.bias, *tensors)

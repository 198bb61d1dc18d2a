"""Training through BatchNorm · ReLU · pooling · products on the channel axis, on any device, keeping the input alone.

What `native.py` does on the CPU, in PyTorch's own operators: each function is one node of autograd, which keeps its
input, weights and BatchNorm's statistics, and normalises the input a second time in backward.
The stem is in `portable_stem.py`. Legend: B batch, C channels, O output channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from san.errors import UserError
from san.ops.kernels.pointwise.native import Linear
from san.ops.normalization import BatchNorm, widened, without_autocast

__all__ = [
    "Made",
    "Statistics",
    "as_filters",
    "autocasts",
    "back_to_norm",
    "check_samples",
    "joined",
    "norm_products",
    "product",
    "product_dtype",
]

_aten = torch.ops.aten


class Statistics(NamedTuple):
    """What BatchNorm normalises by, [C] each: the batch's mean and inverse deviation, or the running averages."""

    mean: Tensor
    spread: Tensor
    uses_batch: bool
    eps: float

    def normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """BatchNorm of x, without a look at its moments; no average moves."""
        # Beside parameters in half precision PyTorch takes no statistics in float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, spread = self.mean.to(wide), self.spread.to(wide)
        variance, eps = (spread**-2, 0.0) if self.uses_batch else (spread, self.eps)
        affine = [each if each is None else each.to(wide) for each in (weight, bias)]
        return torch.native_batch_norm(x, *affine, mean, variance, False, 0.0, eps)[0]

    @classmethod
    def fixed(cls, norm: BatchNorm) -> Statistics:
        """Those of the running averages."""
        if norm.running_mean is None or norm.running_var is None:
            raise UserError("this BatchNorm keeps no running averages, so it needs the moments of a batch")
        return cls(norm.running_mean, norm.running_var, False, norm.eps)

    def inverse(self) -> Tensor:
        """The inverse deviation [C]."""
        return self.spread if self.uses_batch else torch.rsqrt(widened(self.spread) + self.eps)

    def scale(self, weight: Tensor | None) -> Tensor:
        """By what x − mean is multiplied [C]."""
        return self.inverse() if weight is None else self.inverse() * weight

    def backward(
        self, gradient: Tensor | None, x: Tensor, weight: Tensor | None, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Gradients of x, weight and bias, as far as they are wanted."""
        if gradient is None:
            return None, None, None
        if self.uses_batch:
            tensors = (weight, None, None, self.mean, self.spread)
        else:
            # CUDA wants the batch's statistics to be there, if empty; in float32 all are of one dtype everywhere.
            wide = torch.promote_types(x.dtype, torch.float32)
            nothing, own = x.new_empty(0, dtype=wide), (weight, self.mean, self.spread)
            tensors = (*(each if each is None else each.to(wide) for each in own), nothing, nothing)
        return _aten.native_batch_norm_backward(gradient, x, *tensors, self.uses_batch, self.eps, [*wanted])


class Made(NamedTuple):
    """Gradients: of every Linear's weight and bias in turn, and of what BatchNorm gave.

    They are in the products' dtype: autograd makes a parameter's gradient be of its own.
    """

    parameters: list[Tensor | None]
    input: Tensor | None


def _normalised(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Statistics]:
    """BatchNorm of x, which moves the running averages, and its statistics."""
    check_samples(x, norm)
    running = (norm.running_mean, norm.running_var) if norm.updates_running or not norm.uses_batch else (None, None)
    options: Any = (norm.uses_batch, _step(norm), norm.eps)
    y, mean, inverse = torch.native_batch_norm(x, norm.weight, norm.bias, *running, *options)
    return y, Statistics(mean, inverse, True, norm.eps) if norm.uses_batch else Statistics.fixed(norm)


def check_samples(x: Tensor, norm: BatchNorm) -> None:
    """Raise `ValueError`, as BatchNorm does, where the statistics of x would be those of one pixel."""
    if norm.uses_batch and x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")


def _step(norm: BatchNorm) -> float:
    """How far the running averages move towards the batch's; counts the batch."""
    if not norm.updates_running or norm.batches_seen is None:
        return norm.momentum or 0.0
    norm.batches_seen.add_(1)
    return 1 / float(norm.batches_seen) if norm.momentum is None else norm.momentum


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """In what a convolution of x computes here: autocast decides where it is on."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def product(x: Tensor, linear: Linear, dtype: torch.dtype) -> Tensor:
    """W·x + b in `dtype`."""
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return torch.conv2d(x.to(dtype), as_filters(linear.weight).to(dtype), bias)


def as_filters(weight: Tensor) -> Tensor:
    """A weight [O, C] or [O, C, 1, 1] as [O, C, 1, 1]."""
    return weight if weight.dim() == 4 else weight[:, :, None, None]


def back_to_norm(
    y: Tensor,
    weights: Sequence[Tensor],
    outer: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    pooled: bool,
    wanted: Sequence[bool],
    wants_input: bool,
) -> Made:
    """Back from gradients `outer` at products of pool(ReLU(y)) with weights to y, which is overwritten."""
    entering, places = _aten.max_pool2d_with_indices(y, [2, 2], [2, 2]) if pooled else (y, None)
    entering.relu_()
    made = _back_through_products(entering.to(dtype), weights, outer, wanted, wants_input)
    if made.input is None:
        return made
    gradient = made.input.to(y.dtype)
    _aten.threshold_backward.grad_input(gradient, entering, 0, grad_input=gradient)
    if pooled:
        window = ([2, 2], [2, 2], [0, 0], [1, 1], False)
        gradient = _aten.max_pool2d_with_indices_backward(gradient, y, *window, places)
    return made._replace(input=gradient)


def _back_through_products(
    x: Tensor, weights: Sequence[Tensor], outer: Sequence[Tensor], wanted: Sequence[bool], wants_input: bool
) -> Made:
    """Back through all products of x at once, so that x is read once and its gradient written once."""
    mask = [wants_input, any(wanted[0::2]), any(wanted[1::2])]
    if not any(mask):
        return Made([None] * len(wanted), None)
    sizes = [*map(len, weights)]
    weight = joined([as_filters(each).to(x.dtype) for each in weights], 0)
    gradient = joined([each.to(x.dtype) for each in outer], 1)
    options: Any = ([sum(sizes)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
    of_x, of_weight, of_bias = _aten.convolution_backward(gradient, x, weight, *options)
    split = [[None] * len(sizes) if each is None else each.split(sizes) for each in (of_weight, of_bias)]
    found = [each for pair in zip(*split, strict=True) for each in pair]
    shapes = [shape for each in weights for shape in (each.shape, each.shape[:1])]
    parameters = [
        each.reshape(shape) if want and each is not None else None
        for each, shape, want in zip(found, shapes, wanted, strict=True)
    ]
    return Made(parameters, of_x)


def joined(tensors: list[Tensor], axis: int) -> Tensor:
    """The concatenation; of one tensor, that tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


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
        dtype = product_dtype(x)
        with without_autocast(x):
            y, statistics = _normalised(x, norm)
            # Pooling first, ReLU has fewer numbers to look at; the order does not matter to either.
            y = (F.max_pool2d(y, 2) if pooled else y).relu_()
            pairs = zip(tensors[0::2], tensors[1::2], strict=True)
            outputs = [product(y, Linear(*pair), dtype) for pair in pairs]
        if residual is not None:
            outputs[0] = residual + outputs[0]
        ctx.dtype, ctx.pooled, ctx.passes, ctx.options = dtype, pooled, passes, statistics[2:]
        # Without the Linears' biases, which may change before backward: it does not need them.
        ctx.save_for_backward(x, *statistics[:2], norm_weight, norm_bias, *tensors[0::2])
        ctx.residual = None if residual is None else residual.dtype
        return (*outputs, x.view_as(x)) if passes else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, spread, norm_weight, norm_bias, *weights = ctx.saved_tensors
        given, needed = list(outer), ctx.needs_input_grad
        passed = given.pop() if ctx.passes else None
        statistics, of_norm = Statistics(mean, spread, *ctx.options), (needed[0], *needed[5:7])
        with without_autocast(x):
            y = statistics.normalise(x, norm_weight, norm_bias)
            options: Any = {"pooled": ctx.pooled, "wanted": needed[7:], "wants_input": any(of_norm)}
            made = back_to_norm(y, weights, given, ctx.dtype, **options)
            del y
            of_x, *affine = statistics.backward(made.input, x, norm_weight, of_norm)
            if of_x is not None and passed is not None:
                of_x += passed
        of_residual = given[0].to(ctx.residual) if needed[1] else None
        return of_x, of_residual, None, None, None, *affine, *made.parameters


def norm_products(
    x: Tensor,
    norm: BatchNorm,
    linears: Sequence[Linear],
    *,
    pooled: bool = False,
    residual: Tensor | None = None,
    passes: bool = False,
) -> tuple[Tensor, ...]:
    """W·f(x) + b of every Linear, f = ReLU(BatchNorm(x)), then 2×2 max pooling if `pooled`; [B, O, H, W] each.

    x [B, C, H, W] is of any float dtype and memory format, which the outputs share; under autocast products are in its
    dtype. `norm` is not synchronised. `residual` is added to the first output. With `passes` x comes back as last
    output: where it is used again, as a residual for instance, its gradient then joins this one's.
    """
    tensors = [each for linear in linears for each in linear]
    return _NormProducts.apply(x, residual, norm, pooled, passes, norm.weight, norm.bias, *tensors)

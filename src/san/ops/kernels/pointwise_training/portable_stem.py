"""Training through a network's stem on any device without its full-size map: a few images at a time go through it.

W₀ · pool(ReLU(BatchNorm(W · image))) is one node of autograd, which keeps the image alone. BatchNorm's moments behind W
follow from those of the image's pixels, and its gradients from few sums, so no pass over the whole map is needed for
them. Legend: B batch, K image channels, C channels of the stem, O output channels, H W map, N = B · H · W samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from san.ops.kernels.pointwise.native import Linear
from san.ops.kernels.pointwise_training.portable import (
    Statistics,
    as_filters,
    back_to_norm,
    check_samples,
    joined,
    product,
    product_dtype,
)
from san.ops.normalization import BatchNorm, Moments, without_autocast

__all__ = ["Call", "Pixels", "Sums", "like_parameters", "parameter_gradients", "statistics_of", "stem"]

# Numbers of the full-size map that exist at a time: enough to keep a GPU busy.
_SHARE = 1 << 26


class Call(NamedTuple):
    """Tensors and options of a call; `dtype` is that of the products."""

    dtype: torch.dtype
    pooled: bool
    image: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    behind: Tensor

    @property
    def filters(self) -> Tensor:
        return as_filters(self.weight).to(self.dtype)

    @property
    def samples(self) -> int:
        return self.image.numel() // self.image.shape[1]

    def shares(self, map_: Tensor) -> list[Tensor]:
        """The map, a few images at a time."""
        _, _, height, width = self.image.shape
        return list(map_.split(max(_SHARE // (len(self.weight) * height * width), 1)))

    def normalised(self, part: Tensor, statistics: Statistics) -> Tensor:
        """BatchNorm(W · part)."""
        return statistics.normalise(torch.conv2d(part, self.filters), self.norm_weight, self.norm_bias)


class Pixels(NamedTuple):
    """The image's mean [K], and Σ (pixel − mean)(pixel − mean)ᵀ [K, K], in float64; zeros for fixed statistics."""

    mean: Tensor
    deviation: Tensor

    def centred(self, part: Tensor) -> Tensor:
        return part - self.mean.to(part.dtype)[:, None, None]


def _pixels(call: Call, uses_batch: bool) -> Pixels:
    """Moments of the pixels as the product sees them."""
    channels = call.image.shape[1]
    found = Pixels(*(call.image.new_zeros(channels, *more, dtype=torch.float64) for more in ((), (channels,))))
    if not uses_batch:
        return found
    for part in call.shares(call.image):
        found.mean.add_(part.to(call.dtype).sum((0, 2, 3), dtype=torch.float64), alpha=1 / call.samples)
    for part in call.shares(call.image):
        pixels = found.centred(part.to(call.dtype).double())
        # Not a product of matrices, which may leave each of so few sums of a million terms to a single processor.
        found.deviation.add_((pixels[:, :, None] * pixels[:, None]).sum((0, 3, 4)))
    return found


def statistics_of(call: Call, norm: BatchNorm, pixels: Pixels) -> Statistics:
    """BatchNorm's statistics; a batch's move the running averages."""
    if not norm.uses_batch:
        return Statistics.fixed(norm)
    rows = call.filters.flatten(1).double()
    mean, deviation = rows @ pixels.mean, ((rows @ pixels.deviation) * rows).sum(1).clamp_min(0)
    norm.total(Moments(mean.new_full((), call.samples), mean, deviation))
    return Statistics(mean, torch.rsqrt(deviation / call.samples + norm.eps), True, norm.eps)


class Sums(NamedTuple):
    """Of the gradient g behind BatchNorm: Σ g [C] and Σ g (pixel − mean)ᵀ [C, K]; gradients of W₀ and of the image."""

    total: Tensor | None
    product: Tensor | None
    behind: Tensor | None
    image: Tensor | None


def _sums(
    call: Call, statistics: Statistics, pixels: Pixels, part: Tensor, outer: Tensor, needed: tuple[bool, ...]
) -> Sums:
    """Of some images."""
    part = part.to(call.dtype)
    y = call.normalised(part, statistics)
    options: Any = {"pooled": call.pooled, "wanted": (needed[5], False), "wants_input": any(needed[:5])}
    made = back_to_norm(y, [call.behind], [outer], call.dtype, **options)
    if made.input is None:
        return Sums(None, None, made.parameters[0], None)
    wide = torch.promote_types(call.dtype, torch.float32)
    gradient, filters = made.input.to(wide), call.filters.to(wide)
    options = ([len(filters)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    back = torch.ops.aten.convolution_backward
    _, of_filters, total = back(gradient, pixels.centred(part.to(wide)), filters, *options, [False, True, True])
    of_image = None
    if needed[0]:
        scaled = filters * statistics.scale(call.norm_weight).to(wide)[:, None, None, None]
        of_image = back(gradient, part.to(wide), scaled, *options, [True, False, False])[0].to(call.image.dtype)
    return Sums(total, of_filters.flatten(1), made.parameters[0], of_image)


def _summed(shares: list[Sums]) -> Sums:
    *sums, images = ([each for each in field if each is not None] for field in zip(*shares, strict=True))
    total = (torch.stack(each).sum(0, dtype=torch.float64) if each else None for each in sums)
    return Sums(*total, joined(images, 0) if images else None)


def parameter_gradients(call: Call, statistics: Statistics, pixels: Pixels, sums: Sums) -> tuple[Tensor | None, ...]:
    """Gradients of W, and of BatchNorm's weight and bias."""
    if sums.total is None or sums.product is None:
        return None, None, None
    rows, inverse = call.filters.flatten(1).double(), statistics.inverse().double()
    offset = rows @ pixels.mean - statistics.mean.double()
    of_scale = inverse * ((rows * sums.product).sum(1) + offset * sums.total)
    of_weight = sums.product
    if statistics.uses_batch:
        of_weight = of_weight - (of_scale * inverse / call.samples)[:, None] * (rows @ pixels.deviation)
    return statistics.scale(call.norm_weight).double()[:, None] * of_weight, of_scale, sums.total


def like_parameters(call: Call, given: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of W, of nothing, and of BatchNorm's weight and bias in their shapes and dtypes, as far as wanted."""
    return [
        x.to(like.dtype).view_as(like) if want and x is not None and like is not None else None
        for x, like, want in zip(given, (call.weight, None, *call[4:6]), wanted, strict=True)
    ]


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
            pixels = _pixels(call, norm.uses_batch)
            statistics = statistics_of(call, norm, pixels)
            outputs = []
            for part in call.shares(image):
                y = call.normalised(part.to(call.dtype), statistics)
                y = (F.max_pool2d(y, 2) if pooled else y).relu_()
                outputs.append(product(y, Linear(behind, None), call.dtype))
        ctx.call, ctx.statistics = call[:2], statistics[2:]
        ctx.save_for_backward(*call[2:], *statistics[:2], *pixels)
        return joined(outputs, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mean, spread, centre, deviation = ctx.saved_tensors
        call, statistics = Call(*ctx.call, *tensors), Statistics(mean, spread, *ctx.statistics)
        pixels, needed = Pixels(centre, deviation), ctx.needs_input_grad
        with without_autocast(call.image):
            pairs = zip(call.shares(call.image), call.shares(outer[0]), strict=True)
            sums = _summed([_sums(call, statistics, pixels, *pair, needed) for pair in pairs])
            of_weight, *of_norm = parameter_gradients(call, statistics, pixels, sums)
        return sums.image, *like_parameters(call, (of_weight, None, *of_norm), needed[1:5]), sums.behind, None


def stem(image: Tensor, weight: Tensor, norm: BatchNorm, behind: Tensor, *, pooled: bool) -> Tensor:
    """behind · f(image), f = ReLU(BatchNorm(weight · image)), then 2×2 max pooling if `pooled`: [B, O, H, W].

    `image` [B, K, H, W] has few channels, any float dtype and memory format, and gets a gradient only with fixed
    statistics. Under autocast products are in its dtype. `norm` is not synchronised.
    """
    return _Stem.apply(image, weight, norm, norm.weight, norm.bias, behind, pooled)

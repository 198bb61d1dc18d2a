"""BatchNorm on vectors of its channels by the kernels of `native.cpp`: from moments to scale and shift, and back.

Autograd does not know these: the autograd functions of attention and of what surrounds it call them.
Legend: C channels, K channels before a Linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.graph import increment_version

from san.errors import UserError
from san.ops.kernels.native import operators
from san.ops.kernels.native.operators import addresses
from san.ops.kernels.pointwise.native import Affine, Linear
from san.ops.normalization import BatchNorm, Moments, synchronize_moments

__all__ = ["Folded", "Gradients", "Samples", "fold", "fold_backward", "suits"]


class Samples(NamedTuple):
    """At least one sample: count, mean [C] and deviations [C]; of what enters a Linear [K] and [K, K]; float64."""

    count: int
    mean: Tensor
    deviation: Tensor


class Folded(NamedTuple):
    """What a BatchNorm was folded into, in float32: scale and shift [C], or weight [C, K] and bias [C] of a Linear.

    `statistics` are mean, 1/σ, scale and shift, [4, C] in float64; `total` counts the samples behind them in all
    processes. `samples` are this process', None where statistics are fixed.
    """

    affine: Affine
    statistics: Tensor
    samples: Samples | None
    total: int


class Gradients(NamedTuple):
    """Of BatchNorm's weight and bias [C], and of the Linear before it; float32.

    Every sample x behind the moments has the gradient slope · x + intercept beside its own: [C] each, or [K, K] and
    [K], in float64; None where statistics are fixed.
    """

    weight: Tensor
    bias: Tensor
    linear: Linear | None
    slope: Tensor | None
    intercept: Tensor | None


def suits(norms: Sequence[BatchNorm], *tensors: Tensor | None) -> bool:
    """Whether an autograd function may fold these BatchNorms, of this process alone, beside plain other tensors."""
    averages = (x for norm in norms for x in (norm.running_mean, norm.running_var))
    return operators.runs_eagerly(*tensors, *averages) and not any(norm.synchronized for norm in norms)


def fold(norm: BatchNorm, samples: Samples | None, linear: Linear | None = None) -> Folded:
    """Fold BatchNorm to scale and shift, or into the Linear before it, by samples, which move the running averages.

    Without samples the running averages are the statistics. Parameters and running averages are contiguous float32.
    A Linear before a synchronised BatchNorm has no bias.
    """
    if samples is not None and norm.synchronized:
        return _fold_synchronized(norm, samples, linear)
    if samples is not None and samples.count == 1:
        raise UserError("BatchNorm in training needs more than one value per channel, but there is one pixel")
    return _fold(norm, samples, linear)


def _fold(norm: BatchNorm, samples: Samples | None, linear: Linear | None) -> Folded:
    like = norm.running_mean if samples is None else samples.mean
    if like is None:
        raise UserError("this BatchNorm keeps no running averages, so it needs the moments of a batch")
    shape = like.shape if linear is None else linear.weight.shape[:2]
    statistics = like.new_empty(4, shape[0], dtype=torch.float64)
    affine = Affine(*(like.new_empty(size, dtype=torch.float32) for size in (shape, shape[:1])))
    running, step = (norm.running_mean, norm.running_var), 0.0
    if samples is not None:
        running, step = (running, _step(norm)) if norm.updates_running else ((None, None), 0.0)
    operators.call(
        "normalization_fold",
        *_source(shape[0], samples, linear),
        *(operators.bits(norm.eps), operators.bits(step)),
        *addresses(norm.weight, norm.bias, *running, statistics, *affine),
        work=0,
    )
    if step:
        # The kernel wrote unseen by autograd.
        increment_version([x for x in running if x is not None])
    return Folded(affine, statistics, samples, samples.count if samples else 0)


def _source(channels: int, samples: Samples | None, linear: Linear | None) -> tuple[int, ...]:
    """`Source` of native.cpp."""
    count, mean, deviation = samples or (0, None, None)
    weight, bias = linear or (None, None)
    return channels, 0 if weight is None else weight.shape[1], count, *addresses(mean, deviation, weight, bias)


def _step(norm: BatchNorm) -> float:
    """By how much a batch moves the running averages; `momentum` None averages over all batches."""
    if norm.batches_seen is None:
        return norm.momentum or 0.0
    norm.batches_seen.add_(1)
    return 1 / norm.batches_seen.item() if norm.momentum is None else norm.momentum


def _fold_synchronized(norm: BatchNorm, samples: Samples, linear: Linear | None) -> Folded:
    _, mean, deviation = samples
    rows = None if linear is None else linear.weight.flatten(1).double()
    if rows is not None:
        mean, deviation = rows @ mean, ((rows @ deviation) * rows).sum(1)
    total = synchronize_moments(Moments(mean.new_full((), samples.count), mean, deviation), norm.group)
    everyone = Samples(int(total.count.item()), total.mean, total.deviation)
    found = _fold(norm, everyone, None)
    affine = found.affine
    if rows is not None:
        affine = Affine((found.statistics[2, :, None] * rows).float(), affine.shift)
    return Folded(affine, found.statistics, samples, everyone.count)


def fold_backward(
    norm: BatchNorm, folded: Folded, of_scale: Tensor, of_shift: Tensor, linear: Linear | None = None
) -> Gradients:
    """Back from contiguous float64 gradients at `folded.affine`, with the `norm` and `linear` that `fold` was given."""
    channels, samples = of_shift.shape[0], folded.samples
    everywhere = (None, None)
    if samples is not None and norm.synchronized:
        everywhere = _summed(norm, of_scale, of_shift, linear)
    own = [of_shift.new_empty(channels, dtype=torch.float32) for _ in range(2)]
    of_linear = None if linear is None else _like(linear)
    moved = (None, None) if samples is None else (torch.empty_like(samples.deviation), torch.empty_like(samples.mean))
    operators.call(
        "normalization_backward",
        *_source(channels, samples, linear),
        folded.total,
        *addresses(folded.statistics, of_scale, of_shift, *everywhere, *own, *(of_linear or (None, None)), *moved),
        work=0,
    )
    return Gradients(*own, of_linear, *moved)


def _like(linear: Linear) -> Linear:
    return Linear(torch.empty_like(linear.weight), None if linear.bias is None else torch.empty_like(linear.bias))


def _summed(norm: BatchNorm, of_scale: Tensor, of_shift: Tensor, linear: Linear | None) -> tuple[Tensor, Tensor]:
    """Gradients at scale and shift, summed over all processes."""
    if linear is not None:
        of_scale = (linear.weight.flatten(1) * of_scale).sum(1)
    both = torch.stack([of_scale, of_shift])
    distributed.all_reduce(both, group=norm.group)
    return both[0], both[1]

"""BatchNorm on vectors of its channels in double precision, as Triton backends need it: folding and its gradients.

Legend: D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from san.errors import UserError
from san.ops.kernels.gpu.launch import programs, start
from san.ops.mapping import MappingLayer
from san.ops.normalization import BatchNorm, Moments, merge_moments, moments, synchronize_moments

__all__ = [
    "Back",
    "averages",
    "back",
    "fold",
    "group_name",
    "merged",
    "move_running",
    "of_map",
    "parameters",
]


class Back(NamedTuple):
    """Gradients of BatchNorm's weight and bias [D]; every sample x behind its moments gets slope · x + intercept."""

    weight: Tensor
    bias: Tensor
    slope: Tensor
    intercept: Tensor


def merged(parts: Tensor, counts: Tensor, group: str) -> Tensor:
    """Statistics [3, D], mean, squared deviations and count, of parts [T, 2, D] of `counts` [T] samples each.

    A `group` that is not empty names the processes that share them.
    """
    parts = parts.to(torch.float64)
    total = merge_moments(Moments(counts.to(torch.float64), parts[:, 0], parts[:, 1]))
    if group:
        total = synchronize_moments(total, _group(group))
    return torch.stack([total.mean, total.deviation, total.count.expand_as(total.mean)])


def of_map(x: Tensor, *, batch: bool, group: str) -> Tensor | None:
    """Statistics [3, D] of x [B, P, D]; None where those of running averages are taken."""
    if not batch:
        return None
    found = moments(x.transpose(1, 2))
    return merged(torch.stack([found.mean, found.deviation])[None], found.count.reshape(1), group)


def parameters(layer: MappingLayer) -> list[Tensor]:
    """Weight and bias of a layer's BatchNorm and of its Linear, ones and zeros where there are none."""
    given, taken = layer.weight.shape
    norm, like = layer.norm, layer.weight
    return [
        like.new_ones(taken) if norm.weight is None else norm.weight,
        like.new_zeros(taken) if norm.bias is None else norm.bias,
        layer.weight,
        like.new_zeros(given) if layer.bias is None else layer.bias,
    ]


def averages(norm: BatchNorm) -> list[Tensor]:
    """Running averages; none where the batch's statistics are taken."""
    if norm.uses_batch:
        return []
    if norm.running_mean is None or norm.running_var is None:
        raise UserError("this BatchNorm keeps no running averages, so it needs the moments of a batch")
    return [norm.running_mean, norm.running_var]


def _variance(statistics: Tensor) -> Tensor:
    return statistics[1] / statistics[2].clamp_min(1)


def fold(
    statistics: Tensor | None,
    averages: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    affine: Tensor,
    places: int = 1,
) -> Tensor:
    """Write scale and shift to `affine`, 2 · D numbers in float32, such that the normalised x is scale · x + shift.

    Give the statistics [3, D]: `statistics`, or those that running averages [D] stand for where it is None. Channel
    c · places + j goes to j · D/places + c of `affine`.
    """
    from san.ops.kernels.gpu.small import fold_norm

    width = affine.numel() // 2
    found = affine.new_empty((3, width), dtype=torch.float64) if statistics is None else statistics
    known = averages if statistics is None else [None, None]
    if width:
        tensors = (x if x is None else x.contiguous() for x in (*known, weight, bias))
        constants = {"EPS": eps, "PLACES": places, "BLOCK": 256}
        start(fold_norm, (programs(width, 256),), *tensors, found, affine, width, **constants)
    return found


def back(
    statistics: Tensor, weight: Tensor, eps: float, of_scale: Tensor, of_shift: Tensor, *, batch: bool, group: str
) -> Back:
    """Back from gradients at scale and shift; with `batch` statistics also to the samples that gave them."""
    mean, inverse = statistics[0], torch.rsqrt(_variance(statistics) + eps)
    own = inverse * (of_scale - mean * of_shift)
    if not batch:
        nothing = torch.zeros_like(own)
        return Back(own, of_shift, nothing, nothing)
    both = torch.stack([own, of_shift])
    if group:
        both = both.clone()
        distributed.all_reduce(both, group=_group(group))
    # Without samples there is nothing to give them.
    factor = weight.double() * inverse / statistics[2].clamp_min(1)
    slope = -factor * inverse * both[0]
    return Back(own, of_shift, slope, -factor * both[1] - slope * mean)


def move_running(norm: BatchNorm, statistics: Tensor) -> None:
    """Let statistics of all processes move the running averages."""
    if norm.uses_batch and norm.updates_running:
        norm._move_running(Moments(statistics[2, 0], statistics[0], statistics[1]))


def group_name(norm: BatchNorm) -> str:
    """The name of the processes that share a BatchNorm's statistics; empty where it is alone."""
    if not norm.synchronized:
        return ""
    group: Any = norm.group or distributed.group.WORLD
    return group.group_name


def _group(name: Any) -> Any:
    return distributed.distributed_c10d._resolve_process_group(name)

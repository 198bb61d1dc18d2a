"""BatchNorm on vectors of its channels in double precision, as Triton backends need it: folding and its gradients.

Legend: D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from san.errors import UserError
from san.ops.kernels.gpu.launch import block, floats, lanes, programs, shares, start
from san.ops.kernels.native.operators import unobserved
from san.ops.mapping import MappingLayer
from san.ops.normalization import BatchNorm, Moments, synchronize_moments

__all__ = [
    "Back",
    "averages",
    "back",
    "fold",
    "group_name",
    "merged",
    "move_running",
    "of_rows",
    "parameters",
]


# Parts that one program merges, and channels that one takes.
_CHUNK, _CHANNELS = 256, 64


class Back(NamedTuple):
    """What a backward pass of BatchNorm gives.

    `parameters` [2, D], float64: gradients of weight and bias. `slopes` [2, D], float32: every sample x behind the
    moments gets slope · x + intercept.
    """

    parameters: Tensor
    slopes: Tensor


def merged(parts: Tensor, total: int, share: int, group: str, *, samples: int = 1, places: int = 1) -> Tensor:
    """Statistics [3, D], mean, squared deviations and count, of parts [T, 2, D] of `share` pixels each, of `total`.

    A pixel has so many `samples`. Channel j · D/places + c of the parts goes to c · places + j. A `group` that is not
    empty names the processes that share the statistics.
    """
    from san.ops.kernels.gpu.statistics import merge_moments

    width = parts.shape[2]
    found = parts.new_zeros((3, width), dtype=torch.float64)
    if len(parts) and width:
        # Always two launches, so that more parts, in a larger batch, compile nothing new.
        fewer = parts.new_empty((programs(len(parts), _CHUNK), 2, width), dtype=torch.float64)
        steps = ((parts, fewer, share, _CHUNK), (fewer, found, share * _CHUNK, len(fewer)))
        for given, made, pixels, chunk in steps:
            final = made is found
            start(
                *(merge_moments, (programs(width, _CHANNELS), 1 if final else len(made)), given, made),
                *(len(given), width, total, pixels, chunk),
                SAMPLES=samples,
                PLACES=places if final else 1,
                FINAL=final,
                BLOCK_T=32,
                BLOCK=_CHANNELS,
            )
    return _synchronized(found, group) if group else found


def _synchronized(local: Tensor, group: str) -> Tensor:
    """Statistics of all processes."""
    total = synchronize_moments(Moments(local[2, 0], local[0], local[1]), _group(group))
    return torch.stack([total.mean, total.deviation, total.count.expand_as(total.mean)])


def of_rows(x: Tensor, channels: int, group: str) -> Tensor:
    """Statistics [3, C] of the rows of x [N, C], dense memory of any shape."""
    from san.ops.kernels.gpu.statistics import row_moments

    total = x.numel() // channels
    width, rows = min(block(channels), _CHANNELS), lanes(total, 64)
    columns = programs(channels, width)
    count, each = shares(programs(total, rows), columns)
    parts = floats(x, count, 2, channels) if total else floats(x, 0, 2, channels)
    if total:
        constants = {"C": channels, "LANES": rows, "BLOCK_C": width}
        start(row_moments, (columns, count), x, parts, total, each, **constants)
    return merged(parts, total, each * rows, group)


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
    from san.ops.kernels.gpu.statistics import fold_norm

    width = affine.numel() // 2
    found = affine.new_empty((3, width), dtype=torch.float64) if statistics is None else statistics
    known = averages if statistics is None else [None, None]
    if width:
        tensors = (x if x is None else x.contiguous() for x in (*known, weight, bias))
        constants = {"EPS": eps, "PLACES": places, "BLOCK": 256}
        start(fold_norm, (programs(width, 256),), *tensors, found, affine, width, **constants)
    return found


def back(
    statistics: Tensor,
    weight: Tensor | None,
    eps: float,
    of_affine: Tensor,
    *,
    batch: bool,
    group: str,
    places: int = 1,
) -> Back:
    """Back from gradients at scale and shift [2, D], in float64; with `batch` statistics to the samples that gave them.

    Channel c · places + j lies at j · D/places + c of the slopes.
    """
    from san.ops.kernels.gpu.statistics import back_norm

    own, width = of_affine.contiguous(), of_affine.shape[1]
    everyone = own
    if batch and group:
        everyone = own.clone()
        distributed.all_reduce(everyone, group=_group(group))
    found = Back(torch.empty_like(own), floats(own, 2, width))
    if width:
        constants = {"EPS": eps, "BATCH": batch, "PLACES": places, "BLOCK": 256}
        weight = weight if weight is None else weight.contiguous()
        start(back_norm, (programs(width, 256),), statistics, weight, own, everyone, *found, width, **constants)
    return found


def move_running(norm: BatchNorm, statistics: Tensor) -> None:
    """Let statistics of all processes move the running averages."""
    mean, variance = norm.running_mean, norm.running_var
    if not (norm.uses_batch and norm.updates_running) or mean is None or variance is None:
        return
    dense = all(type(x) is Tensor and x.is_contiguous() for x in (statistics, mean, variance))
    if norm.momentum is None or not dense or not unobserved():
        norm._move_running(Moments(statistics[2, 0], statistics[0], statistics[1]))
        return
    from san.ops.kernels.gpu.statistics import move_averages

    if norm.batches_seen is not None:
        norm.batches_seen.add_(1)
    width = len(mean)
    tensors = (statistics, mean, variance)
    start(move_averages, (programs(width, 256),), *tensors, width, float(norm.momentum), BLOCK=256)
    # As an operator would that writes to them.
    torch.autograd.graph.increment_version((mean, variance))


def group_name(norm: BatchNorm) -> str:
    """The name of the processes that share a BatchNorm's statistics; empty where it is alone."""
    if not norm.synchronized:
        return ""
    group: Any = norm.group or distributed.group.WORLD
    return group.group_name


def _group(name: Any) -> Any:
    return distributed.distributed_c10d._resolve_process_group(name)

"""BatchNorm taken apart: moments, their merging and synchronisation, running averages, scale and shift.

Each step is an operator of its own, so that an all-reduce fits between the statistics and the rest, and so that a
backend which never holds a whole activation can still train through BatchNorm exactly: it takes moments tile by tile
and merges them. `nn.SyncBatchNorm` refuses CPU tensors, so synchronisation across processes is ours as well.
Legend: D channels, T tiles or processes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from san.errors import UserError

__all__ = [
    "BatchNorm",
    "Moments",
    "SynchronizedBatchNorm2d",
    "merge_moments",
    "moments",
    "scale_and_shift",
    "synchronize_batch_norm",
    "synchronize_moments",
    "widened",
    "without_autocast",
]


def widened(x: Tensor) -> Tensor:
    """x in at least float32, the precision in which sums are taken."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast does not round what the operators promise to sum in at least float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x [B, D, …] · scale [D] + shift [D], in x's dtype."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    return torch.addcmul(shift.to(x.dtype).view(shape), x, scale.to(x.dtype).view(shape))


class Moments(NamedTuple):
    """Sample count [], mean [D] and sum of squared deviations from it [D]; several parts have a leading [T]."""

    count: Tensor
    mean: Tensor
    deviation: Tensor


def moments(x: Tensor) -> Moments:
    """Moments of every channel of x [B, D, …] over all its other axes; zeros where there is no sample."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // max(x.shape[1], 1)
    if count == 0:
        nothing = x.sum(axes)
        return Moments(nothing.new_zeros(()), nothing, nothing)
    variance, mean = torch.var_mean(x, axes, correction=0)
    return Moments(mean.new_full((), count), mean, variance * count)


def merge_moments(parts: Moments) -> Moments:
    """Moments of the union of T parts, whose fields carry a leading [T]; differentiable, in a fixed order.

    Formula: Chan, Golub, LeVeque (1979), mean = Σ n_t m_t / n, deviation = Σ d_t + Σ n_t (m_t − mean)².
    """
    weight = parts.count.unsqueeze(1)
    count = parts.count.sum()
    mean = (weight * parts.mean).sum(0) / count.clamp_min(1)
    deviation = (parts.deviation + weight * (parts.mean - mean) ** 2).sum(0)
    return Moments(count, mean, deviation)


class _GatherFromAll(torch.autograd.Function):
    """Stack a tensor of every process [W, …]; the gradient sums what every process derives from this one's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(gathered, x.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total[distributed.get_rank(ctx.group)], None


def synchronize_moments(local: Moments, group: Any = None) -> Moments:
    """Moments over the samples of all processes of `group` (default: all), with gradients across processes."""
    packed = torch.cat([local.count.reshape(1), local.mean, local.deviation])
    everyone = _GatherFromAll.apply(packed, group)
    width = local.mean.numel()
    return merge_moments(Moments(everyone[:, 0], *everyone[:, 1:].split(width, dim=1)))


@dataclass(frozen=True)
class BatchNorm:
    """What a BatchNorm layer does at one call, in tensors and plain values: the form in which operators take it.

    `uses_batch` tells whether statistics come from the batch (training, or no running averages kept) or from the
    running averages; `updates_running` whether the running averages move. `momentum` None averages over all batches.
    Semantics are `nn.BatchNorm2d`'s; a batch without samples leaves the running averages alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches_seen: Tensor | None
    momentum: float | None
    eps: float
    uses_batch: bool
    updates_running: bool
    synchronized: bool = False
    group: Any = None

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> BatchNorm:
        """Read a layer; a `SynchronizedBatchNorm2d` in training synchronises when several processes run."""
        tracked = layer.running_mean is not None and layer.running_var is not None
        return cls(
            weight=layer.weight,
            bias=layer.bias,
            running_mean=layer.running_mean,
            running_var=layer.running_var,
            batches_seen=layer.num_batches_tracked,
            momentum=layer.momentum,
            eps=layer.eps,
            uses_batch=layer.training or not tracked,
            updates_running=layer.training and tracked and layer.track_running_stats,
            synchronized=layer.training and isinstance(layer, SynchronizedBatchNorm2d) and layer.several_processes(),
            group=getattr(layer, "group", None),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x [B, D, …] of at least float32."""
        scale, shift = self.scale_and_shift(moments(x) if self.uses_batch else None)
        return scale_and_shift(x, scale, shift)

    def scale_and_shift(self, local: Moments | None = None) -> tuple[Tensor, Tensor]:
        """Scale [D] and shift [D] such that the normalised x is scale · x + shift.

        `local` are this process' moments, needed when `uses_batch`; they are synchronised and move the running
        averages here. Without them the running averages are used.
        """
        if local is None:
            if self.running_mean is None or self.running_var is None:
                raise UserError("this BatchNorm keeps no running averages, so it needs the moments of a batch")
            mean, variance = self.running_mean, self.running_var
        else:
            total = self.total(local)
            mean, variance = total.mean, total.deviation / total.count.clamp_min(1)
        scale = torch.rsqrt(widened(variance) + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def total(self, local: Moments) -> Moments:
        """The moments to normalise by, of all processes if synchronised; they move the running averages."""
        total = synchronize_moments(local, self.group) if self.synchronized else local
        if self.updates_running:
            self._move_running(total)
        return total

    def _move_running(self, total: Moments) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        with torch.no_grad():
            moved = (total.count > 0).to(self.running_mean.dtype)
            step = moved * (self.momentum or 0.0)
            if self.batches_seen is not None:
                self.batches_seen.add_(1)
                step = moved / self.batches_seen if self.momentum is None else step
            unbiased = total.deviation / (total.count - 1).clamp_min(1)
            self.running_mean.lerp_(total.mean.to(self.running_mean.dtype), step)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics cover the batches of all processes of `group`, on any device.

    Without `torch.distributed`, alone in its group, or in evaluation it is `nn.BatchNorm2d`. Parameter and buffer names
    are the same. Affine gradients stay local, as every data-parallel engine expects.
    """

    group: Any = None

    def several_processes(self) -> bool:
        """Whether there is anyone to synchronise with."""
        started = distributed.is_available() and distributed.is_initialized()
        return started and distributed.get_world_size(self.group) > 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, D, H, W]."""
        if not (self.training and self.several_processes()):
            return super().forward(input)
        return BatchNorm.of(self)(widened(input)).to(input.dtype)


def synchronize_batch_norm(module: nn.Module, group: Any = None) -> nn.Module:
    """Replace every `nn.BatchNorm2d` inside `module` by one synchronised over `group`, and return the module.

    Parameters and buffers are kept, not copied, so an optimiser made before stays valid. Raises `UserError` for
    subclasses of BatchNorm that do more than normalise, because replacing them would drop what they add.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _synchronized(module, group)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, group))
    return module


def _synchronized(layer: nn.Module, group: Any) -> nn.Module:
    if type(layer) not in (nn.BatchNorm2d, SynchronizedBatchNorm2d):
        raise UserError(f"{type(layer).__name__} cannot be synchronised, only nn.BatchNorm2d can")
    layer.__class__ = SynchronizedBatchNorm2d
    layer.group = group
    return layer

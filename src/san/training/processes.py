"""What several processes have to agree on, and what one process can ask as well: sums, wishes, whole parameters."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

__all__ = ["agree", "gather", "share_buffers", "total", "whole_parameters"]


def total(trainer: Trainer, sums: Tensor) -> list[float]:
    """Sums over all processes."""
    return trainer.strategy.reduce(sums.clone(), reduce_op="sum").tolist()


def agree(trainer: Trainer, *wishes: bool) -> list[bool]:
    """A wish of any process becomes everybody's, so that all of them save and stop at the same step."""
    if trainer.world_size == 1:
        return list(wishes)
    asked = torch.tensor(wishes, dtype=torch.int32, device=trainer.strategy.root_device)
    return [bool(wish) for wish in trainer.strategy.reduce(asked, reduce_op="max").tolist()]


def gather(trainer: Trainer, indices: Iterable[int]) -> set[int]:
    """Union of a set over all processes."""
    if trainer.world_size == 1:
        return set(indices)
    everyone: list[list[int]] = [[] for _ in range(trainer.world_size)]
    distributed.all_gather_object(everyone, sorted(indices))
    return set().union(*everyone)


def share_buffers(trainer: Trainer, network: nn.Module) -> None:
    """Give every process the first one's running averages, which differ where BatchNorm is not synchronised."""
    if trainer.world_size > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)


def whole_parameters(trainer: Trainer) -> AbstractContextManager[None]:
    """Context in which this process holds every parameter, which under FSDP it otherwise does not."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy) and isinstance(strategy.model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(strategy.model, writeback=False)
    return nullcontext()

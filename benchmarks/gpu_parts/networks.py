"""Whole networks against ResNet26: a forward pass, and a training step of forward, cross-entropy and backward.

Everyone is channels-last. Inference: weights and images cast, BatchNorm of the baseline folded into its convolutions,
compiled code with its weights frozen in. Training: autocast over float32 weights; the optimiser's step is left out, as
it costs the same for every parameter of every network. Eager and compiled, each replayed as a CUDA graph where it can
be captured. Steps are those of `san benchmark`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_parts.clock import free, peak, timed
from benchmarks.gpu_parts.scale import Scale
from san.evaluation.speed.contestants import Runner, Task, Variant, prepare

__all__ = ["measure", "rounds", "runner", "warm"]


def rounds(scale: Scale) -> Iterator[tuple[str, str, int, bool]]:
    """Network, mode, batch and whether it is compiled: first the batches that targets are about, eager first."""
    modes = (("inference", scale.inference_batches), ("training", scale.training_batches))
    for taken in (slice(1), slice(1, None)):
        for compiled in (False, True) if scale.compiles else (False,):
            for mode, batches in modes:
                for batch, network in product(batches[taken], (scale.baseline, *scale.sans.values())):
                    yield network, mode, batch, compiled


def runner(network: str, mode: str, batch: int, compiled: bool, scale: Scale, dtype: str, device: str) -> Runner:
    """The network ready to do a step, which it has done once."""
    torch.compiler.reset()
    task = Task(mode, batch, scale.resolution, dtype, device)
    variant = Variant(channels_last=True, compiled=compiled, autocast=mode == "training")
    return prepare(network, "auto", task, variant)


def measure(
    network: str, mode: str, batch: int, compiled: bool, scale: Scale, dtype: str, device: str
) -> dict[str, Any]:
    """A row: time of a step, images per second, and how far it raises the allocator's memory."""
    found = runner(network, mode, batch, compiled, scale, dtype, device)
    memory = peak(found, device, reset=partial(found.model.zero_grad, set_to_none=True))
    timing = timed(found, device, seconds=2 * scale.seconds, rounds=scale.rounds)
    del found
    free(device)
    return {
        "network": network,
        "mode": mode,
        "batch": batch,
        "form": "compiled" if compiled else "eager",
        "images_per_second": batch / timing.seconds,
        "peak_bytes": memory,
        **asdict(timing),
    }


def warm(network: str, mode: str, batch: int, compiled: bool, scale: Scale, dtype: str, device: str) -> None:
    """Have a network, or its kernels, compiled, so that caches on disk know it."""
    runner(network, mode, batch, compiled, scale, dtype, device)

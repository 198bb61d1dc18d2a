"""Seconds and memory of a step on a GPU: by device events around a CUDA graph of it, medians of rounds.

Before every round a buffer larger than the L2 cache is written, so that the step finds its maps in memory and not in
the cache. The same without graphs where one cannot be captured; on the CPU, by the wall clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["Step", "Timing", "captured", "free", "one_sentence", "peak", "timed"]

Step = Callable[[], object]

# Several times the L2 cache of an H100.
_FLUSH_BYTES = 1 << 28
_WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in seconds over `rounds`; `graph` says whether a graph was replayed, or why not."""

    seconds: float
    quartiles: tuple[float, float]
    rounds: int
    graph: str


def free(device: str) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def one_sentence(problem: BaseException) -> str:
    """What went wrong, in at most 200 characters."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:200]


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which must do the same work on the same memory every time.

    It runs a few times on the stream that is captured afterwards: what is lazy, libraries' handles for this stream
    included, must exist before.
    """
    before, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    before.wait_stream(stream)
    free("cuda")
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    finally:
        # A capture that fails may leave its stream in place.
        torch.cuda.set_stream(before)
    return graph


def timed(step: Step, device: str, *, seconds: float, rounds: int) -> Timing:
    """Time `step` for about `seconds`, at least three and at most `rounds` times."""
    if device != "cuda":
        return _summary([_wall(step) for _ in range(rounds)], "none on the CPU")
    step()
    kept: Step = step
    try:
        kept, how = captured(step).replay, "replayed"
    except RuntimeError as problem:
        how = one_sentence(problem)
    if kept is step:
        free(device)
    kept()
    once = _by_events(kept, 1)[0]
    return _summary(_by_events(kept, max(3, min(rounds, int(seconds / max(once, 1e-6))))), how)


def _wall(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _by_events(step: Step, rounds: int) -> list[float]:
    buffer = _flush_buffer()
    events: list[Any] = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize()
    for begin, end in events:
        # While the device is busy with it, the CPU has time to hand over what follows.
        buffer.zero_()
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _summary(times: list[float], how: str) -> Timing:
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return Timing(median, (q1, q3), len(times), how)


def peak(step: Step, device: str, reset: Step = lambda: None) -> int | None:
    """Bytes by which a step, without a graph, raises the allocator's memory above what it held; None on the CPU.

    `reset` lets go of what the step before left behind.
    """
    if device != "cuda":
        step()
        return None
    step()
    reset()
    free(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

"""Time of steps that take turns: every round runs each step once, in another order.

The order is shuffled rather than rotated, because what ran before decides what the caches hold: nobody should always
follow the same neighbour.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import TypeVar

import torch

__all__ = ["Step", "ratios", "seconds", "spread", "take_turns", "threads_set"]

Step = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def seconds(step: Step, device: str = "cpu") -> float:
    """Seconds that one step takes; on a GPU by its own events, so that waiting for the CPU is not left out."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def take_turns(
    steps: Mapping[Name, Step], rounds: int, device: str = "cpu", say: Callable[[str], None] = lambda text: None
) -> dict[Name, list[float]]:
    """Seconds of every step in every round, after one round that does not count.

    Args:
        steps: By name.
        rounds: How many count.
        device: Such as cpu or cuda:0.
        say: Told before every round which it is.
    """
    names = list(steps)
    found: dict[Name, list[float]] = {name: [] for name in names}
    for name in names:
        seconds(steps[name], device)
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for name in Random(turn).sample(names, len(names)):
            found[name].append(seconds(steps[name], device))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, as {"median", "q1", "q3"}."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return {"median": median, "q1": q1, "q3": q3}


def ratios(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """`spread` of the ratios round by round: load that comes and goes hits both sides of each."""
    return spread([value / other for value, other in zip(values, baseline, strict=True)])


@contextmanager
def threads_set(threads: int | None) -> Generator[int]:
    """PyTorch uses so many threads inside (None: as many as before); gives their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)

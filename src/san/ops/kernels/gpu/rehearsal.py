"""Compile the kernels of a step several at a time, before the first one: one by one they take most of a minute.

Triton keeps them on disk, so that this is once for a machine, a dtype and a network's widths.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

from san.ops.kernels.gpu import launch

__all__ = ["rehearsal"]


@contextmanager
def rehearsal() -> Generator[None]:
    """Inside, Triton's kernels are compiled by several threads, one a core, and not launched.

    What they would have written stays as it was. All are there when it ends. Nobody else may launch meanwhile.
    """
    import triton

    with ThreadPoolExecutor(_threads()) as executor, triton.AsyncCompileMode(executor):
        # Backward runs on a thread of autograd's, which does not know of Triton's mode.
        context = copy_context()

        def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
            context.run(partial(kernel.warmup, *arguments, grid=grid, **constants))

        before, launch.instead = launch.instead, compile_only
        try:
            yield
        finally:
            launch.instead = before


def _threads() -> int:
    """Cores that this process may use, shared with the other processes of a training on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)

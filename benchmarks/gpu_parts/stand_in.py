"""A driver that takes a GPU's place: Triton does all that it does before a launch, on tensors of the CPU, but launch.

Arguments are bound, specialised and looked up in the cache, kernels are compiled for compute capability 9.0 and checked
against its shared memory and threads; what they would have written stays as it is. For a process of its own: what was
compiled stays in Triton's cache, without a launch.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["standing_in"]


class _Driver:
    """What Triton asks of a driver when it launches."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        # Module, function, registers, spills, threads of a block at most.
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda module: None,
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def standing_in() -> Generator[None]:
    """Inside, kernels that are launched are compiled; not where Triton interprets."""
    stand_in: Any = _Driver()
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = None

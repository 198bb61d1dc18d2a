"""The machine and the versions that a measurement belongs to, and what the native library tells about itself."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from san import __version__

__all__ = ["describe_machine", "describe_versions", "native_bytes", "release_native_memory"]

_NATIVE = "san.ops.kernels.native.library"


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, memory in bytes, the native library's instruction set if it is loaded, and the GPU if used."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "instruction_set": getattr(_library(), "instruction_set", None),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of what it stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "san": __version__, "torch": torch.__version__}
    for package in ("timm", "torchvision", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def native_bytes() -> int:
    """Bytes that the native library holds in buffers of its own, which PyTorch's allocator does not see."""
    count = getattr(_library(), "native_bytes", None)
    return 0 if count is None else count()


def release_native_memory() -> None:
    """Let the native library give back buffers that no call is working in."""
    release = getattr(_library(), "release_memory", None)
    if release is not None:
        release()


def _library() -> Any:
    """The native library, where this installation has one and an operator has asked for it; else None."""
    load = getattr(sys.modules.get(_NATIVE), "load", None)
    return None if load is None else load()


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

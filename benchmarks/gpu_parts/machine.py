"""The machine that a result belongs to, and what it can do: a large copy and large matrix products, measured."""

from __future__ import annotations

import datetime
import subprocess
from functools import partial
from typing import Any

import torch
import triton

from benchmarks.floors import Rates
from benchmarks.gpu_parts.clock import free, timed
from benchmarks.gpu_parts.scale import Scale
from san.evaluation.speed.machine import describe_machine, describe_versions

__all__ = ["describe", "measure", "rates"]


def describe(device: str) -> dict[str, Any]:
    """Date, machine, GPU with driver and memory, versions."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": {**describe_versions(), "triton": triton.__version__, "cuda": torch.version.cuda},
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "driver": _driver(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        }
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return found.split()[0] if found.split() else None


def measure(scale: Scale, device: str) -> dict[str, Any]:
    """Bytes per second that a copy moves, read and written, FLOP/s of square products, and an empty graph's time."""
    source = torch.zeros(scale.copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(partial(target.copy_, source), scale, device)
    found: dict[str, Any] = {"copy_bytes_per_second": 2 * scale.copy_bytes / copy}
    del source, target
    free(device)
    operations = 2 * scale.product**3
    before = torch.backends.cuda.matmul.fp32_precision
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, before),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        left, right = (torch.randn(scale.product, scale.product, device=device).to(dtype) for _ in range(2))
        step = partial(torch.mm, left, right, out=torch.empty_like(left))
        found[f"{name}_flops"] = operations / _seconds(step, scale, device)
    torch.backends.cuda.matmul.fp32_precision = before
    if device == "cuda":
        one = torch.zeros(1, device=device)
        found["smallest_graph_seconds"] = _seconds(partial(one.add_, 1), scale, device)
    return found


def _seconds(step: Any, scale: Scale, device: str) -> float:
    return timed(step, device, seconds=scale.seconds, rounds=scale.rounds).seconds


def rates(measured: dict[str, Any]) -> Rates:
    """The measured rates as floors take them; ordinary float32 arithmetic is as fast as its product without TF32."""
    return Rates("measured", measured["copy_bytes_per_second"], measured["bfloat16_flops"], measured["float32_flops"])

"""Memory of a step: what is kept for backward, counted twice, and how far the process grows in all.

"Kept" is what PyTorch's allocator holds after forward and did not hold before, the buffers of the native library added.
"Saved" is what autograd's graph reaches, storage by storage; more kept than saved would be memory that something
holds on to beside the graph. Peak memory is seen in a process of its own, which has run nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from san.errors import UserError
from san.evaluation.speed.clock import threads_set
from san.evaluation.speed.contestants import Runner, Task, Variant, draw, prepare
from san.evaluation.speed.machine import native_bytes, release_native_memory

__all__ = ["held_bytes", "kept", "peak_bytes", "report_peak", "saved_bytes"]

_WARM_SIDE = 32
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kept(runner: Runner) -> dict[str, int]:
    """What a training step keeps between forward and backward, in bytes: {"kept", "saved", "native"}.

    `kept` includes `native`. Parameters, buffers and the images are not counted: they are there before.
    """
    owned = [*runner.model.parameters(), *runner.model.buffers(), runner.images, runner.labels]
    # One step, backward included, shows what buffers this network needs rather than those that ran before it.
    release_native_memory()
    runner()
    held = held_bytes(runner.forward, runner.task.device)
    native = native_bytes() if runner.operators else 0
    return {"kept": held + native, "saved": saved_bytes(runner.forward, owned), "native": native}


def saved_bytes(forward: Callable[[], Tensor], owned: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for the backward of `forward()`; views count once.

    Args:
        forward: Computes something differentiable.
        owned: Tensors whose storages are not counted, such as parameters and inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    # Kept alive until all are seen, else a freed address could come back as another storage.
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in found.values())


def held_bytes(forward: Callable[[], Tensor], device: str = "cpu") -> int:
    """Bytes that PyTorch's allocator holds while the result of `forward()` is alive, beyond those it held before."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        output = forward()
        held = torch.cuda.memory_allocated(device) - before
        del output
        return held
    with _silent(), torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profile:
        output = forward()
    del output
    return sum(event.self_cpu_memory_usage for event in profile.function_events or [])


@contextmanager
def _silent() -> Generator[None]:
    """Nothing reaches standard error inside: the profiler's C++ tells there that it starts, stops, and finds no GPU."""
    sys.stderr.flush()
    kept_stream, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept_stream, 2)
        os.close(kept_stream)
        os.close(nowhere)


def peak_bytes(network: str, backend: str, task: Task, variant: Variant) -> int | None:
    """How far one step raises peak memory above what the process held before it, gradients included.

    On a GPU the allocator's peak; on a CPU the resident set of a fresh process that has run the step on one small
    image before. Compiled variants are measured eager. None on systems that do not tell (all but Linux).

    Raises `UserError` if the process dies, which mostly means that memory ran out.
    """
    variant = replace(variant, compiled=False)
    if task.device.startswith("cuda"):
        return _peak_on_gpu(prepare(network, backend, task, variant))
    if not _STATUS.exists():
        return None
    asked = {"network": network, "backend": backend, "task": asdict(task), "variant": asdict(variant)}
    code = "import sys; from san.evaluation.speed.memory import report_peak; report_peak(sys.argv[1])"
    text = json.dumps({**asked, "threads": torch.get_num_threads()})
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the process that measures the memory of {network}, {task}, ended with {done.returncode}")
    return int(done.stdout)


def report_peak(asked: str) -> None:
    """Print the growth of this process' peak resident memory over one step; the work of the fresh process.

    Args:
        asked: JSON with what `peak_bytes` was given, and the number of threads.
    """
    given = json.loads(asked)
    task, variant = Task(**given["task"]), Variant(**given["variant"])
    with threads_set(given["threads"]):
        # Two images, because BatchNorm refuses a single value per channel.
        small = replace(task, batch=2, resolution=min(task.resolution, max(_WARM_SIDE, task.resolution // 4)))
        runner = prepare(given["network"], given["backend"], small, variant)
        images, labels = draw(runner.model, task, task.resolution, runner.images.dtype, variant)
        full = replace(runner, images=images, labels=labels)
        _forget()
        before = _peak_so_far()
        full()
        print(_peak_so_far() - before)


def _forget() -> None:
    """Give freed memory back to the system, so that using it again counts, and forget the peak so far."""
    # Only glibc has the one, and not every system allows the other; then the growth comes out too small.
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        _FORGET.write_text("5")


def _peak_so_far() -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _peak_on_gpu(runner: Runner) -> int:
    device = runner.task.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner()
    return torch.cuda.max_memory_allocated(device) - before

"""What the Python side of every native operator needs: addresses for the kernels, and when a call must be refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from san.errors import UserError
from san.ops.kernels.native import library, recording
from san.ops.mapping import Mapping

__all__ = [
    "MAX_LAYERS",
    "address",
    "addresses",
    "bits",
    "call",
    "check",
    "fake",
    "operator",
    "output_size",
    "refusal",
    "runs_eagerly",
    "single",
    "unobserved",
]

# As in the kernels: more layers than the paper's longest mapping, LRLRL, has.
MAX_LAYERS = 4

# Multiply-adds that are worth a thread: some 40 µs of one core.
GRAIN = 1 << 22


def single(x: Tensor) -> Tensor:
    """x as kernels read it: float32, contiguous, and not negated on the fly as the imaginary part of a conjugate is."""
    return x.to(torch.float32).contiguous().resolve_neg()


def operator(name: str, check: Callable[..., None] | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors, which it may take to be contiguous, a custom operator of the CPU.

    Who calls a custom operator makes its tensors contiguous, but a tracer that finds one so leaves that away. Nor is a
    custom operator called by SAN alone: `check`, of the same arguments, raises `UserError` where they do not fit.
    """
    options: Any = {"mutates_args": (), "device_types": "cpu"}
    return lambda function: torch.library.custom_op(name, _densely(function, check), **options)


def fake(found: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function tell the shapes that a custom operator gives, of tensors that are contiguous there as well."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        found.register_fake(_densely(function))
        return function

    return register


def _densely(function: Callable[..., Any], check: Callable[..., None] | None = None) -> Callable[..., Any]:
    @wraps(function)
    def run(*arguments: Any) -> Any:
        dense = [_dense(x) for x in arguments]
        if check:
            check(*dense)
        return function(*dense)

    return run


def _dense(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.contiguous().resolve_neg()
    return [_dense(each) for each in x] if isinstance(x, list) else x


def check(dtype: torch.dtype = torch.float32, **tensors: tuple[Tensor | None, Sequence[int]]) -> None:
    """Raise `UserError` for the first tensor that is not of the dtype and the shape beside it."""
    for name, (x, shape) in tensors.items():
        if x is not None and (x.dtype != dtype or [*x.shape] != [*shape]):
            raise UserError(f"{name} is {x.dtype} {list(x.shape)}, but it must be {dtype} {list(shape)}")


def address(x: Tensor | None) -> int:
    """Where a contiguous tensor's data lie; 0 for None."""
    return 0 if x is None else x.data_ptr()


def addresses(*tensors: Tensor | None, room: int = 0) -> list[int]:
    """Addresses of tensors, followed by zeros up to `room` of them."""
    return [*map(address, tensors), *[0] * (room - len(tensors))]


def bits(number: float) -> int:
    """The 64 bits of a number in double precision, as kernels take them."""
    return struct.unpack("q", struct.pack("d", number))[0]


def call(kernel: str, *arguments: int, work: int | None = None) -> None:
    """Run a kernel on its `Arguments`, of which the number of threads comes first and is added here.

    `work` is about how many multiply-adds there are: a thread with fewer than `GRAIN` would cost more than it gives,
    above all where other processes want the cores, because threads wait for each other by spinning. None: all threads.
    """
    loaded = library.load()
    if loaded is None:
        raise RuntimeError(f"the kernel {kernel} was called without the native library")
    threads = library.threads()
    threads = threads if work is None else min(threads, 1 + work // GRAIN)
    (recording.active() or loaded).call(kernel, threads, *arguments)


def output_size(map_: Tensor, geometry: list[int]) -> tuple[int, int]:
    """Height and width of the output; `geometry` is kernel size, stride, dilation, zeros."""
    stride = geometry[1]
    return (map_.shape[2] + stride - 1) // stride, (map_.shape[3] + stride - 1) // stride


@torch.compiler.assume_constant_result
def _present() -> bool:
    if library.load() is None:
        library.announce_absence()
    return library.load() is not None


def refusal(call: Any) -> str | None:
    """None, or why no native kernel runs a call of any operator."""
    for x in call.tensors():
        if x.device.type != "cpu":
            return f"native runs on the CPU, but the tensors are on {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"native computes in float32, but a tensor is {x.dtype}"
    if not _present():
        return "native is not installed here: its C++ kernels are built where `pip install` finds a compiler"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "native has a backward of its own, which torch.func and forward-mode differentiation cannot transform"
    mapping = getattr(call, "mapping", None)
    if not isinstance(mapping, Mapping | None):
        return "native needs the mapping's layers to fuse them, but the mapping is an opaque callable"
    if mapping is not None and len(mapping.layers) > MAX_LAYERS:
        return f"native fuses at most {MAX_LAYERS} layers, but the mapping has {len(mapping.layers)}"
    return None


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors, as kernels read them, and nothing traces, observes or transforms what is done.

    Then an autograd function may call kernels directly; custom operators, for which PyTorch has an answer in every
    other case, cost more than the small kernels themselves.
    """
    return unobserved() and all(map(_is_plain, tensors))


def unobserved() -> bool:
    """Whether nothing traces, observes or transforms what is done now."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not _python_dispatch._len_torch_dispatch_stack()
    )


def _is_plain(x: Tensor | None) -> bool:
    if x is None:
        return True
    usual = type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype is torch.float32
    return usual and x.is_contiguous() and not x.is_neg()

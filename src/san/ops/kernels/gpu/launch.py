"""What the host side of every Triton backend needs: when a call must be refused, layouts, precision, sizes of tiles."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from san.ops.footprint import Footprint
from san.ops.mapping import Mapping

__all__ = [
    "IMAGE_NUMBERS",
    "MAX_LAYERS",
    "Bordered",
    "as_map",
    "block",
    "floats",
    "geometry",
    "gpu_refusal",
    "half_mode",
    "installed",
    "interpreting",
    "is_last",
    "laid_out",
    "lanes",
    "like_value",
    "map_refusal",
    "members",
    "memory_refusal",
    "mode",
    "pays",
    "programs",
    "refusal",
    "shares",
    "single",
    "start",
    "sums_of_eight",
    "width_refusal",
]

# As in the kernels: the paper's longest mapping, LRLRL.
MAX_LAYERS = 3
# A tile of a footprint's place must fit into a multiprocessor's registers and shared memory.
MAX_RELATION, MAX_GROUPS, MAX_VALUE = 128, 128, 1024

# Kilobytes of shared memory that SAN10's layers ask for at most, up to 64 channels and beyond: see gpu_compile.py.
_SHARED_KB = {torch.bfloat16: (75, 115), torch.float16: (77, 217), torch.float32: (145, 163)}

# Programs that keep every multiprocessor busy.
_PROGRAMS = 2048

# Within an image kernels count in 32 bits; half of them leaves room for borders.
IMAGE_NUMBERS = 1 << 30

_MODES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def installed() -> bool:
    """Whether there is Triton; PyTorch brings it where it brings CUDA."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's kernels are interpreted on the CPU, as tests without a GPU do: `TRITON_INTERPRET=1`."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def refusal(call: Any) -> str | None:
    """None, or why no Triton kernel runs a call of any operator."""
    for x in call.tensors():
        if (why := map_refusal(x)) is not None:
            return why
    if (why := gpu_refusal(call.value)) is not None:
        return why
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "triton has a backward of its own, which torch.func and forward-mode differentiation cannot transform"
    return _mapping_refusal(getattr(call, "mapping", None))


def map_refusal(x: Tensor) -> str | None:
    """None, or why no Triton kernel takes a map."""
    if not (x.is_cuda or (x.device.type == "cpu" and interpreting())):
        return f"triton runs on GPUs, but the tensors are on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"triton computes in float32, bfloat16 and float16, but a tensor is {x.dtype}"
    if math.prod(x.shape[1:]) > IMAGE_NUMBERS:
        return f"triton takes maps of at most 2³⁰ numbers an image, but one has {math.prod(x.shape[1:])}"
    return None


def gpu_refusal(x: Tensor) -> str | None:
    """None, or what is wrong with the GPU of a map."""
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "triton needs a GPU of compute capability 8.0 or newer"
    return None


def _mapping_refusal(mapping: Any) -> str | None:
    if not isinstance(mapping, Mapping | None):
        return "triton needs the mapping's layers to fuse them, but the mapping is an opaque callable"
    if mapping is not None and len(mapping.layers) > MAX_LAYERS:
        return f"triton fuses at most {MAX_LAYERS} layers, but the mapping has {len(mapping.layers)}"
    return None


def width_refusal(relation: int, widths: Sequence[int], value: int) -> str | None:
    """None, or which width is too large for a tile; `widths` are what γ's layers give, weight groups last."""
    limits = (
        ("relation channels", relation, MAX_RELATION),
        ("weight groups or channels of γ", max(widths), MAX_GROUPS),
    )
    for name, width, most in limits:
        if width > most:
            return f"triton keeps a place of the footprint on the chip, at most {most} {name}, but there are {width}"
    # Tracing makes tensors of sizes.
    share, groups = int(value) // int(widths[-1]), int(widths[-1])
    tile = members(share) * block(groups)
    if tile > MAX_VALUE:
        return (
            f"triton keeps a pixel's output on the chip, at most {MAX_VALUE} channels in groups filled up to 16, but "
            f"{value} channels in {groups} groups take {tile}"
        )
    return None


def memory_refusal(call: Any, width: int) -> str | None:
    """None, or by how much a tile of this relation width or so many groups exceeds the GPU's shared memory."""
    if not call.value.is_cuda or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(call.value.device)
    needed, there = _SHARED_KB[call.value.dtype][width > 64], properties.shared_memory_per_block_optin // 1024
    if needed <= there:
        return None
    dtype = str(call.value.dtype).removeprefix("torch.")
    return f"triton needs {needed} kB of shared memory for {width} channels in {dtype}, but this GPU has {there} kB"


def pays(call: Any) -> bool:
    """Whether the kernels are worth it: not where they are interpreted."""
    return call.value.is_cuda


def is_last(x: Tensor) -> bool:
    """Whether a map has its channels last in memory and not first."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def laid_out(x: Tensor, last: bool) -> Tensor:
    """The map dense, with channels last or not; without a copy where it is."""
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).resolve_neg()


def mode(x: Tensor, *, backward: bool = False, exact: bool = False) -> str:
    """The precision in which products of γ take their operands, for maps like x; see `geometry.product`.

    Gradients of float16 exceed its range where a scaled loss makes them large, so their products are in tf32; with
    `exact` those of all half precision are.
    """
    if x.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and not interpreting() else "ieee"
    if exact or (backward and x.dtype == torch.float16):
        return "ieee" if interpreting() else "tf32"
    return half_mode(x.dtype) or "ieee"


def half_mode(dtype: torch.dtype) -> str | None:
    """The mode of half precision; None for others."""
    found = _MODES.get(dtype)
    return found and ("~" if interpreting() else "") + found


def block(width: int) -> int:
    """Columns of a tile that holds `width` channels: a power of two, at least the 16 that a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def members(share: int) -> int:
    """Rows of a tile that holds the value channels of one weight: a power of two."""
    return 1 << (share - 1).bit_length()


# What is done instead of launches while kernels are only to be compiled: see `rehearsal.py`.
instead: Callable[..., None] | None = None


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel; type checkers take it for the Python function that it looks like."""
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(next(x for x in arguments if x is not None)):
        if instead is None:
            kernel[grid](*arguments, **constants)
        else:
            instead(kernel, grid, *arguments, **constants)


def programs(total: int, lanes: int) -> int:
    """How many programs own `total` pixels."""
    return (total + lanes - 1) // lanes


def lanes(total: int, most: int) -> int:
    """Pixels of a program: `most`, a power of two.

    In the interpreter, where every program costs milliseconds whatever its lanes, as many as serve `total`, up to 1024.
    """
    return max(16, min(1024, 1 << (total - 1).bit_length())) if interpreting() else most


@cache
def sums_of_eight() -> bool:
    """Whether products in tf32 sum over as few as 8 terms: before 3.8, Triton wants 16."""
    return tuple(map(int, version("triton").split(".")[:2])) >= (3, 8)


def shares(tiles: int, places: int, most: int | None = None) -> tuple[int, int]:
    """Into how many shares `tiles` tiles of pixels are cut for kernels that own a place each, and tiles in a share.

    There are at most some 2,000 programs, or `most` where each writes much and few fit a multiprocessor.
    """
    each = max(programs(tiles * places, most or _PROGRAMS), 1)
    return max(programs(tiles, each), 1), each


def floats(like: Tensor, *shape: int) -> Tensor:
    """Fresh float32 memory."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def single(x: Tensor) -> Tensor:
    """A dense copy in float32, in one launch."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def like_value(value: Tensor, size: Sequence[int]) -> Tensor:
    """A fresh map of another size, in dtype and memory format of `value`."""
    last = torch.channels_last if is_last(value) else torch.contiguous_format
    return torch.empty((*value.shape[:2], *size), dtype=value.dtype, device=value.device, memory_format=last)


def geometry(footprint: Footprint, height: int, width: int) -> dict[str, Any]:
    """The footprint's constants for kernels; ONCE: the border reflects no index twice."""
    once = footprint.padding < min(height, width)
    return {
        "KERNEL": footprint.kernel_size,
        "STRIDE": footprint.stride,
        "DILATION": footprint.dilation,
        "ZEROS": footprint.border == "zeros",
        "ONCE": once or footprint.border == "zeros",
    }


class Bordered:
    """The places whose gradients a kernel owns, and the way back to the map.

    With reflection these are all places of the bordered map, without it the map's own pixels. `origin` is where the
    first of them lies, counted from the bordered map's corner.
    """

    def __init__(self, footprint: Footprint, height: int, width: int) -> None:
        rows, columns = footprint.output_size(height, width)
        self.footprint, self.height, self.width = footprint, height, width
        self.folds = footprint.border == "reflect" and footprint.padding > 0
        self.origin = 0 if self.folds else footprint.padding
        reach = 2 * footprint.padding + 1
        self.tall = (rows - 1) * footprint.stride + reach if self.folds else height
        self.wide = (columns - 1) * footprint.stride + reach if self.folds else width

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """x [B, tall · wide, C] in float32 → [B, C, H, W] in dtype and memory format of `like`."""
        batch, _, channels = x.shape
        if not self.folds:
            return as_map(x, (self.height, self.width), like)
        last = is_last(like)
        output = torch.empty(
            (batch, channels, self.height, self.width),
            dtype=like.dtype,
            device=like.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        self._fold(x, output, last)
        return output

    def _fold(self, x: Tensor, output: Tensor, last: bool) -> None:
        from san.ops.kernels.gpu.border import fold

        batch, channels, height, width = output.shape
        total, lanes, columns = batch * height * width, 64, min(block(channels), 64)
        if not total:
            return
        mirrors = [self.footprint.padding // max(side - 1, 1) + 1 for side in (height, width)]
        start(
            *(fold, (programs(total, lanes), programs(channels, columns))),
            *(x, output, total, height, width, self.tall, self.wide, *mirrors),
            CHANNELS=channels,
            PADDING=self.footprint.padding,
            LAST=last,
            LANES=lanes,
            BLOCK=columns,
        )


def as_map(x: Tensor, size: tuple[int, int], like: Tensor, stride: int = 1) -> Tensor:
    """x [B, P, C] in float32, of every `stride`-th pixel → [B, C, H, W] like `like`, zeros between."""
    batch, _, channels = x.shape
    y = x.view(batch, *size, channels).permute(0, 3, 1, 2)
    last = torch.channels_last if is_last(like) else torch.contiguous_format
    if stride == 1:
        return y.to(like.dtype).contiguous(memory_format=last)
    full = torch.zeros((batch, channels, *like.shape[2:]), dtype=like.dtype, device=like.device)
    full[:, :, ::stride, ::stride] = y
    return full.contiguous(memory_format=last)

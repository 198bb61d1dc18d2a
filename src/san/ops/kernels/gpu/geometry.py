"""Triton functions that find, load and store the pixels of maps.

A map [B, C, H, W] is dense, with channels last (LAST) or not; sizes of maps are arguments, so that a new size compiles
nothing, and what a network fixes, channels and footprint, are constants. A program owns some pixels of a batch, lane by
lane, and walks over the places of their footprints.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "load_channels",
    "load_groups",
    "load_tile",
    "lookers",
    "place",
    "product",
    "reader",
    "relu",
    "source",
    "store_channels",
    "store_groups",
    "store_tile",
    "tile_of",
]


@triton.jit
def _reflected(index, size, ONCE: tl.constexpr):
    """Fold an index into [0, size) by a triangle wave of period 2(size − 1); ONCE: one reflection is enough."""
    if ONCE:
        index = tl.abs(index)
        return tl.minimum(index, 2 * (size - 1) - index)
    period = tl.maximum(2 * (size - 1), 1)
    index = index % period
    index = tl.where(index < 0, index + period, index)
    return tl.minimum(index, period - index)


@triton.jit
def source(y, x, height, width, ZEROS: tl.constexpr, ONCE: tl.constexpr):
    """The pixel that (y, x), possibly outside the map, stands for, and whether there is one."""
    if ZEROS:
        return y * width + x, (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixel = _reflected(y, height, ONCE) * width + _reflected(x, width, ONCE)
    return pixel, pixel >= 0


@triton.jit
def place(row, column, number, height, width, KERNEL, DILATION, ZEROS: tl.constexpr, ONCE: tl.constexpr):
    """The pixel at a place of the footprint around pixel (row, column), and whether there is one."""
    y = row + (number // KERNEL - KERNEL // 2) * DILATION
    x = column + (number % KERNEL - KERNEL // 2) * DILATION
    return source(y, x, height, width, ZEROS, ONCE)


@triton.jit
def reader(y, x, number, rows, columns, KERNEL, STRIDE, DILATION):
    """The output pixel whose footprint has (y, x) at a place, and whether there is one.

    Coordinates count from where the first footprint begins, KERNEL // 2 · DILATION before the map.
    """
    y = y - number // KERNEL * DILATION
    x = x - number % KERNEL * DILATION
    row, column = y // STRIDE, x // STRIDE
    met = (y >= 0) & (x >= 0) & (row < rows) & (column < columns)
    return row, column, met & (y % STRIDE == 0) & (x % STRIDE == 0)


@triton.jit
def lookers(total, rows, columns, LANES: tl.constexpr):
    """This program's pixels: their numbers in the batch, whether they exist, images, and pixels in their images."""
    return tile_of(tl.program_id(0), total, rows, columns, LANES)


@triton.jit
def tile_of(number, total, rows, columns, LANES: tl.constexpr):
    """The same of a tile of LANES pixels."""
    lane = tl.cast(number, tl.int64) * LANES + tl.arange(0, LANES)
    return lane, lane < total, lane // (rows * columns), (lane % (rows * columns)).to(tl.int32)


@triton.jit
def _pointers(map, image, pixel, channel, size, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    start = map + image.to(tl.int64) * (size * CHANNELS)
    if LAST:
        return start + (pixel * CHANNELS + channel)
    return start + (pixel + channel * size)


@triton.jit
def load_tile(map, image, pixel, channel, size, mask, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """A tile of a map of `size` pixels, in float32, zeros where the mask is off; its shape is that to which image,
    pixel, channel and mask broadcast."""
    return tl.load(_pointers(map, image, pixel, channel, size, CHANNELS, LAST), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(map, x, image, pixel, channel, size, mask, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """The reverse of `load_tile`, in the map's dtype."""
    pointers = _pointers(map, image, pixel, channel, size, CHANNELS, LAST)
    tl.store(pointers, x.to(map.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(map, image, pixel, channel, size, mask, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """[lanes, channels] of a map; zeros where the mask is off or there is no channel."""
    present = mask[:, None] & (channel < CHANNELS)[None, :]
    return load_tile(map, image[:, None], pixel[:, None], channel[None, :], size, present, CHANNELS, LAST)


@triton.jit
def store_channels(map, x, image, pixel, channel, size, mask, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """Store [lanes, channels]."""
    present = mask[:, None] & (channel < CHANNELS)[None, :]
    store_tile(map, x, image[:, None], pixel[:, None], channel[None, :], size, present, CHANNELS, LAST)


@triton.jit
def load_groups(map, image, pixel, member, group, size, mask, GROUPS: tl.constexpr, SHARE: tl.constexpr, LAST):
    """[lanes, members, groups] of a value map, whose SHARE channels with one weight are a group's members: channel
    c = member · GROUPS + group."""
    channel = (member[:, None] * GROUPS + group[None, :])[None, :, :]
    present = mask[:, None, None] & ((member < SHARE)[:, None] & (group < GROUPS)[None, :])[None, :, :]
    where = image[:, None, None], pixel[:, None, None]
    return load_tile(map, where[0], where[1], channel, size, present, GROUPS * SHARE, LAST)


@triton.jit
def store_groups(map, x, image, pixel, member, group, size, mask, GROUPS: tl.constexpr, SHARE: tl.constexpr, LAST):
    """Store [lanes, members, groups]."""
    channel = (member[:, None] * GROUPS + group[None, :])[None, :, :]
    present = mask[:, None, None] & ((member < SHARE)[:, None] & (group < GROUPS)[None, :])[None, :, :]
    where = image[:, None, None], pixel[:, None, None]
    store_tile(map, x, where[0], where[1], channel, size, present, GROUPS * SHARE, LAST)


@triton.jit
def relu(x):
    """max(x, 0), which keeps NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def product(a, b, MODE: tl.constexpr):
    """a @ b in float32. MODE is the operands' precision: "ieee", "tf32", "bf16", "fp16", or one of the latter two with
    an "~" before it where Triton's interpreter, whose products of half precision are wrong, must round and then widen.
    """
    # Not returned from within: Triton would compile what follows a return as well.
    if MODE == "bf16":
        c = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif MODE == "fp16":
        c = tl.dot(a.to(tl.float16), b.to(tl.float16))
    elif MODE == "~bf16":
        c = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), input_precision="ieee")
    elif MODE == "~fp16":
        c = tl.dot(a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32), input_precision="ieee")
    else:
        c = tl.dot(a, b, input_precision=MODE)
    return c

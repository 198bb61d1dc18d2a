"""Gradients of what a reflecting border repeats, added up at the pixels that it repeats.

Kernels that own the places of a map's bordered form, without writing twice to any, leave the sums to this one: so no
float atomics are needed and two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from san.ops.kernels.gpu.geometry import load_channels, store_channels

__all__ = ["fold"]


@triton.jit
def _unfolded(index, size, mirror):
    """The pre-image of an index in the `mirror`-th copy of the map, and whether it is that copy's and not the one
    before, with which it shares an edge pixel."""
    reach = tl.maximum(size - 1, 1)
    within = tl.where(mirror % 2 == 0, index, size - 1 - index)
    return mirror * reach + within, (within > 0) | (size == 1)


@triton.jit(do_not_specialize=["total", "height", "width", "tall", "wide", "mirrors_y", "mirrors_x"])
def fold(
    bordered,
    output,
    total,
    height,
    width,
    tall,
    wide,
    mirrors_y,
    mirrors_x,
    CHANNELS: tl.constexpr,
    PADDING: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bordered [B, tall · wide, CHANNELS], float32 → output [B, CHANNELS, height, width]; (PADDING, PADDING) of the
    former is pixel (0, 0) of the latter."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, pixel, mask = lane // (height * width), lane % (height * width), lane < total
    row, column = pixel // width, pixel % width
    sum = tl.zeros([LANES, BLOCK], tl.float32)
    for mirror_y in range(-mirrors_y, mirrors_y + 1):
        y, own_y = _unfolded(row, height, mirror_y)
        y += PADDING
        for mirror_x in range(-mirrors_x, mirrors_x + 1):
            x, own_x = _unfolded(column, width, mirror_x)
            x += PADDING
            met = mask & own_y & own_x & (y >= 0) & (y < tall) & (x >= 0) & (x < wide)
            sum += load_channels(bordered, image, y * wide + x, channel, tall * wide, met, CHANNELS, True)
    store_channels(output, sum, image, pixel, channel, height * width, mask, CHANNELS, LAST)

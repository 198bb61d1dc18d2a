"""Products on the channel axis as one Triton kernel, BatchNorm, ReLU and pooling before them, a residual behind.

A program owns some output pixels and output channels, and walks over the channels that enter: it normalises a tile of
them, or with a stem makes it from the image, and multiplies it at once, so that what enters a product is never written.
Maps have their channels last, so that a batch of them is one matrix. Sizes of maps are arguments, widths are constants.
Legend: N pixels of a batch, C channels that enter, O output channels of all products, K image channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from san.ops.kernels.gpu.geometry import load_tile, product, relu, tile_of

__all__ = ["entering", "normalised", "of_image", "products", "rows_of", "store_rows", "vector"]


@triton.jit
def vector(x, channel, present):
    """[channels] in float32, zeros where there are none."""
    return tl.load(x + channel, mask=present, other=0.0).to(tl.float32)


@triton.jit
def rows_of(map, pixel, channel, mask, CHANNELS: tl.constexpr):
    """[lanes, channels] of a map [N, CHANNELS] in float32; zeros where there is none."""
    present = mask[:, None] & ((channel >= 0) & (channel < CHANNELS))[None, :]
    return tl.load(map + pixel[:, None] * CHANNELS + channel[None, :], mask=present, other=0.0).to(tl.float32)


@triton.jit
def store_rows(map, x, pixel, channel, mask, CHANNELS: tl.constexpr):
    """The reverse of `rows_of`, in the map's dtype."""
    present = mask[:, None] & ((channel >= 0) & (channel < CHANNELS))[None, :]
    tl.store(map + pixel[:, None] * CHANNELS + channel[None, :], x.to(map.dtype.element_ty), mask=present)


@triton.jit
def of_image(x, image, pixel, size, mask, stem, channel, C: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr):
    """Weight [C, K] times an image's pixels: [lanes, channels]."""
    y = tl.zeros([pixel.shape[0], channel.shape[0]], tl.float32)
    for k in tl.static_range(K):
        colour = load_tile(x, image, pixel, k, size, mask, K, LAST)
        y += colour[:, None] * vector(stem + k, channel * K, channel < C)[None, :]
    return y


@triton.jit
def normalised(x, affine, channel, C: tl.constexpr):
    """scale · x + shift of x [lanes, channels]; `affine` is [2, C]."""
    return x * vector(affine, channel, channel < C)[None, :] + vector(affine + C, channel, channel < C)[None, :]


@triton.jit
def entering(x, image, pixel, size, mask, stem, affine, channel, C: tl.constexpr, K: tl.constexpr, LAST: tl.constexpr):
    """BatchNorm of some channels at some pixels of a map, or with K of stem · image: [lanes, channels]."""
    if K > 0:
        y = of_image(x, image, pixel, size, mask, stem, channel, C, K, LAST)
    else:
        y = rows_of(x, image * size + pixel, channel, mask, C)
    return normalised(y, affine, channel, C)


@triton.jit(do_not_specialize=["total", "height", "width", "rows", "columns"])
def products(
    x,
    stem,
    affine,
    weight,
    bias,
    residual,
    output1,
    output2,
    output3,
    total,
    height,
    width,
    rows,
    columns,
    C: tl.constexpr,
    K: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    POOLED: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """weight [O, C] · f(x) + bias + residual, f = ReLU(scale · x + shift), then 2×2 max pooling if POOLED.

    x is of height × width pixels, the outputs of rows × columns; `affine` [2, C] holds scale and shift. With K x is an
    image, with channels LAST or not, and stem · x [C] takes its place. bias, residual, output2, output3 may be None.
    """
    GIVEN: tl.constexpr = O1 + O2 + O3
    BLOCKS: tl.constexpr = (GIVEN + BLOCK_O - 1) // BLOCK_O
    # One axis, as others of a grid are short; programs that read the same pixels are neighbours.
    lane, mask, image, out = tile_of(tl.program_id(0) // BLOCKS, total, rows, columns, LANES)
    made = tl.program_id(0) % BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    size, corner = height * width, out
    if POOLED:
        corner = out // columns * 2 * width + out % columns * 2
    sums = tl.zeros([LANES, BLOCK_O], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        y = entering(x, image, corner, size, mask, stem, affine, channel, C, K, LAST)
        if POOLED:
            for number in tl.static_range(1, 4):
                pixel = corner + number // 2 * width + number % 2
                other = entering(x, image, pixel, size, mask, stem, affine, channel, C, K, LAST)
                y = tl.maximum(y, other, propagate_nan=tl.PropagateNan.ALL)
        inside = (made < GIVEN)[None, :] & (channel < C)[:, None]
        matrix = tl.load(weight + made[None, :] * C + channel[:, None], mask=inside, other=0.0)
        sums += product(relu(y), matrix.to(tl.float32), MODE)
    if bias is not None:
        sums += vector(bias, made, made < GIVEN)[None, :]
    if residual is not None:
        sums += rows_of(residual, lane, made, mask, O1)
    store_rows(output1, sums, lane, made, mask, O1)
    if output2 is not None:
        store_rows(output2, sums, lane, made - O1, mask, O2)
    if output3 is not None:
        store_rows(output3, sums, lane, made - (O1 + O2), mask, O3)

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

__all__ = ["products"]


@triton.jit
def _vector(x, channel, present):
    """[channels] in float32, zeros where there are none."""
    return tl.load(x + channel, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _rows(map, pixel, channel, present, CHANNELS: tl.constexpr):
    """[lanes, channels] of a map [N, CHANNELS] in float32; zeros where there is none."""
    pointers = map + pixel[:, None] * CHANNELS + channel[None, :]
    return tl.load(pointers, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _of_image(x, image, pixel, size, mask, stem, channel, present, K: tl.constexpr, LAST: tl.constexpr):
    """Weight [C, K] times an image's pixels: [lanes, channels]."""
    y = tl.zeros([pixel.shape[0], channel.shape[0]], tl.float32)
    for k in tl.static_range(K):
        colour = load_tile(x, image, pixel, k, size, mask, K, LAST)
        y += colour[:, None] * tl.load(stem + channel * K + k, mask=present, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def _normalised(
    x,
    image,
    pixel,
    size,
    mask,
    stem,
    mean,
    variance,
    weight,
    bias,
    channel,
    C: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    LAST: tl.constexpr,
):
    """BatchNorm of some channels at some pixels, [lanes, channels], by fixed statistics; its weight and bias may be
    None."""
    present = channel < C
    if K > 0:
        y = _of_image(x, image, pixel, size, mask, stem, channel, present, K, LAST)
    else:
        y = _rows(x, image * size + pixel, channel, mask[:, None] & present[None, :], C)
    scale = tl.rsqrt(_vector(variance, channel, present) + EPS)
    if weight is not None:
        scale *= _vector(weight, channel, present)
    y = (y - _vector(mean, channel, present)[None, :]) * scale[None, :]
    if bias is not None:
        y += _vector(bias, channel, present)[None, :]
    return y


@triton.jit
def _store(map, x, pixel, channel, mask, CHANNELS: tl.constexpr):
    """Store [lanes, channels] to a map [N, CHANNELS], where there are such channels."""
    present = mask[:, None] & ((channel >= 0) & (channel < CHANNELS))[None, :]
    tl.store(map + pixel[:, None] * CHANNELS + channel[None, :], x.to(map.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["total", "height", "width", "rows", "columns"])
def products(
    x,
    stem,
    mean,
    variance,
    norm_weight,
    norm_bias,
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
    EPS: tl.constexpr,
    POOLED: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """weight [O, C] · f(x) + bias + residual, f = ReLU(BatchNorm(x)), then 2×2 max pooling if POOLED.

    x is of height × width pixels, the outputs of rows × columns. With K x is an image, with channels LAST or not, and
    stem · x [C] takes its place. bias, residual, norm_weight, norm_bias, output2 and output3 may be None.
    """
    GIVEN: tl.constexpr = O1 + O2 + O3
    lane, mask, image, out = tile_of(tl.program_id(1), total, rows, columns, LANES)
    made = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    size, corner = height * width, out
    if POOLED:
        corner = out // columns * 2 * width + out % columns * 2
    sums = tl.zeros([LANES, BLOCK_O], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        norm = stem, mean, variance, norm_weight, norm_bias, channel
        y = _normalised(x, image, corner, size, mask, *norm, C, K, EPS, LAST)
        if POOLED:
            for number in tl.static_range(1, 4):
                pixel = corner + number // 2 * width + number % 2
                other = _normalised(x, image, pixel, size, mask, *norm, C, K, EPS, LAST)
                y = tl.maximum(y, other, propagate_nan=tl.PropagateNan.ALL)
        inside = (made < GIVEN)[None, :] & (channel < C)[:, None]
        matrix = tl.load(weight + made[None, :] * C + channel[:, None], mask=inside, other=0.0)
        sums += product(relu(y), matrix.to(tl.float32), MODE)
    if bias is not None:
        sums += _vector(bias, made, made < GIVEN)[None, :]
    if residual is not None:
        sums += _rows(residual, lane, made, mask[:, None] & (made < GIVEN)[None, :], GIVEN)
    _store(output1, sums, lane, made, mask, O1)
    if output2 is not None:
        _store(output2, sums, lane, made - O1, mask, O2)
    if output3 is not None:
        _store(output3, sums, lane, made - (O1 + O2), mask, O3)

"""Training through BatchNorm · ReLU · pooling · products on the channel axis as Triton kernels that keep the input.

Forward's products are in `kernels/pointwise/device.py`. Backward normalises the input a second time, tile by tile: one
kernel goes back to BatchNorm, with the sums that its own gradients need; one makes the gradients of the products'
weights; one joins what reaches the input. Every program writes sums of its own, which are added afterwards in a fixed
order: no atomics. Maps have their channels last, so that a batch of them is one matrix.
Legend: N pixels of a batch, C channels that enter, O output channels of all products, K image channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from san.ops.kernels.gpu.geometry import load_tile, product, relu, tile_of
from san.ops.kernels.pointwise.device import entering, normalised, rows_of, store_rows, vector

__all__ = ["back_to_input", "back_to_norm", "image_moments", "of_products", "stem_backward"]

_SIZES = ["total", "height", "width", "rows", "columns", "tiles"]


@triton.jit
def _outer(gradient1, gradient2, gradient3, pixel, made, mask, O1: tl.constexpr, O2: tl.constexpr, O3: tl.constexpr):
    """[lanes, outputs] of the gradients of up to three products, one beside the other."""
    found = rows_of(gradient1, pixel, made, mask, O1)
    if gradient2 is not None:
        found += rows_of(gradient2, pixel, made - O1, mask, O2)
    if gradient3 is not None:
        found += rows_of(gradient3, pixel, made - (O1 + O2), mask, O3)
    return found


@triton.jit
def _weight(weight, made, channel, GIVEN: tl.constexpr, C: tl.constexpr):
    """[outputs, channels] of all products' weight [O, C], in float32."""
    present = (made < GIVEN)[:, None] & (channel < C)[None, :]
    return tl.load(weight + made[:, None] * C + channel[None, :], mask=present, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def back_to_norm(
    x,
    affine,
    weight,
    outer1,
    outer2,
    outer3,
    gradient,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    C: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    POOLED: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradient at scale · x + shift, in x's place, from those of the products of its ReLU, which is pooled if POOLED;
    and `sums` [programs, 2, C] of it times x, for the scale, and of itself, for the shift."""
    GIVEN: tl.constexpr = O1 + O2 + O3
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // BLOCKS
    lane, mask, image, out = tile_of(tile, total, rows, columns, LANES)
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    back = tl.zeros([LANES, BLOCK_C], tl.float32)
    for first in range(0, GIVEN, BLOCK_O):
        made = first + tl.arange(0, BLOCK_O)
        outer = _outer(outer1, outer2, outer3, lane, made, mask, O1, O2, O3)
        back += product(outer, _weight(weight, made, channel, GIVEN, C), MODE)
    start = image * (height * width)
    of_scale, of_shift = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    if POOLED:
        corner = start + out // columns * 2 * width + out % columns * 2
        winner, highest = _winner(x, corner, width, affine, channel, mask, C, LANES, BLOCK_C)
        back = tl.where(highest <= 0, 0.0, back)
        for number in tl.static_range(4):
            pixel = corner + number // 2 * width + number % 2
            own = tl.where(winner == number, back, 0.0)
            store_rows(gradient, own, pixel, channel, mask, C)
            of_scale += tl.sum(own * rows_of(x, pixel, channel, mask, C), 0)
            of_shift += tl.sum(own, 0)
    else:
        seen = rows_of(x, start + out, channel, mask, C)
        back = tl.where(normalised(seen, affine, channel, C) <= 0, 0.0, back)
        store_rows(gradient, back, start + out, channel, mask, C)
        of_scale += tl.sum(back * seen, 0)
        of_shift += tl.sum(back, 0)
    to = sums + tile.to(tl.int64) * (2 * C) + channel
    tl.store(to, of_scale, mask=channel < C)
    tl.store(to + C, of_shift, mask=channel < C)


@triton.jit
def _winner(x, corner, width, affine, channel, mask, C: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of a window's four pixels is the largest, the first of several, and its value: [lanes, channels] each."""
    winner = tl.zeros([LANES, BLOCK_C], tl.int32)
    highest = tl.full([LANES, BLOCK_C], float("-inf"), tl.float32)
    for number in tl.static_range(4):
        pixel = corner + number // 2 * width + number % 2
        y = normalised(rows_of(x, pixel, channel, mask, C), affine, channel, C)
        wins = (y > highest) | (y != y)
        winner, highest = tl.where(wins, number, winner), tl.where(wins, y, highest)
    return winner, highest


@triton.jit(do_not_specialize=_SIZES)
def of_products(
    x,
    affine,
    outer1,
    outer2,
    outer3,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    tiles,
    C: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    POOLED: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradients of all products' weights and biases, from `tiles` tiles of pixels: [programs, O, C + 1], bias last."""
    GIVEN: tl.constexpr = O1 + O2 + O3
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    made = tl.program_id(0) // BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    of_weight, of_bias = tl.zeros([BLOCK_O, BLOCK_C], tl.float32), tl.zeros([BLOCK_O], tl.float32)
    for tile in range(tl.program_id(1) * tiles, tl.program_id(1) * tiles + tiles):
        lane, mask, image, out = tile_of(tile, total, rows, columns, LANES)
        pixel = image * (height * width) + out
        if POOLED:
            pixel = image * (height * width) + out // columns * 2 * width + out % columns * 2
        y = normalised(rows_of(x, pixel, channel, mask, C), affine, channel, C)
        if POOLED:
            for number in tl.static_range(1, 4):
                other = rows_of(x, pixel + number // 2 * width + number % 2, channel, mask, C)
                y = tl.maximum(y, normalised(other, affine, channel, C), propagate_nan=tl.PropagateNan.ALL)
        outer = _outer(outer1, outer2, outer3, lane, made, mask, O1, O2, O3)
        of_weight += product(tl.trans(outer), relu(y), MODE)
        of_bias += tl.sum(outer, 0)
    to = sums + (tl.program_id(1).to(tl.int64) * GIVEN + made) * (C + 1)
    tl.store(to[:, None] + channel[None, :], of_weight, mask=(made < GIVEN)[:, None] & (channel < C)[None, :])
    tl.store(to + C, of_bias, mask=(made < GIVEN) & (tl.program_id(0) % BLOCKS == 0))


@triton.jit(do_not_specialize=_SIZES)
def back_to_input(
    gradient,
    x,
    passed,
    affine,
    slopes,
    total,
    C: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """scale · gradient + slope · x + intercept + passed, in the gradient's place; `slopes` [2, C] and `passed` may be
    None."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    lane = (tl.program_id(0) // BLOCKS).to(tl.int64) * LANES + tl.arange(0, LANES)
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = lane < total
    y = rows_of(gradient, lane, channel, mask, C) * vector(affine, channel, channel < C)[None, :]
    if slopes is not None:
        y += normalised(rows_of(x, lane, channel, mask, C), slopes, channel, C)
    if passed is not None:
        y += rows_of(passed, lane, channel, mask, C)
    store_rows(gradient, y, lane, channel, mask, C)


@triton.jit(do_not_specialize=_SIZES)
def image_moments(x, moments, total, rows, columns, K: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr):
    """Mean [K] and Σ (pixel − mean)(pixel − mean)ᵀ [K, K] over this program's pixels: [programs, K + K · K]."""
    _, mask, image, pixel = tile_of(tl.program_id(0), total, rows, columns, LANES)
    count = tl.maximum(tl.sum(mask.to(tl.float32), 0), 1.0)
    to = moments + tl.program_id(0).to(tl.int64) * (K + K * K)
    for k in tl.static_range(K):
        own = load_tile(x, image, pixel, k, rows * columns, mask, K, LAST)
        mean = tl.sum(own, 0) / count
        own = tl.where(mask, own - mean, 0.0)
        tl.store(to + k, mean)
        for j in tl.static_range(K):
            other = load_tile(x, image, pixel, j, rows * columns, mask, K, LAST)
            other -= tl.sum(other, 0) / count
            tl.store(to + K + k * K + j, tl.sum(own * other, 0))


@triton.jit(do_not_specialize=_SIZES)
def stem_backward(
    x,
    stem,
    affine,
    centre,
    weight,
    outer,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    O1: tl.constexpr,
    POOLED: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Of g, the gradient behind BatchNorm of stem · x, over this program's `tiles` tiles: Σ g [C], Σ g · (x − centre)
    [K, C], and the gradient of the product behind [O, C]: [programs, 1 + K + O, C]."""
    channel, made = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_O)
    matrix = _weight(weight, made, channel, O1, C)
    total_sum, of_weight = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    colour, size = tl.arange(0, 4), height * width
    of_colours = tl.zeros([4, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0) * tiles, tl.program_id(0) * tiles + tiles):
        lane, mask, image, out = tile_of(tile, total, rows, columns, LANES)
        corner = out
        if POOLED:
            corner = out // columns * 2 * width + out % columns * 2
        gradient = rows_of(outer, lane, made, mask, O1)
        winner = tl.zeros([LANES, BLOCK_C], tl.int32)
        y = entering(x, image, corner, size, mask, stem, affine, channel, C, K, LAST)
        if POOLED:
            for number in tl.static_range(1, 4):
                pixel = corner + number // 2 * width + number % 2
                other = entering(x, image, pixel, size, mask, stem, affine, channel, C, K, LAST)
                wins = (other > y) | (other != other)
                winner, y = tl.where(wins, number, winner), tl.where(wins, other, y)
        of_weight += product(tl.trans(gradient), relu(y), MODE)
        back = tl.where(y <= 0, 0.0, product(gradient, matrix, MODE))
        total_sum += tl.sum(back, 0)
        for number in tl.static_range(4 if POOLED else 1):
            pixel = corner + number // 2 * width + number % 2
            own = tl.where(winner == number, back, 0.0)
            for k in tl.static_range(K):
                seen = load_tile(x, image, pixel, k, size, mask, K, LAST) - tl.load(centre + k)
                of_colours += tl.where(colour[:, None] == k, tl.sum(own * seen[:, None], 0)[None, :], 0.0)
    to = sums + tl.program_id(0).to(tl.int64) * ((1 + K + O1) * C)
    tl.store(to + channel, total_sum, mask=channel < C)
    present = (colour < K)[:, None] & (channel < C)[None, :]
    tl.store(to + (1 + colour[:, None]) * C + channel[None, :], of_colours, mask=present)
    present = (made < O1)[:, None] & (channel < C)[None, :]
    tl.store(to + (1 + K + made[:, None]) * C + channel[None, :], of_weight, mask=present)

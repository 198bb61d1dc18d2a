"""Patchwise attention as Triton kernels: γ's first Linear on a footprint, its BatchNorm's moments, and star.

δ = [φ_i, ψ_R(i)] is never written: its first Linear is a sum over places, z_i = Σ_j W_j · relu(scale_j ψ_j + shift_j),
of which the query's part is another call with a footprint of one place. What follows is a map of few channels; the last
Linear meets aggregation in `aggregation/device.py`. Parameters lie place by place: W [K, R, GIVEN], vectors [K, R].
Legend: R relation width, K places, GIVEN channels of what the Linear gives, P output pixels, N = B · P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from san.ops.kernels.gpu.geometry import load_channels, lookers, place, product, reader, relu, source, tile_of

__all__ = [
    "hidden",
    "hidden_backward_key",
    "hidden_backward_parameters",
    "observe",
    "star",
    "star_backward_key",
    "star_backward_query",
]

_SIZES = ["total", "height", "width", "rows", "columns", "tall", "wide", "origin", "tiles"]


@triton.jit
def _load_place(vector, number, column, R: tl.constexpr):
    """A place's part of a vector [K, R]: [R]."""
    return tl.load(vector + number * R + column, mask=column < R, other=0.0)


@triton.jit
def _load_weight(matrix, number, column, row, R: tl.constexpr, GIVEN: tl.constexpr):
    """W_j of a place: [R, GIVEN]."""
    present = (column < R)[:, None] & (row < GIVEN)[None, :]
    return tl.load(matrix + (number * R + column[:, None]) * GIVEN + row[None, :], mask=present, other=0.0)


@triton.jit
def _load_rows(x, lane, row, mask, GIVEN: tl.constexpr):
    """[lanes, GIVEN] of a map [N, GIVEN]."""
    present = mask[:, None] & (row < GIVEN)[None, :]
    return tl.load(x + lane.to(tl.int64)[:, None] * GIVEN + row[None, :], mask=present, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def hidden(
    key,
    affine,
    matrix,
    output,
    total,
    height,
    width,
    rows,
    columns,
    R: tl.constexpr,
    GIVEN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """z [N, GIVEN], BLOCK_O channels a program."""
    K: tl.constexpr = KERNEL * KERNEL
    column, row = tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    y, x = out // columns * STRIDE, out % columns * STRIDE
    z = tl.zeros([LANES, BLOCK_O], tl.float32)
    for number in range(K):
        pixel, inside = place(y, x, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        k = load_channels(key, image, pixel, column, height * width, inside & mask, R, LAST)
        scale, shift = _load_place(affine, number, column, R), _load_place(affine + R * K, number, column, R)
        active = relu(k * scale[None, :] + shift[None, :])
        z += product(active, _load_weight(matrix, number, column, row, R, GIVEN), MODE)
    tl.store(output + lane[:, None] * GIVEN + row[None, :], z, mask=mask[:, None] & (row < GIVEN)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def observe(
    key,
    moments,
    total,
    height,
    width,
    rows,
    columns,
    tiles,
    R: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Mean and squared deviations of every channel at one place over `tiles` tiles of pixels: [shares, 2, K, R]."""
    K: tl.constexpr = KERNEL * KERNEL
    number, column = tl.program_id(0), tl.arange(0, BLOCK_R)
    mean, deviation = tl.zeros([LANES, BLOCK_R], tl.float32), tl.zeros([LANES, BLOCK_R], tl.float32)
    count = tl.zeros([LANES], tl.float32)
    first = tl.program_id(1) * tiles
    for tile in range(first, first + tiles):
        _, mask, image, out = tile_of(tile, total, rows, columns, LANES)
        y, x = out // columns * STRIDE, out % columns * STRIDE
        pixel, inside = place(y, x, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        k = load_channels(key, image, pixel, column, height * width, inside & mask, R, LAST)
        count += mask.to(tl.float32)
        # Lanes that are over stay as they are.
        distance = tl.where(mask[:, None], k - mean, 0.0)
        mean += distance / tl.maximum(count, 1.0)[:, None]
        deviation += distance * (k - mean)
    samples = tl.maximum(tl.sum(count, 0), 1.0)
    centre = tl.sum(mean * count[:, None], 0) / samples
    away = mean - centre[None, :]
    spread = tl.sum(deviation + count[:, None] * away * away, 0)
    moments += tl.program_id(1).to(tl.int64) * (2 * R * K)
    tl.store(moments + number * R + column, centre, mask=column < R)
    tl.store(moments + (K + number) * R + column, spread, mask=column < R)


@triton.jit(do_not_specialize=_SIZES)
def hidden_backward_key(
    gradient,
    key,
    affine,
    matrix,
    slopes,
    key_gradient,
    total,
    height,
    width,
    rows,
    columns,
    tall,
    wide,
    origin,
    R: tl.constexpr,
    GIVEN: tl.constexpr,
    SLOPES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradient of key [B, tall · wide, R] at the places of the bordered map, or of the map: `origin` says which."""
    K: tl.constexpr = KERNEL * KERNEL
    PADDING: tl.constexpr = KERNEL // 2 * DILATION
    column = tl.arange(0, BLOCK_R)
    lane, mask, image, own = lookers(total, tall, wide, LANES)
    y, x = own // wide + origin, own % wide + origin
    pixel, inside = source(y - PADDING, x - PADDING, height, width, ZEROS, ONCE)
    k = load_channels(key, image, pixel, column, height * width, inside & mask, R, LAST)
    of_key = tl.zeros([LANES, BLOCK_R], tl.float32)
    for number in range(K):
        row, col, met = reader(y, x, number, rows, columns, KERNEL, STRIDE, DILATION)
        met, looking = met & mask, image * (rows * columns) + row * columns + col
        of_active = tl.zeros([LANES, BLOCK_R], tl.float32)
        for start in range(0, GIVEN, BLOCK_O):
            given = start + tl.arange(0, BLOCK_O)
            dz = _load_rows(gradient, looking, given, met, GIVEN)
            of_active += product(dz, tl.trans(_load_weight(matrix, number, column, given, R, GIVEN)), MODE)
        scale, shift = _load_place(affine, number, column, R), _load_place(affine + R * K, number, column, R)
        of_key += tl.where(k * scale[None, :] + shift[None, :] <= 0, 0.0, of_active) * scale[None, :]
        if SLOPES:
            slope = _load_place(slopes, number, column, R)
            intercept = _load_place(slopes + R * K, number, column, R)
            of_key += tl.where(met[:, None], k * slope[None, :] + intercept[None, :], 0.0)
    tl.store(key_gradient + lane[:, None] * R + column[None, :], of_key, mask=mask[:, None] & (column < R)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def hidden_backward_parameters(
    gradient,
    key,
    affine,
    matrix,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    tiles,
    R: tl.constexpr,
    GIVEN: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Gradients of one place's parameters from `tiles` tiles of pixels and BLOCK_O channels: of W as `sums` [shares,
    K, R, GIVEN], and behind all of these scale and shift as [blocks, shares, 2, K, R]."""
    K: tl.constexpr = KERNEL * KERNEL
    number, share, column = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_R)
    given = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    scale, shift = _load_place(affine, number, column, R), _load_place(affine + R * K, number, column, R)
    layer = _load_weight(matrix, number, column, given, R, GIVEN)
    of_layer = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    of_scale, of_shift = tl.zeros([LANES, BLOCK_R], tl.float32), tl.zeros([LANES, BLOCK_R], tl.float32)
    for tile in range(share * tiles, share * tiles + tiles):
        lane, mask, image, out = tile_of(tile, total, rows, columns, LANES)
        y, x = out // columns * STRIDE, out % columns * STRIDE
        pixel, inside = place(y, x, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        k = load_channels(key, image, pixel, column, height * width, inside & mask, R, LAST)
        dz = _load_rows(gradient, lane, given, mask, GIVEN)
        before = k * scale[None, :] + shift[None, :]
        of_layer += product(tl.trans(relu(before)), dz, MODE)
        passed = tl.where(before <= 0, 0.0, product(dz, tl.trans(layer), MODE))
        of_scale += passed * k
        of_shift += passed
    shares, size = tl.num_programs(1), R * K
    present = (column < R)[:, None] & (given < GIVEN)[None, :]
    to = sums + tl.cast(share, tl.int64) * (GIVEN * size)
    tl.store(to + (number * R + column[:, None]) * GIVEN + given[None, :], of_layer, mask=present)
    to = sums + shares.to(tl.int64) * (GIVEN * size) + (tl.program_id(2) * shares + share).to(tl.int64) * (2 * size)
    tl.store(to + number * R + column, tl.sum(of_scale, 0), mask=column < R)
    tl.store(to + (K + number) * R + column, tl.sum(of_shift, 0), mask=column < R)


@triton.jit(do_not_specialize=_SIZES)
def star(
    query,
    key,
    output,
    total,
    height,
    width,
    rows,
    columns,
    R: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """δ = [φ_iᵀψ_j]_j as a map [N, K]."""
    K: tl.constexpr = KERNEL * KERNEL
    column = tl.arange(0, BLOCK_R)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    y, x = out // columns * STRIDE, out % columns * STRIDE
    q = load_channels(query, image, y * width + x, column, height * width, mask, R, LAST)
    for number in range(K):
        pixel, inside = place(y, x, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        k = load_channels(key, image, pixel, column, height * width, inside & mask, R, LAST)
        tl.store(output + lane * K + number, tl.sum(q * k, 1), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def star_backward_query(
    gradient,
    key,
    query_gradient,
    total,
    height,
    width,
    rows,
    columns,
    R: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradient of query [N, R] at the looking pixels."""
    K: tl.constexpr = KERNEL * KERNEL
    column = tl.arange(0, BLOCK_R)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    y, x = out // columns * STRIDE, out % columns * STRIDE
    of_query = tl.zeros([LANES, BLOCK_R], tl.float32)
    for number in range(K):
        pixel, inside = place(y, x, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        k = load_channels(key, image, pixel, column, height * width, inside & mask, R, LAST)
        of_query += tl.load(gradient + lane * K + number, mask=mask, other=0.0)[:, None] * k
    present = mask[:, None] & (column < R)[None, :]
    tl.store(query_gradient + lane[:, None] * R + column[None, :], of_query, mask=present)


@triton.jit(do_not_specialize=_SIZES)
def star_backward_key(
    gradient,
    query,
    key_gradient,
    total,
    height,
    width,
    rows,
    columns,
    tall,
    wide,
    origin,
    R: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradient of key [B, tall · wide, R], as `hidden_backward_key`."""
    K: tl.constexpr = KERNEL * KERNEL
    column = tl.arange(0, BLOCK_R)
    lane, mask, image, own = lookers(total, tall, wide, LANES)
    y, x = own // wide + origin, own % wide + origin
    of_key = tl.zeros([LANES, BLOCK_R], tl.float32)
    for number in range(K):
        row, col, met = reader(y, x, number, rows, columns, KERNEL, STRIDE, DILATION)
        met, looking = met & mask, image * (rows * columns) + row * columns + col
        centre = row * STRIDE * width + col * STRIDE
        q = load_channels(query, image, centre, column, height * width, met, R, LAST)
        of_key += tl.load(gradient + looking * K + number, mask=met, other=0.0)[:, None] * q
    tl.store(key_gradient + lane[:, None] * R + column[None, :], of_key, mask=mask[:, None] & (column < R)[None, :])

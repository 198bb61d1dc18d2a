"""Aggregation as Triton kernels: y_i = Σ_j α_ij ⊙ β(x_j), with α from memory or made on the way.

α comes from memory as the operator's [B, G, K, P], or with PIXELS_FIRST as [B, P, G · K]; or, where WIDTH is not 0, it
is the last layer of patchwise γ, α_gj = W_gj · relu(scale · hidden + shift) + b_gj of a map `hidden` [B, P, WIDTH], and
never lies in memory; W lies place by place, [K, WIDTH, G], and b as [K, G]. Each gradient has one owner: of α and
hidden the pixel that looks, of value the pixel that is looked at, of W the place.
Legend: B batch, G weight groups, K places, P output pixels, N = B · P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from san.ops.kernels.gpu.geometry import load_groups, lookers, place, product, reader, relu, store_groups, tile_of

__all__ = ["aggregate", "aggregate_backward_parameters", "aggregate_backward_value", "aggregate_backward_weight"]

_SIZES = ["total", "height", "width", "rows", "columns", "tall", "wide", "origin", "tiles"]


@triton.jit
def _weight_pointers(weight, image, out, number, group, pixels, GROUPS: tl.constexpr, K: tl.constexpr, PIXELS_FIRST):
    """α of one place in memory: [lanes, groups]."""
    # An image's weights alone can be more than 32 bits count.
    out, pixels = out.to(tl.int64), tl.cast(pixels, tl.int64)
    start = weight + image.to(tl.int64)[:, None] * (pixels * GROUPS * K)
    column = group[None, :] * K + number
    if PIXELS_FIRST:
        return start + (out[:, None] * (GROUPS * K) + column)
    return start + (column * pixels + out[:, None])


@triton.jit
def _load_hidden(hidden, lane, column, mask, WIDTH: tl.constexpr):
    present = mask[:, None] & (column < WIDTH)[None, :]
    return tl.load(hidden + lane.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=present, other=0.0)


@triton.jit
def _load_affine(affine, column, WIDTH: tl.constexpr):
    scale = tl.load(affine + column, mask=column < WIDTH, other=0.0)
    return scale, tl.load(affine + WIDTH + column, mask=column < WIDTH, other=0.0)


@triton.jit
def _load_layer(matrix, number, column, group, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """W_j of a place: [WIDTH, groups]."""
    present = (column < WIDTH)[:, None] & (group < GROUPS)[None, :]
    return tl.load(matrix + (number * WIDTH + column[:, None]) * GROUPS + group[None, :], mask=present, other=0.0)


@triton.jit
def _made(active, matrix, bias, number, column, group, WIDTH: tl.constexpr, GROUPS: tl.constexpr, MODE):
    """α of one place from what enters the last layer: [lanes, groups]."""
    layer = _load_layer(matrix, number, column, group, WIDTH, GROUPS)
    offset = tl.load(bias + number * GROUPS + group, mask=group < GROUPS, other=0.0)
    return product(active, layer, MODE) + offset[None, :]


@triton.jit(do_not_specialize=_SIZES)
def aggregate(
    value,
    weight,
    hidden,
    affine,
    matrix,
    bias,
    output,
    total,
    height,
    width,
    rows,
    columns,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y."""
    K: tl.constexpr = KERNEL * KERNEL
    group, member, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    row, col = out // columns * STRIDE, out % columns * STRIDE
    if WIDTH:
        scale, shift = _load_affine(affine, column, WIDTH)
        active = relu(_load_hidden(hidden, lane, column, mask, WIDTH) * scale[None, :] + shift[None, :])
    y = tl.zeros([LANES, BLOCK_S, BLOCK_G], tl.float32)
    for number in range(K):
        pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        if WIDTH:
            alpha = _made(active, matrix, bias, number, column, group, WIDTH, G, MODE)
        else:
            at = _weight_pointers(weight, image, out, number, group, rows * columns, G, K, PIXELS_FIRST)
            alpha = tl.load(at, mask=mask[:, None] & (group < G)[None, :], other=0.0).to(tl.float32)
        v = load_groups(value, image, pixel, member, group, height * width, inside & mask, G, SHARE, LAST)
        y += alpha[:, None, :] * v
    store_groups(output, y, image, out, member, group, rows * columns, mask, G, SHARE, LAST)


@triton.jit(do_not_specialize=_SIZES)
def aggregate_backward_weight(
    value,
    gradient,
    hidden,
    affine,
    matrix,
    weight_gradient,
    hidden_gradient,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of α; or that of hidden with statistics held fixed, and of scale and shift as `sums` [programs, 2,
    WIDTH]."""
    K: tl.constexpr = KERNEL * KERNEL
    group, member, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    row, col = out // columns * STRIDE, out % columns * STRIDE
    dy = load_groups(gradient, image, out, member, group, rows * columns, mask, G, SHARE, LAST)
    of_active = tl.zeros([LANES, BLOCK_H], tl.float32)
    for number in range(K):
        pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        v = load_groups(value, image, pixel, member, group, height * width, inside & mask, G, SHARE, LAST)
        of_alpha = tl.sum(v * dy, 1)
        if WIDTH:
            layer = _load_layer(matrix, number, column, group, WIDTH, G)
            of_active += product(of_alpha, tl.trans(layer), MODE)
        else:
            at = _weight_pointers(weight_gradient, image, out, number, group, rows * columns, G, K, PIXELS_FIRST)
            of_alpha = of_alpha.to(weight_gradient.dtype.element_ty)
            tl.store(at, of_alpha, mask=mask[:, None] & (group < G)[None, :])
    if WIDTH:
        scale, shift = _load_affine(affine, column, WIDTH)
        x = _load_hidden(hidden, lane, column, mask, WIDTH)
        passed = tl.where(x * scale[None, :] + shift[None, :] <= 0, 0.0, of_active)
        passed = tl.where(mask[:, None], passed, 0.0)
        present = mask[:, None] & (column < WIDTH)[None, :]
        tl.store(hidden_gradient + lane[:, None] * WIDTH + column[None, :], passed * scale[None, :], mask=present)
        sums += tl.program_id(0).to(tl.int64) * 2 * WIDTH
        tl.store(sums + column, tl.sum(passed * x, 0), mask=column < WIDTH)
        tl.store(sums + WIDTH + column, tl.sum(passed, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def aggregate_backward_value(
    gradient,
    weight,
    hidden,
    affine,
    matrix,
    bias,
    value_gradient,
    total,
    height,
    width,
    rows,
    columns,
    tall,
    wide,
    origin,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS_FIRST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradient of value [B, tall · wide, C] at the places of the bordered map, or of the map: `origin` says which."""
    K: tl.constexpr = KERNEL * KERNEL
    group, member, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
    lane, mask, image, own = lookers(total, tall, wide, LANES)
    y, x = own // wide + origin, own % wide + origin
    if WIDTH:
        scale, shift = _load_affine(affine, column, WIDTH)
    of_value = tl.zeros([LANES, BLOCK_S, BLOCK_G], tl.float32)
    for number in range(K):
        row, col, met = reader(y, x, number, rows, columns, KERNEL, STRIDE, DILATION)
        met, out = met & mask, row * columns + col
        if WIDTH:
            looking = _load_hidden(hidden, image * (rows * columns) + out, column, met, WIDTH)
            active = relu(looking * scale[None, :] + shift[None, :])
            alpha = _made(active, matrix, bias, number, column, group, WIDTH, G, MODE)
        else:
            at = _weight_pointers(weight, image, out, number, group, rows * columns, G, K, PIXELS_FIRST)
            alpha = tl.load(at, mask=met[:, None] & (group < G)[None, :], other=0.0).to(tl.float32)
        dy = load_groups(gradient, image, out, member, group, rows * columns, met, G, SHARE, LAST)
        of_value += alpha[:, None, :] * dy
    channel = member[:, None] * G + group[None, :]
    present = mask[:, None, None] & (member < SHARE)[None, :, None] & (group < G)[None, None, :]
    tl.store(value_gradient + lane[:, None, None] * (G * SHARE) + channel[None, :, :], of_value, mask=present)


@triton.jit(do_not_specialize=_SIZES)
def aggregate_backward_parameters(
    value,
    gradient,
    hidden,
    affine,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    tiles,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of W and b of one place from `tiles` tiles of pixels: `sums` [shares, K, WIDTH + 1, G]."""
    K: tl.constexpr = KERNEL * KERNEL
    number = tl.program_id(0)
    group, member, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H)
    scale, shift = _load_affine(affine, column, WIDTH)
    of_layer = tl.zeros([BLOCK_H, BLOCK_G], tl.float32)
    of_bias = tl.zeros([LANES, BLOCK_G], tl.float32)
    first = tl.program_id(1) * tiles
    for tile in range(first, first + tiles):
        lane, mask, image, out = tile_of(tile, total, rows, columns, LANES)
        row, col = out // columns * STRIDE, out % columns * STRIDE
        pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        v = load_groups(value, image, pixel, member, group, height * width, inside & mask, G, SHARE, LAST)
        dy = load_groups(gradient, image, out, member, group, rows * columns, mask, G, SHARE, LAST)
        of_alpha = tl.sum(v * dy, 1)
        active = relu(_load_hidden(hidden, lane, column, mask, WIDTH) * scale[None, :] + shift[None, :])
        of_layer += product(tl.trans(active), of_alpha, MODE)
        of_bias += of_alpha
    sums += (tl.program_id(1) * K + number).to(tl.int64) * (G * (WIDTH + 1))
    present = (column < WIDTH)[:, None] & (group < G)[None, :]
    tl.store(sums + column[:, None] * G + group[None, :], of_layer, mask=present)
    tl.store(sums + G * WIDTH + group, tl.sum(of_bias, 0), mask=group < G)

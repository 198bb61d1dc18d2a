"""Pairwise attention as Triton kernels: forward, moments for BatchNorm, and the two halves of backward.

A program owns some pixels, its lanes, and walks over the K places of their footprints; nothing per pair is written to
memory. Forward keeps a running softmax. Backward recomputes the pairs twice: once from the pixels that look (gradients
of query and γ), once from those that are looked at (gradients of key and value), so that every sum has one owner, taken
in a fixed order without atomics. Sums over all pixels are written a program each and added afterwards.

γ is a chain of LAYERS layers z_l = W_l · relu(scale_l · z_{l−1} + shift_l) + b_l with z_0 = δ; without NORM, the first
is z_1 = W_1 · δ + b_1. δ has three parts, because products like widths that are powers of two:
- pairs, R channels of subtraction, summation, hadamard, or the key's of concatenation;
- looks, the R channels of concatenation that only the looking pixel decides;
- extras, up to EXTRAS channels: dot, and position behind all others.
Tiles are [channels, lanes]: warps share out the rows of a product, and so γ's weights, which each would hold otherwise.
Legend: R relation width, D δ's width, C value channels, G weight groups, K places, O_l what layer l gives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from san.ops.kernels.gpu.geometry import (
    load_tile,
    lookers,
    place,
    product,
    reader,
    relu,
    source,
    store_tile,
    tile_of,
)

__all__ = [
    "EXTRAS",
    "attend",
    "attend_backward_key",
    "attend_backward_mapping",
    "attend_backward_query",
    "observe",
    "position_map",
]

# Rows of the tile of extras: the least that a product takes.
EXTRAS = 16
_EXTRAS = tl.constexpr(EXTRAS)

_SIZES = ["total", "height", "width", "rows", "columns", "tall", "wide", "origin", "tiles"]


@triton.jit
def _load(map, image, pixel, channel, size, mask, CHANNELS: tl.constexpr, LAST: tl.constexpr):
    """[channels, lanes] of a map of `size` pixels; zeros where the mask is off or there is no channel."""
    present = ((channel >= 0) & (channel < CHANNELS))[:, None] & mask[None, :]
    return load_tile(map, image[None, :], pixel[None, :], channel[:, None], size, present, CHANNELS, LAST)


@triton.jit
def _load_member(map, image, pixel, member, group, size, mask, GROUPS: tl.constexpr, SHARE: tl.constexpr, LAST):
    """[groups, lanes] of a value map: one of the SHARE channels that a group weighs alike."""
    present, channel = (group < GROUPS)[:, None] & mask[None, :], (member * GROUPS + group)[:, None]
    return load_tile(map, image[None, :], pixel[None, :], channel, size, present, GROUPS * SHARE, LAST)


@triton.jit
def _load_groups(map, image, pixel, member, group, size, mask, GROUPS: tl.constexpr, SHARE: tl.constexpr, LAST):
    """[members, groups, lanes] of a value map."""
    channel = (member[:, None] * GROUPS + group[None, :])[:, :, None]
    present = ((member < SHARE)[:, None] & (group < GROUPS)[None, :])[:, :, None] & mask[None, None, :]
    where = image[None, None, :], pixel[None, None, :]
    return load_tile(map, where[0], where[1], channel, size, present, GROUPS * SHARE, LAST)


@triton.jit
def _store_groups(map, x, image, pixel, member, group, size, mask, GROUPS: tl.constexpr, SHARE: tl.constexpr, LAST):
    """Store [members, groups, lanes] to a value map, in its dtype."""
    channel = (member[:, None] * GROUPS + group[None, :])[:, :, None]
    present = ((member < SHARE)[:, None] & (group < GROUPS)[None, :])[:, :, None] & mask[None, None, :]
    where = image[None, None, :], pixel[None, None, :]
    store_tile(map, x, where[0], where[1], channel, size, present, GROUPS * SHARE, LAST)


@triton.jit
def _pairs(query, key, RELATION: tl.constexpr):
    """The part of δ that is as wide as the key: [R, lanes]."""
    if RELATION == "subtraction":
        return query - key
    if RELATION == "summation":
        return query + key
    if RELATION == "hadamard":
        return query * key
    return key


@triton.jit
def _extras(query, key, looking, seen, RELATION: tl.constexpr, POSITION: tl.constexpr):
    """dot and position: [EXTRAS, lanes], from positions of both pixels that already lie in their rows."""
    extras = tl.zeros(looking.shape, tl.float32)
    if RELATION == "dot":
        first = tl.arange(0, _EXTRAS)[:, None] == 0
        extras += tl.where(first, tl.sum(query * key, 0)[None, :], 0.0)
    if POSITION == "relative":
        extras += looking - seen
    if POSITION == "absolute":
        extras += looking + seen
    return extras


@triton.jit
def _load_position(position, pixel, size, mask, FIRST: tl.constexpr, POSITION: tl.constexpr, LANES: tl.constexpr):
    """Position [2, size] of some pixels in rows FIRST and FIRST + 1: [EXTRAS, lanes]."""
    if POSITION == "none":
        return tl.zeros([_EXTRAS, LANES], tl.float32)
    return _load(position, pixel * 0, pixel, tl.arange(0, _EXTRAS) - FIRST, size, mask, 2, False)


@triton.jit
def _load_vector(vector, first, column, WIDTH: tl.constexpr):
    """[width] from `first` on; 0 beyond WIDTH."""
    return tl.load(vector + first + column, mask=column < WIDTH, other=0.0)


@triton.jit
def _load_weight(weight, first, column, row, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Columns [first, first + WIDTH) of a Linear's weight [ROWS, COLUMNS]: [rows, columns]."""
    present = (column < WIDTH)[None, :] & (row < ROWS)[:, None]
    return tl.load(weight + row[:, None] * COLUMNS + first + column[None, :], mask=present, other=0.0)


@triton.jit
def _store_weight(to, x, first, column, row, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The reverse of `_load_weight`."""
    present = (column < WIDTH)[None, :] & (row < ROWS)[:, None]
    tl.store(to + row[:, None] * COLUMNS + first + column[None, :], x, mask=present)


@triton.jit
def _activated(x, scale, shift, NORM: tl.constexpr):
    """ReLU of BatchNorm; without NORM, x."""
    if NORM:
        return relu(x * scale[:, None] + shift[:, None])
    return x


@triton.jit
def _passed(gradient, x, scale, shift, NORM: tl.constexpr):
    """Gradient at scale · x + shift, from that behind its ReLU."""
    if NORM:
        return tl.where(x * scale[:, None] + shift[:, None] <= 0, 0.0, gradient)
    return gradient


@triton.jit
def _scaled(gradient, scale, NORM: tl.constexpr):
    """Gradient at x from that at scale · x + shift."""
    if NORM:
        return gradient * scale[:, None]
    return gradient


@triton.jit
def _observed(mean, deviation, x, number):
    """Welford's step for sample `number` (from 1) of every lane."""
    distance = x - mean
    mean += distance / number
    return mean, deviation + distance * (x - mean)


@triton.jit
def _store_moments(to, mean, deviation, mask, first, column, D: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    """Moments of all lanes' samples, K each, to columns [first, first + WIDTH) of [2, D]."""
    valid = mask[None, :]
    count = tl.maximum(tl.sum(mask.to(tl.float32), 0), 1.0)
    centre = tl.sum(tl.where(valid, mean, 0.0), 1) / count
    distance = mean - centre[:, None]
    total = tl.sum(tl.where(valid, deviation + K * distance * distance, 0.0), 1)
    present = column < WIDTH
    tl.store(to + first + column, centre, mask=present)
    tl.store(to + D + first + column, total, mask=present)


@triton.constexpr_function
def pairs_at(RELATION, R):
    """The first column of δ that pairs fill."""
    return R if RELATION == "concatenation" else 0


@triton.constexpr_function
def extras_at(RELATION, R):
    """The first column of δ that extras fill."""
    return {"dot": 0, "concatenation": 2 * R}.get(RELATION, R)


@triton.constexpr_function
def extras_of(RELATION, POSITION):
    """How many extras there are."""
    return (RELATION == "dot") + {"none": 0, "relative": 2, "absolute": 4}[POSITION]


@triton.constexpr_function
def has_pairs(RELATION):
    """Whether a part of δ is as wide as the key."""
    return RELATION != "dot"


@triton.constexpr_function
def has_extras(RELATION, POSITION):
    """Whether there are extras."""
    return RELATION == "dot" or POSITION != "none"


@triton.constexpr_function
def looking_at(RELATION):
    """The first row of extras that the looking pixel's position fills; relative position lies there too."""
    return 1 if RELATION == "dot" else 0


@triton.constexpr_function
def seen_at(RELATION, POSITION):
    """The first row of extras that the position of the pixel that is looked at fills."""
    return (RELATION == "dot") + (2 if POSITION == "absolute" else 0)


@triton.constexpr_function
def relation_width(RELATION, POSITION, R):
    """D, the width of δ."""
    own = {"dot": 1, "concatenation": 2 * R}.get(RELATION, R)
    return own + {"none": 0, "relative": 2, "absolute": 4}[POSITION]


@triton.constexpr_function
def layer_at(layer, D, O1, O2):
    """Where layer 1, 2, 3 begins in γ's packed parameters: scale and shift, then weight and bias of each in turn."""
    taken, given = (D, O1, O2), (O1, O2)
    return sum(2 * taken[n] + given[n] * (taken[n] + 1) for n in range(layer - 1))


@triton.constexpr_function
def slopes_at(layer, D, O1):
    """Where slope and intercept of layer 1, 2, 3 begin among those of all layers."""
    return sum(2 * width for width in (D, O1)[: layer - 1])


@triton.jit
def _behind(z1, gamma, column1, column2, column3, LAYERS: tl.constexpr, D, O1, O2, O3, MODE: tl.constexpr):
    """What γ's second and third layers give, where there are such; else what comes in."""
    z2 = z1
    if LAYERS > 1:
        at: tl.constexpr = layer_at(2, D, O1, O2)
        scale, shift = _load_vector(gamma, at, column1, O1), _load_vector(gamma, at + O1, column1, O1)
        weight = _load_weight(gamma + at + 2 * O1, 0, column1, column2, O1, O1, O2)
        bias = _load_vector(gamma, at + 2 * O1 + O1 * O2, column2, O2)
        z2 = product(weight, _activated(z1, scale, shift, True), MODE) + bias[:, None]
    z3 = z2
    if LAYERS > 2:
        at3: tl.constexpr = layer_at(3, D, O1, O2)
        scale3, shift3 = _load_vector(gamma, at3, column2, O2), _load_vector(gamma, at3 + O2, column2, O2)
        weight3 = _load_weight(gamma + at3 + 2 * O2, 0, column2, column3, O2, O2, O3)
        bias3 = _load_vector(gamma, at3 + 2 * O2 + O2 * O3, column3, O3)
        z3 = product(weight3, _activated(z2, scale3, shift3, True), MODE) + bias3[:, None]
    return z2, z3


@triton.jit
def _load_affine(gamma, column, extra, RELATION: tl.constexpr, POSITION: tl.constexpr, R: tl.constexpr):
    """Scale and shift of the first layer, of pairs and of extras."""
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    PAIRS: tl.constexpr = pairs_at(RELATION, R)
    EXTRA: tl.constexpr = extras_at(RELATION, R)
    WIDTH: tl.constexpr = extras_of(RELATION, POSITION)
    scale, shift = _load_vector(gamma, PAIRS, column, R), _load_vector(gamma, D + PAIRS, column, R)
    extra_scale, extra_shift = (
        _load_vector(gamma, EXTRA, extra, WIDTH),
        _load_vector(gamma, D + EXTRA, extra, WIDTH),
    )
    return scale, shift, extra_scale, extra_shift


@triton.jit
def _load_linear(gamma, column, extra, column1, RELATION: tl.constexpr, POSITION: tl.constexpr, R, O1):
    """Weights of the first Linear, for pairs and for extras, and its bias [outputs, 1]."""
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    PAIRS: tl.constexpr = pairs_at(RELATION, R)
    EXTRA: tl.constexpr = extras_at(RELATION, R)
    WIDTH: tl.constexpr = extras_of(RELATION, POSITION)
    weight = _load_weight(gamma + 2 * D, PAIRS, column, column1, D, R, O1)
    extra_weight = _load_weight(gamma + 2 * D, EXTRA, extra, column1, D, WIDTH, O1)
    return weight, extra_weight, _load_vector(gamma, 2 * D + O1 * D, column1, O1)[:, None]


@triton.jit
def _first_layer(
    pairs,
    extras,
    start,
    scale,
    shift,
    extra_scale,
    extra_shift,
    weight,
    extra_weight,
    RELATION: tl.constexpr,
    POSITION: tl.constexpr,
    NORM: tl.constexpr,
    MODE: tl.constexpr,
):
    """z_1, from the part `start` that the looking pixel decides."""
    z = start
    if has_pairs(RELATION):
        z = z + product(weight, _activated(pairs, scale, shift, NORM), MODE)
    if has_extras(RELATION, POSITION):
        z = z + product(extra_weight, _activated(extras, extra_scale, extra_shift, NORM), MODE)
    return z


@triton.jit
def _own_part(bias, query, gamma, column, column1, RELATION: tl.constexpr, POSITION: tl.constexpr, R, O1, NORM, MODE):
    """The part of z_1 that the looking pixel decides: the bias, and what its channels of concatenation give."""
    start = bias
    if RELATION == "concatenation":
        D: tl.constexpr = relation_width(RELATION, POSITION, R)
        scale, shift = _load_vector(gamma, 0, column, R), _load_vector(gamma, D, column, R)
        weight = _load_weight(gamma + 2 * D, 0, column, column1, D, R, O1)
        start = start + product(weight, _activated(query, scale, shift, NORM), MODE)
    return start


@triton.jit(do_not_specialize=_SIZES)
def attend(
    query,
    key,
    value,
    position,
    gamma,
    output,
    normalizer,
    total,
    height,
    width,
    rows,
    columns,
    RELATION: tl.constexpr,
    POSITION: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    G: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y, and the normaliser log Σ exp of every pixel's and group's scores [B · P, G]."""
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    column, extra = tl.arange(0, BLOCK_R), tl.arange(0, _EXTRAS)
    column1, column2, column3 = tl.arange(0, BLOCK_1), tl.arange(0, BLOCK_2), tl.arange(0, BLOCK_3)
    member = tl.arange(0, BLOCK_S)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    row, col = out // columns * STRIDE, out % columns * STRIDE
    size, centre = height * width, row * width + col
    affine = _load_affine(gamma, column, extra, RELATION, POSITION, R)
    weight, extra_weight, bias = _load_linear(gamma, column, extra, column1, RELATION, POSITION, R, O1)
    q = _load(query, image, centre, column, size, mask, R, LAST)
    looking = _load_position(position, centre, size, mask, looking_at(RELATION), POSITION, LANES)
    start = _own_part(bias, q, gamma, column, column1, RELATION, POSITION, R, O1, NORM, MODE)
    top = tl.full([BLOCK_3, LANES], float("-inf"), tl.float32)
    sum = tl.zeros([BLOCK_3, LANES], tl.float32)
    y = tl.zeros([BLOCK_S, BLOCK_3, LANES], tl.float32)
    for number in range(KERNEL * KERNEL):
        pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        inside = inside & mask
        k = _load(key, image, pixel, column, size, inside, R, LAST)
        seen = _load_position(position, pixel, size, inside, seen_at(RELATION, POSITION), POSITION, LANES)
        pairs, extras = _pairs(q, k, RELATION), _extras(q, k, looking, seen, RELATION, POSITION)
        z = _first_layer(pairs, extras, start, *affine, weight, extra_weight, RELATION, POSITION, NORM, MODE)
        scores = _behind(z, gamma, column1, column2, column3, LAYERS, D, O1, O2, O3, MODE)[1]
        higher = tl.maximum(top, scores, propagate_nan=tl.PropagateNan.ALL)
        old, new = tl.exp(top - higher), tl.exp(scores - higher)
        top, sum = higher, sum * old + new
        v = _load_groups(value, image, pixel, member, column3, size, inside, G, SHARE, LAST)
        y = y * old[None, :, :] + v * new[None, :, :]
    y = y / sum[None, :, :]
    _store_groups(output, y, image, out, member, column3, rows * columns, mask, G, SHARE, LAST)
    present = mask[None, :] & (column3 < G)[:, None]
    tl.store(normalizer + lane[None, :] * G + column3[:, None], top + tl.log(sum), mask=present)


@triton.jit(do_not_specialize=_SIZES)
def observe(
    query,
    key,
    position,
    gamma,
    moments,
    total,
    height,
    width,
    rows,
    columns,
    RELATION: tl.constexpr,
    POSITION: tl.constexpr,
    R: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    LAYERS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """Mean and squared deviations of z_LAYERS over this program's pairs: [programs, 2, D or O_LAYERS]."""
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    K: tl.constexpr = KERNEL * KERNEL
    PAIRS: tl.constexpr = pairs_at(RELATION, R)
    EXTRA: tl.constexpr = extras_at(RELATION, R)
    EXTRA_WIDTH: tl.constexpr = extras_of(RELATION, POSITION)
    column, extra = tl.arange(0, BLOCK_R), tl.arange(0, _EXTRAS)
    column1, column2 = tl.arange(0, BLOCK_1), tl.arange(0, BLOCK_2)
    _, mask, image, out = lookers(total, rows, columns, LANES)
    row, col = out // columns * STRIDE, out % columns * STRIDE
    size, centre = height * width, row * width + col
    q = _load(query, image, centre, column, size, mask, R, LAST)
    looking = _load_position(position, centre, size, mask, looking_at(RELATION), POSITION, LANES)
    moments += tl.program_id(0).to(tl.int64) * 2 * (D if LAYERS == 0 else O1 if LAYERS == 1 else O2)
    if LAYERS == 0:
        mean, deviation = tl.zeros([BLOCK_R, LANES], tl.float32), tl.zeros([BLOCK_R, LANES], tl.float32)
        extra_mean, extra_deviation = tl.zeros([_EXTRAS, LANES], tl.float32), tl.zeros([_EXTRAS, LANES], tl.float32)
        for number in range(K):
            pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
            k = _load(key, image, pixel, column, size, inside & mask, R, LAST)
            seen = _load_position(position, pixel, size, inside & mask, seen_at(RELATION, POSITION), POSITION, LANES)
            if has_pairs(RELATION):
                mean, deviation = _observed(mean, deviation, _pairs(q, k, RELATION), number + 1.0)
            if has_extras(RELATION, POSITION):
                extras = _extras(q, k, looking, seen, RELATION, POSITION)
                extra_mean, extra_deviation = _observed(extra_mean, extra_deviation, extras, number + 1.0)
        if has_pairs(RELATION):
            _store_moments(moments, mean, deviation, mask, PAIRS, column, D, R, K)
        if has_extras(RELATION, POSITION):
            _store_moments(moments, extra_mean, extra_deviation, mask, EXTRA, extra, D, EXTRA_WIDTH, K)
        if RELATION == "concatenation":
            _store_moments(moments, q, q * 0.0, mask, 0, column, D, R, K)
    else:
        affine = _load_affine(gamma, column, extra, RELATION, POSITION, R)
        weight, extra_weight, bias = _load_linear(gamma, column, extra, column1, RELATION, POSITION, R, O1)
        start = _own_part(bias, q, gamma, column, column1, RELATION, POSITION, R, O1, True, MODE)
        mean, deviation = tl.zeros([BLOCK_2, LANES], tl.float32), tl.zeros([BLOCK_2, LANES], tl.float32)
        for number in range(K):
            pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
            k = _load(key, image, pixel, column, size, inside & mask, R, LAST)
            seen = _load_position(position, pixel, size, inside & mask, seen_at(RELATION, POSITION), POSITION, LANES)
            pairs, extras = _pairs(q, k, RELATION), _extras(q, k, looking, seen, RELATION, POSITION)
            z = _first_layer(pairs, extras, start, *affine, weight, extra_weight, RELATION, POSITION, True, MODE)
            z = _behind(z, gamma, column1, column2, column2, LAYERS, D, O1, O2, O2, MODE)[0]
            mean, deviation = _observed(mean, deviation, z, number + 1.0)
        WIDTH: tl.constexpr = O1 if LAYERS == 1 else O2
        _store_moments(moments, mean, deviation, mask, 0, column2, WIDTH, WIDTH, K)


@triton.jit
def _top_row(extras):
    """The first row of a tile of extras: [1, lanes]."""
    return tl.sum(tl.where(tl.arange(0, _EXTRAS)[:, None] == 0, extras, 0.0), 0)[None, :]


@triton.jit
def _back_to_first(
    gradient, z1, z2, gamma, slopes, valid, column1, column2, column3, LAYERS, SLOPES, D, O1, O2, O3, MODE
):
    """Gradient of γ's last output → those of z_1, z_2, z_3, and of what the ReLUs of layers 2 and 3 were given.

    With SLOPES, what reaches z_1 and z_2 through BatchNorm's statistics is part of theirs. Those of layers that there
    are not are what comes in.
    """
    of3, of2, passed3 = gradient, gradient, gradient
    if LAYERS > 2:
        at3: tl.constexpr = layer_at(3, D, O1, O2)
        scale3, shift3 = _load_vector(gamma, at3, column2, O2), _load_vector(gamma, at3 + O2, column2, O2)
        weight3 = _load_weight(gamma + at3 + 2 * O2, 0, column2, column3, O2, O2, O3)
        passed3 = _passed(product(tl.trans(weight3), of3, MODE), z2, scale3, shift3, True)
        of2 = _scaled(passed3, scale3, True)
        if SLOPES:
            where3: tl.constexpr = slopes_at(3, D, O1)
            of2 += _statistics(z2, slopes, O2, where3, column2, valid, O2)
    of1, passed2 = of2, of2
    if LAYERS > 1:
        at2: tl.constexpr = layer_at(2, D, O1, O2)
        scale2, shift2 = _load_vector(gamma, at2, column1, O1), _load_vector(gamma, at2 + O1, column1, O1)
        weight2 = _load_weight(gamma + at2 + 2 * O1, 0, column1, column2, O1, O1, O2)
        passed2 = _passed(product(tl.trans(weight2), of2, MODE), z1, scale2, shift2, True)
        of1 = _scaled(passed2, scale2, True)
        if SLOPES:
            where2: tl.constexpr = slopes_at(2, D, O1)
            of1 += _statistics(z1, slopes, O1, where2, column1, valid, O1)
    return of1, of2, of3, passed2, passed3


@triton.jit
def _statistics(x, slopes, ALL: tl.constexpr, first, column, valid, WIDTH: tl.constexpr):
    """slope · x + intercept, the gradient that reaches a sample through BatchNorm's statistics; ALL slopes of a layer
    come before its intercepts, and those of x lie at `first`."""
    slope, intercept = _load_vector(slopes, first, column, WIDTH), _load_vector(slopes, first + ALL, column, WIDTH)
    return tl.where(valid[None, :], x * slope[:, None] + intercept[:, None], 0.0)


@triton.jit
def _add(to, x, mask, ACCUMULATE: tl.constexpr):
    """Store x, or with ACCUMULATE add it to what is there."""
    if ACCUMULATE:
        x += tl.load(to, mask=mask, other=0.0)
    tl.store(to, x, mask=mask)


@triton.jit
def _agreement(
    first, pixel, size, second, out, outs, image, mask, group, GROUPS: tl.constexpr, SHARE: tl.constexpr, LAST
):
    """Σ over a group's members of a map at some pixels times another one at others: [groups, lanes]."""
    sum = tl.zeros([group.shape[0], pixel.shape[0]], tl.float32)
    for member in range(SHARE):
        a = _load_member(first, image, pixel, member, group, size, mask, GROUPS, SHARE, LAST)
        sum += a * _load_member(second, image, out, member, group, outs, mask, GROUPS, SHARE, LAST)
    return sum


@triton.jit(do_not_specialize=_SIZES)
def attend_backward_query(
    query,
    key,
    value,
    position,
    gamma,
    slopes,
    output,
    gradient,
    normalizer,
    delta,
    query_gradient,
    position_gradient,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    RELATION: tl.constexpr,
    POSITION: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    G: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    ATTEND: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
):
    """Gradients that the looking pixels own: of query [B · P, R], position [B · P, 2], and the first layer's scale and
    shift as `sums` [programs, 2, D].

    With ATTEND from that of y; writes Σ y · dy of every group to `delta`. Without, from slope · z_LAYERS + intercept,
    which reaches what a BatchNorm takes its statistics from, and is added to the gradients of query and position.
    """
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    PAIRS: tl.constexpr = pairs_at(RELATION, R)
    EXTRA: tl.constexpr = extras_at(RELATION, R)
    EXTRA_WIDTH: tl.constexpr = extras_of(RELATION, POSITION)
    column, extra = tl.arange(0, BLOCK_R), tl.arange(0, _EXTRAS)
    column1, column2, column3 = tl.arange(0, BLOCK_1), tl.arange(0, BLOCK_2), tl.arange(0, BLOCK_3)
    lane, mask, image, out = lookers(total, rows, columns, LANES)
    row, col = out // columns * STRIDE, out % columns * STRIDE
    size, centre = height * width, row * width + col
    affine = _load_affine(gamma, column, extra, RELATION, POSITION, R)
    scale, shift, extra_scale, extra_shift = affine
    q = _load(query, image, centre, column, size, mask, R, LAST)
    looking = _load_position(position, centre, size, mask, looking_at(RELATION), POSITION, LANES)
    if LAYERS > 0:
        weight, extra_weight, bias = _load_linear(gamma, column, extra, column1, RELATION, POSITION, R, O1)
        start = _own_part(bias, q, gamma, column, column1, RELATION, POSITION, R, O1, NORM, MODE)
        if RELATION == "concatenation":
            sum1 = tl.zeros([BLOCK_1, LANES], tl.float32)
    if ATTEND:
        groups = mask[None, :] & (column3 < G)[:, None]
        top = tl.load(normalizer + lane[None, :] * G + column3[:, None], mask=groups, other=float("inf"))
        shared = _agreement(
            output, out, rows * columns, gradient, out, rows * columns, image, mask, column3, G, SHARE, LAST
        )
        tl.store(delta + lane[None, :] * G + column3[:, None], shared, mask=groups)
    # Σ of gradients at scale · pairs + shift, and of them times pairs, or the key where that gives both.
    shift_sum, scale_sum = tl.zeros([BLOCK_R, LANES], tl.float32), tl.zeros([BLOCK_R, LANES], tl.float32)
    extra_shift_sum, extra_scale_sum = tl.zeros([_EXTRAS, LANES], tl.float32), tl.zeros([_EXTRAS, LANES], tl.float32)
    for number in range(KERNEL * KERNEL):
        pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
        inside = inside & mask
        if ATTEND:
            agreement = _agreement(
                value, pixel, size, gradient, out, rows * columns, image, inside, column3, G, SHARE, LAST
            )
        k = _load(key, image, pixel, column, size, inside, R, LAST)
        seen = _load_position(position, pixel, size, inside, seen_at(RELATION, POSITION), POSITION, LANES)
        pairs = _pairs(q, k, RELATION)
        extras = _extras(q, k, looking, seen, RELATION, POSITION)
        if LAYERS == 0:
            if has_pairs(RELATION):
                of_pairs = _statistics(pairs, slopes, D, PAIRS, column, mask, R)
            if has_extras(RELATION, POSITION):
                of_extras = _statistics(extras, slopes, D, EXTRA, extra, mask, EXTRA_WIDTH)
        else:
            z1 = _first_layer(pairs, extras, start, *affine, weight, extra_weight, RELATION, POSITION, NORM, MODE)
            z2, z3 = _behind(z1, gamma, column1, column2, column3, LAYERS, D, O1, O2, O3, MODE)
            if ATTEND:
                of_last = tl.exp(z3 - top) * (agreement - shared)
            else:
                of_last = _statistics(z3, slopes, O3, 0, column3, mask, O3)
            of1 = _back_to_first(
                of_last, z1, z2, gamma, slopes, mask, column1, column2, column3, LAYERS, False, D, O1, O2, O3, MODE
            )[0]
            if RELATION == "concatenation":
                sum1 += of1
            if has_pairs(RELATION):
                of_pairs = _passed(product(tl.trans(weight), of1, MODE), pairs, scale, shift, NORM)
            if has_extras(RELATION, POSITION):
                of_extras = product(tl.trans(extra_weight), of1, MODE)
                of_extras = _passed(of_extras, extras, extra_scale, extra_shift, NORM)
        if has_pairs(RELATION):
            shift_sum += of_pairs
            scale_sum += of_pairs * (k if RELATION == "hadamard" else pairs)
        if has_extras(RELATION, POSITION):
            extra_shift_sum += of_extras
            extra_scale_sum += of_extras * extras
            if RELATION == "dot":
                scale_sum += _top_row(of_extras) * k
    SCALED: tl.constexpr = NORM and LAYERS > 0
    of_query = _scaled(shift_sum, scale, SCALED)
    if RELATION == "hadamard":
        of_query = _scaled(scale_sum, scale, SCALED)
        scale_sum = scale_sum * q
    if RELATION == "dot":
        first_scale = tl.sum(tl.where(extra == 0, extra_scale, 0.0), 0)
        of_query = scale_sum * (first_scale if SCALED else 1.0)
    if RELATION == "concatenation":
        if LAYERS == 0:
            slope, intercept = _load_vector(slopes, 0, column, R), _load_vector(slopes, D, column, R)
            of_query = tl.where(mask[None, :], (q * slope[:, None] + intercept[:, None]) * (KERNEL * KERNEL), 0.0)
        else:
            own_scale, own_shift = _load_vector(gamma, 0, column, R), _load_vector(gamma, D, column, R)
            own_weight = _load_weight(gamma + 2 * D, 0, column, column1, D, R, O1)
            passed = _passed(product(tl.trans(own_weight), sum1, MODE), q, own_scale, own_shift, NORM)
            of_query = _scaled(passed, own_scale, NORM)
    present = mask[None, :] & (column < R)[:, None]
    _add(query_gradient + lane[None, :] * R + column[:, None], of_query, present, not ATTEND)
    if POSITION != "none":
        of_position = _scaled(extra_shift_sum, extra_scale, SCALED)
        axis = extra - looking_at(RELATION)
        present = mask[None, :] & ((axis >= 0) & (axis < 2))[:, None]
        _add(position_gradient + lane[None, :] * 2 + axis[:, None], of_position, present, not ATTEND)
    if LAYERS > 0:
        sums += tl.program_id(0).to(tl.int64) * 2 * D
        if has_pairs(RELATION):
            tl.store(sums + PAIRS + column, tl.sum(scale_sum, 1), mask=column < R)
            tl.store(sums + D + PAIRS + column, tl.sum(shift_sum, 1), mask=column < R)
        if has_extras(RELATION, POSITION):
            tl.store(sums + EXTRA + extra, tl.sum(extra_scale_sum, 1), mask=extra < EXTRA_WIDTH)
            tl.store(sums + D + EXTRA + extra, tl.sum(extra_shift_sum, 1), mask=extra < EXTRA_WIDTH)
        if RELATION == "concatenation":
            tl.store(sums + column, tl.sum(passed * q, 1), mask=column < R)
            tl.store(sums + D + column, tl.sum(passed, 1), mask=column < R)


@triton.jit(do_not_specialize=_SIZES)
def attend_backward_mapping(
    query,
    key,
    value,
    position,
    gamma,
    slopes,
    gradient,
    normalizer,
    delta,
    sums,
    total,
    height,
    width,
    rows,
    columns,
    tiles,
    RELATION: tl.constexpr,
    POSITION: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    G: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    ATTEND: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    ZEROS: tl.constexpr,
    ONCE: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
):
    """Gradients of the packed parameters of γ's layers FROM to TO, but for the first layer's scale and shift, from
    `tiles` tiles of looking pixels: `sums` [programs, SIZE].

    With ATTEND from that of y, of which `attend_backward_query` has written `delta`; without, from slope · z_LAYERS +
    intercept.
    """
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    PAIRS: tl.constexpr = pairs_at(RELATION, R)
    EXTRA: tl.constexpr = extras_at(RELATION, R)
    EXTRA_WIDTH: tl.constexpr = extras_of(RELATION, POSITION)
    column, extra = tl.arange(0, BLOCK_R), tl.arange(0, _EXTRAS)
    column1, column2, column3 = tl.arange(0, BLOCK_1), tl.arange(0, BLOCK_2), tl.arange(0, BLOCK_3)
    # Products of half precision sum over at least 16 lanes, those of tf32 over 8.
    SUMS: tl.constexpr = "tf32" if LANES < 16 and MODE != "ieee" else MODE
    size = height * width
    affine = _load_affine(gamma, column, extra, RELATION, POSITION, R)
    scale, shift, extra_scale, extra_shift = affine
    weight, extra_weight, bias = _load_linear(gamma, column, extra, column1, RELATION, POSITION, R, O1)
    if FROM == 1:
        weight_sum, own_sum = tl.zeros([BLOCK_1, BLOCK_R], tl.float32), tl.zeros([BLOCK_1, BLOCK_R], tl.float32)
        extra_weight_sum, bias_sum = tl.zeros([BLOCK_1, _EXTRAS], tl.float32), tl.zeros([BLOCK_1], tl.float32)
    if FROM <= 2 and TO >= 2:
        at2: tl.constexpr = layer_at(2, D, O1, O2)
        scale2, shift2 = _load_vector(gamma, at2, column1, O1), _load_vector(gamma, at2 + O1, column1, O1)
        weight_sum2, bias_sum2 = tl.zeros([BLOCK_2, BLOCK_1], tl.float32), tl.zeros([BLOCK_2], tl.float32)
        scale_sum2, shift_sum2 = tl.zeros([BLOCK_1], tl.float32), tl.zeros([BLOCK_1], tl.float32)
    if TO > 2:
        at3: tl.constexpr = layer_at(3, D, O1, O2)
        scale3, shift3 = _load_vector(gamma, at3, column2, O2), _load_vector(gamma, at3 + O2, column2, O2)
        weight_sum3, bias_sum3 = tl.zeros([BLOCK_3, BLOCK_2], tl.float32), tl.zeros([BLOCK_3], tl.float32)
        scale_sum3, shift_sum3 = tl.zeros([BLOCK_2], tl.float32), tl.zeros([BLOCK_2], tl.float32)
    for tile in range(tl.program_id(0) * tiles, tl.program_id(0) * tiles + tiles):
        lane, mask, image, out = tile_of(tile, total, rows, columns, LANES)
        row, col = out // columns * STRIDE, out % columns * STRIDE
        centre = row * width + col
        q = _load(query, image, centre, column, size, mask, R, LAST)
        looking = _load_position(position, centre, size, mask, looking_at(RELATION), POSITION, LANES)
        start = _own_part(bias, q, gamma, column, column1, RELATION, POSITION, R, O1, NORM, MODE)
        sum1 = tl.zeros([BLOCK_1, LANES], tl.float32)
        if ATTEND:
            groups = mask[None, :] & (column3 < G)[:, None]
            top = tl.load(normalizer + lane[None, :] * G + column3[:, None], mask=groups, other=float("inf"))
            shared = tl.load(delta + lane[None, :] * G + column3[:, None], mask=groups, other=0.0)
        for number in range(KERNEL * KERNEL):
            pixel, inside = place(row, col, number, height, width, KERNEL, DILATION, ZEROS, ONCE)
            inside = inside & mask
            if ATTEND:
                agreement = _agreement(
                    value, pixel, size, gradient, out, rows * columns, image, inside, column3, G, SHARE, LAST
                )
            k = _load(key, image, pixel, column, size, inside, R, LAST)
            seen = _load_position(position, pixel, size, inside, seen_at(RELATION, POSITION), POSITION, LANES)
            pairs = _pairs(q, k, RELATION)
            extras = _extras(q, k, looking, seen, RELATION, POSITION)
            z1 = _first_layer(pairs, extras, start, *affine, weight, extra_weight, RELATION, POSITION, NORM, MODE)
            z2, z3 = _behind(z1, gamma, column1, column2, column3, LAYERS, D, O1, O2, O3, MODE)
            if ATTEND:
                of_last = tl.exp(z3 - top) * (agreement - shared)
            else:
                of_last = _statistics(z3, slopes, O3, 0, column3, mask, O3)
            of1, of2, of3, passed2, passed3 = _back_to_first(
                of_last, z1, z2, gamma, slopes, mask, column1, column2, column3, LAYERS, False, D, O1, O2, O3, MODE
            )
            if TO > 2:
                bias_sum3 += tl.sum(of3, 1)
                weight_sum3 += product(of3, tl.trans(_activated(z2, scale3, shift3, True)), SUMS)
                shift_sum3 += tl.sum(passed3, 1)
                scale_sum3 += tl.sum(passed3 * z2, 1)
            if FROM <= 2 and TO >= 2:
                bias_sum2 += tl.sum(of2, 1)
                weight_sum2 += product(of2, tl.trans(_activated(z1, scale2, shift2, True)), SUMS)
                shift_sum2 += tl.sum(passed2, 1)
                scale_sum2 += tl.sum(passed2 * z1, 1)
            if FROM == 1:
                bias_sum += tl.sum(of1, 1)
            if FROM == 1 and RELATION == "concatenation":
                sum1 += of1
            if FROM == 1 and has_pairs(RELATION):
                weight_sum += product(of1, tl.trans(_activated(pairs, scale, shift, NORM)), SUMS)
            if FROM == 1 and has_extras(RELATION, POSITION):
                active = _activated(extras, extra_scale, extra_shift, NORM)
                extra_weight_sum += product(of1, tl.trans(active), SUMS)
        if FROM == 1 and RELATION == "concatenation":
            own_scale, own_shift = _load_vector(gamma, 0, column, R), _load_vector(gamma, D, column, R)
            own_sum += product(sum1, tl.trans(_activated(q, own_scale, own_shift, NORM)), SUMS)
    sums += tl.program_id(0).to(tl.int64) * SIZE
    if FROM == 1 and has_pairs(RELATION):
        _store_weight(sums + 2 * D, weight_sum, PAIRS, column, column1, D, R, O1)
    if FROM == 1 and has_extras(RELATION, POSITION):
        _store_weight(sums + 2 * D, extra_weight_sum, EXTRA, extra, column1, D, EXTRA_WIDTH, O1)
    if FROM == 1 and RELATION == "concatenation":
        _store_weight(sums + 2 * D, own_sum, 0, column, column1, D, R, O1)
    if FROM == 1:
        tl.store(sums + 2 * D + O1 * D + column1, bias_sum, mask=column1 < O1)
    if FROM <= 2 and TO >= 2:
        tl.store(sums + at2 + column1, scale_sum2, mask=column1 < O1)
        tl.store(sums + at2 + O1 + column1, shift_sum2, mask=column1 < O1)
        _store_weight(sums + at2 + 2 * O1, weight_sum2, 0, column1, column2, O1, O1, O2)
        tl.store(sums + at2 + 2 * O1 + O1 * O2 + column2, bias_sum2, mask=column2 < O2)
    if TO > 2:
        tl.store(sums + at3 + column2, scale_sum3, mask=column2 < O2)
        tl.store(sums + at3 + O2 + column2, shift_sum3, mask=column2 < O2)
        _store_weight(sums + at3 + 2 * O2, weight_sum3, 0, column2, column3, O2, O2, O3)
        tl.store(sums + at3 + 2 * O2 + O2 * O3 + column3, bias_sum3, mask=column3 < O3)


@triton.jit(do_not_specialize=_SIZES)
def attend_backward_key(
    query,
    key,
    value,
    position,
    gamma,
    slopes,
    gradient,
    normalizer,
    delta,
    key_gradient,
    value_gradient,
    position_gradient,
    total,
    height,
    width,
    rows,
    columns,
    tall,
    wide,
    origin,
    RELATION: tl.constexpr,
    POSITION: tl.constexpr,
    R: tl.constexpr,
    SHARE: tl.constexpr,
    G: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    O3: tl.constexpr,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
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
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Gradients that the pixels which are looked at own: of key, value and position, [B · tall · wide, channels] each.

    Lanes are the places of the bordered map, or with ZEROS those of the map, `origin` beyond the bordered map's corner.
    With SLOPES every BatchNorm's slope · x + intercept is part of them.
    """
    D: tl.constexpr = relation_width(RELATION, POSITION, R)
    PAIRS: tl.constexpr = pairs_at(RELATION, R)
    EXTRA: tl.constexpr = extras_at(RELATION, R)
    EXTRA_WIDTH: tl.constexpr = extras_of(RELATION, POSITION)
    PADDING: tl.constexpr = KERNEL // 2 * DILATION
    column, extra = tl.arange(0, BLOCK_R), tl.arange(0, _EXTRAS)
    column1, column2, column3 = tl.arange(0, BLOCK_1), tl.arange(0, BLOCK_2), tl.arange(0, BLOCK_3)
    member = tl.arange(0, BLOCK_S)
    size = height * width
    lane, mask, image, own = lookers(total, tall, wide, LANES)
    y, x = own // wide + origin, own % wide + origin
    pixel, inside = source(y - PADDING, x - PADDING, height, width, ZEROS, ONCE)
    inside = inside & mask
    k = _load(key, image, pixel, column, size, inside, R, LAST)
    seen = _load_position(position, pixel, size, inside, seen_at(RELATION, POSITION), POSITION, LANES)
    affine = _load_affine(gamma, column, extra, RELATION, POSITION, R)
    scale, shift, extra_scale, extra_shift = affine
    weight, extra_weight, bias = _load_linear(gamma, column, extra, column1, RELATION, POSITION, R, O1)
    of_key = tl.zeros([BLOCK_R, LANES], tl.float32)
    of_value = tl.zeros([BLOCK_S, BLOCK_3, LANES], tl.float32)
    of_seen = tl.zeros([_EXTRAS, LANES], tl.float32)
    for number in range(KERNEL * KERNEL):
        row, col, met = reader(y, x, number, rows, columns, KERNEL, STRIDE, DILATION)
        met = met & mask
        centre, out = row * STRIDE * width + col * STRIDE, row * columns + col
        agreement = _agreement(
            value, pixel, size, gradient, out, rows * columns, image, met & inside, column3, G, SHARE, LAST
        )
        q = _load(query, image, centre, column, size, met, R, LAST)
        looking = _load_position(position, centre, size, met, looking_at(RELATION), POSITION, LANES)
        start = _own_part(bias, q, gamma, column, column1, RELATION, POSITION, R, O1, NORM, MODE)
        pairs = _pairs(q, k, RELATION)
        extras = _extras(q, k, looking, seen, RELATION, POSITION)
        z1 = _first_layer(pairs, extras, start, *affine, weight, extra_weight, RELATION, POSITION, NORM, MODE)
        z2, z3 = _behind(z1, gamma, column1, column2, column3, LAYERS, D, O1, O2, O3, MODE)
        reader_of = image * (rows * columns) + out
        groups = met[None, :] & (column3 < G)[:, None]
        place_of = reader_of[None, :] * G + column3[:, None]
        top = tl.load(normalizer + place_of, mask=groups, other=float("inf"))
        shared = tl.load(delta + place_of, mask=groups, other=0.0)
        dy = _load_groups(gradient, image, out, member, column3, rows * columns, met, G, SHARE, LAST)
        alpha = tl.exp(z3 - top)
        of_value += alpha[None, :, :] * dy
        of_last = alpha * (agreement - shared)
        of1 = _back_to_first(
            of_last, z1, z2, gamma, slopes, met, column1, column2, column3, LAYERS, SLOPES, D, O1, O2, O3, MODE
        )[0]
        if has_pairs(RELATION):
            of_pairs = _passed(product(tl.trans(weight), of1, MODE), pairs, scale, shift, NORM)
            of_pairs = _scaled(of_pairs, scale, NORM)
            if SLOPES:
                of_pairs += _statistics(pairs, slopes, D, PAIRS, column, met, R)
            if RELATION == "subtraction":
                of_pairs = -of_pairs
            if RELATION == "hadamard":
                of_pairs *= q
            of_key += of_pairs
        if has_extras(RELATION, POSITION):
            of_extras = product(tl.trans(extra_weight), of1, MODE)
            of_extras = _scaled(_passed(of_extras, extras, extra_scale, extra_shift, NORM), extra_scale, NORM)
            if SLOPES:
                of_extras += _statistics(extras, slopes, D, EXTRA, extra, met, EXTRA_WIDTH)
            of_seen += of_extras
            if RELATION == "dot":
                of_key += _top_row(of_extras) * q
    tl.store(key_gradient + lane[None, :] * R + column[:, None], of_key, mask=mask[None, :] & (column < R)[:, None])
    channel = member[:, None] * G + column3[None, :]
    present = mask[None, None, :] & (member < SHARE)[:, None, None] & (column3 < G)[None, :, None]
    tl.store(value_gradient + lane[None, None, :] * (G * SHARE) + channel[:, :, None], of_value, mask=present)
    if POSITION != "none":
        axis = extra - seen_at(RELATION, POSITION)
        of_seen = -of_seen if POSITION == "relative" else of_seen
        present = mask[None, :] & ((axis >= 0) & (axis < 2))[:, None]
        tl.store(position_gradient + lane[None, :] * 2 + axis[:, None], of_seen, mask=present)


@triton.jit(do_not_specialize=["height", "width"])
def position_map(weight, bias, output, height, width, BLOCK: tl.constexpr):
    """Position [2, H, W] of every pixel in float32: weight [2, 2] · (x, y) + bias, coordinates from −1 to 1."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (pixel % width).to(tl.float32) * (2.0 / tl.maximum(width - 1, 1)) - 1.0
    y = (pixel // width).to(tl.float32) * (2.0 / tl.maximum(height - 1, 1)) - 1.0
    for axis in tl.static_range(2):
        along, across = tl.load(weight + 2 * axis).to(tl.float32), tl.load(weight + 2 * axis + 1).to(tl.float32)
        p = along * x + across * y
        if bias is not None:
            p += tl.load(bias + axis).to(tl.float32)
        tl.store(output + axis * height * width + pixel, p, mask=pixel < height * width)

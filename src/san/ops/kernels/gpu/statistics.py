"""BatchNorm's arithmetic on vectors as Triton kernels, a launch each: as PyTorch's operators these are ten or more.

Legend: N samples, D channels of a BatchNorm, T parts of the samples.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["back_norm", "fold_norm", "merge_moments", "move_averages", "row_moments"]


@triton.jit(do_not_specialize=["width"])
def fold_norm(
    mean,
    variance,
    weight,
    bias,
    statistics,
    affine,
    width,
    EPS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale and shift `affine` [2, D], float32, such that BatchNorm(x) = scale · x + shift, in double precision inside.

    From `statistics` [3, D], float64: mean, squared deviations, count; or with running averages `mean` and `variance`,
    which are then written there with a count of 1. weight and bias [D] may be None. Channel c · PLACES + place goes to
    place · D/PLACES + c.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = channel < width
    if mean is not None:
        centre = tl.load(mean + channel, mask=present, other=0.0).to(tl.float64)
        spread = tl.load(variance + channel, mask=present, other=1.0).to(tl.float64)
        tl.store(statistics + channel, centre, mask=present)
        tl.store(statistics + width + channel, spread, mask=present)
        tl.store(statistics + 2 * width + channel, tl.full([BLOCK], 1.0, tl.float64), mask=present)
    else:
        centre = tl.load(statistics + channel, mask=present, other=0.0)
        count = tl.load(statistics + 2 * width + channel, mask=present, other=1.0)
        # Without samples there is nothing to divide.
        spread = tl.load(statistics + width + channel, mask=present, other=1.0) / tl.maximum(count, 1.0)
    scale = 1.0 / tl.sqrt(spread + EPS)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=present, other=0.0).to(tl.float64)
    shift = -centre * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=present, other=0.0).to(tl.float64)
    to = channel % PLACES * (width // PLACES) + channel // PLACES
    tl.store(affine + to, scale.to(tl.float32), mask=present)
    tl.store(affine + width + to, shift.to(tl.float32), mask=present)


@triton.jit(do_not_specialize=["total", "tiles"])
def row_moments(x, moments, total, tiles, C: tl.constexpr, LANES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and squared deviations of every channel over this program's `tiles` tiles of rows of x [N, C]:
    [programs, 2, C]."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, deviation = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    before = 0.0
    for tile in range(tl.program_id(1) * tiles, tl.program_id(1) * tiles + tiles):
        lane = tl.cast(tile, tl.int64) * LANES + tl.arange(0, LANES)
        mask = lane < total
        present = mask[:, None] & (channel < C)[None, :]
        seen = tl.load(x + lane[:, None] * C + channel[None, :], mask=present, other=0.0).to(tl.float32)
        count = tl.sum(mask.to(tl.float32), 0)
        centre = tl.sum(seen, 0) / tl.maximum(count, 1.0)
        distance = tl.where(mask[:, None], seen - centre[None, :], 0.0)
        away, share = centre - mean, count / tl.maximum(before + count, 1.0)
        mean += away * share
        deviation += tl.sum(distance * distance, 0) + away * away * before * share
        before += count
    to = moments + tl.program_id(1).to(tl.int64) * (2 * C) + channel
    tl.store(to, mean, mask=channel < C)
    tl.store(to + C, deviation, mask=channel < C)


@triton.jit
def _samples(part, parts, total, share, SAMPLES: tl.constexpr):
    """How many samples parts of `share` pixels each have, of `total` pixels, in float64."""
    left = total - part.to(tl.int64) * share
    pixels = tl.where(part < parts, tl.minimum(tl.maximum(left, 0), share), 0)
    return pixels.to(tl.float64) * SAMPLES


@triton.jit(do_not_specialize=["many", "width", "total", "share", "chunk"])
def merge_moments(
    parts,
    output,
    many,
    width,
    total,
    share,
    chunk,
    SAMPLES: tl.constexpr,
    PLACES: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and squared deviations [programs, 2, D] of the union of `chunk` of `many` parts [T, 2, D], in float64.

    FINAL: of all, as statistics [3, D], count last, where channel place · D/PLACES + c goes to c · PLACES + place.

    A part has `share` of all `total` pixels, the last one fewer, and SAMPLES samples a pixel. Formula: see
    `san.ops.normalization.merge_moments`.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present, first = channel < width, tl.program_id(1) * chunk
    count, sum = tl.zeros([1], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunk, BLOCK_T):
        part = first + start + tl.arange(0, BLOCK_T)
        weight = _samples(part, many, total, share, SAMPLES)
        mask = (part < many)[:, None] & present[None, :]
        pointers = parts + part.to(tl.int64)[:, None] * (2 * width) + channel[None, :]
        sum += tl.sum(weight[:, None] * tl.load(pointers, mask=mask, other=0.0).to(tl.float64), 0)
        count += tl.sum(weight, 0)
    mean, deviation = sum / tl.maximum(count, 1.0), tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunk, BLOCK_T):
        part = first + start + tl.arange(0, BLOCK_T)
        weight = _samples(part, many, total, share, SAMPLES)
        mask = (part < many)[:, None] & present[None, :]
        pointers = parts + part.to(tl.int64)[:, None] * (2 * width) + channel[None, :]
        away = tl.load(pointers, mask=mask, other=0.0).to(tl.float64) - mean[None, :]
        own = tl.load(pointers + width, mask=mask, other=0.0).to(tl.float64)
        deviation += tl.sum(own + weight[:, None] * away * away, 0)
    to = output + tl.program_id(1).to(tl.int64) * (2 * width) + channel
    if FINAL:
        each = width // PLACES
        to = output + channel % each * PLACES + channel // each
        tl.store(to + 2 * width, tl.zeros([BLOCK], tl.float64) + count, mask=present)
    tl.store(to, mean, mask=present)
    tl.store(to + width, deviation, mask=present)


@triton.jit(do_not_specialize=["width", "momentum"])
def move_averages(statistics, mean, variance, width, momentum, BLOCK: tl.constexpr):
    """Move running averages by `momentum` towards statistics [3, D], unless these have no samples."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = channel < width
    count = tl.load(statistics + 2 * width + channel, mask=present, other=0.0)
    step = tl.where(count > 0, momentum, 0.0)
    unbiased = tl.load(statistics + width + channel, mask=present, other=0.0) / tl.maximum(count - 1, 1.0)
    old = tl.load(mean + channel, mask=present, other=0.0).to(tl.float64)
    new = old + step * (tl.load(statistics + channel, mask=present, other=0.0) - old)
    # By way of float32, from which alone the interpreter makes bfloat16.
    tl.store(mean + channel, new.to(tl.float32).to(mean.dtype.element_ty), mask=present)
    old = tl.load(variance + channel, mask=present, other=0.0).to(tl.float64)
    new = old + step * (unbiased - old)
    tl.store(variance + channel, new.to(tl.float32).to(variance.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["width"])
def back_norm(
    statistics,
    weight,
    own,
    everyone,
    gradients,
    slopes,
    width,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Back from gradients at scale and shift, of this process (`own` [2, D]) and summed over all, in float64.

    `gradients` [2, D], float64: of BatchNorm's weight and bias; `slopes` [2, D], float32: every sample x gets slope · x
    + intercept, with BATCH statistics; channel c · PLACES + place lies at place · D/PLACES + c.
    """
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = channel < width
    mean = tl.load(statistics + channel, mask=present, other=0.0)
    count = tl.maximum(tl.load(statistics + 2 * width + channel, mask=present, other=1.0), 1.0)
    inverse = 1.0 / tl.sqrt(tl.load(statistics + width + channel, mask=present, other=1.0) / count + EPS)
    of_shift = tl.load(own + width + channel, mask=present, other=0.0)
    of_scale = tl.load(own + channel, mask=present, other=0.0)
    tl.store(gradients + channel, inverse * (of_scale - mean * of_shift), mask=present)
    tl.store(gradients + width + channel, of_shift, mask=present)
    slope, intercept = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    if BATCH:
        of_shift = tl.load(everyone + width + channel, mask=present, other=0.0)
        of_scale = tl.load(everyone + channel, mask=present, other=0.0)
        factor = inverse / count
        if weight is not None:
            factor *= tl.load(weight + channel, mask=present, other=0.0).to(tl.float64)
        slope = -factor * inverse * inverse * (of_scale - mean * of_shift)
        intercept = -factor * of_shift - slope * mean
    to = channel % PLACES * (width // PLACES) + channel // PLACES
    tl.store(slopes + to, slope.to(tl.float32), mask=present)
    tl.store(slopes + width + to, intercept.to(tl.float32), mask=present)

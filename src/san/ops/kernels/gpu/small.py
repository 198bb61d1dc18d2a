"""What attention needs beside its maps, a launch each: as PyTorch's operators these are ten launches or more.

Legend: D channels of a BatchNorm, H W map.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fold_norm", "position_map"]


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

"""Geometry of the footprint R(i), the k×k window around an output pixel, and its border rule.

The only place that knows index arithmetic. A `Footprint` is the rule; a `Window` applies it to a run of output rows of
one map, so that the same formulas run on a whole map or band by band.
Legend: B batch, C channels, K = k·k places (row-major), H W input map, P output pixels (row-major).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from san.errors import UserError

__all__ = ["BORDERS", "Footprint", "Window", "coordinates"]

BORDERS = ("reflect", "zeros")


@dataclass(frozen=True)
class Footprint:
    """The k×k window around every output pixel.

    `stride` s puts the centres at input pixels 0, s, 2s, …; `dilation` d spaces the places; padding is d·(k−1)//2, so
    the output has ⌈H/s⌉ × ⌈W/s⌉ pixels. `border` says what lies outside the map: "reflect" mirrors it without repeating
    the edge, as often as the window needs (a map of one pixel repeats that pixel); "zeros" puts zeros there.

    Source: paper §3. Departure: the authors' operators mirror only maps larger than the padding, and their patchwise
    form ignores dilation when padding.

    Raises `UserError` for an even or non-positive kernel size, a stride or dilation below 1, an unknown border.
    """

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    border: str = "reflect"

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            if not isinstance(getattr(self, name), int):
                raise UserError(f"{name} is {getattr(self, name)!r}, but it must be one integer for both sides")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {self.kernel_size}, but it must be odd and at least 1")
        if self.stride < 1 or self.dilation < 1:
            raise UserError(f"stride is {self.stride} and dilation {self.dilation}, but both must be at least 1")
        if self.border not in BORDERS:
            raise UserError(f"border {self.border!r} is unknown; choose one of: {', '.join(BORDERS)}")

    @property
    def places(self) -> int:
        """K, the number of places in one footprint."""
        return self.kernel_size**2

    @property
    def padding(self) -> int:
        """How far a footprint reaches beyond its centre, in input pixels."""
        return self.dilation * (self.kernel_size - 1) // 2

    def numbers(self) -> list[int]:
        """Kernel size, stride, dilation, and 1 for zeros or 0 for reflection: what kernels are told."""
        return [self.kernel_size, self.stride, self.dilation, int(self.border == "zeros")]

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> Footprint:
        """The reverse of `numbers`."""
        size, stride, dilation, zeros = numbers
        return cls(size, stride, dilation, "zeros" if zeros else "reflect")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input map of `height` × `width`."""
        return (height + self.stride - 1) // self.stride, (width + self.stride - 1) // self.stride

    def window(self, height: int, width: int) -> Window:
        """The window onto a whole map of `height` × `width`."""
        return Window(self, height, width, 0, self.output_size(height, width)[0], 0, height)

    def band(self, height: int, width: int, row: int, row_stop: int) -> Window:
        """The window onto output rows [row, row_stop), reading only the input rows that they need."""
        lowest, highest = row * self.stride - self.padding, (row_stop - 1) * self.stride + self.padding
        if self.border == "reflect":
            read = [_reflected(index, height) for index in range(lowest, highest + 1)]
            first, stop = min(read), max(read) + 1
        else:
            first, stop = max(lowest, 0), min(highest + 1, height)
        return Window(self, height, width, row, row_stop, first, stop)


@dataclass(frozen=True)
class Window:
    """Output rows [row, row_stop) of a map, and the input rows [first, stop) that they read.

    `centre` and `gather` take those input rows only: `x[:, :, window.first : window.stop]`.
    """

    footprint: Footprint
    height: int
    width: int
    row: int
    row_stop: int
    first: int
    stop: int

    def centre(self, x: Tensor) -> Tensor:
        """Values at the centres of the footprints: [B, C, stop − first, W] → [B, C, 1, P]."""
        stride, start = self.footprint.stride, self.row * self.footprint.stride - self.first
        rows = (self.row_stop - 1 - self.row) * stride + 1
        return x[:, :, start : start + rows : stride, ::stride].flatten(2).unsqueeze(2)

    def gather(self, x: Tensor) -> Tensor:
        """Values at every place of every footprint: [B, C, stop − first, W] → [B, C, K, P]."""
        rule = self.footprint
        columns = F.unfold(self._bordered(x), rule.kernel_size, rule.dilation, stride=rule.stride)
        return columns.unflatten(1, (x.shape[1], rule.places))

    def _bordered(self, x: Tensor) -> Tensor:
        rule, padding = self.footprint, self.footprint.padding
        top, bottom = self.row * rule.stride - padding, (self.row_stop - 1) * rule.stride + padding + 1
        right = (rule.output_size(self.height, self.width)[1] - 1) * rule.stride + padding + 1
        if rule.border == "zeros":
            return F.pad(x, [padding, right - self.width, self.first - top, bottom - self.stop])
        rows = _reflected_range(top, bottom, self.height, x.device) - self.first
        columns = _reflected_range(-padding, right, self.width, x.device)
        return x.index_select(2, rows).index_select(3, columns)


def coordinates(height: int, width: int, *, like: Tensor) -> Tensor:
    """Pixel coordinates in [−1, 1], x first: [1, 2, H, W], in dtype and on device of `like`; −1 along a side of one."""
    # Not torch.linspace, which would make the sizes constants of a traced graph.
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) * (2 / max(n - 1, 1)) - 1 for n in (height, width))
    return torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width)]).unsqueeze(0)


def _reflected(index: int, size: int) -> int:
    """Fold an index into [0, size) by a triangle wave of period 2(size − 1)."""
    period = max(2 * (size - 1), 1)
    return min(index % period, period - index % period)


def _reflected_range(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """`_reflected` for every index in [start, stop)."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, stop, device=device) % period
    return torch.minimum(index, period - index)

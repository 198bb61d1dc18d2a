"""What the call of every Triton kernel has: pixels that look, the footprint, and the map whose pixels are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from san.ops.footprint import Footprint
from san.ops.kernels.gpu import launch
from san.ops.kernels.gpu.launch import Bordered, floats, programs

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Sizes of a call on `map` [B, C, H, W]; `geometry` is the footprint as `Footprint.numbers` gives it."""

    map: Tensor
    geometry: list[int]

    @cached_property
    def footprint(self) -> Footprint:
        return Footprint.from_numbers(self.geometry)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the pixels that look."""
        return self.footprint.output_size(*self.map.shape[2:])

    @property
    def total(self) -> int:
        """Pixels that look, in all images."""
        return self.map.shape[0] * self.size[0] * self.size[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """As kernels take them."""
        return self.total, *self.map.shape[2:], *self.size

    @property
    def most_lanes(self) -> int:
        """Pixels of a program on a GPU."""
        return 64

    def lanes(self, total: int | None = None) -> int:
        """Pixels of a program, of `total` or all that look."""
        return launch.lanes(self.total if total is None else total, self.most_lanes)

    def launch_bordered(self, kernel: Any, *arguments: Any, **constants: Any) -> Tensor:
        """Start a kernel over all pixels that are looked at; gives their gradient as a map like `map`."""
        border = Bordered(self.footprint, *self.map.shape[2:])
        batch, channels, pixels = len(self.map), self.map.shape[1], border.tall * border.wide
        found = floats(self.map, batch, pixels, channels)
        if total := batch * pixels:
            sizes = (total, *self.sizes[1:], border.tall, border.wide, border.origin)
            constants |= {"LANES": self.lanes(total)}
            launch.start(kernel, (programs(total, constants["LANES"]),), *arguments, found, *sizes, **constants)
        return border.back(found, self.map)

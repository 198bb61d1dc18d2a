"""Geometry against a plain loop over pixels, for any map, footprint, border and band."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from san.errors import UserError
from san.ops.footprint import BORDERS, Footprint, coordinates

sizes = st.integers(1, 9)
footprints = st.builds(
    Footprint,
    kernel_size=st.sampled_from([1, 3, 5, 7, 9, 11]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    border=st.sampled_from(BORDERS),
)


def mirrored(index: int, size: int) -> int:
    """Walk from the edge step by step, turning round at either end."""
    position, direction = 0, 1
    for _ in range(abs(index)):
        if size == 1:
            return 0
        if not 0 <= position + direction < size:
            direction = -direction
        position += direction
    return position


def value_at(x: torch.Tensor, row: int, column: int, border: str) -> torch.Tensor:
    height, width = x.shape[1:]
    if 0 <= row < height and 0 <= column < width:
        return x[:, row, column]
    if border == "zeros":
        return torch.zeros_like(x[:, 0, 0])
    return x[:, mirrored(row, height), mirrored(column, width)]


def gathered(x: torch.Tensor, rule: Footprint) -> torch.Tensor:
    """[C, H, W] → [C, K, P], one place at a time."""
    rows, columns = rule.output_size(*x.shape[1:])
    offsets = range(-(rule.kernel_size // 2), rule.kernel_size // 2 + 1)
    pixels = [
        torch.stack(
            [
                value_at(x, i * rule.stride + a * rule.dilation, j * rule.stride + b * rule.dilation, rule.border)
                for a in offsets
                for b in offsets
            ],
            dim=1,
        )
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(pixels, dim=2)


@given(footprints, sizes, sizes)
def test_gather_equals_a_loop_over_pixels(rule: Footprint, height: int, width: int) -> None:
    x = torch.arange(2.0 * height * width).view(2, height, width) + 1
    window = rule.window(height, width)
    assert torch.equal(window.gather(x[None])[0], gathered(x, rule))


@given(footprints, sizes, sizes, st.data())
def test_a_band_is_the_rows_of_the_whole(rule: Footprint, height: int, width: int, data: st.DataObject) -> None:
    x = torch.arange(2.0 * height * width).view(1, 2, height, width) + 1
    rows, columns = rule.output_size(height, width)
    row = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(row + 1, rows))
    band, whole = rule.band(height, width, row, stop), rule.window(height, width)
    part = x[:, :, band.first : band.stop]
    pixels = slice(row * columns, stop * columns)
    assert torch.equal(band.gather(part), whole.gather(x)[..., pixels])
    assert torch.equal(band.centre(part), whole.centre(x)[..., pixels])


def test_stride_one_keeps_the_size() -> None:
    assert Footprint(7).output_size(5, 8) == (5, 8)
    assert Footprint(7, stride=2).output_size(5, 8) == (3, 4)


@pytest.mark.parametrize("border", BORDERS)
def test_gather_is_differentiable_twice(border: str) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    window = Footprint(5, border=border).window(3, 4)
    assert torch.autograd.gradgradcheck(lambda x: window.gather(x).square(), x)


def test_coordinates_run_from_minus_one_to_one_x_first() -> None:
    plane = coordinates(2, 3, like=torch.empty(0))
    assert plane.tolist() == [[[[-1, 0, 1], [-1, 0, 1]], [[-1, -1, -1], [1, 1, 1]]]]
    assert coordinates(1, 1, like=torch.empty(0)).flatten().tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel_size": 4}, "kernel_size is 4, but it must be odd"),
        ({"kernel_size": (3, 3)}, "kernel_size is .3, 3., but it must be one integer"),
        ({"kernel_size": -1}, "kernel_size is -1, but it must be odd"),
        ({"kernel_size": 3, "stride": 0}, "stride is 0"),
        ({"kernel_size": 3, "dilation": 0}, "dilation 0"),
        ({"kernel_size": 3, "border": "wrap"}, "choose one of: reflect, zeros"),
    ],
)
def test_bad_footprints_are_named(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Footprint(**options)

"""Products joined to what surrounds them on GPUs, in Triton's interpreter, against the modules that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from san.ops.kernels.gpu import launch
from san.ops.kernels.pointwise.native import Linear, Norm
from san.ops.kernels.pointwise.triton import folded, products, runs

pytestmark = pytest.mark.skipif(not launch.interpreting() or not launch.installed(), reason="needs Triton, interpreted")

# What remains after a sum of rounded terms, of the largest number around.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def _map(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def _norm(channels: int, *, affine: bool = True, eps: float = 1e-5) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=eps, affine=affine).eval()
    with torch.no_grad():
        for name, x in norm.state_dict().items():
            if name != "num_batches_tracked":
                x.uniform_(0.2, 1.5)
        if affine:
            norm.weight[::2] *= -1
    return norm


def _plain(
    x: Tensor, norm: nn.BatchNorm2d, linears: list[nn.Conv2d], stem: nn.Conv2d | None, pooled: bool
) -> list[Tensor]:
    y = F.relu(norm(x if stem is None else stem(x)))
    y = F.max_pool2d(y, 2) if pooled else y
    return [linear(y) for linear in linears]


def _fused(
    x: Tensor, norm: Any, linears: list[nn.Conv2d], stem: nn.Conv2d | None, pooled: bool, **options: Any
) -> list[Tensor]:
    tensors = Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    options = {"stem": None if stem is None else stem.weight.flatten(1), "pooled": pooled, **options}
    return products(x, [Linear(each.weight, each.bias) for each in linears], folded(tensors), x.dtype, **options)


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    allowed = TOLERANCES[found.dtype] * max(float(exact.abs().max()), 1.0)
    assert float((found.double() - exact.double()).abs().max()) <= allowed


@torch.no_grad()
@settings(max_examples=25)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(
    batch=st.integers(1, 3),
    sides=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    channels=st.integers(1, 40),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    image=st.integers(0, 4),
    pooled=st.booleans(),
    last=st.booleans(),
    affine=st.booleans(),
    biased=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_products_are_their_modules(
    dtype: torch.dtype,
    batch: int,
    sides: tuple[int, int],
    channels: int,
    widths: list[int],
    image: int,
    pooled: bool,
    last: bool,
    affine: bool,
    biased: list[bool],
) -> None:
    norm = _norm(channels, affine=affine)
    linears = [nn.Conv2d(channels, width, 1, bias=bias) for width, bias in zip(widths, biased, strict=False)]
    stem = nn.Conv2d(image, channels, 1, bias=False) if image else None
    x = torch.randn(batch, image or channels, *sides).to(dtype)
    # Images may lie as they like, maps have their channels last.
    x = x.contiguous(memory_format=torch.channels_last if last or not image else torch.contiguous_format)
    exact = _plain(x.float(), norm, linears, stem, pooled)
    for found, expected in zip(_fused(x, norm, linears, stem, pooled), exact, strict=True):
        assert_near(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_is_added(dtype: torch.dtype) -> None:
    """In its own dtype, if that is wider: as autocast wants it."""
    norm, linear = _norm(24), nn.Conv2d(24, 40, 1)
    x, residual = _map(2, 24, 5, 7).to(dtype), _map(2, 40, 5, 7)
    (exact,) = _plain(x.float(), norm, [linear], None, False)
    for added in (residual, residual.to(dtype)):
        (found,) = _fused(x, norm, [linear], None, False, residual=added)
        assert found.dtype == added.dtype
        assert_near(found.to(dtype), exact + added.float())


@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True])
def test_many_programs_do_what_one_does(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of pixels, of channels that enter and of those that leave."""
    monkeypatch.setattr(launch, "lanes", lambda total, most: 16)
    norm, linears = _norm(150), [nn.Conv2d(150, width, 1) for width in (50, 120, 3)]
    x = _map(3, 150, 6, 9)
    for found, exact in zip(
        _fused(x, norm, linears, None, pooled), _plain(x, norm, linears, None, pooled), strict=True
    ):
        assert_near(found, exact)


@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True])
def test_nan_goes_through(pooled: bool) -> None:
    norm, linear = _norm(20), nn.Conv2d(20, 16, 1)
    x = _map(1, 20, 4, 4)
    x[0, 3, 1, 1] = float("nan")
    (found,), (exact,) = (each(x, norm, [linear], None, pooled) for each in (_fused, _plain))
    assert torch.equal(found.isnan(), exact.isnan())


def test_what_the_kernel_does_not_take() -> None:
    x = torch.empty(2, 3, 8, 8)
    assert runs(x, [64, 128], torch.float32)
    assert not runs(x.double(), [64], torch.float64)
    # The image is small enough, but not what the stem makes of it.
    large = torch.empty(1, 1, 1, 1).expand(1, 3, 1 << 13, 1 << 13)
    assert runs(large, [16], torch.float32)
    assert not runs(large, [64], torch.float32)


def test_float32_is_left_to_convolutions_where_they_may_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "map_refusal", lambda x: None)
    x, switch = torch.empty(2, 3, 8, 8), torch.backends.cudnn.conv
    with torch.backends.cudnn.flags(enabled=True):
        before = switch.fp32_precision
        for precision in ("tf32", "ieee"):
            switch.fp32_precision = precision
            assert runs(x, [64], torch.float32) == (precision == "tf32")
            assert runs(x, [64], torch.bfloat16)
        switch.fp32_precision = before

"""The C++ kernels that train what surrounds attention, against PyTorch's float64 autograd.

Legend: B batch, C channels, O output channels, K channels of the stem's image, H W map.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from san.ops.kernels.native import library, operators
from san.ops.kernels.pointwise.native import Linear, products

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not installed")

MODES = pytest.mark.parametrize("mode", ["norm", "plain", "stem"])
POOLED = pytest.mark.parametrize("pooled", [False, True], ids=["whole", "pooled"])
SHAPES = pytest.mark.parametrize(
    ("batch", "channels", "given", "size"),
    [(4, 5, (3,), (7, 7)), (3, 100, (4, 4, 16), (9, 13)), (2, 64, (32, 32, 128), (28, 28)), (1, 16, (24,), (56, 56))],
)
BOUND = 3e-6
MUCH = 1 << 40  # work for all threads


class Call(NamedTuple):
    """One product, or several of one input. Values are small multiples of 1/8, so that all agree on what is largest."""

    input: Tensor
    scale: Tensor | None
    shift: Tensor | None
    stem: Tensor | None
    weights: list[Tensor]
    output_gradients: list[Tensor]
    pooled: bool


def build(mode: str, pooled: bool, batch: int, channels: int, given: tuple[int, ...], size: tuple[int, int]) -> Call:
    generator = torch.Generator().manual_seed(channels)

    def eighths(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(8).round() / 8

    height, width = (n // 2 for n in size) if pooled else size
    return Call(
        input=eighths(batch, 3 if mode == "stem" else channels, *size),
        scale=eighths(channels) if mode == "norm" else None,
        shift=None if mode == "plain" else eighths(channels),
        stem=eighths(channels, 3) if mode == "stem" else None,
        weights=[torch.randn(o, channels, generator=generator) for o in given],
        output_gradients=[torch.randn(batch, o, height, width, generator=generator) for o in given],
        pooled=pooled,
    )


def found(c: Call) -> list[Tensor]:
    """The kernel's gradients of weights, biases and input, and its two sums; each starts as NaN."""
    channels = c.weights[0].shape[1]
    weights = [torch.full_like(w, torch.nan) for w in c.weights]
    biases = [torch.full((len(w),), torch.nan) for w in c.weights]
    gradient = torch.full_like(c.input, torch.nan)
    sums = torch.full((channels,), torch.nan, dtype=torch.float64)
    products = torch.full((channels, 1 if c.stem is None else 3), torch.nan, dtype=torch.float64)
    tensors = (c.weights, c.output_gradients, weights, biases)
    operators.call(
        "pointwise_backward",
        *(c.input.shape[0], channels, *c.input.shape[2:], int(c.pooled), 0 if c.stem is None else 3),
        *operators.addresses(c.input, c.scale, c.shift, c.stem),
        *(*map(len, c.weights), *[0] * (3 - len(c.weights))),
        *(a for each in tensors for a in operators.addresses(*each, room=3)),
        *operators.addresses(gradient, sums, products),
        work=MUCH,
    )
    return [*weights, *biases, gradient, sums, products]


def expected(c: Call) -> list[Tensor]:
    x = c.input.double().requires_grad_()
    weights = [w.double().requires_grad_() for w in c.weights]
    biases = [torch.zeros(len(w), dtype=torch.float64, requires_grad=True) for w in c.weights]
    y = x if c.stem is None else torch.einsum("ck,bkhw->bchw", c.stem.double(), x)
    if c.scale is not None:
        y = y * c.scale.double().view(-1, 1, 1)
    y = y + (0 if c.shift is None else c.shift.double().view(-1, 1, 1))
    a = y if c.shift is None else y.relu()
    a = functional.max_pool2d(a, 2) if c.pooled else a
    pairs = zip(weights, biases, c.output_gradients, strict=True)
    loss = sum((functional.conv2d(a, w[:, :, None, None], b) * dz.double()).sum() for w, b, dz in pairs)
    *parameters, at_image, g = torch.autograd.grad(loss, [*weights, *biases, x, y])
    products = ((g * x).sum((0, 2, 3))[:, None] if c.stem is None else torch.einsum("bchw,bkhw->ck", g, x)).detach()
    return [*parameters, g if c.stem is None else at_image, g.sum((0, 2, 3)), products]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@MODES
@POOLED
@SHAPES
@pytest.mark.usefixtures("restored_threads")
def test_gradients_are_autograds_and_no_thread_changes_a_bit(mode, pooled, batch, channels, given, size):
    call = build(mode, pooled, batch, channels, given, size)
    torch.set_num_threads(1)
    results = found(call)
    for got, want in zip(results, expected(call), strict=True):
        assert (got - want).abs().max() <= BOUND * want.abs().max()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(results, found(call), strict=True))


def moments(kernel: str, x: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    mean = torch.full(x.shape[1:2], torch.nan, dtype=torch.float64)
    deviation = torch.full(shape, torch.nan, dtype=torch.float64)
    operators.call(kernel, *x.shape, *operators.addresses(x, mean, deviation), work=MUCH)
    return mean, deviation


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("shape", [(3, 3, 49), (70, 3, 49), (2, 3, 117), (2, 3, 12544)], ids=str)
def test_moments_keep_their_digits_however_large_the_mean(shape, offset):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    mean = x.double().mean((0, 2))
    centred = x.double() - mean[:, None]
    codeviation = torch.einsum("bip,bjp->ij", centred, centred)
    by_channel = moments("channel_moments", x, 3)
    by_pixel = moments("image_moments", x, 3, 3)
    for found_mean in (by_channel[0], by_pixel[0]):
        torch.testing.assert_close(found_mean, mean, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(by_channel[1], codeviation.diag(), rtol=1e-6, atol=0)
    torch.testing.assert_close(by_pixel[1], codeviation, rtol=1e-6, atol=1e-6 * codeviation.max().item())


@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_input_gradient(with_residual):
    generator = torch.Generator().manual_seed(0)
    g, x, r = torch.randn(3, 2, 5, 49, generator=generator)
    a, b, c = torch.randn(3, 5, generator=generator)
    residual = r if with_residual else None
    want = a[:, None] * g.double() + b[:, None] * x + c[:, None] + (r if with_residual else 0)
    operators.call("norm_input_gradient", *x.shape, *operators.addresses(g, x, a, b, c, residual), work=MUCH)
    torch.testing.assert_close(g.double(), want, rtol=1e-6, atol=1e-6)


def test_pooling_hands_on_what_max_pooling_does() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, 1.0, torch.nan], [2.0, 3.0, torch.inf, 4.0]]).expand(1, 1, 2, 4)
    (y,) = products(x.contiguous(), [Linear(torch.ones(1, 1), None)], pooled=True)
    torch.testing.assert_close(y, functional.max_pool2d(x, 2), equal_nan=True)

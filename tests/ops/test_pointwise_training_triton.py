"""Training kernels of GPUs around the attention, in Triton's interpreter, against the modules that they stand for.

The modules run in float64, on numbers that float32 or half precision has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.test_pointwise_portable import CHANGED, FORMS, Products, Stem, _frozen, _prepared, _random, outcome
from torch import Tensor

from san.ops.kernels.gpu import launch
from san.ops.kernels.pointwise_training import triton, triton_stem

pytestmark = pytest.mark.skipif(not launch.interpreting() or not launch.installed(), reason="needs Triton, interpreted")


class JoinedProducts(Products):
    node = staticmethod(triton.norm_products)


class JoinedStem(Stem):
    node = staticmethod(triton_stem.stem)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _map(*shape: int, seed: int = 0) -> Tensor:
    return _last(_random(*shape, seed=seed).float())


def assert_near(module: Any, inputs: list[Tensor], tolerance: float = 1e-5, dtype: torch.dtype = torch.float32) -> None:
    """By the largest numbers: some gradients are zero but for rounding."""
    module, inputs = module.to(dtype), [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
    found = outcome(module, True, inputs, dtype)
    expected = outcome(copy.deepcopy(module), False, inputs)
    assert found.keys() == expected.keys()
    largest = max(float(x.abs().max()) for name, x in expected.items() if name.startswith("d"))
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        error = float((found[name].double() - x.double()).norm())
        assert error <= tolerance * max(float(x.double().norm()), largest, 1.0), (name, error)


@CHANGED
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_the_modules(form: dict[str, bool], change: Callable[[Any], Any]) -> None:
    module = _prepared(JoinedProducts(**form))
    change(module)
    for wanted in (True, False):
        inputs = [_map(2, 6, 5, 7).requires_grad_(wanted), _map(2, 4, 5, 7).requires_grad_()]
        assert_near(module, inputs)


@pytest.mark.parametrize(
    "frozen", [("convolutions.0",), ("convolutions", "norm"), ("convolutions.1", "convolutions.2")]
)
def test_frozen_products_get_no_gradients(frozen: tuple[str, ...]) -> None:
    module = _prepared(JoinedProducts())
    _frozen(*frozen)(module)
    assert_near(module, [_map(2, 6, 5, 7).requires_grad_(), _map(2, 4, 5, 7)])


@CHANGED
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("pooled", [True, False])
def test_stem_is_the_modules(pooled: bool, last: bool, change: Callable[[Any], Any]) -> None:
    module = _prepared(JoinedStem(pooled))
    change(module)
    image = _random(3, 3, 5, 7).float() + 2
    assert_near(module, [_last(image) if last else image])


@pytest.mark.parametrize("frozen", [("convolution",), ("behind",), ("convolution", "norm")])
def test_frozen_stem_gets_no_gradients(frozen: tuple[str, ...]) -> None:
    module = _prepared(JoinedStem())
    _frozen(*frozen)(module)
    assert_near(module, [_map(3, 3, 6, 4)])


# Triton's interpreter cuts off what it should round to bfloat16.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_is_near(training: bool, dtype: torch.dtype, tolerance: float) -> None:
    maps = [_map(2, 6, 8, 8).requires_grad_(), _map(2, 4, 8, 8).requires_grad_()]
    assert_near(_prepared(JoinedProducts(residual=True)).train(training), maps, tolerance, dtype)
    assert_near(_prepared(JoinedStem()).train(training), [_map(2, 3, 8, 8) + 1], tolerance, dtype)


@pytest.mark.parametrize("pooled", [True, False])
def test_autocast_decides_the_products_dtype(pooled: bool) -> None:
    for module, inputs in (
        (JoinedProducts(pooled), [_map(2, 6, 8, 8).requires_grad_()] * 2),
        (JoinedStem(pooled), [_map(2, 3, 8, 8)]),
    ):
        module = _prepared(module).float()
        with torch.autocast("cpu", torch.float16):
            found, plain = module.joined(*inputs), module(*inputs)
        assert [y.dtype for y in found] == [y.dtype for y in plain]
        tensors = [*(x for x in inputs[:1] if x.requires_grad), *module.parameters()]
        cotangents = [_random(*y.shape).to(y) for y in found]
        gradients = [torch.autograd.grad(outputs, tensors, cotangents) for outputs in (found, plain)]
        for one, other in zip(*gradients, strict=True):
            assert one.dtype is other.dtype
            assert float((one - other).norm()) <= 0.01 * max(float(other.norm()), 1.0)


@pytest.mark.parametrize("pooled", [True, False])
def test_many_programs_do_what_one_does(pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of pixels and of channels, shared out among few programs, and sums that meet afterwards."""
    monkeypatch.setattr(launch, "lanes", lambda total, most: 16)
    monkeypatch.setattr(launch, "_PROGRAMS", 6)
    monkeypatch.setattr(triton, "PROGRAMS", 6)
    products = JoinedProducts(pooled)
    products.norm = torch.nn.BatchNorm2d(150)
    products.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(150, width, 1) for width in (70, 3, 80))
    x = _map(3, 150, 5, 6).requires_grad_()
    assert_near(products, [x, x])
    assert_near(_prepared(JoinedStem(pooled)), [_map(3, 3, 8, 8)])


def test_the_first_of_equal_pixels_wins() -> None:
    """As in PyTorch's pooling: whole windows of one value."""
    x = _last(torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 4, 4) / 3 + 0.5).requires_grad_()
    module = _prepared(JoinedProducts(pooled=True)).eval()
    with torch.no_grad():
        module.norm.weight.abs_()
    assert_near(module, [x, x])


def test_changed_weights_are_noticed_in_backward() -> None:
    module, x = _prepared(JoinedProducts()).float(), _map(2, 6, 4, 4).requires_grad_()
    y = module.joined(x, x)[0]
    with torch.no_grad():
        module.convolutions[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_value_per_channel_has_no_statistics() -> None:
    x, before = _map(1, 6, 1, 1), _prepared(JoinedProducts()).float()
    module = copy.deepcopy(before)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module.joined(x, x)
    assert all(torch.equal(one, other) for one, other in zip(module.buffers(), before.buffers(), strict=True))


def test_two_runs_give_the_same_bits() -> None:
    for module, inputs in (
        (JoinedProducts(pooled=True), [_map(2, 6, 8, 8).requires_grad_()] * 2),
        (JoinedStem(), [_map(2, 3, 8, 8)]),
    ):
        module = _prepared(module).float()
        first, second = (outcome(module, True, inputs, torch.float32) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

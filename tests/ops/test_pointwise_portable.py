"""Joined BatchNorm, ReLU, pooling and products against the modules that they stand for, on the CPU.

In float64 both compute the same but for the last bits, in output, gradients, running averages and what is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from san.ops.kernels.pointwise.native import Linear
from san.ops.kernels.pointwise_training import portable_stem
from san.ops.kernels.pointwise_training.portable import norm_products
from san.ops.kernels.pointwise_training.portable_stem import stem
from san.ops.normalization import BatchNorm


class Products(nn.Module):
    """BatchNorm, ReLU, pooling if `pooled`, and products; the first takes a residual with as many channels as it."""

    node = staticmethod(norm_products)

    def __init__(self, pooled: bool = False, residual: bool = False, biased: bool = True) -> None:
        super().__init__()
        self.pooled, self.residual = pooled, residual
        self.norm = nn.BatchNorm2d(6)
        self.convolutions = nn.ModuleList(nn.Conv2d(6, width, 1, bias=biased) for width in (4, 3, 5))

    def forward(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        y = F.relu(self.norm(x))
        y = F.max_pool2d(y, 2) if self.pooled else y
        found = [convolution(y) for convolution in self.convolutions]
        return [residual + found[0] if self.residual else found[0], *found[1:], 3 * x]

    def joined(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        linears = [Linear(layer.weight, layer.bias) for layer in self.convolutions]
        options: Any = {"pooled": self.pooled, "residual": residual if self.residual else None, "passes": True}
        *found, x = self.node(x, BatchNorm.of(self.norm), linears, **options)
        return [*found, 3 * x]


class Stem(nn.Module):
    """A product, BatchNorm, ReLU, pooling if `pooled`, and a product."""

    node = staticmethod(stem)

    def __init__(self, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.convolution, self.norm = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.behind = nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = F.relu(self.norm(self.convolution(x)))
        return [self.behind(F.max_pool2d(y, 2) if self.pooled else y)]

    def joined(self, x: Tensor) -> list[Tensor]:
        norm = BatchNorm.of(self.norm)
        return [self.node(x, self.convolution.weight, norm, self.behind.weight, pooled=self.pooled)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _prepared(module: Any) -> Any:
    """In float64, with a BatchNorm that is not its first values."""
    norm = module.norm
    with torch.no_grad():
        for place, x in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            x.copy_(_random(6, seed=place).abs() + 0.2)
    return module.double()


def outcome(module: Any, joined: bool, inputs: list[Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after a step of a copy."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
    outputs = (module.joined if joined else module)(*inputs)
    reached = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(reached, [_random(*y.shape).to(y) for y in reached])
    found = {f"y{place}": y.detach() for place, y in enumerate(outputs)}
    found |= {f"dx{place}": x.grad for place, x in enumerate(inputs) if x.grad is not None}
    found |= {f"d {name}": each.grad for name, each in module.named_parameters() if each.grad is not None}
    return found | dict(module.named_buffers())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """By norms; a gradient is zero in exact arithmetic where it is a billionth of the largest."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        error = float((found[name].double() - x.double()).norm())
        assert error <= tolerance * max(float(x.double().norm()), 1.0), (name, error)


def _norm(**values: Any) -> Callable[[Any], None]:
    return lambda module: vars(module.norm).update(values)


def _without_averages(module: Any) -> None:
    norm = module.norm
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None


def _without_affine(module: Any) -> None:
    module.norm.affine, module.norm.weight, module.norm.bias = False, None, None


def _frozen(*paths: str) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        for path in paths:
            module.get_submodule(path).requires_grad_(False)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda module: None,
    "fixed statistics": lambda module: module.eval(),
    "averages over all batches": _norm(momentum=None),
    "other momentum": _norm(momentum=0.3),
    "large eps": _norm(eps=0.1),
    "averages not moved": _norm(track_running_stats=False),
    "no averages": _without_averages,
    "not affine": _without_affine,
    "frozen norm": _frozen("norm"),
    "frozen bias of norm": lambda module: module.norm.bias.requires_grad_(False),
    "frozen norm, fixed": lambda module: module.eval().norm.requires_grad_(False),
}
CHANGED = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
FORMS = [
    {},
    {"pooled": True},
    {"residual": True, "biased": False},
]


@CHANGED
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_the_modules(form: dict[str, bool], change: Callable[[Any], Any]) -> None:
    module = _prepared(Products(**form))
    change(module)
    for wanted in (True, False):
        inputs = [_random(2, 6, 5, 7).requires_grad_(wanted), _random(2, 4, 5, 7).requires_grad_()]
        assert_close(outcome(module, True, inputs), outcome(module, False, inputs), 1e-12)


@pytest.mark.parametrize(
    "frozen", [("convolutions.0",), ("convolutions", "norm"), ("convolutions.1", "convolutions.2")]
)
def test_frozen_products_get_no_gradients(frozen: tuple[str, ...]) -> None:
    module = _prepared(Products())
    _frozen(*frozen)(module)
    inputs = [_random(2, 6, 5, 7).requires_grad_(), _random(2, 4, 5, 7)]
    assert_close(outcome(module, True, inputs), outcome(module, False, inputs), 1e-12)


@CHANGED
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("images", [8, 1])
def test_stem_is_the_modules(
    images: int, pooled: bool, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole and image by image; a gradient of the image only where statistics are fixed."""
    monkeypatch.setattr(portable_stem, "_SHARE", images * 6 * 35)
    module = _prepared(Stem(pooled))
    change(module)
    inputs = [(_random(3, 3, 5, 7) + 2).requires_grad_(not BatchNorm.of(module.norm).uses_batch)]
    assert_close(outcome(module, True, inputs), outcome(module, False, inputs), 1e-11)


@pytest.mark.parametrize("frozen", [("convolution",), ("behind",), ("convolution", "norm")])
def test_frozen_stem_gets_no_gradients(frozen: tuple[str, ...]) -> None:
    module = _prepared(Stem())
    _frozen(*frozen)(module)
    inputs = [_random(3, 3, 6, 4)]
    assert_close(outcome(module, True, inputs), outcome(module, False, inputs), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("training", [True, False])
def test_narrow_dtypes_are_near(training: bool, dtype: torch.dtype, tolerance: float) -> None:
    residual = _random(2, 4, 8, 8).to(dtype).requires_grad_()
    for module, inputs in (
        (Products(residual=True), [_random(2, 6, 8, 8).to(dtype).requires_grad_(), residual]),
        (Stem(), [_random(2, 3, 8, 8).to(dtype) + 1]),
    ):
        rounded = _prepared(module).to(dtype).train(training)
        found = outcome(rounded, True, inputs, dtype)
        assert all(x.dtype is dtype for name, x in found.items() if "tracked" not in name)
        assert_close(found, outcome(rounded, False, inputs), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooled", [True, False])
def test_autocast_decides_the_products_dtype(pooled: bool, dtype: torch.dtype) -> None:
    """Of maps in both dtypes; what autocast keeps of weights stays usable, and gradients have the parameters' dtype."""
    module, x = _prepared(Products(pooled)).float(), _random(2, 6, 8, 8).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = module.joined(x, x), module(x, x)
    assert [y.dtype for y in found] == [y.dtype for y in plain]
    gradients = []
    for outputs in (found, plain):
        tensors = [x, *module.parameters()]
        gradients.append(torch.autograd.grad(outputs, tensors, [_random(*y.shape).to(y) for y in outputs]))
    for one, other in zip(*gradients, strict=True):
        assert one.dtype is other.dtype
        assert float((one - other).norm()) <= 0.02 * max(float(other.norm()), 1.0)


def test_autocast_of_a_stem() -> None:
    module, image = _prepared(Stem()).float(), _random(2, 3, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        (found,), (plain,) = module.joined(image), module(image)
    assert found.dtype is plain.dtype is torch.bfloat16
    assert torch.linalg.norm((found - plain).detach().float()) <= 0.02 * torch.linalg.norm(plain.detach().float())
    found.float().square().sum().backward()
    assert all(each.grad.dtype is torch.float32 for each in module.parameters())


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_memory_format_is_kept(format: torch.memory_format, pooled: bool) -> None:
    x = _random(2, 6, 8, 8).contiguous(memory_format=format).requires_grad_()
    outputs = _prepared(Products(pooled)).joined(x, x)
    (of_x,) = torch.autograd.grad(outputs, x, [y.detach() for y in outputs])
    image = _random(2, 3, 8, 8).contiguous(memory_format=format)
    assert all(y.is_contiguous(memory_format=format) for y in [*outputs, of_x, *_prepared(Stem(pooled)).joined(image)])


def test_one_value_per_channel_has_no_statistics() -> None:
    x = _random(1, 6, 1, 1)
    before = _prepared(Products())
    module = copy.deepcopy(before)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module.joined(x, x)
    assert all(torch.equal(one, other) for one, other in zip(module.buffers(), before.buffers(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_numbers(training: bool) -> None:
    """On tensors without any: so a CUDA graph may record a step, and the processor runs ahead of the device."""
    images = torch.empty(4, 3, 8, 8, device="meta", requires_grad=not training)
    x = torch.empty(2, 6, 8, 8, device="meta", requires_grad=True)
    for module, inputs in ((Products(pooled=True), [x, x]), (Stem(), [images])):
        module = module.to("meta").train(training)
        outputs = module.joined(*inputs)
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
        assert all(each.grad is not None for each in module.parameters())


def test_changed_weights_are_noticed_in_backward() -> None:
    module, x = _prepared(Products()), _random(2, 6, 4, 4).requires_grad_()
    y = module.joined(x, x)[0]
    with torch.no_grad():
        module.convolutions[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_biases_may_change_before_backward() -> None:
    """As a convolution's may: no gradient depends on them."""
    module, x = _prepared(Products(residual=True)), _random(2, 6, 5, 7).requires_grad_()
    gradients = []
    for outputs in (module.joined, module):
        found = outputs(x, x[:, :4])
        with torch.no_grad():
            for layer in module.convolutions:
                layer.bias.add_(1)
        gradients.append(torch.autograd.grad(found, [x, *module.parameters()], [_random(*y.shape) for y in found]))
    torch.testing.assert_close(*gradients)

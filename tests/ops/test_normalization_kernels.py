"""The C++ kernels of BatchNorm on vectors of its channels, against PyTorch's float64 autograd and its own BatchNorm.

Legend: N samples, C channels, K channels before a Linear.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from san import ops
from san.ops.cases import CASES
from san.ops.kernels.native import library, operators
from san.ops.kernels.normalization.native import Samples, fold, fold_backward
from san.ops.kernels.pointwise.native import Linear
from san.ops.normalization import BatchNorm

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not installed")

settings.register_profile("kernels", deadline=None, max_examples=50)
settings.load_profile("kernels")


def layer_of(channels: int, **options: Any) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, **options)
    for x in (layer.weight, layer.bias, layer.running_mean):
        if x is not None:
            nn.init.normal_(x)
    if layer.running_var is not None:
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def samples_of(x: Tensor, *, square: bool) -> Samples:
    """Of x [N, C]."""
    centred = x - x.mean(0)
    return Samples(len(x), x.mean(0), centred.T @ centred if square else centred.square().sum(0))


CALLS = given(
    seed=st.integers(0, 1000),
    count=st.integers(2, 60),
    channels=st.integers(1, 9),
    columns=st.integers(0, 7),
    biased=st.booleans(),
    affine=st.booleans(),
    training=st.booleans(),
)


@CALLS
def test_folding_is_normalising_and_so_are_its_gradients(
    seed: int, count: int, channels: int, columns: int, biased: bool, affine: bool, training: bool
) -> None:
    """Σ g · BatchNorm(W x + b) over all samples x, with and without W, from samples and from running averages."""
    torch.manual_seed(seed)
    layer = layer_of(channels, affine=affine).train(training)
    x = (3 * torch.randn(count, columns or channels, dtype=torch.float64) + 5).requires_grad_()
    linear = Linear(torch.randn(channels, columns), torch.randn(channels) if biased else None) if columns else None
    g = torch.randn(count, channels, dtype=torch.float64)

    norm = BatchNorm.of(layer)
    samples = samples_of(x.detach(), square=bool(columns)) if training else None
    wide = nn.BatchNorm2d(channels, affine=affine).double().train(training)
    wide.load_state_dict(layer.state_dict())
    found = fold(norm, samples, linear)
    parameters = [p.double().requires_grad_() for p in linear or () if p is not None]
    y = nn.functional.linear(x, *parameters) if columns else x
    z = wide(y[:, :, None, None])[:, :, 0, 0]
    z.backward(g)

    scale, shift = (part.double() for part in found.affine)
    folded = x @ scale.T + shift if columns else x * scale + shift
    torch.testing.assert_close(folded, z, rtol=1e-5, atol=1e-5 * float(scale.abs().max() + 1) * 50)
    for ours, theirs in zip(layer.buffers(), wide.buffers(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)

    plain = x.detach()
    back = fold_backward(norm, found, (g.T @ plain if columns else (g * plain).sum(0)).contiguous(), g.sum(0), linear)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    if affine:
        torch.testing.assert_close(back.weight.double(), wide.weight.grad, **tolerance)
        torch.testing.assert_close(back.bias.double(), wide.bias.grad, **tolerance)
    for ours, theirs in zip((p for p in back.linear or () if p is not None), parameters, strict=True):
        torch.testing.assert_close(ours.double(), theirs.grad, **tolerance)
    of_x = g @ (scale if columns else scale.diag())
    if back.slope is not None and back.intercept is not None:
        of_x = of_x + plain @ (back.slope if columns else back.slope.diag()) + back.intercept
    assert (back.slope is None) == (not training)
    torch.testing.assert_close(of_x, x.grad, **tolerance)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("tracks", [True, False])
def test_running_averages_move_as_pytorch_moves_them(momentum: float | None, tracks: bool) -> None:
    layer = layer_of(3, momentum=momentum, track_running_stats=tracks)
    expected = nn.BatchNorm2d(3, momentum=momentum, track_running_stats=tracks)
    expected.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = torch.randn(20, 3)
        expected(x[:, :, None, None])
        fold(BatchNorm.of(layer), samples_of(x.double(), square=False))
    for ours, theirs in zip(layer.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autograd_learns_that_running_averages_moved() -> None:
    layer = layer_of(3)
    y = layer.running_mean * torch.ones(3, requires_grad=True)
    fold(BatchNorm.of(layer), samples_of(torch.randn(20, 3).double(), square=False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_sample_has_no_variance() -> None:
    with pytest.raises(ValueError, match="more than one value per channel"):
        fold(BatchNorm.of(layer_of(3)), samples_of(torch.randn(1, 3).double(), square=False))


def test_channels_that_do_not_vary_give_finite_results() -> None:
    """Rounding makes W C Wᵀ negative; no variance is."""
    linear = Linear(torch.tensor([[1.0, -1.0]]), None)
    deviation = torch.tensor([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]], dtype=torch.float64) * 1e9
    found = fold(BatchNorm.of(layer_of(1)), Samples(10, torch.zeros(2, dtype=torch.float64), deviation), linear)
    assert all(part.isfinite().all() for part in found.affine)


FOLD = ("normalization_fold", 7 + 2 + 7)
BACKWARD = ("normalization_backward", 7 + 1 + 1 + 11)


@pytest.mark.parametrize(("kernel", "count"), [FOLD, BACKWARD], ids=lambda x: x)
@pytest.mark.parametrize("sizes", [(0, 0, 5), (-1, 0, 5), (3, -1, 5), (3, 0, -1), (2**41, 0, 5), (2**30, 2**30, 5)])
@pytest.mark.parametrize("wide", [False, True])
def test_kernels_refuse_sizes_that_cannot_be(kernel: str, count: int, sizes: tuple[int, ...], wide: bool) -> None:
    room = torch.zeros(10_000, dtype=torch.float64)
    arguments = [*(2**62 if wide and x > 2**30 else x for x in sizes), *[room.data_ptr()] * (count - 4)]
    with pytest.raises(ValueError, match="sizes"):
        operators.call(kernel, *arguments)


def nodes(function: Any) -> list[str]:
    """Names of the functions of autograd behind one."""
    before = [each for each, _ in function.next_functions if each is not None]
    return [function.name(), *(name for each in before for name in nodes(each))]


@pytest.mark.parametrize("mapping", ["L", "LRL", "LRLRL"])
@pytest.mark.parametrize("form", ["pairwise-subtraction", "patchwise-concatenation", "patchwise-star"])
@pytest.mark.parametrize("training", [True, False])
def test_one_function_of_autograd_gives_what_the_operators_give(
    form: str, mapping: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, gradients and running averages; the operators are what tracers see."""
    name = next(name for name in CASES if name.startswith(form))
    case = replace(CASES[name], mapping=mapping, training=training, height=9, width=8)
    found = []
    for eager in (True, False):
        if not eager:
            monkeypatch.setattr(operators, "runs_eagerly", lambda *tensors: False)
        problem = case.build(torch.float32)
        with ops.use_backend("native"):
            y = getattr(ops, problem.operator)(*problem.arguments, **problem.options)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(y, list(problem.tensors.values()), cotangent)
        found.append([y, *gradients, *problem.running.values()])
        assert any("_Attention" in node or "Layer" in node for node in nodes(y.grad_fn)) == eager
    largest = max(float(x.detach().abs().max()) for x in found[0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)

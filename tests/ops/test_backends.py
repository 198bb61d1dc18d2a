"""One suite for all backends: every case, dtype and memory format, outputs and every gradient against float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from san import ops
from san.ops import dispatch, tiled
from san.ops.cases import CASES, Case, Problem
from san.ops.kernels.gpu import launch

BACKENDS = [name for name in ops.backends() if name != "reference"]
HALF_CASES = [name for name in CASES if not name.endswith(("k1", "k11-dilated", "batch1", "stride3", "one-group"))]
CASES_BY_DTYPE = {
    torch.float64: list(CASES),
    torch.float32: list(CASES),
    torch.bfloat16: HALF_CASES,
    torch.float16: HALF_CASES[::4],
}
PROBLEMS = [
    pytest.param(CASES[name], dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for dtype, names in CASES_BY_DTYPE.items()
    for name in names
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every case has several."""
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 1000)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh allocations hold NaN, so that a result which is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(problem: Problem, backend: str) -> Tensor:
    with ops.use_backend(backend):
        return getattr(ops, problem.operator)(*problem.arguments, **problem.options)


def evaluate(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Output, every gradient for a random cotangent, and the running averages after the call, in float64."""
    y = call(problem, backend)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    gradients = torch.autograd.grad(y, list(problem.tensors.values()), cotangent)
    named = {f"d{name}": gradient for name, gradient in zip(problem.tensors, gradients, strict=True)}
    return {key: x.detach().double() for key, x in {"y": y, **named, **problem.running}.items()}


# Triton's interpreter takes seconds a case: all run once in float32, most in half precision, and a few repeatedly.
SLOW_INTERPRETED = ("wide", "k5-narrow", "k7-one-pixel", "k7-two-by-three", "k9-zeros", "k11-dilated", "stride3")


REPEATED_INTERPRETED = ("pairwise-subtraction-LRL-relative", "patchwise-concatenation-LRL", "aggregation")


def skip_if_slow(case: Case, backend: str, *, repeated: bool = False) -> None:
    if backend != "triton" or not launch.interpreting():
        return
    if case.name.endswith(SLOW_INTERPRETED) or (repeated and case.name not in REPEATED_INTERPRETED):
        pytest.skip("interpreting this case takes too long for more than one test of it")


def skip_unless_supported(problem: Problem, backend: str) -> None:
    request = ops.make_call(problem.operator, *problem.arguments, **problem.options)
    refusal = dispatch.answers(problem.operator, request)[backend]
    if refusal is not None:
        pytest.skip(refusal)


def distances(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {key: float((found[key] - exact[key]).abs().max()) if exact[key].numel() else 0.0 for key in exact}


def exact_problem(case: Case, dtype: torch.dtype) -> Problem:
    """The problem of `dtype` with its rounded values carried over to float64."""
    rounded, problem = case.build(dtype), case.build(torch.float64)
    with torch.no_grad():
        for name, x in problem.tensors.items():
            x.copy_(rounded.tensors[name])
    return problem


def rounding_noise(case: Case, dtype: torch.dtype, exact: dict[str, Tensor], unit: float) -> dict[str, float]:
    """How far the reference itself strays in this dtype when its inputs change by one unit in the last place.

    It measures the magnitude of the terms behind each number, where the number itself may cancel to zero. A `unit` of
    half precision is that of operands: the reference then computes in float64, and its inputs alone stray.
    """
    half = unit > torch.finfo(torch.float32).eps
    worst = dict.fromkeys(exact, 0.0)
    for seed in range(3):
        problem = exact_problem(case, dtype) if half else case.build(dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for x in problem.tensors.values():
                x.mul_(1 + unit * (2 * torch.rand(x.shape, generator=generator) - 1).to(x.dtype))
        strayed = distances(evaluate(problem, "reference"), exact)
        worst = {key: max(worst[key], strayed[key]) for key in exact}
    return worst


@pytest.mark.parametrize(("case", "dtype"), PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_the_float64_reference(backend: str, case: Case, dtype: torch.dtype) -> None:
    """The error stays within a few times the noise of rounding and the dtype's resolution.

    Where terms cancel exactly even under noise, the yardstick is one rounding of the largest number around. Rounding is
    float32's or finer, but for the operands of γ's products on tensor cores, which are of the maps' dtype.
    """
    problem = case.build(dtype)
    skip_unless_supported(problem, backend)
    if dtype != torch.float32:
        skip_if_slow(case, backend)
    exact = evaluate(exact_problem(case, dtype), "reference")
    unit, wide = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    noise = {key: 16 * each for key, each in rounding_noise(case, dtype, exact, wide).items()}
    if backend == "triton" and wide < unit:
        # Not only inputs are rounded but what enters each of up to three products, forward and backward.
        noise = {key: noise[key] + 4 * each for key, each in rounding_noise(case, dtype, exact, unit).items()}
        wide = unit
    found = distances(evaluate(problem, backend), exact)
    largest = {key: float(x.abs().max()) if x.numel() else 0.0 for key, x in exact.items()}
    for key, error in found.items():
        assert error <= noise[key] + 2 * unit * largest[key] + wide * max(largest.values()), key


@pytest.mark.parametrize(("case", "dtype"), [p for p in PROBLEMS if p.values[1] != torch.float64])
def test_reference_rounds_no_more_than_its_dtype(case: Case, dtype: torch.dtype) -> None:
    """Sums are taken in float32: the error is one rounding to the dtype, and some of float32's, whatever K is."""
    exact = evaluate(exact_problem(case, dtype), "reference")["y"]
    found = evaluate(case.build(dtype), "reference")["y"]
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(
        found, exact, rtol=torch.finfo(dtype).eps, atol=64 * torch.finfo(torch.float32).eps * largest
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ops.backends())
def test_gradients_equal_finite_differences(backend: str, case: Case) -> None:
    """Float64 finite differences of every tensor, running averages frozen out of the way."""
    problem = case.build(torch.float64)
    skip_unless_supported(problem, backend)
    names = [name for name, x in problem.tensors.items() if x.numel()]
    if not names:
        assert call(problem, backend).shape[0] == 0
        return

    def operator(*_: Tensor) -> Tensor:
        return call(problem, backend)

    tensors = [problem.tensors[name] for name in names]
    assert torch.autograd.gradcheck(operator, tensors, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ops.backends())
def test_memory_format_changes_nothing(backend: str, case: Case) -> None:
    skip_if_slow(case, backend, repeated=True)
    skip_unless_supported(case.build(torch.float32), backend)
    contiguous = evaluate(case.build(torch.float32), backend)
    channels_last = evaluate(case.build(torch.float32, channels_last=True), backend)
    largest = max((float(x.abs().max()) for x in contiguous.values() if x.numel()), default=0.0)
    for key, x in contiguous.items():
        torch.testing.assert_close(channels_last[key], x, rtol=1e-4, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ops.backends())
def test_two_runs_are_bit_identical(backend: str, case: Case) -> None:
    skip_if_slow(case, backend, repeated=True)
    skip_unless_supported(case.build(torch.float32), backend)
    first, second = (evaluate(case.build(torch.float32), backend) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


BOTH_FORMS = pytest.mark.parametrize(
    "case",
    [CASES["pairwise-subtraction-LRL-relative"], CASES["patchwise-concatenation-LRL"]],
    ids=lambda case: case.name,
)


def bytes_kept(problem: Problem, backend: str) -> int:
    """Storages that autograd keeps between forward and backward."""
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = call(problem, backend)
    assert y.requires_grad
    return sum(seen.values())


@BOTH_FORMS
def test_tiled_keeps_maps_only(case: Case) -> None:
    """What tiled keeps for backward is the maps and little else, whatever the footprint; the reference keeps pairs."""
    kept = {}
    for kernel_size in (3, 11):
        problem = replace(case, kernel_size=kernel_size, height=24, width=24, mapping="LRL").build(torch.float32)
        maps = sum(problem.tensors[name].nbytes for name in ("query", "key", "value"))
        parameters = sum(x.nbytes for name, x in problem.tensors.items() if "." in name)
        kept[kernel_size] = bytes_kept(problem, "tiled")
        # Position's map is one more, a fraction of a query; tile moments are vectors.
        assert kept[kernel_size] <= 1.25 * maps + 8 * parameters
        assert bytes_kept(problem, "reference") > 3 * kept[kernel_size]


@BOTH_FORMS
def test_tiled_lets_go_of_the_maps_after_backward(case: Case) -> None:
    problem = replace(case, height=24, width=24).build(torch.float32)
    query, key, value, mapping = problem.arguments
    maps = [x * 1 for x in (query, key, value)]
    alive = [weakref.ref(x) for x in maps]
    with ops.use_backend("tiled"):
        y = getattr(ops, case.operator)(*maps, mapping, **problem.options)
    y.sum().backward()
    del maps
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert y.grad_fn is not None


@BOTH_FORMS
def test_tiled_leaves_transforms_to_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.func and forward mode work on maps of any size."""
    monkeypatch.setattr(tiled, "TRAINING_ELEMENTS", 0)
    problem = replace(case, training=False).build()
    query, key, value, mapping = (x.detach() if isinstance(x, Tensor) else x for x in problem.arguments)

    def attend(value: Tensor) -> Tensor:
        return getattr(ops, case.operator)(query, key, value, mapping, **problem.options)

    # The output is linear in the value, so the derivative along v is the output for v.
    _, tangent = torch.func.jvp(attend, (value,), (value,))
    torch.testing.assert_close(tangent, attend(value))
    gradient = torch.func.grad(lambda v: attend(v).sum())(value)
    torch.testing.assert_close((gradient * value).sum(), attend(value).sum())


@pytest.mark.parametrize("backend", ops.backends())
@BOTH_FORMS
def test_a_whole_call_in_half_precision_sums_in_float32(case: Case, backend: str) -> None:
    """γ and position in bfloat16 as well, as in `model.bfloat16()`: only storage is rounded."""
    if backend == "triton":
        pytest.skip("products take their operands in the maps' precision")
    case = replace(case, height=40, width=40)
    rounded = case.build(torch.bfloat16, parameters=torch.bfloat16)
    skip_unless_supported(rounded, backend)
    problem = case.build(torch.float64, parameters=torch.float64)
    with torch.no_grad():
        for name, x in problem.tensors.items():
            x.copy_(rounded.tensors[name])
    exact, found = evaluate(problem, "reference"), evaluate(rounded, backend)
    for key, x in exact.items():
        if key not in rounded.running:
            assert (found[key] - x).norm() <= 0.01 * x.norm() + 1e-3 * exact["y"].norm(), key

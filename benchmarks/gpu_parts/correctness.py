"""Every operator against the float64 reference on the same device: output, every gradient, running averages.

The yardstick is that of `tests/ops/test_backends.py`: how far the reference itself strays when its inputs change by one
unit in the last place, in float32 and, for half precision, in float64 by units of the operands of γ's products; and one
rounding of the largest number around. Among millions of pairs some lie within rounding of ReLU's kink, and one that
falls on the other side moves a few gradients by a whole term: of a map of more than 10,000 numbers, one in 10,000 may
leave the tolerance, though not by more than the largest number there. Fresh memory holds NaN, so that what is never
written shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from san import ops
from san.ops.cases import Case, Problem

__all__ = ["check", "evaluate", "is_full_size"]

_ONE_IN = 10_000


def is_full_size(case: Case) -> bool:
    """Whether it is a layer of SAN10, whose maps lie channels-last as in networks."""
    return case.name.startswith("san10")


def check(case: Case, dtype: str, device: str) -> dict[str, Any]:
    """One case on the Triton backend: `right`, the number furthest out and its error as a share of the tolerance."""
    start, number = time.perf_counter(), getattr(torch, dtype)
    with _without_tf32():
        exact = evaluate(_exact_problem(case, number, device), "reference")
        allowed = _tolerances(case, number, device, exact)
        with _poisoned():
            found = evaluate(_build(case, number, device), "triton")
    shares = {key: _furthest(found[key], exact[key], allowed[key], gradient=key.startswith("d")) for key in exact}
    worst = max(shares, key=lambda key: shares[key])
    return {
        "case": case.name,
        "dtype": dtype,
        "right": all(share <= 1 for share in shares.values()),
        "worst": worst,
        # None is not finite, for which JSON has no word.
        "error_of_tolerance": shares[worst] if math.isfinite(shares[worst]) else None,
        "beyond": sum(int(_beyond(found[key], exact[key], allowed[key]).sum()) for key in exact),
        "numbers": sum(x.numel() for x in exact.values()),
        "seconds": time.perf_counter() - start,
    }


def evaluate(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Output, every gradient for a random cotangent, and running averages after the call, in float64."""
    with ops.use_backend(backend):
        y = getattr(ops, problem.operator)(*problem.arguments, **problem.options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
    gradients = torch.autograd.grad(y, list(problem.tensors.values()), cotangent)
    named = {f"d{name}": gradient for name, gradient in zip(problem.tensors, gradients, strict=True)}
    return {key: x.detach().double() for key, x in {"y": y, **named, **problem.running}.items()}


def _build(case: Case, dtype: torch.dtype, device: str) -> Problem:
    return case.build(dtype, device, channels_last=is_full_size(case))


def _exact_problem(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """The problem of `dtype` with its rounded values carried over to float64."""
    rounded, problem = _build(case, dtype, device), _build(case, torch.float64, device)
    with torch.no_grad():
        for name, x in problem.tensors.items():
            x.copy_(rounded.tensors[name])
    return problem


def _tolerances(case: Case, dtype: torch.dtype, device: str, exact: dict[str, Tensor]) -> dict[str, float]:
    unit, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    noise = {key: 16 * each for key, each in _noise(case, dtype, device, exact, wide).items()}
    if unit > wide:
        # Not only inputs are rounded but what enters each of up to three products, forward and backward.
        noise = {key: noise[key] + 4 * each for key, each in _noise(case, dtype, device, exact, unit).items()}
    largest = {key: _largest(x) for key, x in exact.items()}
    return {key: noise[key] + 2 * unit * largest[key] + unit * max(largest.values()) for key in exact}


def _noise(case: Case, dtype: torch.dtype, device: str, exact: dict[str, Tensor], unit: float) -> dict[str, float]:
    """How far the reference strays when its inputs change by `unit`; beyond float32's, it computes in float64."""
    half = unit > torch.finfo(torch.float32).eps
    worst = dict.fromkeys(exact, 0.0)
    for seed in range(3):
        problem = _exact_problem(case, dtype, device) if half else _build(case, dtype, device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for x in problem.tensors.values():
                factor = 1 + unit * (2 * torch.rand(x.shape, generator=generator) - 1)
                x.mul_(factor.to(x.device, x.dtype))
        strayed = evaluate(problem, "reference")
        worst = {key: max(worst[key], _largest(strayed[key] - exact[key])) for key in exact}
    return worst


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _beyond(found: Tensor, exact: Tensor, allowed: float) -> Tensor:
    # The negation also catches NaN.
    return ~((found - exact).abs() <= allowed)


def _furthest(found: Tensor, exact: Tensor, allowed: float, *, gradient: bool) -> float:
    """The largest error as a share of the tolerance, less what may lie beyond; infinite where something is NaN."""
    if not exact.numel():
        return 0.0
    error = (found - exact).abs().flatten()
    if not bool(error.isfinite().all()):
        return float("inf")
    spared = exact.numel() // _ONE_IN if gradient else 0
    if spared and float(error.max()) <= max(_largest(exact), allowed):
        error = error.sort().values[: error.numel() - spared]
    largest = float(error.max())
    # Where nothing but zeros is around, nothing else is right.
    return largest / allowed if allowed else (float("inf") if largest else 0.0)


@contextmanager
def _without_tf32() -> Generator[None]:
    """PyTorch rounds what convolutions take to TF32 by default, and the yardstick of float32 would be as coarse."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@contextmanager
def _poisoned() -> Generator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

"""The attention layers of SAN10: the Triton kernels against the plain form, eager and compiled, on the same maps.

"inference" is the forward pass with running averages, "training" forward with the batch's statistics and backward to
query, key, value and all parameters. Maps are channels-last in one dtype, γ and position in float32, as autocast hands
them over. The plain form is the reference, which widens maps to float32 and multiplies in TF32, as PyTorch lets
convolutions do. A batch's images repeat a few, since values do not matter here and drawing them takes time.
Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import Rates, floor
from benchmarks.gpu_parts.clock import Step, Timing, free, peak, timed
from benchmarks.gpu_parts.scale import Scale
from san import ops
from san.ops.cases import Case, Problem

__all__ = ["FORMS", "PASSES", "measure", "step", "warm"]

PASSES = ("inference", "training")
# Backend, and whether torch.compile gets it.
FORMS = {"triton": ("triton", False), "eager": ("reference", False), "compiled": ("reference", True)}
_DRAWN = 4


def step(case: Case, batch: int, what: str, form: str, dtype: torch.dtype, device: str) -> Step:
    """One pass of a layer in a form of `FORMS`, the same work on the same memory every time."""
    backend, compiles = FORMS[form]
    problem = replace(case, batch=min(batch, _DRAWN), training=what == "training").build(
        dtype, device, channels_last=True
    )
    maps = [_repeated(x, batch) for x in problem.arguments[:3]]
    attend = _operator(problem)
    if compiles:
        torch.compiler.reset()
        attend = torch.compile(attend, dynamic=False, fullgraph=True)
    parameters = [x for name, x in problem.tensors.items() if name not in ("query", "key", "value")]
    cotangent = torch.ones_like(maps[2]).detach()

    def infer() -> Tensor:
        with torch.no_grad(), ops.use_backend(backend):
            return attend(*maps)

    def train() -> tuple[Tensor, ...]:
        with ops.use_backend(backend):
            return torch.autograd.grad(attend(*maps), [*maps, *parameters], cotangent)

    return infer if what == "inference" else train


def _operator(problem: Problem) -> Callable[..., Tensor]:
    operator, mapping, options = getattr(ops, problem.operator), problem.arguments[3], problem.options

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return operator(query, key, value, mapping, **options)

    return attend


def _repeated(x: Tensor, batch: int) -> Tensor:
    """[b, …] as [B, …], images over and over."""
    times = -(-batch // len(x))
    y = x.detach().repeat(times, 1, 1, 1)[:batch]
    return y.contiguous(memory_format=torch.channels_last).requires_grad_()


def measure(
    case: Case, batch: int, what: str, form: str, scale: Scale, device: str, rates: Rates, dtype: torch.dtype
) -> dict[str, Any]:
    """A row: time, memory, and for the kernels the distance from the floor and the rates they reach."""
    call = step(case, batch, what, form, dtype, device)
    memory = peak(call, device)
    timing = timed(call, device, seconds=scale.seconds, rounds=scale.rounds)
    del call
    free(device)
    row = {"layer": case.name, "batch": batch, "pass": what, "form": form, "peak_bytes": memory, **asdict(timing)}
    return row | (_distance(replace(case, batch=batch), what, timing, dtype, rates) if form == "triton" else {})


def _distance(case: Case, what: str, timing: Timing, dtype: torch.dtype, rates: Rates) -> dict[str, float]:
    """Shares count what must be done alone; what is recomputed makes the floor higher, not the shares."""
    parts = [floor(case, each, dtype, rates) for each in (["inference"] if what == "inference" else _TRAINING)]
    seconds = timing.seconds
    moved, products = sum(each.bytes for each in parts), sum(each.work.products for each in parts)
    return {
        "floor_seconds": sum(each.seconds for each in parts),
        "recomputing_floor_seconds": sum(each.recomputing_seconds for each in parts),
        "of_floor": seconds / sum(each.seconds for each in parts),
        "of_recomputing_floor": seconds / sum(each.recomputing_seconds for each in parts),
        "bytes_per_second": moved / seconds,
        "flops": 2 * products / seconds,
        "share_of_copy": moved / seconds / rates.bytes,
        "share_of_product": 2 * products / seconds / rates.products,
    }


_TRAINING = ["training", "backward"]


def warm(case: Case, batch: int, what: str, dtype: torch.dtype, device: str) -> None:
    """Have the plain form compiled, so that Inductor's cache on disk knows it."""
    step(case, batch, what, "compiled", dtype, device)()

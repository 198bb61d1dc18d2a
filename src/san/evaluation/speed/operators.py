"""Operators one by one: time against what the machine can do, and growth with the map and the footprint.

The machine's peaks are measured right before each layer: a product of two large float32 matrices for its arithmetic, a
large copy for its memory. Not in the same rounds, where they would empty the caches of whoever comes next. No operator
can be faster than its operations at the one and its least bytes at the other; the longer of the two times is its roof.
Legend: B batch, R relation width, C value channels, K places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from san.errors import UserError
from san.evaluation.speed.attention import AttentionOperator, attention_operators
from san.evaluation.speed.clock import Step, spread, take_turns
from san.evaluation.speed.contestants import build_network
from san.evaluation.speed.machine import native_bytes
from san.evaluation.speed.memory import held_bytes
from san.evaluation.speed.settings import Settings
from san.layers import ATTENTIONS
from san.ops import use_backend

__all__ = ["SWEEP_KERNELS", "SWEEP_SIDES", "measure_operators", "measure_sweep", "peaks"]

SWEEP_SIDES = (64, 128, 256, 512)
SWEEP_KERNELS = (3, 5, 7, 9, 11)
_SWEEP_SIDE, _SWEEP_KERNEL, _SWEEP_RELATION, _SWEEP_CHANNELS = 56, 7, 16, 64
_SWEEP_ROUNDS = 5
_PRODUCT_SIDE = 2048
_COPY_BYTES = 1 << 28
# A backward pass multiplies twice for every product of the forward pass; what it computes anew is not counted.
_TRAINING_FACTOR = 3


@dataclass(frozen=True)
class _Call:
    """One operator on one backend, with its maps: `infer` runs forward alone, `train` forward and backward."""

    operator: AttentionOperator
    backend: str
    maps: list[Tensor]
    gradient: list[Tensor] = field(default_factory=list)

    def infer(self) -> None:
        """Forward, BatchNorm by its running averages."""
        self.operator.layer.eval()
        with torch.inference_mode(), use_backend(self.backend):
            self.operator(*self.maps)

    def forward(self) -> Tensor:
        """Forward, BatchNorm by the batch's statistics, ready for backward."""
        self.operator.layer.train()
        with use_backend(self.backend):
            return self.operator(*(x.requires_grad_() for x in self.maps))

    def train(self) -> None:
        """Forward and backward to query, key, value and the layer's parameters."""
        for x in (*self.maps, *self.operator.layer.parameters()):
            x.grad = None
        y = self.forward()
        # Drawn once: drawing takes time of its own.
        if not self.gradient:
            self.gradient.append(torch.randn_like(y))
        y.backward(self.gradient[0])


def measure_operators(settings: Settings, say: Callable[[str], None], notes: list[str]) -> list[dict[str, Any]]:
    """A row for every different attention layer of the models, by batch, resolution, dtype and backend.

    `gflop` counts 2 operations per multiply-add of γ's products and the aggregation, in training three times as many.
    `share_of_peak` is the rate against the matrix product's. `roof` says whether operations or bytes bound the forward
    pass, and `share_of_roof` how near it is, 1 being the best possible.
    """
    rows: list[dict[str, Any]] = []
    for model, resolution in itertools.product(settings.models, settings.resolutions):
        groups: dict[Any, list[AttentionOperator]] = {}
        for operator in attention_operators(build_network(model), resolution):
            groups.setdefault(operator.shape, []).append(operator)
        for group, batch, dtype in itertools.product(groups.values(), settings.batches, settings.dtypes):
            names = [operator.name for operator in group]
            say(f"{model}: {names[0]}, batch {batch}, {dtype}")
            where = {"network": model, "layers": names, "resolution": resolution}
            rows += [where | row for row in _measure_operator(group[0], batch, dtype, settings, notes)]
    return rows


def _measure_operator(
    operator: AttentionOperator, batch: int, dtype: str, settings: Settings, notes: list[str]
) -> list[dict[str, Any]]:
    operator.layer.to(settings.device)
    number: torch.dtype = getattr(torch, dtype)
    calls = [
        _Call(operator, backend, operator.maps(batch, number, settings.device, channels_last=True))
        for backend in settings.backends
    ]
    calls = [call for call in calls if _runs(call, notes)]
    peak, copy = peaks(settings.device)
    steps: dict[tuple[str, str], Step] = {(call.backend, "infer"): call.infer for call in calls}
    steps |= {(call.backend, "train"): call.train for call in calls}
    times = take_turns(steps, settings.rounds, settings.device)
    rows = []
    for call in calls:
        forward, training = times[call.backend, "infer"], times[call.backend, "train"]
        row = _cost(operator, batch, number) | {"backend": call.backend, "batch": batch, "dtype": dtype}
        row |= {"forward_seconds": forward, "training_seconds": training}
        rows.append(row | _rates(row, peak, copy))
    return rows


def _runs(call: _Call, notes: list[str]) -> bool:
    try:
        call.infer()
        call.train()
    except UserError as problem:
        notes.append(f"{call.operator.name} was left out: {problem}")
        return False
    return True


def _cost(operator: AttentionOperator, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    layer = operator.layer
    return {
        "form": next(name for name, kind in ATTENTIONS.items() if isinstance(layer, kind)),
        "height": operator.height,
        "width": operator.width,
        "kernel_size": layer.footprint.kernel_size,
        "relation_channels": layer.relation_channels,
        "channels": layer.out_channels,
        "gflop": operator.operations(batch) / 1e9,
        "least_bytes": operator.least_bytes(batch, dtype),
    }


def _rates(row: dict[str, Any], peak: float, copy: float) -> dict[str, Any]:
    """Rates of a row against the machine's peak in GFLOP/s and the copy's bytes per second."""
    forward, training = spread(row["forward_seconds"]), spread(row["training_seconds"])
    at_peak, at_copy = row["gflop"] / peak, row["least_bytes"] / copy
    rate, training_rate = row["gflop"] / forward["median"], _TRAINING_FACTOR * row["gflop"] / training["median"]
    return {
        "forward_ms": {name: 1e3 * value for name, value in forward.items()},
        "training_ms": {name: 1e3 * value for name, value in training.items()},
        "gflops": rate,
        "training_gflops": training_rate,
        "peak_gflops": peak,
        "copy_bytes_per_second": copy,
        "share_of_peak": rate / peak,
        "training_share_of_peak": training_rate / peak,
        "roof": "operations" if at_peak > at_copy else "bytes",
        "roof_ms": 1e3 * max(at_peak, at_copy),
        "share_of_roof": max(at_peak, at_copy) / forward["median"],
    }


def peaks(device: str = "cpu", rounds: int = 5) -> tuple[float, float]:
    """GFLOP/s of a product of two 2048×2048 float32 matrices, and bytes per second that a copy of 256 MiB moves."""
    left, right = torch.rand(2, _PRODUCT_SIDE, _PRODUCT_SIDE, device=device)
    # Written once before: the first touch of fresh memory costs more than the copy.
    source, target = torch.zeros(2, _COPY_BYTES // 4, device=device)
    product_step = partial(torch.mm, left, right, out=torch.empty_like(left))
    times = take_turns({"product": product_step, "copy": partial(target.copy_, source)}, rounds, device)
    product, copy = spread(times["product"])["median"], spread(times["copy"])["median"]
    # A copy reads every byte and writes it.
    return 2 * _PRODUCT_SIDE**3 / product / 1e9, 2 * _COPY_BYTES / copy


def measure_sweep(
    settings: Settings,
    say: Callable[[str], None],
    notes: list[str],
    sides: Sequence[int] = SWEEP_SIDES,
    kernels: Sequence[int] = SWEEP_KERNELS,
) -> list[dict[str, Any]]:
    """How time and kept memory of one layer grow with the map and with the footprint.

    R = 16, C = 64, batch 1, both forms: maps of side `sides` at k = 7, then `kernels` on a map of 56×56. Linear growth
    shows as a constant time per pixel, and per pixel and place; memory that the footprint does not move shows as a
    constant number of bytes per pixel. Rows carry a `series`, "side" or "kernel_size".
    """
    series = {
        "side": [(side, _SWEEP_KERNEL) for side in sides],
        "kernel_size": [(_SWEEP_SIDE, kernel) for kernel in kernels],
    }
    rows: list[dict[str, Any]] = []
    for form, backend, dtype in itertools.product(("pairwise", "patchwise"), settings.backends, settings.dtypes):
        for name, sizes in series.items():
            say(f"sweep: {form} on {backend} by {name}")
            found = _sweep(form, backend, dtype, sizes, settings, notes)
            rows += [{"series": name, **row} for row in found]
    return rows


def _sweep(
    form: str, backend: str, dtype: str, sizes: list[tuple[int, int]], settings: Settings, notes: list[str]
) -> list[dict[str, Any]]:
    calls: dict[tuple[int, int], _Call] = {}
    for side, kernel in sizes:
        layer: Any = ATTENTIONS[form](_SWEEP_CHANNELS, _SWEEP_CHANNELS, kernel, relation_channels=_SWEEP_RELATION)
        operator = AttentionOperator(f"{form} {side}×{side}, k={kernel}", layer.to(settings.device), side, side)
        maps = operator.maps(1, getattr(torch, dtype), settings.device, channels_last=True)
        calls[side, kernel] = _Call(operator, backend, maps)
    calls = {size: call for size, call in calls.items() if _runs(call, notes)}
    steps: dict[Any, Step] = {(size, "infer"): call.infer for size, call in calls.items()}
    steps |= {(size, "train"): call.train for size, call in calls.items()}
    times = take_turns(steps, min(settings.rounds, _SWEEP_ROUNDS), settings.device) if steps else {}
    return [
        {
            "form": form,
            "backend": backend,
            "dtype": dtype,
            **_growth(*size, times[size, "infer"], times[size, "train"]),
            "kept_bytes_per_pixel": (held_bytes(call.forward, settings.device) + native_bytes()) / size[0] ** 2,
        }
        for size, call in calls.items()
    ]


def _growth(side: int, kernel: int, forward: list[float], training: list[float]) -> dict[str, Any]:
    pixels, pairs = side**2, side**2 * kernel**2
    row: dict[str, Any] = {"side": side, "kernel_size": kernel}
    for name, times in (("forward", forward), ("training", training)):
        median = spread(times)["median"]
        row |= {
            f"{name}_seconds": times,
            f"{name}_ms": 1e3 * median,
            f"{name}_ns_per_pixel": 1e9 * median / pixels,
            f"{name}_ns_per_pixel_and_place": 1e9 * median / pairs,
        }
    return row

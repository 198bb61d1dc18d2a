"""Named problem sizes that tests and benchmarks share, with tensors to run them on.

Every tensor is random, BatchNorm's too: at PyTorch's initial values the centre place sits exactly on ReLU's kink.
Legend: B batch, R relation width, C value channels, G weight groups, K places, P output pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from san.ops.footprint import Footprint
from san.ops.mapping import MAPPINGS, Mapping, MappingLayer
from san.ops.normalization import BatchNorm
from san.ops.relations import POSITION_WIDTHS, Position, find_relation

__all__ = ["CASES", "LAYOUTS", "SAN10_LAYERS", "Case", "Problem"]


@dataclass(frozen=True)
class Problem:
    """Arguments of one call, and all its differentiable tensors by name."""

    operator: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    running: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One problem size. `mapping` None is the identity; `training` takes BatchNorm's statistics from the batch."""

    name: str
    operator: str
    relation: str = ""
    batch: int = 2
    height: int = 7
    width: int = 6
    relation_channels: int = 4
    channels: int = 8
    groups: int = 2
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    border: str = "reflect"
    mapping: str | None = "LRL"
    position: str = "relative"
    training: bool = True
    seed: int = 0

    @property
    def footprint(self) -> Footprint:
        """The geometry."""
        return Footprint(self.kernel_size, self.stride, self.dilation, self.border)

    def build(
        self,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        *,
        seed: int | None = None,
        channels_last: bool = False,
        parameters: torch.dtype | None = None,
    ) -> Problem:
        """Random arguments in `dtype`; γ and position in `parameters`, by default at least float32 as under autocast.

        Values are drawn in float32 and rounded to `dtype`, so that the same seed gives the same problem in float64.
        """
        draw = _Draw(
            self.seed if seed is None else seed,
            dtype,
            device,
            channels_last,
            parameters or torch.promote_types(dtype, torch.float32),
        )
        options: dict[str, Any] = vars(self.footprint).copy()
        value = draw.map("value", self.batch, self.channels, self.height, self.width)
        if self.operator == "aggregation":
            rows, columns = self.footprint.output_size(self.height, self.width)
            weight = draw.map("weight", self.batch, self.groups, self.footprint.places, rows * columns)
            return Problem(self.operator, (value, weight), options, draw.tensors, draw.running)
        size = (self.batch, self.relation_channels, self.height, self.width)
        query, key = draw.map("query", *size), draw.map("key", *size)
        options["relation"] = self.relation
        if self.operator == "pairwise_attention" and self.position != "none":
            position = Position(self.position, draw.vector("position.weight", 2, 2), draw.vector("position.bias", 2))
            options["position"] = position
        arguments = (query, key, value, self._mapping(draw))
        return Problem(self.operator, arguments, options, draw.tensors, draw.running)

    def _mapping(self, draw: _Draw) -> Mapping | None:
        if self.mapping is None:
            return None
        taken, hidden, given = self._widths()
        widths = [taken, *[hidden] * (MAPPINGS[self.mapping] - 1), given]
        layers = [draw.layer(f"mapping.{i}", *widths[i : i + 2], self.training) for i in range(len(widths) - 1)]
        return Mapping(tuple(layers))

    def _widths(self) -> tuple[int, int, int]:
        found = find_relation(self.operator.removesuffix("_attention"), self.relation)
        places = self.footprint.places
        taken = found.width(self.relation_channels, places)
        if self.operator == "pairwise_attention":
            return taken + POSITION_WIDTHS[self.position], self.relation_channels, self.groups
        return taken, self.groups, self.groups * places


class _Draw:
    """Draws named tensors from one generator."""

    def __init__(
        self, seed: int, dtype: torch.dtype, device: str, channels_last: bool, parameters: torch.dtype
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.parameters, self.device = dtype, parameters, device
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.tensors: dict[str, Tensor] = {}
        self.running: dict[str, Tensor] = {}

    def _normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def map(self, name: str, *shape: int) -> Tensor:
        x = self._normal(self.dtype, *shape).contiguous(memory_format=self.format)
        self.tensors[name] = x.requires_grad_()
        return x

    def vector(self, name: str, *shape: int) -> Tensor:
        self.tensors[name] = self._normal(self.parameters, *shape).requires_grad_()
        return self.tensors[name]

    def layer(self, name: str, taken: int, given: int, training: bool) -> MappingLayer:
        mean = self.vector("", taken).detach()
        variance = self.vector("", taken).detach().square() + 0.5
        del self.tensors[""]
        self.running |= {f"{name}.mean": mean, f"{name}.variance": variance}
        norm = BatchNorm(
            weight=self.vector(f"{name}.norm.weight", taken),
            bias=self.vector(f"{name}.norm.bias", taken),
            running_mean=mean,
            running_var=variance,
            batches_seen=torch.zeros((), dtype=torch.long, device=self.device),
            momentum=0.1,
            eps=1e-5,
            uses_batch=training,
            updates_running=training,
        )
        weight = self.vector(f"{name}.weight", given, taken)
        with torch.no_grad():
            weight.div_(taken**0.5)
        return MappingLayer(norm, weight, self.vector(f"{name}.bias", given))


_PAIRWISE = (
    ("subtraction", "LRL", "relative"),
    ("subtraction", "L", "none"),
    ("subtraction", "LRLRL", "absolute"),
    ("summation", "LRL", "relative"),
    ("hadamard", "LRL", "absolute"),
    ("concatenation", "LRL", "relative"),
    ("dot", "LRL", "relative"),
)
_PATCHWISE = (
    ("concatenation", "LRL"),
    ("concatenation", "L"),
    ("concatenation", "LRLRL"),
    ("star", "LRL"),
    ("clique", "LRL"),
)


def _operator_cases() -> list[Case]:
    pairwise = [
        Case(f"pairwise-{kind}-{mapping}-{position}", "pairwise_attention", kind, mapping=mapping, position=position)
        for kind, mapping, position in _PAIRWISE
    ]
    # Seed 0 puts a pair 3e-6 from ReLU's kink, within the rounding of a product in float32.
    pairwise = [replace(case, seed=1) if case.relation == "summation" else case for case in pairwise]
    patchwise = [
        Case(f"patchwise-{kind}-{mapping}", "patchwise_attention", kind, mapping=mapping)
        for kind, mapping in _PATCHWISE
    ]
    identity = [
        Case("pairwise-identity", "pairwise_attention", "subtraction", mapping=None, position="none"),
        Case("pairwise-scalar", "pairwise_attention", "dot", mapping=None, position="none", kernel_size=5),
        Case("patchwise-identity", "patchwise_attention", "star", mapping=None, kernel_size=3),
    ]
    return [*pairwise, *patchwise, *identity, Case("aggregation", "aggregation")]


_GEOMETRIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zeros", {"border": "zeros"}),
    ("wide", {"kernel_size": 5, "height": 13, "width": 37}),
    ("k1", {"kernel_size": 1}),
    ("k5-narrow", {"kernel_size": 5, "height": 9, "width": 3}),
    ("k7-one-pixel", {"kernel_size": 7, "height": 1, "width": 1, "batch": 3}),
    # Sixteen lanes, of which the last two repeat a pixel: few enough for the code that takes rows' ends.
    ("two-by-seven", {"height": 2, "width": 7, "batch": 1}),
    ("k7-two-by-three", {"kernel_size": 7, "height": 2, "width": 3}),
    ("k9-zeros", {"kernel_size": 9, "border": "zeros", "height": 5, "width": 4}),
    ("k11-dilated", {"kernel_size": 11, "dilation": 2, "height": 4, "width": 5, "batch": 1}),
    ("stride2", {"stride": 2, "height": 9, "width": 8}),
    ("stride2-dilation2-zeros", {"stride": 2, "dilation": 2, "border": "zeros", "kernel_size": 5}),
    ("stride3", {"stride": 3, "kernel_size": 5, "height": 8, "width": 11}),
    ("batch0", {"batch": 0}),
    ("batch1", {"batch": 1}),
    ("evaluation", {"training": False}),
    ("one-group", {"groups": 1}),
    ("group-per-channel", {"groups": 8}),
)


def _geometry_cases() -> list[Case]:
    bases = (
        Case("pairwise", "pairwise_attention", "subtraction"),
        Case("patchwise", "patchwise_attention", "concatenation"),
        Case("aggregation", "aggregation"),
    )
    return [replace(base, name=f"{base.name}-{name}", **change) for base in bases for name, change in _GEOMETRIES]


def _san10_layers() -> list[Case]:
    """The attention layers of each stage of SAN10 at 224×224, and aggregation of its second stage's sizes."""
    forms = (("pairwise_attention", "subtraction"), ("patchwise_attention", "concatenation"))
    layers = [
        Case(
            name=f"san10-{operator.removesuffix('_attention')}-stage{stage}",
            operator=operator,
            relation=relation,
            height=112 >> stage,
            width=112 >> stage,
            relation_channels=width // 16,
            channels=width // 4,
            groups=width // 32,
            kernel_size=7 if stage else 3,
        )
        for operator, relation in forms
        for stage, width in enumerate((64, 256, 512, 1024, 2048))
    ]
    return [*layers, replace(layers[1], name="san10-aggregation-stage1", operator="aggregation")]


SAN10_LAYERS = {case.name: case for case in _san10_layers()}

CASES = {case.name: case for case in (*_operator_cases(), *_geometry_cases())}

# What a tensor [B, C, H, W] may look like in memory: functions that autograd sees through, to the same shape. The
# values are the same too, but where several elements share one.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cut": lambda x: F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "overlapping": lambda x: x.contiguous().as_strided(x.shape, [stride // 2 for stride in x.contiguous().stride()]),
    "negative": lambda x: torch._neg_view(-x),
}

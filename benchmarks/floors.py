"""The least that each attention layer of SAN10 costs at 224×224, and the time below which no kernel can take it.

    python benchmarks/floors.py [--batch 256] [--dtype bfloat16] [--device H200] [--json floors.json]

Counted from the layers' shapes, three times: forward in inference, forward in training, backward in training.

**Products** are the multiply-adds of γ's two Linears, which tensor cores do. **Others** are instructions of a float32
lane, a multiply-add being one: the relation, one for every channel of a pair; BatchNorm and ReLU before a Linear, of
which BatchNorm is free where it folds into query and key or into the Linear before it; four for every weight of the
softmax (largest so far, scale and subtract, exponential, sum), and its division at the end; one for every value channel
of a pair in the aggregation. **Bytes** are query, key, value read once and y written once, in backward their gradients
too, and γ's parameters in float32.

Training looks at all pairs once more before it knows the second BatchNorm's statistics (pairwise; patchwise keeps that
map, [B, G, P]). The first BatchNorm's follow from sums over the maps and cost K times less than pairs do: not counted.
**Recomputed** is what backward does anew because nothing per pair is kept: pairwise attention twice, since the second
BatchNorm's gradient needs sums over the whole batch before the first layer's can begin; patchwise its weights and
BatchNorm and ReLU, once.

The floor is the longest of three times, as all may overlap: bytes at the memory's rate, products at the tensor cores',
others at the float32 lanes'. In float32 products run on the lanes as well, so these two add up. Exponentials run at an
eighth of a lane's rate, beside it, and are never the longest here. Re-reading maps in a second pass is not counted.
Legend: B batch, R relation width, D δ's width, C value channels, G weight groups, K places, P pixels, N = B · P.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from san.ops.cases import SAN10_LAYERS, Case
from san.weights import NETWORKS

__all__ = [
    "DEVICES",
    "PASSES",
    "Floor",
    "Rates",
    "Work",
    "as_markdown",
    "floor",
    "layers",
    "least_bytes",
    "table",
    "work",
]

PASSES = ("inference", "training", "backward")


@dataclass(frozen=True)
class Rates:
    """What a device can do: bytes per second, and floating-point operations per second, two to a multiply-add.

    `products` is the tensor cores' rate in half precision, `lanes` the rate of ordinary float32 arithmetic.
    """

    name: str
    bytes: float
    products: float
    lanes: float


# NVIDIA's data sheets, SXM, without sparsity.
DEVICES = {
    "H200": Rates("H200, data sheet", 4.8e12, 989e12, 67e12),
    "H100": Rates("H100, data sheet", 3.35e12, 989e12, 67e12),
}


@dataclass(frozen=True)
class Work:
    """Multiply-adds of γ's Linears, and float32 instructions of the rest."""

    products: int = 0
    relation: int = 0
    activation: int = 0
    softmax: int = 0
    aggregation: int = 0

    @property
    def others(self) -> int:
        """All that is no product."""
        return self.relation + self.activation + self.softmax + self.aggregation

    def __add__(self, more: Work) -> Work:
        return Work(*(getattr(self, part.name) + getattr(more, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Floor:
    """One pass of one layer: its work, what is recomputed beside it, its bytes, and the times they take, in seconds.

    `seconds` is the floor and `bound` what it comes from: bytes, products or others. `recomputing_seconds` is the floor
    where `recomputed` counts as well.
    """

    work: Work
    recomputed: Work
    bytes: int
    bytes_seconds: float
    products_seconds: float
    others_seconds: float
    seconds: float
    bound: str
    recomputing_seconds: float


@dataclass(frozen=True)
class _Sizes:
    """Of a case: N, K, C, G, pairs or pixels that γ sees, and widths that its Linears take and give."""

    pixels: int
    places: int
    channels: int
    groups: int
    columns: int
    first: tuple[int, int]
    last: tuple[int, int]

    @property
    def linears(self) -> int:
        return self.first[0] * self.first[1] + self.last[0] * self.last[1]


def layers() -> dict[str, tuple[Case, int]]:
    """The attention layers of both SAN10 by name, and how often a network has each."""
    counts = NETWORKS["san10"]["blocks"]
    cases = [case for case in SAN10_LAYERS.values() if case.operator != "aggregation"]
    return {case.name: (case, counts[int(case.name[-1])]) for case in cases}


def work(case: Case, what: str) -> tuple[Work, Work]:
    """What a pass of `PASSES` must compute, and what it computes anew.

    `case` has the form that SAN10 uses: relation subtraction with relative position, or concatenation; mapping LRL;
    stride 1. Raises `ValueError` for others, whose kernels differ.
    """
    sizes, pairwise = _sizes(case), case.operator == "pairwise_attention"
    forward = _pairwise(sizes) if pairwise else _patchwise(sizes)
    if what == "inference":
        return forward, Work()
    if what == "training":
        return forward + _statistics(sizes, pairwise=pairwise), Work()
    return (_pairwise_backward if pairwise else _patchwise_backward)(sizes)


@cache
def _sizes(case: Case) -> _Sizes:
    forms = {"pairwise_attention": ("subtraction", "relative"), "patchwise_attention": ("concatenation", case.position)}
    if case.operator not in forms or (case.relation, case.position) != forms[case.operator]:
        raise ValueError(f"{case.name} is not one of the forms that SAN10 uses")
    if case.mapping != "LRL" or case.stride != 1:
        raise ValueError(f"{case.name} has mapping {case.mapping} and stride {case.stride}, but floors need LRL and 1")
    mapping: Any = replace(case, batch=0).build().arguments[3]
    (given, taken), (last_given, last_taken) = (layer.weight.shape for layer in mapping.layers)
    pixels, places = case.batch * case.height * case.width, case.footprint.places
    columns = pixels * places if case.operator == "pairwise_attention" else pixels
    return _Sizes(pixels, places, case.channels, case.groups, columns, (taken, given), (last_taken, last_given))


def _pairwise(sizes: _Sizes) -> Work:
    """Of a pair: D differences, D + R ReLUs, 4 · G for the softmax, C for the aggregation."""
    return Work(
        products=sizes.columns * sizes.linears,
        relation=sizes.columns * sizes.first[0],
        activation=sizes.columns * (sizes.first[0] + sizes.last[0]),
        softmax=sizes.columns * 4 * sizes.groups + sizes.pixels * sizes.channels,
        aggregation=sizes.columns * sizes.channels,
    )


def _patchwise(sizes: _Sizes) -> Work:
    """Of a pixel: BatchNorm and ReLU on δ, whose concatenation is free; ReLU on the hidden layer; K · C."""
    return Work(
        products=sizes.columns * sizes.linears,
        activation=sizes.columns * (2 * sizes.first[0] + sizes.last[0]),
        aggregation=sizes.pixels * sizes.places * sizes.channels,
    )


def _statistics(sizes: _Sizes, *, pairwise: bool) -> Work:
    """Sum and sum of squares of the hidden layer, and pairwise computes it for them alone."""
    moments = Work(activation=sizes.columns * 2 * sizes.last[0])
    if not pairwise:
        return moments
    return moments + Work(
        products=sizes.columns * sizes.first[0] * sizes.first[1],
        relation=sizes.columns * sizes.first[0],
        activation=sizes.columns * sizes.first[0],
    )


def _pairwise_backward(sizes: _Sizes) -> tuple[Work, Work]:
    """Linears give two gradients for each product. An input of γ's layers: ReLU's mask, two sums for BatchNorm's
    gradient, and for the second one multiply-add that applies it; δ's gradient goes to query and to key."""
    hidden, groups = sizes.last[0], sizes.groups
    necessary = Work(
        products=2 * sizes.columns * sizes.linears,
        relation=2 * sizes.columns * sizes.first[0],
        activation=sizes.columns * (3 * sizes.first[0] + 4 * hidden),
        softmax=sizes.columns * 2 * groups + sizes.pixels * sizes.channels,
        aggregation=2 * sizes.columns * sizes.channels,
    )
    # The normaliser is kept: a weight is one multiply-add and one exponential.
    again = replace(_pairwise(sizes), softmax=sizes.columns * 2 * groups, aggregation=0)
    to_hidden = Work(
        products=sizes.columns * hidden * groups,
        activation=sizes.columns * hidden,
        softmax=sizes.columns * 2 * groups,
        aggregation=sizes.columns * sizes.channels,
    )
    return necessary, again + again + to_hidden


def _patchwise_backward(sizes: _Sizes) -> tuple[Work, Work]:
    """As pairwise, but without softmax, and every channel at a place has a BatchNorm of its own, to be applied."""
    necessary = Work(
        products=2 * sizes.columns * sizes.linears,
        relation=sizes.columns * sizes.first[0],
        activation=sizes.columns * 4 * (sizes.first[0] + sizes.last[0]),
        aggregation=2 * sizes.pixels * sizes.places * sizes.channels,
    )
    again = Work(
        products=sizes.columns * sizes.last[0] * sizes.last[1],
        activation=sizes.columns * (2 * sizes.first[0] + sizes.last[0]),
    )
    return necessary, again


def least_bytes(case: Case, what: str, dtype: torch.dtype) -> int:
    """Maps in `dtype` and γ's parameters in float32, each read or written once."""
    sizes = _sizes(case)
    maps = sizes.pixels * (2 * case.relation_channels + 2 * case.channels) * dtype.itemsize
    parameters = 4 * sum(taken * given + 2 * taken + given for taken, given in (sizes.first, sizes.last))
    if what != "backward":
        return maps + parameters
    # Read: query, key, value, y's gradient; written: three gradients.
    gradients = sizes.pixels * (2 * case.relation_channels + case.channels) * dtype.itemsize
    return maps + gradients + 2 * parameters


def floor(case: Case, what: str, dtype: torch.dtype, rates: Rates) -> Floor:
    """The floor of a pass of `PASSES` at `rates`."""
    needed, again = work(case, what)
    moved = least_bytes(case, what, dtype)
    times = _times(needed, moved, dtype, rates)
    bound = max(times, key=lambda name: times[name])
    return Floor(
        *(needed, again, moved, times["bytes"], times["products"], times["others"], times[bound], bound),
        recomputing_seconds=max(_times(needed + again, moved, dtype, rates).values()),
    )


def _times(needed: Work, moved: int, dtype: torch.dtype, rates: Rates) -> dict[str, float]:
    wide = dtype == torch.float32
    lanes = 2 * needed.others / rates.lanes
    products = 2 * needed.products / (rates.lanes if wide else rates.products)
    return {"bytes": moved / rates.bytes, "products": products, "others": lanes + products if wide else lanes}


def table(batch: int, dtype: torch.dtype, rates: Rates) -> list[dict[str, Any]]:
    """A row for every layer and pass, and for each form and pass the sum over a network's layers."""
    rows = []
    for form in ("pairwise", "patchwise"):
        for what in PASSES:
            mine = [
                (name, count, floor(replace(case, batch=batch), what, dtype, rates))
                for name, (case, count) in layers().items()
                if form in name
            ]
            rows += [_row(name, what, count, [(1, found)]) for name, count, found in mine]
            rows.append(_row(f"san10-{form}, all", what, 1, [(count, found) for _, count, found in mine]))
    return rows


def _row(name: str, what: str, count: int, found: Iterable[tuple[int, Floor]]) -> dict[str, Any]:
    found = list(found)

    def total(of: Any) -> float:
        return sum(times * of(each) for times, each in found)

    alone = found[0][1] if len(found) == 1 else None
    return {
        "layer": name,
        "pass": what,
        "layers": count,
        "products G": total(lambda each: each.work.products) / 1e9,
        "others G": total(lambda each: each.work.others) / 1e9,
        "recomputed products G": total(lambda each: each.recomputed.products) / 1e9,
        "recomputed others G": total(lambda each: each.recomputed.others) / 1e9,
        "MB": total(lambda each: each.bytes) / 1e6,
        "bytes µs": 1e6 * total(lambda each: each.bytes_seconds),
        "products µs": 1e6 * total(lambda each: each.products_seconds),
        "others µs": 1e6 * total(lambda each: each.others_seconds),
        "floor µs": 1e6 * total(lambda each: each.seconds),
        "bound": alone.bound if alone else "",
        "with recomputation µs": 1e6 * total(lambda each: each.recomputing_seconds),
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table; numbers with three digits that count."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images (default 256)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="H200", choices=list(DEVICES), help="whose data sheet (default H200)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    rates = DEVICES[given.device]
    rows = table(given.batch, getattr(torch, given.dtype), rates)
    print(f"SAN10 at 224×224, batch {given.batch}, {given.dtype}, at the rates of {rates.name}\n")
    print(as_markdown(rows))
    if given.json:
        found = {"batch": given.batch, "dtype": given.dtype, "rates": asdict(rates), "rows": rows}
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

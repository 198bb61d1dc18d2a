"""Where a network's inference on the CPU spends its time, stage by stage, against what the machine can do at best.

    python benchmarks/roofline.py [san10_pairwise …] [--batch 4] [--image-size 224] [--rounds 15] [--json roofline.json]

The kernels that stand for a network are run one by one, in their order, so that each finds the caches as the one before
leaves them. The last BatchNorm, pooling and the classifier are no part of the table. **Operations** are the
multiply-adds of products and of aggregation, nothing else; **bytes** what any form of the part moves at least: maps
read and written once, weights read once. The **roof** is the longer of the two times at the machine's rates (a product
of two 2048×2048 matrices, a copy of 256 MiB, measured before and after); a part whose maps are still in a cache may
stay below. Ratios are against ResNet26 in its fastest form, interleaved, medians of all rounds. For SANs with
pairwise attention, or patchwise by concatenation.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from san import fused
from san.cli.printing import as_table
from san.errors import UserError
from san.evaluation.speed.attention import AttentionOperator, attention_operators
from san.evaluation.speed.clock import seconds
from san.evaluation.speed.contestants import build_network
from san.evaluation.speed.machine import describe_machine, describe_versions
from san.evaluation.speed.networks import WHOLE, measure_networks
from san.evaluation.speed.operators import peaks
from san.evaluation.speed.settings import Settings
from san.models import SAN

__all__ = ["Part", "kernel_times", "main", "measure", "parts", "table"]

NETWORKS = ("san10_pairwise", "san10_patchwise")
SUMS = ("multiply_adds", "bytes", "seconds", "roof_seconds")
ATTENTION, PRODUCT = "attention", "pointwise_forward"
BESIDE = ("fold", "position_map")
"""Kernels that prepare weights and positions: no part of a stage."""


@dataclass(frozen=True)
class Part:
    """One pass over the maps of a stage: its multiply-adds and least bytes for one image, and bytes of its weights."""

    stage: int
    name: str
    multiply_adds: int
    map_bytes: int
    weight_bytes: int

    def roof(self, batch: int, peak: float, copy: float) -> float:
        """Seconds of a batch at `peak` multiply-adds and `copy` bytes per second."""
        return max(batch * self.multiply_adds / peak, (batch * self.map_bytes + self.weight_bytes) / copy)


def parts(model: Any, image_size: int) -> list[Part]:
    """The parts of a network from `san.create_model`, in the order of its kernels."""
    operators = iter(attention_operators(model, image_size))
    found, size, channels = [], image_size, 3
    for number, stage in enumerate(model._stages()):
        before, size = size, size // 2 if stage.pooled else size
        stem = model.conv_in.weight.numel() if number == 0 else 0
        first = _product(number, "pooling, product", [stage.convolution], size, (channels * before**2, 0))
        # The stem looks at every pixel of the full image.
        found.append(replace(first, multiply_adds=first.multiply_adds + stem * before**2))
        channels = stage.convolution.out_channels
        for block in stage.blocks:
            found += _block(number, block, next(operators), size)
    return found


def _block(stage: int, block: Any, operator: AttentionOperator, size: int) -> Iterator[Part]:
    transformations, convolution = block.sam.transformations_of_input(), block.conv
    yield _product(stage, "φ, ψ, β", transformations, size, (block.bn1.num_features * size**2, 0))
    weights = sum(part.weight.nbytes for part in list(block.sam.conv_w)[2::3])
    least = operator.least_bytes(1, torch.float32)
    yield Part(stage, ATTENTION, operator.operations(1) // 2, least, weights)
    # Beside the map it reads what it adds to.
    yield _product(stage, "last product", [convolution], size, (convolution.in_channels * size**2, 1))


def _product(stage: int, name: str, convolutions: list[nn.Conv2d], size: int, read: tuple[int, int]) -> Part:
    """Pointwise convolutions of one map; `read` are the floats of the map, and how many maps like the output."""
    weights = sum(convolution.weight.numel() for convolution in convolutions)
    given = sum(convolution.out_channels for convolution in convolutions) * size**2
    return Part(stage, name, weights * size**2, 4 * (read[0] + (1 + read[1]) * given), 4 * weights)


def kernel_times(model: nn.Module, images: Tensor, rounds: int) -> list[tuple[str, float]]:
    """Every kernel of the network in its order, and its seconds for the whole batch, the median of the rounds."""
    with torch.inference_mode():
        output = torch.empty_like(model.forward_features(images))  # type: ignore[operator]
    recordings = {shape[0]: recording for shape, recording in fused.recordings_of(model).items()}
    shares = images.split(max(recordings))
    room = torch.empty(max(recording.bytes for recording in recordings.values()), dtype=torch.uint8)
    single = {size: recording.apart() for size, recording in recordings.items()}

    def times() -> list[float]:
        found = [
            [seconds(partial(one.repeat, room.data_ptr(), share.data_ptr(), output.data_ptr())) for _, one in each]
            for share, each in ((share, single[len(share)]) for share in shares)
        ]
        return [sum(values) for values in zip(*found, strict=True)]

    kernels = [kernel for kernel, _ in single[max(single)]]
    return list(zip(kernels, map(median, zip(*(times() for _ in range(rounds)), strict=True)), strict=True))


def _shared_out(times: list[tuple[str, float]], found: list[Part]) -> Iterator[float]:
    """Seconds of every part: attention has all kernels up to the next product, every other part one product."""
    counted = deque((kernel, value) for kernel, value in times if kernel not in BESIDE)
    for part in found:
        if part.name != ATTENTION:
            yield counted.popleft()[1]
            continue
        total = 0.0
        while counted[0][0] != PRODUCT:
            total += counted.popleft()[1]
        yield total
    if counted:
        raise RuntimeError(f"{len(counted)} kernels belong to no part of the network: {', '.join(dict(counted))}")


def measure(name: str, batch: int, image_size: int, rounds: int) -> dict[str, Any]:
    """The network's rows, by stage and part, and in `all` its sums; `beside` are seconds outside of stages' parts."""
    model = build_network(name).eval()
    before = peaks()
    times = kernel_times(model, torch.randn(batch, 3, image_size, image_size), rounds)
    peak, copy = (mean(pair) for pair in zip(before, peaks(), strict=True))
    peak *= 1e9 / 2
    found = parts(model, image_size)
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for part, value in zip(found, _shared_out(times, found), strict=True):
        row = rows.setdefault((part.stage, part.name), dict.fromkeys(SUMS, 0.0))
        row["multiply_adds"] += batch * part.multiply_adds
        row["bytes"] += batch * part.map_bytes + part.weight_bytes
        row["seconds"] += value
        row["roof_seconds"] += part.roof(batch, peak, copy)
    listed = [{"stage": stage, "part": part, **row} for (stage, part), row in rows.items()]
    return {
        "network": name,
        "multiply_adds_per_second": peak,
        "copy_bytes_per_second": copy,
        "rows": listed,
        "all": {key: sum(row[key] for row in listed) for key in SUMS},
        "beside": sum(value for kernel, value in times if kernel in BESIDE),
    }


def table(result: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of `measure` as text."""
    peak = result["multiply_adds_per_second"]
    rows = [*result["rows"], {"stage": "", "part": "all", **result["all"]}]
    return [
        {
            "stage": str(row["stage"]),
            "part": row["part"],
            "G multiply-adds": f"{row['multiply_adds'] / 1e9:.3f}",
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "ms": f"{1e3 * row['seconds']:.2f}",
            "of the product's rate": f"{row['multiply_adds'] / row['seconds'] / peak:.0%}",
            "roof, ms": f"{1e3 * row['roof_seconds']:.2f}",
            "of the roof": f"{row['roof_seconds'] / row['seconds']:.0%}",
        }
        for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    return parser


def _settings(given: argparse.Namespace) -> Settings:
    """What to measure of whole networks; `UserError` where the command line asks for what cannot be."""
    asked: Any = {"batches": (given.batch,), "resolutions": (given.image_size,), "rounds": given.rounds}
    settings = Settings(tuple(given.networks), **asked, modes=("inference",), peak=False)
    if wrong := [name for name in given.networks if not isinstance(build_network(name), SAN)]:
        raise UserError(f"{wrong[0]} is no self-attention network; choose one such as {NETWORKS[0]}")
    if given.json and not given.json.parent.is_dir():
        raise UserError(f"{given.json.parent} is no folder; --json needs one to write to")
    return settings


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print, write."""
    parser = _parser()
    given = parser.parse_args(words)
    try:
        settings = _settings(given)
    except UserError as problem:
        parser.error(str(problem))
    notes: list[str] = []
    rows = measure_networks(settings, lambda text: None, notes)
    whole = [row for row in rows if row["part"] == WHOLE]
    found = [measure(name, given.batch, given.image_size, given.rounds) for name in given.networks]
    for row in whole:
        each = row["ms_per_image"]["median"] * given.batch
        print(f"{row['network']}: {each:.1f} ms a batch, {row['ratio']['median']:.2f} of {whole[0]['network']}")
    print(*notes, sep="\n")
    for result in found:
        print(f"\n{result['network']}, batch {given.batch}, {given.image_size} px\n{as_table(table(result))}")
        rates = result["multiply_adds_per_second"] / 1e9, result["copy_bytes_per_second"] / 1e9
        print("rates: {:.0f} G multiply-adds of a large product, {:.0f} GB of a copy a second".format(*rates))
    if given.json:
        about = {"machine": describe_machine(), "versions": describe_versions(), "date": str(date.today())}
        about |= {"threads": torch.get_num_threads(), "batch": given.batch, "image_size": given.image_size}
        given.json.write_text(json.dumps({**about, "whole": whole, "parts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

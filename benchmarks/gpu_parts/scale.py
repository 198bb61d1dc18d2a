"""How much of everything a run does: all of it, a smoke run on a GPU, or a rehearsal of every line on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.floors import layers
from san.ops.cases import CASES, SAN10_LAYERS, Case

__all__ = ["FULL", "QUICK", "REHEARSAL", "Scale"]

HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    `checks` are cases and dtypes to compare with float64, the most important first. `layers` are those to time, by
    name, with how often a network has each. Batches come with the one that targets are about first. `compiled` are the
    layers whose plain form torch.compile gets too, and `compiles` tells whether it gets networks. `seconds` and
    `rounds` bound one measurement, `product` and `copy_bytes` the machine's.
    """

    name: str
    checks: tuple[tuple[Case, str], ...]
    layers: dict[str, tuple[Case, int]]
    operator_batches: tuple[int, ...]
    compiled: tuple[str, ...]
    sans: dict[str, str]
    baseline: str
    resolution: int
    inference_batches: tuple[int, ...]
    training_batches: tuple[int, ...]
    compiles: bool
    sizes: tuple[tuple[int, int, int], ...]
    small: dict[str, str]
    seconds: float
    rounds: int
    product: int
    copy_bytes: int


def _evaluated(cases: list[Case]) -> list[Case]:
    return [replace(case, name=f"{case.name}-evaluation", training=False) for case in cases]


def _all_checks() -> tuple[tuple[Case, str], ...]:
    """SAN10's layers in the dtype that is timed, every operator, SAN10's layers in the others, every geometry."""
    full = list(SAN10_LAYERS.values())
    operators = [CASES[name] for name in CASES if _is_operator(name) and "clique" not in name]
    geometries = [CASES[name] for name in CASES if not _is_operator(name)]
    trained = [case for case in operators if case.mapping and case.operator != "aggregation"]
    groups = [
        (full, ("bfloat16",)),
        (operators, ("float32", *HALF)),
        (_evaluated([case for case in full if case.operator != "aggregation"]), ("bfloat16",)),
        (_evaluated(trained), ("float32", *HALF)),
        (full, ("float32", "float16")),
        (geometries, ("float32",)),
    ]
    return tuple((case, dtype) for cases, dtypes in groups for dtype in dtypes for case in cases)


_FORMS = ("pairwise-subtraction-LRL-relative", "patchwise-concatenation-LRL")
_OPERATORS = (
    *(f"pairwise-{each}" for each in ("subtraction", "summation", "hadamard", "concatenation", "dot", "identity")),
    *(f"patchwise-{each}" for each in ("concatenation", "star", "clique", "identity")),
    "pairwise-scalar",
)


def _is_operator(name: str) -> bool:
    """Whether a case stands for a relation or mapping rather than for a geometry."""
    return name == "aggregation" or name.startswith(_OPERATORS)


_SIDES = (8, 9, 14, 17, 28, 31, 33, 40, 56, 57)
_SIZES = tuple((batch, side, side + wider) for batch, wider in ((1, 0), (5, 3)) for side in _SIDES)

FULL = Scale(
    name="full",
    checks=_all_checks(),
    layers=layers(),
    operator_batches=(256, 32, 1),
    compiled=tuple(sorted(layers(), key=lambda name: "13204".index(name[-1]))),
    sans={"pairwise": "san10_pairwise", "patchwise": "san10_patchwise"},
    baseline="baseline_resnet26",
    resolution=224,
    inference_batches=(256, 32, 1),
    training_batches=(256, 32, 128),
    compiles=True,
    sizes=_SIZES,
    small={"pairwise": "san4_pairwise", "patchwise": "san4_patchwise"},
    seconds=0.25,
    rounds=50,
    product=8192,
    copy_bytes=1 << 31,
)

_STAGE1 = {name: each for name, each in layers().items() if name.endswith("stage1")}

QUICK = replace(
    FULL,
    name="quick",
    checks=tuple(
        (case, dtype)
        for case, dtype in FULL.checks
        if case.name.startswith(_FORMS) or (case.name.removesuffix("-evaluation") in _STAGE1 and dtype == "bfloat16")
    ),
    layers=_STAGE1,
    operator_batches=(32,),
    compiled=(),
    inference_batches=(32,),
    training_batches=(32,),
    compiles=False,
    sizes=_SIZES[:4],
    seconds=0.1,
    rounds=10,
)

_TINY = {
    name: (replace(case, height=3, width=4, kernel_size=3, relation_channels=4, channels=8, groups=2), count)
    for name, (case, count) in _STAGE1.items()
}

REHEARSAL = replace(
    QUICK,
    name="rehearsal",
    checks=tuple(
        (CASES[name], dtype) for name, dtype in zip((*_FORMS, "aggregation"), ("float32", *HALF), strict=True)
    ),
    layers=_TINY,
    operator_batches=(1,),
    compiled=(next(iter(_TINY)),),
    sans={"pairwise": "san4_pairwise", "patchwise": "san4_patchwise"},
    resolution=32,
    inference_batches=(2,),
    training_batches=(2,),
    sizes=((1, 3, 4), (2, 3, 3)),
    seconds=0.05,
    rounds=1,
    product=256,
    copy_bytes=1 << 20,
)

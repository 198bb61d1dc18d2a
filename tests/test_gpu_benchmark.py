"""The GPU benchmark without a GPU: floors are counted right, wrong kernels are found, and the verdicts follow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import floors, gpu_traffic
from benchmarks.gpu_parts import correctness, features, report, workers
from benchmarks.gpu_parts.scale import FULL, QUICK, REHEARSAL
from torch.utils.flop_counter import FlopCounterMode

import san
from san import ops
from san.evaluation.cost import complexity
from san.evaluation.speed.attention import attention_operators
from san.ops import dispatch
from san.ops.cases import CASES, Case
from san.ops.kernels.gpu import launch

ROOT = Path(__file__).parents[1]
FORMS = ("pairwise", "patchwise")
EACH_FORM = pytest.mark.parametrize("form", FORMS)
# Border "zeros" is left out: a place outside costs as much as one inside.
SMALL = {
    "pairwise": Case("p", "pairwise_attention", "subtraction", batch=1, height=3, width=4, training=False),
    "patchwise": Case("q", "patchwise_attention", "concatenation", batch=1, height=3, width=4, training=False),
}
interpreted = pytest.mark.skipif(
    not launch.interpreting() or not launch.installed(), reason="needs Triton, interpreted"
)


# Floors


class Scalar:
    """A formula evaluated number by number, as a fused kernel does it, counting by kind."""

    def __init__(self, case: Case) -> None:
        self.case, self.problem = case, case.build()
        self.counts = dict.fromkeys(("products", "relation", "activation", "softmax", "aggregation"), 0)
        self.query, self.key, self.value = (x.detach()[0].tolist() for x in self.problem.arguments[:3])
        self.layers: Any = self.problem.arguments[3].layers
        self.affine = [[part.tolist() for part in layer.norm.scale_and_shift()] for layer in self.layers]

    def output(self) -> list[list[list[float]]]:
        """y [C, H, W]."""
        form = self.pairwise if self.case.operator == "pairwise_attention" else self.patchwise
        y = [[form(row, column) for column in range(self.case.width)] for row in range(self.case.height)]
        return torch.tensor(y, dtype=torch.float64).permute(2, 0, 1).tolist()

    def places(self, row: int, column: int) -> list[tuple[int, int]]:
        reach = self.case.kernel_size // 2

        def mirrored(at: int, size: int) -> int:
            return abs(at) if at < size else 2 * (size - 1) - at

        steps = range(-reach, reach + 1)
        height, width = self.case.height, self.case.width
        return [(mirrored(row + a, height), mirrored(column + b, width)) for a in steps for b in steps]

    def count(self, kind: str, value: float) -> float:
        self.counts[kind] += 1
        return value

    def linear(self, x: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
        found = list(bias)
        for i, row in enumerate(weight):
            for each, w in zip(x, row, strict=True):
                found[i] = self.count("products", found[i] + each * w)
        return found

    def last_layer(self, hidden: list[float]) -> list[float]:
        """ReLU and Linear on a hidden layer whose BatchNorm is part of the Linear before."""
        active = [self.count("activation", max(each, 0.0)) for each in hidden]
        return self.linear(active, self.layers[1].weight.tolist(), self.layers[1].bias.tolist())

    def folded_first(self) -> tuple[list[list[float]], list[float]]:
        """The first Linear with the second BatchNorm behind it, computed once for all pixels."""
        scale, shift = self.affine[1]
        weight, bias = self.layers[0].weight.tolist(), self.layers[0].bias.tolist()
        rows = [[s * w for w in row] for s, row in zip(scale, weight, strict=True)]
        return rows, [s * b + t for s, b, t in zip(scale, bias, shift, strict=True)]

    def aggregate(self, total: list[float], weights: list[float], value: list[float]) -> None:
        for c, each in enumerate(value):
            weight = weights[c % len(weights)]
            total[c] = self.count("aggregation", total[c] + weight * each)

    def pairwise(self, row: int, column: int) -> list[float]:
        scale, shift = self.affine[0]
        # Once for a pixel, not for a pair: the first BatchNorm goes into what is compared.
        positions = self.problem.options["position"].map(self.case.height, self.case.width).detach()[0].tolist()

        def compared(maps: list[Any], at: tuple[int, int]) -> list[float]:
            return [each[at[0]][at[1]] for each in [*maps, *positions]]

        own = [s * x + t for s, x, t in zip(scale, compared(self.query, (row, column)), shift, strict=True)]
        groups, total = self.case.groups, [0.0] * self.case.channels
        largest, sums = [-math.inf] * groups, [0.0] * groups
        scored = []
        for at in self.places(row, column):
            other = [s * x for s, x in zip(scale, compared(self.key, at), strict=True)]
            pairs = [self.count("relation", a - b) for a, b in zip(own, other, strict=True)]
            active = [self.count("activation", max(each, 0.0)) for each in pairs]
            scores = self.last_layer(self.linear(active, *self.folded_first()))
            largest = [self.count("softmax", max(a, b)) for a, b in zip(largest, scores, strict=True)]
            scored.append((at, scores))
        for at, scores in scored:
            shifted = [self.count("softmax", a - b) for a, b in zip(scores, largest, strict=True)]
            weights = [self.count("softmax", math.exp(each)) for each in shifted]
            sums = [self.count("softmax", a + b) for a, b in zip(sums, weights, strict=True)]
            self.aggregate(total, weights, [each[at[0]][at[1]] for each in self.value])
        return [self.count("softmax", each / sums[c % groups]) for c, each in enumerate(total)]

    def patchwise(self, row: int, column: int) -> list[float]:
        scale, shift = self.affine[0]
        places = self.places(row, column)
        relation = [each[row][column] for each in self.query]
        relation += [each[a][b] for each in self.key for a, b in places]
        active = []
        for x, s, t in zip(relation, scale, shift, strict=True):
            normal = self.count("activation", s * x + t)
            active.append(self.count("activation", max(normal, 0.0)))
        weights = self.last_layer(self.linear(active, *self.folded_first()))
        total = [0.0] * self.case.channels
        for j, (a, b) in enumerate(places):
            self.aggregate(total, weights[j :: len(places)], [each[a][b] for each in self.value])
        return total


@EACH_FORM
def test_operations_are_those_of_the_formula_done_number_by_number(form: str) -> None:
    case = SMALL[form]
    scalar = Scalar(case)
    y = torch.tensor(scalar.output(), dtype=torch.float64)
    with ops.use_backend("reference"):
        problem = scalar.problem
        expected = getattr(ops, problem.operator)(*problem.arguments, **problem.options)[0]
    torch.testing.assert_close(y, expected)
    found, again = floors.work(case, "inference")
    assert vars(found) == scalar.counts
    assert again == floors.Work()


@EACH_FORM
def test_products_are_those_that_the_reference_multiplies(form: str) -> None:
    """Forward and backward; torch counts two operations to a multiply-add."""
    case = replace(SMALL[form], training=True, position="none") if form == "patchwise" else SMALL[form]
    problem = case.build()
    with ops.use_backend("reference"):
        with FlopCounterMode(display=False) as forward:
            y = getattr(ops, problem.operator)(*problem.arguments, **problem.options)
        products = floors.work(case, "inference")[0].products
        assert forward.get_flop_counts()["Global"][torch.ops.aten.convolution] == 2 * products
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y.sum(), list(problem.tensors.values()))
    products = floors.work(case, "backward")[0].products
    assert backward.get_flop_counts()["Global"][torch.ops.aten.convolution_backward] == 2 * products


@EACH_FORM
def test_floors_cover_the_layers_of_the_network(form: str) -> None:
    """Against the networks themselves, as `san benchmark` and `san complexity` count them."""
    model = san.create_model(f"san10_{form}")
    expected, found, macs = [], [], 0
    for operator in attention_operators(model, 224):
        expected.append((operator.operations(2), operator.least_bytes(2, torch.bfloat16)))
        layer: Any = operator.layer
        transformations = sum(part.weight.numel() for part in (layer.conv1, layer.conv2, layer.conv3))
        macs += operator.height * operator.width * (transformations + (4 if form == "pairwise" else 0))
    for name, (case, count) in floors.layers().items():
        if form not in name:
            continue
        done, _ = floors.work(replace(case, batch=2), "inference")
        moved = floors.least_bytes(replace(case, batch=2), "inference", torch.bfloat16)
        parameters = moved - floors.least_bytes(replace(case, batch=0), "inference", torch.bfloat16)
        found += count * [(2 * (done.products + done.aggregation), parameters)]
        macs += count * (done.products + done.aggregation) // 2
    assert found == expected
    others = [model.conv_in, *(getattr(model, f"conv{stage}") for stage in range(5))]
    sides = [224, *(112 >> stage for stage in range(5))]
    macs += sum(part.weight.numel() * side**2 for part, side in zip(others, sides, strict=True))
    blocks = [(block, 112 >> stage) for stage in range(5) for block in getattr(model, f"layer{stage}")]
    macs += sum(block.conv.weight.numel() * side**2 for block, side in blocks) + model.fc.weight.numel()
    assert macs == complexity(model)["macs"]


def test_a_floor_is_the_longest_of_its_times() -> None:
    case = SMALL["pairwise"]
    for rates, bound in (((1.0, 1e9, 1e9), "bytes"), ((1e9, 1.0, 1e9), "products"), ((1e9, 1e9, 1.0), "others")):
        found = floors.floor(case, "training", torch.bfloat16, floors.Rates("slow in one", *rates))
        assert found.bound == bound
        assert found.seconds == max(found.bytes_seconds, found.products_seconds, found.others_seconds)
    wide = floors.floor(case, "backward", torch.float32, floors.DEVICES["H200"])
    lanes = 2 * (wide.work.products + wide.work.others) / 67e12
    assert wide.others_seconds == pytest.approx(lanes)
    assert wide.recomputing_seconds > wide.seconds


def test_the_table_sums_over_a_networks_layers() -> None:
    rows = floors.table(4, torch.bfloat16, floors.DEVICES["H200"])
    assert len(rows) == 2 * 3 * (5 + 1)
    for form in FORMS:
        for what in floors.PASSES:
            *each, total = [row for row in rows if form in row["layer"] and row["pass"] == what]
            for column in ("products G", "MB", "floor µs", "with recomputation µs"):
                assert total[column] == pytest.approx(sum(row["layers"] * row[column] for row in each))


def test_forms_that_were_not_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="not one of the forms that SAN10 uses"):
        floors.work(CASES["pairwise-dot-LRL-relative"], "inference")
    with pytest.raises(ValueError, match="floors need LRL and 1"):
        floors.work(CASES["patchwise-concatenation-LRLRL"], "inference")


# Correctness


@interpreted
def test_right_kernels_are_found_right_and_wrong_ones_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["patchwise-concatenation-LRL"], batch=1, height=3, width=3)
    row = correctness.check(case, "float32", "cpu")
    assert row["right"]
    assert 0 < row["error_of_tolerance"] <= 1
    assert row["beyond"] == 0
    kernels = dispatch._implementations[case.operator]["triton"]
    slightly = replace(kernels, run=lambda call: kernels.run(call) * (1 + 1e-4))
    monkeypatch.setitem(dispatch._implementations[case.operator], "triton", slightly)
    row = correctness.check(case, "float32", "cpu")
    assert not row["right"]
    assert row["error_of_tolerance"] > 1


def test_few_gradients_of_a_large_map_may_leave_the_tolerance_but_nothing_else() -> None:
    exact = torch.ones(20_000)
    off, lost = exact.clone(), exact.clone()
    off[:2] += 0.5
    lost[0] = torch.nan

    def share(found: torch.Tensor, *, gradient: bool = True, numbers: int = 20_000) -> float:
        return correctness._furthest(found[:numbers], exact[:numbers], 0.1, gradient=gradient)

    assert share(off) == 0
    assert share(off, gradient=False) == pytest.approx(5)
    assert share(off, numbers=9_999) == pytest.approx(5)
    off[2] += 0.5
    assert share(off) == pytest.approx(5)
    off[:3] = 3.0
    assert share(off) == pytest.approx(20)
    assert share(lost) == math.inf


def test_every_operator_is_checked_in_training_and_evaluation() -> None:
    """All cases that the kernels take, and every layer of SAN10 in every dtype."""
    names = {(case.name, dtype) for case, dtype in FULL.checks}
    assert len(names) == len(FULL.checks)
    for case in CASES.values():
        problem = replace(case, batch=0).build(torch.float32)
        call = ops.make_call(problem.operator, *problem.arguments, **problem.options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            refusal = dispatch.answers(case.operator, call)["triton"]
        assert ((case.name, "float32") in names) == (refusal is None), case.name
    for name in floors.layers():
        assert {(name, dtype) for dtype in ("float32", "bfloat16", "float16")} <= names
        assert (f"{name}-evaluation", "bfloat16") in names
    assert len(FULL.sizes) == 20
    assert set(QUICK.checks) < set(FULL.checks)


# Workers


def test_a_failing_job_does_not_stop_the_others() -> None:
    soon, told = time.monotonic() + 60, []
    jobs = [
        workers.Job("fails", partial(math.sqrt, -1), soon),
        workers.Job("works", partial(math.sqrt, 4), soon),
        workers.Job("late", partial(math.sqrt, 9), time.monotonic() - 1),
    ]
    outcomes = workers.run(jobs, 0, "cpu", 10, told.append)
    assert outcomes == told
    fails, works, late = outcomes
    assert "ValueError" in (fails.error or "")
    assert works == workers.Outcome("works", 2.0)
    assert late.skipped
    assert late.value is None


@pytest.mark.long
def test_processes_that_die_or_hang_are_replaced() -> None:
    soon = time.monotonic() + 600
    jobs = [
        workers.Job("dies", partial(os._exit, 7), soon),
        workers.Job("hangs", partial(time.sleep, 1000), soon),
        workers.Job("works", partial(math.sqrt, 4), soon),
    ]
    outcomes = {each.name: each for each in workers.run(jobs, 1, "cpu", 30, lambda outcome: None)}
    assert outcomes["dies"].error == "its process died (exit code 7)"
    assert outcomes["hangs"].error == "took longer than 30 s"
    assert outcomes["works"].value == 2.0


# Report


def result(**rows: Any) -> dict[str, Any]:
    settings = {"scale": "full", "sans": FULL.sans, "baseline": FULL.baseline, "dtype": "bfloat16"}
    settings["layers"] = {name: count for name, (_, count) in FULL.layers.items()}
    lists = ("checks", "compilations", "operators", "networks", "features", "failures", "skipped")
    machine = {"gpu": None, "machine": {"processor": "a processor"}, "versions": {}, "date": "2026-01-01"}
    machine["versions"] = dict.fromkeys(("torch", "triton", "cuda", "python", "san"), "1")
    return {**machine, "settings": settings, "rates": None, "seconds": 1.0, **{key: [] for key in lists}, **rows}


def network(name: str, mode: str, batch: int, form: str, speed: float, peak: float) -> dict[str, Any]:
    row = {"network": name, "mode": mode, "batch": batch, "form": form, "seconds": batch / speed, "graph": "replayed"}
    return row | {"images_per_second": speed, "peak_bytes": peak}


def verdicts(found: dict[str, Any]) -> dict[tuple[str, str], tuple[float | None, str]]:
    return {
        (row["target"].split()[0], row["SAN10"]): (row["measured"], row["verdict"]) for row in report.targets(found)
    }


def test_networks_compare_in_their_faster_form_at_the_largest_common_batch() -> None:
    rows = [
        network("baseline_resnet26", "inference", 256, "eager", 900.0, 1.0),
        network("baseline_resnet26", "inference", 256, "compiled", 1000.0, 1.0),
        network("san10_pairwise", "inference", 256, "eager", 750.0, 1.0),
        network("san10_pairwise", "inference", 256, "compiled", 100.0, 1.0),
        network("san10_patchwise", "inference", 32, "eager", 5000.0, 1.0),
        network("baseline_resnet26", "training", 32, "eager", 100.0, 10.0),
        network("san10_patchwise", "training", 32, "eager", 110.0, 12.0),
        network("san10_pairwise", "training", 32, "eager", 40.0, 13.0),
    ]
    found = verdicts(result(networks=rows))
    assert found["inference", "pairwise"] == (0.75, "must met")
    assert found["inference", "patchwise"] == (None, "not measured")
    assert found["training", "patchwise"] == (1.1, "goal met")
    assert found["training", "pairwise"] == (0.4, "not met")
    assert found["peak", "patchwise"] == (1.2, "must met")
    assert found["peak", "pairwise"] == (1.3, "not met")


def test_attention_compares_all_layers_with_the_faster_plain_form() -> None:
    times = {"triton": 1.0, "eager": 30.0, "compiled": 12.0}
    rows = [
        {"layer": name, "batch": batch, "pass": "inference", "form": form, "seconds": seconds}
        for name in FULL.layers
        for batch in (32, 256)
        for form, seconds in times.items()
        # One layer of patchwise did not run at the largest batch, and nothing was compiled at the smaller.
        if not (batch == 256 and name.endswith("patchwise-stage1") and form != "triton")
        and not (batch == 32 and form == "compiled")
    ]
    value, where = report.attention_ratio(result(operators=rows), "pairwise", "inference")
    assert value == 12.0
    assert where.startswith("batch 256")
    assert "5 of 5 plain forms compiled too" in where
    value, where = report.attention_ratio(result(operators=rows), "patchwise", "inference")
    assert value == 30.0
    assert where.startswith("batch 32")
    assert "0 of 5" in where
    assert report.attention_ratio(result(operators=rows), "pairwise", "training") == (None, "")


def test_the_page_ends_with_the_targets_and_names_what_is_missing() -> None:
    found = result(failures=["networks: out of memory"], skipped=["mixed precision"])
    found["checks"] = [{"case": "a case", "dtype": "float16", "right": False, "error": "its process died"}]
    page = report.as_page(found)
    for text in ("0 of 1 comparisons", "a case", "its process died", "networks: out of memory", "- mixed precision"):
        assert text in page
    assert page.rindex("##") == page.index("## Against the targets")
    assert "no measurement" in report.as_page(result(settings={**found["settings"], "scale": "rehearsal"}))


# The command


@interpreted
def test_refusals_are_sentences() -> None:
    assert "triton knows the relations" in features.refused_in_a_sentence(REHEARSAL, "cpu")


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, "benchmarks/gpu.py", *words)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_to_do() -> None:
    done = command("--quick")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["there is no GPU here; rehearse with --device cpu"]


@pytest.mark.long
def test_a_rehearsal_goes_through_every_step(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    done = command("--device", "cpu", "--json", str(target))
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert not found["failures"]
    assert not found["skipped"]
    assert all(row["right"] for row in [*found["checks"], *found["compilations"]])
    assert len(found["operators"]) == 2 * 2 * 2 + 2
    assert len(found["networks"]) == 2 * 3
    assert {row["kept"] for row in found["features"]} == {"yes", "not tried"}
    assert done.stdout.rindex("##") == done.stdout.index("## Against the targets")


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_traffic_is_counted(mode: str) -> None:
    """Of tensors without data; kernels around the attention move a fraction of what the modules move."""
    written, joined = (gpu_traffic.measure("san10_patchwise", mode, 64, joined=each) for each in (False, True))
    assert 0 < joined["moved"] < 0.5 * written["moved"]
    assert 0 < joined["peak"] < 0.5 * written["peak"]
    if mode == "training":
        assert 0 < joined["kept"] < 0.5 * written["kept"]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_large_batches_fit_into_grids(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid has 2³¹ programs along its first axis and 65,535 along the others."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(gpu_traffic.Count, "start", lambda count, kernel, grid, *_, **options: grids.append(grid))
    gpu_traffic.measure("san10_pairwise", mode, 8192, joined=True)
    assert max(grid[0] for grid in grids) > 1 << 16
    assert all(grid[0] < 1 << 31 and max(grid[1:], default=1) < 1 << 16 for grid in grids)

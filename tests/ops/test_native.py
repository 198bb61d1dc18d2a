"""What the native backend promises beyond the shared suite: registration, threads, forks and refusals."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import san
from san import ops
from san.ops import dispatch
from san.ops.cases import CASES, LAYOUTS, Problem
from san.ops.kernels.native import library, operators

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not installed")

FORMS = [replace(CASES[name], height=21, width=37) for name in CASES if name.endswith("-LRL-relative")][:1]
FORMS += [replace(CASES[name], height=21, width=37) for name in ("patchwise-concatenation-LRL", "aggregation")]
EACH_FORM = pytest.mark.parametrize("case", FORMS, ids=lambda case: case.operator)


def skip_unless_native(operator: str) -> None:
    if "native" not in dispatch._implementations[operator]:
        pytest.skip(f"native does not implement {operator}")


def results(problem: Problem) -> list[Tensor]:
    """Output and all gradients."""
    with ops.use_backend("native"):
        y = getattr(ops, problem.operator)(*problem.arguments, **problem.options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, list(problem.tensors.values()), cotangent)]


@pytest.fixture(autouse=True)
def small_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls, too, run on all threads."""
    monkeypatch.setattr(operators, "GRAIN", 1)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_FORM
@pytest.mark.usefixtures("restored_threads")
def test_the_number_of_threads_changes_no_bit(case: Any) -> None:
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(results(case.build(torch.float32)))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def bits(threads: int) -> list[str]:
    """What all forms give on so many threads, as a digest each."""
    torch.set_num_threads(threads)
    found = [torch.cat([x.detach().flatten() for x in results(case.build(torch.float32))]) for case in FORMS]
    return [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in found]


@pytest.mark.usefixtures("restored_threads")
def test_fewer_threads_than_asked_for_do_all_of_the_work() -> None:
    """As where OpenMP is told to start no more, or is nested: threads do what those that are missing would have."""
    script = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_native as t"
    script += "; t.operators.GRAIN = 1; print(*t.bits(4))"
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=limited, capture_output=True, text=True, check=True)
    assert done.stdout.split() == bits(1)


@EACH_FORM
def test_four_python_threads_at_once_give_the_right_results(case: Any) -> None:
    expected = [results(case.build(torch.float32, seed=seed)) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed] = results(case.build(torch.float32, seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(torch.equal(x, y) for x, y in zip(expected[seed], found[seed], strict=True))


def inferred(case: Any) -> float:
    problem = case.build(torch.float32)
    with ops.use_backend("native"), torch.inference_mode():
        return getattr(ops, problem.operator)(*problem.arguments, **problem.options).flatten()[3].item()


def _attend_in_child(case: Any, answer: Any) -> None:
    # As data loaders do in their workers: PyTorch's own operators hang there otherwise.
    torch.set_num_threads(1)
    answer.put(inferred(case))


@EACH_FORM
def test_a_forked_child_runs_after_its_parent_has(case: Any) -> None:
    """As the workers of a data loader do. Autograd itself refuses to run in such a child."""
    expected = inferred(case)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_attend_in_child, args=(case, answer), daemon=True)
    child.start()
    assert answer.get(timeout=60) == expected
    child.join(timeout=60)


@EACH_FORM
def test_compiles_as_one_graph(case: Any) -> None:
    """Frozen statistics and training, gradients included."""
    skip_unless_native(case.operator)
    problem = case.build(torch.float32)

    def attend(*arguments: Any) -> Tensor:
        return getattr(ops, case.operator)(*arguments, **problem.options)

    with ops.use_backend("native"):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        y = compiled(*problem.arguments)
        gradients = torch.autograd.grad(y.sum(), list(problem.tensors.values()))
        again = case.build(torch.float32)
        expected = getattr(ops, case.operator)(*again.arguments, **again.options)
    torch.testing.assert_close(y, expected)
    for found, exact in zip(gradients, torch.autograd.grad(expected.sum(), list(again.tensors.values())), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def calls(operator: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every custom operator of one run, forward and backward, with its arguments."""
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "san":
                seen.append((function, args))
            return function(*args, **(kwargs or {}))

    case = next(case for case in FORMS if case.operator == operator)
    with Recorder():
        results(replace(case, height=5, width=6, batch=1).build(torch.float32))
    return seen


@pytest.mark.parametrize("operator", [case.operator for case in FORMS])
def test_operators_pass_opcheck(operator: str) -> None:
    skip_unless_native(operator)
    found = calls(operator)
    assert found
    for function, arguments in found:
        backward = str(function).endswith("backward.default")
        torch.library.opcheck(function, torch.utils._pytree.tree_map(_copy if backward else _leaf, arguments))


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _leaf(x: Any) -> Any:
    return _copy(x).requires_grad_(x.dtype == torch.float32) if isinstance(x, Tensor) else x


@EACH_FORM
def test_says_why_it_refuses(case: Any) -> None:
    skip_unless_native(case.operator)
    problem = case.build(torch.float64)
    with ops.use_backend("native"), pytest.raises(ValueError, match="native computes in float32, but a tensor is"):
        getattr(ops, case.operator)(*problem.arguments, **problem.options)


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_FORM
def test_any_layout_gives_the_same(case: Any, layout: str) -> None:
    """Inputs and the gradient that comes in; outputs and gradients against the reference."""
    small, found = replace(case, height=7, width=6), {}
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        problem = small.build(dtype)
        maps = [LAYOUTS[layout](x) if isinstance(x, Tensor) else x for x in problem.arguments]
        with ops.use_backend(backend):
            y = getattr(ops, case.operator)(*maps, **problem.options)
        cotangent = LAYOUTS[layout](torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        found[backend] = [y, *torch.autograd.grad(y, list(problem.tensors.values()), cotangent)]
    largest = max(x.abs().max().item() for x in found["reference"])
    for got, exact in zip(*found.values(), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * largest)


@EACH_FORM
def test_views_may_be_leaves(case: Any) -> None:
    problem, wanted = case.build(torch.float32), case.build(torch.float32)
    wide = [torch.nn.functional.pad(x.detach(), (1, 1)) if isinstance(x, Tensor) else x for x in problem.arguments]
    maps = [x[..., 1:-1].requires_grad_() if isinstance(x, Tensor) else x for x in wide]
    with ops.use_backend("native"):
        getattr(ops, case.operator)(*maps, **problem.options).sum().backward()
        getattr(ops, case.operator)(*wanted.arguments, **wanted.options).sum().backward()
    for x, expected in zip(maps, wanted.arguments, strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x.grad, expected.grad)


@EACH_FORM
def test_nothing_in_gives_nothing_out(case: Any) -> None:
    y, *gradients = results(replace(case, batch=0).build(torch.float32))
    assert y.shape[0] == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("spoil", [torch.Tensor.long, lambda x: x.to("meta"), lambda x: x[..., :0], lambda x: x[0]])
@EACH_FORM
def test_maps_that_are_none_are_refused(case: Any, spoil: Any) -> None:
    """Integers, another device, no pixels, no batch."""
    problem = case.build(torch.float32)
    maps = [spoil(x.detach()) if isinstance(x, Tensor) else x for x in problem.arguments]
    with ops.use_backend("native"), pytest.raises(ValueError, match=r"must be|runs on the CPU"):
        getattr(ops, case.operator)(*maps, **problem.options)


class Size(NamedTuple):
    """A size in a kernel's arguments, and whether it may be 0."""

    value: int
    zero: bool = False


FREE, ROOM = 0, None  # what may be anything; the address of a tensor
GEOMETRY = [Size(1), *map(Size, (2, 5, 6, 3, 1, 1)), FREE]  # threads, batch, map, kernel, stride, dilation, zeros
INPUT = [Size(1), *map(Size, (2, 4, 5, 6)), FREE, Size(0, zero=True), *[ROOM] * 4]
GIVEN = [Size(3), Size(2, zero=True), Size(0, zero=True)]
RELATION = [Size(0, zero=True), Size(0, zero=True), Size(4)]
LAYERS = Size(1, zero=True)
PAIRWISE = [*GEOMETRY, *RELATION, Size(8), Size(2), Size(1), *[ROOM] * 6, Size(4), Size(2), *[FREE] * 3, *[ROOM] * 28]
MOMENTS = [*GEOMETRY, *RELATION, FREE, FREE, LAYERS, ROOM, ROOM, FREE, *[ROOM] * 3, Size(4), *[FREE] * 4, *[ROOM] * 28]
HIDDEN = [*GEOMETRY, Size(4), Size(4, zero=True), Size(2), *[ROOM] * 14]
OUTPUT = [*GEOMETRY, *map(Size, (2, 2, 8)), *[ROOM] * 14]
STAR = [*GEOMETRY, Size(4), *[ROOM] * 6]
KERNELS: dict[str, list[Any]] = {
    "aggregation_forward": [*GEOMETRY, Size(8), Size(2), *[ROOM] * 6],
    "aggregation_backward": [*GEOMETRY, Size(8), Size(2), *[ROOM] * 6],
    "pairwise_forward": PAIRWISE,
    "pairwise_backward": PAIRWISE,
    "pairwise_moments": MOMENTS,
    "pairwise_moments_backward": MOMENTS,
    "patchwise_hidden": HIDDEN,
    "patchwise_hidden_backward": HIDDEN,
    "patchwise_output": OUTPUT,
    "patchwise_output_backward": OUTPUT,
    "patchwise_moments": [*GEOMETRY, Size(4), Size(4, zero=True), *[ROOM] * 8],
    "patchwise_moments_backward": [*GEOMETRY, Size(4), Size(4, zero=True), *[ROOM] * 8],
    "patchwise_star": STAR,
    "patchwise_star_backward": STAR,
    "pointwise_forward": [*INPUT, *GIVEN, *[ROOM] * 10],
    "pointwise_backward": [*INPUT, *GIVEN, *[ROOM] * 15],
    "fold": [Size(1), Size(4, zero=True), *[ROOM] * 4, FREE, Size(3, zero=True), *[ROOM] * 4, *[FREE] * 55],
    "channel_moments": [*map(Size, (1, 2, 3, 30)), *[ROOM] * 3],
    "image_moments": [*map(Size, (1, 2, 3, 30)), *[ROOM] * 3],
    "norm_input_gradient": [*map(Size, (1, 2, 3, 30)), *[ROOM] * 6],
}


def called(kernel: str, changes: dict[int, int]) -> None:
    """Call a kernel on its arguments of above with some of them changed."""
    loaded, room = library.load(), torch.zeros(100_000)
    assert loaded is not None
    values = [room.data_ptr() if x is ROOM else x.value if isinstance(x, Size) else x for x in KERNELS[kernel]]
    loaded.call(kernel, *(changes.get(i, value) for i, value in enumerate(values)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_refuses_sizes_that_cannot_be(kernel: str) -> None:
    """The library trusts nobody: it looks at sizes before it computes or reads anything, and never wraps around."""
    called(kernel, {})
    sizes = [i for i, x in enumerate(KERNELS[kernel]) if isinstance(x, Size)]
    for i in sizes:
        for wrong in (0, -1, 2**41 + 1, 2**62 + 1, -(2**63)):
            if wrong or not KERNELS[kernel][i].zero:
                with pytest.raises(ValueError, match="sizes"):
                    called(kernel, {i: wrong})
    for all_of_them in (2**21 + 1, 2**32, -(2**32)):
        with pytest.raises(ValueError, match="sizes"):
            called(kernel, dict.fromkeys(sizes[1:], all_of_them))


@pytest.mark.parametrize("kernel", [name for name, sizes in KERNELS.items() if sizes[:8] == GEOMETRY])
@pytest.mark.parametrize("changes", [{4: 10**6 + 1}, {4: 2}, {6: 2**40}, {4: 10**5 + 1, 6: 10**5}], ids=str)
def test_a_kernel_refuses_footprints_that_cannot_be(kernel: str, changes: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        called(kernel, changes)


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        ("aggregation_forward", {9: 3}),
        ("pairwise_forward", {12: 3}),
        ("pairwise_forward", {20: 5}),
        ("patchwise_output", {9: 3}),
        ("patchwise_hidden", {9: 5}),
        ("image_moments", {2: 5}),
    ],
)
def test_a_kernel_refuses_sizes_that_do_not_fit_one_another(kernel: str, changes: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        called(kernel, changes)


def test_a_kernel_called_with_other_arguments_refuses() -> None:
    """Nor does a call whose arguments are not as many as the kernel's run."""
    loaded = library.load()
    assert loaded is not None
    with pytest.raises(ValueError, match="sizes"):
        loaded.call("pairwise_forward", 1, 2, 3)
    with pytest.raises(ValueError, match="sizes"):
        loaded.call("pairwise_forward", *[0] * 60)


@EACH_FORM
def test_exported_programs_take_any_memory_format(case: Any) -> None:
    """A tracer that saw contiguous tensors leaves out what would make others so."""
    problem = replace(case, training=False).build(torch.float32)
    maps = [x.detach() if isinstance(x, Tensor) else x for x in problem.arguments]
    mapping = maps[3:]

    class Operator(torch.nn.Module):
        def forward(self, *maps: Tensor) -> Tensor:
            return getattr(ops, case.operator)(*maps, *mapping, **problem.options)

    with ops.use_backend("native"):
        program = torch.export.export(Operator(), tuple(maps[:3])).module()
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps[:3]]
    torch.testing.assert_close(program(*last), program(*maps[:3]))


def test_registered_operators_refuse_tensors_that_do_not_fit() -> None:
    value, weight = torch.randn(1, 4, 8, 8), torch.randn(1, 2, 9, 64)
    query, key = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 3, 3)
    registered: Any = torch.ops.san
    with pytest.raises(ValueError, match=r"weight is .*\[1, 2, 9, 4\], but it must be .*\[1, 2, 9, 64\]"):
        registered.aggregation_forward(value, weight[..., :4], [3, 1, 1, 0])
    with pytest.raises(ValueError, match=r"value is torch\.float64"):
        registered.aggregation_forward(value.double(), weight, [3, 1, 1, 0])
    with pytest.raises(ValueError, match="key is"):
        registered.pairwise_forward(query, key, query, 4, None, None, None, [], [], [3, 1, 1, 0, 0, 0, 4])
    with pytest.raises(ValueError, match="query is"):
        registered.patchwise_star(query, key, [3, 1, 1, 0])


@pytest.mark.parametrize("form", [san.PairwiseAttention, san.PatchwiseAttention])
def test_tensors_of_gamma_elsewhere_are_refused(form: Any) -> None:
    layer = form(32, 32, 3).eval()
    layer.conv_w.to("meta")
    with pytest.raises(ValueError, match="a tensor of the mapping is on meta, but it must be on cpu"):
        layer(torch.randn(1, 32, 5, 5))


def _gradients_of(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_equal_query_and_key_sit_on_the_kink_of_relu(training: bool) -> None:
    """The centre's difference is 0 exactly, and BatchNorm's first shift is 0: rounding may not push it off."""
    torch.manual_seed(0)
    layer = san.PairwiseAttention(64, 32, 3, transformations="query=key", position="none").train(training)
    x = torch.randn(1, 64, 9, 9)
    with ops.use_backend("native"):
        found = _gradients_of(copy.deepcopy(layer), x)
    with ops.use_backend("reference"):
        exact = _gradients_of(copy.deepcopy(layer).double(), x.double())
    largest = max(float(each.norm()) for each in exact)
    for got, want in zip(found, exact, strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-6 * largest


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_differences_are_taken_before_they_are_scaled(offset: float) -> None:
    case = replace(CASES["pairwise-subtraction-LRL-relative"], training=False)
    found, exact = case.build(torch.float32), case.build(torch.float64)
    for problem in (found, exact):
        with torch.no_grad():
            for name in ("query", "key"):
                problem.tensors[name].copy_((found.tensors[name] + (offset if problem is found else 0)).float())
    with ops.use_backend("native"):
        got = ops.pairwise_attention(*found.arguments, **found.options)
    with ops.use_backend("reference"):
        want = ops.pairwise_attention(*exact.arguments, **exact.options)
    assert float((got - want).norm()) <= 1e-6 * float(want.norm())


@pytest.mark.parametrize("name", ["query", "key", "value"])
@EACH_FORM
def test_nan_reaches_what_it_reaches_in_the_reference(case: Any, name: str) -> None:
    """Output, gradients and running averages."""
    if case.operator == "aggregation":
        name = "value"
    found, expected = {}, {}
    for backend, where in (("native", found), ("reference", expected)):
        problem = case.build(torch.float32)
        with torch.no_grad():
            problem.tensors[name][0, 1, 3, 3] = torch.nan
        with ops.use_backend(backend):
            y = getattr(ops, case.operator)(*problem.arguments, **problem.options)
        gradients = torch.autograd.grad(y.sum(), list(problem.tensors.values()))
        where |= {"y": y.detach(), **dict(zip(problem.tensors, gradients, strict=True)), **problem.running}
    for key, x in expected.items():
        assert torch.equal(x.isnan(), found[key].isnan()), key

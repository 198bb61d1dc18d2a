"""What the native backend promises beyond the shared suite: registration, threads, forks and refusals."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from san import ops
from san.ops import dispatch
from san.ops.cases import CASES, Problem
from san.ops.kernels.native import library

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


def test_a_kernel_called_with_wrong_sizes_refuses() -> None:
    """The library trusts nobody: a call whose arguments are not those of the kernel does not run."""
    loaded = library.load()
    assert loaded is not None
    with pytest.raises(ValueError, match="sizes"):
        loaded.call("pairwise_forward", 1, 2, 3)
    with pytest.raises(ValueError, match="sizes"):
        loaded.call("pairwise_forward", *[0] * 60)

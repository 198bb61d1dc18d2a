"""What the Triton backend promises beyond the shared suite, without a GPU: registration, layouts, refusals, code.

Kernels run in Triton's interpreter here, and are compiled for GPUs in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import san
from san import ops
from san.ops.cases import CASES
from san.ops.kernels.gpu import launch
from san.ops.kernels.native import library
from san.ops.relations import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS

pytestmark = pytest.mark.skipif(not launch.interpreting() or not launch.installed(), reason="needs Triton, interpreted")

FORMS = [CASES[name] for name in ("pairwise-subtraction-LRL-relative", "patchwise-concatenation-LRL", "aggregation")]
EACH_FORM = pytest.mark.parametrize("case", FORMS, ids=lambda case: case.operator)
ROOT = Path(__file__).parents[2]


def call(problem: Any, backend: str = "triton") -> Tensor:
    with ops.use_backend(backend):
        return getattr(ops, problem.operator)(*problem.arguments, **problem.options)


class Operator(nn.Module):
    """An operator as a module, for tracers."""

    def __init__(self, problem: Any) -> None:
        super().__init__()
        self.problem, self.rest = problem, [x for x in problem.arguments if not isinstance(x, Tensor)]

    def forward(self, *maps: Tensor) -> Tensor:
        return getattr(ops, self.problem.operator)(*maps, *self.rest, **self.problem.options)


def maps_of(problem: Any) -> list[Tensor]:
    return [x.detach() for x in problem.arguments if isinstance(x, Tensor)]


@EACH_FORM
def test_traces_whole(case: Any) -> None:
    problem = replace(case, training=False).build(torch.float32)
    maps = maps_of(problem)
    with ops.use_backend("triton"):
        expected = Operator(problem)(*maps)
        compiled = torch.compile(Operator(problem), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*maps), expected)
        program = torch.export.export(Operator(problem), tuple(maps))
    assert "san.triton_" in str(program)
    torch.testing.assert_close(program.module()(*maps), expected)


@EACH_FORM
def test_compiled_training_steps_are_eager_ones(case: Any) -> None:
    results = []
    for compiles in (False, True):
        problem = case.build(torch.float32)
        operator = Operator(problem)
        operator = torch.compile(operator, backend="aot_eager", fullgraph=True) if compiles else operator
        with ops.use_backend("triton"):
            y = operator(*[x for x in problem.arguments if isinstance(x, Tensor)])
            gradients = torch.autograd.grad(y.square().sum(), list(problem.tensors.values()))
        results.append([y.detach(), *gradients, *problem.running.values()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_operators_pass_opcheck() -> None:
    noted: list[tuple[Any, tuple[Any, ...]]] = []

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "triton" in str(function) and function not in [each for each, _ in noted]:
                noted.append((function, args))
            return function(*args, **(kwargs or {}))

    for name in ("pairwise-subtraction-LRL-relative", "patchwise-star-LRL", "patchwise-concatenation-L"):
        problem = CASES[name].build(torch.float32)
        with Note():
            call(problem).sum().backward()
    assert len(noted) == 10
    for function, args in noted:
        detached = [_detached(x) for x in args]
        torch.library.opcheck(function, tuple(detached), test_utils=("test_schema", "test_faketensor"))


def _detached(x: Any) -> Any:
    if isinstance(x, list):
        return [_detached(each) for each in x]
    return x.detach().clone() if isinstance(x, Tensor) else x


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@EACH_FORM
def test_maps_keep_their_memory_format_without_copies(case: Any, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels get are the maps themselves, and y and gradients lie as they do."""
    problem = case.build(torch.float32, channels_last=last)
    maps = [x for x in problem.arguments if isinstance(x, Tensor)][: 1 if case.operator == "aggregation" else 3]
    seen: list[bool] = []

    def laid_out(x: Tensor, wanted: bool) -> Tensor:
        y = x.contiguous(memory_format=torch.channels_last if wanted else torch.contiguous_format)
        seen.append(y.data_ptr() == x.data_ptr())
        return y

    for name in ("aggregation", "pairwise", "patchwise"):
        monkeypatch.setattr(f"san.ops.kernels.{name}.triton.laid_out", laid_out)
    y = call(problem)
    assert seen
    assert all(seen)
    assert launch.is_last(y) == last
    assert all(launch.is_last(x) == last for x in torch.autograd.grad(y.sum(), maps))


@pytest.mark.parametrize(
    ("form", "unwanted"), [("pairwise", "attend_backward_mapping"), ("patchwise", "hidden_backward_parameters")]
)
def test_frozen_mappings_cost_no_kernel(form: str, unwanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an attack needs it: running averages, and gradients of the maps alone."""
    launched: list[str] = []
    start = launch.start

    def note(kernel: Any, *rest: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        start(kernel, *rest, **options)

    monkeypatch.setattr(launch, "start", note)
    layer = san.SelfAttentionBlock(32, 3, form).eval().sam
    x = torch.randn(1, 32, 5, 5, requires_grad=True)
    found = []
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        launched.clear()
        with ops.use_backend("triton"):
            found += torch.autograd.grad(layer(x).sum(), x)
        assert (unwanted in launched) is not frozen
    assert torch.equal(*found)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name", ["pairwise-subtraction-LRL-relative", "pairwise-hadamard-LRL-absolute", "patchwise-concatenation-LRL"]
)
def test_without_gradients_it_gives_the_same(name: str, training: bool) -> None:
    """Where the position's map is one kernel, whose last bits may differ."""
    case = replace(CASES[name], training=training)
    expected = call(case.build(torch.float32)).detach()
    with torch.no_grad():
        torch.testing.assert_close(call(case.build(torch.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_autocast_hands_over_half_precision(form: str) -> None:
    network = san.SelfAttentionBlock(32, 3, form)
    x = torch.randn(2, 32, 6, 6)
    with ops.use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        y = network.sam(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    gradients = [parameter.grad for parameter in network.sam.parameters()]
    assert all(each is not None and each.dtype == torch.float32 and each.isfinite().all() for each in gradients)


def test_the_automatic_choice_does_not_interpret() -> None:
    problem = FORMS[0].build(torch.float32)
    expected = call(problem, "native" if library.load() else "tiled")
    assert torch.equal(call(FORMS[0].build(torch.float32), "auto"), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"operator": "patchwise_attention", "relation": "clique"}, "not 'clique'"),
        ({"relation_channels": 200}, "at most 128 relation channels, but there are 200"),
        ({"channels": 2048}, "at most 1024 channels in groups filled up to 16, but 2048 channels in"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    problem = replace(FORMS[0], height=2, width=2, **change).build(torch.float32)
    with pytest.raises(ValueError, match=f"backend triton cannot run this call: .*{sentence}"):
        call(problem)


@pytest.mark.parametrize("case", FORMS[:2], ids=lambda case: case.operator)
def test_a_relation_that_kernels_do_not_know_is_refused(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    relations = PAIRWISE_RELATIONS if case.operator == "pairwise_attention" else PATCHWISE_RELATIONS
    monkeypatch.setitem(relations, "own", relations[case.relation])
    with pytest.raises(ValueError, match=r"triton knows the relations .*, but not 'own'"):
        call(replace(case, relation="own").build(torch.float32))


def test_an_image_of_too_many_numbers_is_refused_in_a_sentence() -> None:
    # As large as that without the memory.
    query, value = (torch.zeros(1, 1, 1, 1).expand(1, channels, 1 << 14, 1 << 14) for channels in (4, 8))
    sentence = f"at most 2³⁰ numbers an image, but one has {1 << 31}"
    with ops.use_backend("triton"), pytest.raises(ValueError, match=sentence):
        ops.pairwise_attention(query, query, value, kernel_size=3)


def test_without_a_gpu_it_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="triton runs on GPUs, but the tensors are on cpu"):
        call(FORMS[0].build(torch.float32))


@EACH_FORM
def test_many_programs_do_what_one_does(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: few pixels a program, tiles shared out among few programs, and sums that meet afterwards."""
    case = replace(case, height=6, width=7, kernel_size=3)
    expected, gradients = _with_gradients(case)
    monkeypatch.setattr(launch, "lanes", lambda total, most: 16)
    monkeypatch.setattr(launch, "_PROGRAMS", 2)
    y, found = _with_gradients(case)
    torch.testing.assert_close(y, expected)
    # Some gradients are zero but for rounding: what BatchNorm behind takes away again.
    largest = max(float(other.abs().max()) for other in gradients)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


def _with_gradients(case: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    problem = case.build(torch.float32)
    y = call(problem)
    return y, torch.autograd.grad(y.square().sum(), list(problem.tensors.values()))


class Called(TorchDispatchMode):
    """Names of the operators of this package that are called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "san":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Makes tensors without data, also on a GPU that is not there; it is asked for what an H200 would answer."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=232448)
    )
    return FakeTensorMode()


# The first layer of patchwise γ once for the query and once for the footprint of the key.
PATCHWISE = {"triton_patchwise_hidden": 20, "triton_attend_hidden": 10}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(("form", "expected"), [("pairwise", {"triton_pairwise": 10}), ("patchwise", PATCHWISE)])
def test_a_network_on_a_gpu_takes_the_kernels_by_itself(
    form: str, training: bool, expected: dict[str, int], gpu: FakeTensorMode
) -> None:
    """In all ten attention layers of SAN10, with no configuration."""
    with gpu, torch.device("cuda"), Called() as called, torch.set_grad_enabled(training):
        network = san.create_model(f"san10_{form}").train(training)
        assert network(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    assert {name: called.names.count(name) for name in called.names} == expected


@pytest.mark.parametrize(
    ("backend", "dtype", "sentence"),
    [
        ("triton", torch.float64, "triton computes in float32, bfloat16 and float16, but a tensor is torch.float64"),
        ("native", torch.float32, "native runs on the CPU, but the tensors are on cuda:0"),
    ],
)
def test_forcing_what_cannot_run_on_a_gpu_is_refused(
    backend: str, dtype: torch.dtype, sentence: str, gpu: FakeTensorMode
) -> None:
    with gpu, torch.device("cuda"), ops.use_backend(backend):
        value, weight = torch.randn(1, 32, 8, 8, dtype=dtype), torch.randn(1, 4, 9, 64, dtype=dtype)
        with pytest.raises(ValueError, match=f"backend {backend} cannot run this call: {sentence}"):
            ops.aggregation(value, weight, kernel_size=3)


def test_gpus_with_little_shared_memory_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(shared_memory_per_block_optin=101376)
    )
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16)
    assert launch.memory_refusal(SimpleNamespace(value=on_gpu), 64) is None
    sentence = launch.memory_refusal(SimpleNamespace(value=on_gpu), 128)
    assert sentence == "triton needs 115 kB of shared memory for 128 channels in bfloat16, but this GPU has 99 kB"


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_sizes_of_images_compile_nothing_new(form: str) -> None:
    """Nor do momenta. A network in training and without gradients: all that Triton does but for launching."""
    script = f"""
import torch
from benchmarks.gpu_compile import as_on_a_gpu
from benchmarks.gpu_parts.features import compilations
from benchmarks.gpu_parts.stand_in import standing_in
from san.models import SAN
from san.ops import use_backend
network, counts = SAN((1, 0), (32, 64), (3, 3), "{form}", 5), []
with standing_in(), as_on_a_gpu(), use_backend("triton"):
    for n in range(20):
        images = torch.rand(1 + n % 5, 3, 16 + 3 * n, 17 + 5 * n)
        network.bn0.momentum = 1 / (2 + n)
        with compilations() as found, torch.autocast("cpu", torch.bfloat16):
            network.train()(images).float().sum().backward()
            with torch.no_grad():
                network.eval()(images)
        counts.append(len(found))
print(*counts)
"""
    found = subprocess.run([sys.executable, "-c", script], **_alone())
    assert found.returncode == 0, found.stderr
    first, *later = map(int, found.stdout.split())
    assert first > 20
    assert not any(later)


def test_a_rehearsal_compiles_all_that_a_step_needs() -> None:
    """Forward and, on a thread of its own as on a GPU, backward; the network stays as it is."""
    script = """
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
import torch
from benchmarks.gpu_compile import as_on_a_gpu
from benchmarks.gpu_parts.features import compilations
from benchmarks.gpu_parts.stand_in import standing_in
from san.ops.kernels.gpu.rehearsal import rehearsal
from san.fused.rehearsal import compile_kernels
from san.models import SAN
from san.ops import use_backend
network, images = SAN((1,), (32,), (3,), "patchwise", 5), torch.rand(3, 3, 20, 24)
before = {name: x.clone() for name, x in network.state_dict().items()}
with standing_in(), as_on_a_gpu(), use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
    with compilations() as first:
        compile_kernels(network, images[:2])
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert all(x.grad is None for x in network.parameters())
    with compilations() as later:
        network(images).float().sum().backward()
    submitted, submit = [], ThreadPoolExecutor.submit
    ThreadPoolExecutor.submit = lambda *arguments: (submitted.append(1), submit(*arguments))[1]
    y = SAN((1,), (64,), (3,), "patchwise", 5)(images).sum()
    with compilations() as backward, rehearsal():
        thread = Thread(target=y.backward)
        thread.start()
        thread.join()
    assert len(submitted) >= len(backward) > 5
print(len(first), len(later))
"""
    found = subprocess.run([sys.executable, "-c", script], **_alone())
    assert found.returncode == 0, found.stderr
    first, later = map(int, found.stdout.split())
    assert first > 20
    assert not later


def _alone() -> dict[str, Any]:
    """A process in which Triton compiles, from the project's root."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    return {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 280}


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Those of one layer of each SAN10, for compute capability 9.0, and none of inference spills registers."""
    report = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/gpu_compile.py", "--layers", "few", "--json", str(report)]
    found = subprocess.run(command, **_alone())
    assert report.exists(), found.stdout + found.stderr
    kernels = json.loads(report.read_text())["kernels"]
    assert {each["form"] for each in kernels} == {
        "pairwise",
        "patchwise",
        "aggregation",
        "pointwise",
        "pointwise_training",
        "gpu",
    }
    names = {"attend", "hidden", "aggregate", "products", "fold_norm", "position_map"}
    inference = [each for each in kernels if each["kernel"] in names]
    assert {each["kernel"] for each in inference} == names
    assert not any(each["stack"] for each in inference)

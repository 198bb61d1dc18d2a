"""What the kernels promise beside numbers and speed, each answered by yes or no."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_parts.clock import captured, free
from benchmarks.gpu_parts.correctness import evaluate
from benchmarks.gpu_parts.operators import step
from benchmarks.gpu_parts.scale import Scale
from san import create_model, ops
from san.errors import UserError
from san.ops.cases import CASES, SAN10_LAYERS
from san.ops.kernels.aggregation import device as aggregation
from san.ops.kernels.gpu import border, launch, statistics
from san.ops.kernels.pairwise import device as pairwise
from san.ops.kernels.patchwise import device as patchwise
from san.ops.kernels.pointwise import device as pointwise
from san.ops.kernels.pointwise_training import device as pointwise_training

__all__ = ["FEATURES", "GPU_ONLY", "compilations", "count_compilations"]


@contextmanager
def compilations() -> Generator[list[str]]:
    """Names of kernels that enter a JIT function's cache of this process inside, compiled or found on disk."""
    found: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook

    def note(*arguments: Any, **named: Any) -> Any:
        found.append(named["fn"].name)
        return before(*arguments, **named) if before else None

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def _forget_kernels() -> None:
    """Empty the JIT functions' caches in this process, whatever ran before; what is on disk stays."""
    for module in (aggregation, border, pairwise, patchwise, pointwise, pointwise_training, statistics):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()


def count_compilations(form: str, scale: Scale, device: str) -> list[dict[str, Any]]:
    """Rows of a layer of SAN10, forward and backward, and of a small network without gradients."""
    case, _ = scale.layers[f"san10-{form}-stage1"]
    network = create_model(scale.small[form]).to(device, torch.bfloat16, memory_format=torch.channels_last).eval()

    def layer(batch: int, height: int, width: int) -> Callable[[], Any]:
        sized = replace(case, height=height, width=width)
        return step(sized, batch, "training", "triton", torch.bfloat16, device)

    def inference(batch: int, height: int, width: int) -> Callable[[], Any]:
        images = torch.zeros(batch, 3, 8 * height, 8 * width, device=device, dtype=torch.bfloat16)
        return torch.no_grad()(partial(network, images))

    return [
        _compilations_over_sizes(*each, scale, device) for each in ((case.name, layer), (scale.small[form], inference))
    ]


def _compilations_over_sizes(
    name: str, prepare: Callable[[int, int, int], Callable[[], Any]], scale: Scale, device: str
) -> dict[str, Any]:
    """Variants of kernels that a call needs at its first size, and at all others after.

    `first_seconds` is how long the first call takes, which compiles or finds on disk, loads, and tunes if it tunes.
    """
    counts, seconds = [], []
    _forget_kernels()
    for size in scale.sizes:
        call = prepare(*size)
        with compilations() as found:
            start = time.perf_counter()
            call()
            free(device)
            seconds.append(time.perf_counter() - start)
        counts.append(found)
    later = [each for found in counts[1:] for each in found]
    return {
        "layer": name,
        "sizes": len(counts),
        "first": len(counts[0]),
        "first_seconds": seconds[0],
        "later": len(later),
        "right": not later and (bool(counts[0]) or launch.interpreting()),
        "names": later,
    }


class _Operators(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def chosen_without_asking(scale: Scale, device: str) -> str:
    """`san.create_model(...).cuda()` runs these kernels; interpreted ones are for tests alone."""
    for name in scale.small.values():
        model = create_model(name).to(device).eval()
        with torch.no_grad(), _Operators() as seen:
            model(torch.zeros(2, 3, 28, 28, device=device))
        ran = any("san.triton" in each for each in seen.names)
        _expect(ran == (device == "cuda"), f"{name} {'runs' if ran else 'does not run'} them")
    return "by networks on the GPU" if device == "cuda" else "interpreted kernels are not, as it must be"


def refused_in_a_sentence(scale: Scale, device: str) -> str:
    """A call that they cannot run says why, if they are forced."""
    problem = CASES["patchwise-clique-LRL"].build(torch.float32, device)
    try:
        with ops.use_backend("triton"):
            ops.patchwise_attention(*problem.arguments, **problem.options)
    except UserError as refusal:
        return str(refusal)
    raise AssertionError("the relation clique was not refused")


def repeatable(scale: Scale, device: str) -> str:
    """Two runs give the same bits, output, gradients and running averages."""
    cases = [case for case, _ in scale.layers.values()]
    for case in cases:
        first, second = (evaluate(case.build(torch.bfloat16, device, channels_last=True), "triton") for _ in range(2))
        differing = [key for key in first if not torch.equal(first[key], second[key])]
        _expect(not differing, f"{case.name}: {', '.join(differing)} differ")
    return f"{len(cases)} layers, forward and backward"


def captured_by_graphs(scale: Scale, device: str) -> str:
    """A training step of a network's attention block, replayed on other images, gives what it gives without a graph."""
    for form in scale.sans:
        problem = SAN10_LAYERS[f"san10-{form}-stage1"].build(torch.bfloat16, device, channels_last=True)
        maps = problem.arguments[:3]
        found: list[Tensor] = []

        def train(problem: Any = problem, found: list[Tensor] = found) -> None:
            with ops.use_backend("triton"):
                y = getattr(ops, problem.operator)(*problem.arguments, **problem.options)
            found[:] = [y, *torch.autograd.grad(y, list(problem.tensors.values()), torch.ones_like(y))]

        graph = captured(train)
        replayed = list(found)
        with torch.no_grad():
            for x in maps:
                x.copy_(x.flip(2, 3))
        graph.replay()
        kept = [x.clone() for x in replayed]
        train()
        same = all(torch.equal(one, other) for one, other in zip(kept, found, strict=True))
        _expect(same, f"{form}: a replay differs from an eager step")
    for name in scale.sans.values():
        _expect(_replays(name, scale.resolution, device), f"{name} without gradients: a replay differs")
    return "a layer of each form, forward and backward, and networks without gradients, bit for bit"


@torch.no_grad()
def _replays(name: str, side: int, device: str) -> bool:
    """Whether a network's graph gives on other images what it gives without one."""
    network = _random_norms(create_model(name)).to(device, torch.bfloat16, memory_format=torch.channels_last).eval()
    images = torch.rand(2, 3, side, side, device=device, dtype=torch.bfloat16)
    found: list[Tensor] = []

    def infer() -> None:
        found[:] = [network(images)]

    graph = captured(infer)
    (replayed,) = found
    images.copy_(images.flip(2))
    graph.replay()
    kept = replayed.clone()
    infer()
    return torch.equal(kept, found[0])


def _random_norms(model: nn.Module) -> nn.Module:
    """The network with every BatchNorm's tensors random: at first they hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for x in (part.bias, part.running_mean):
                nn.init.normal_(x, std=0.2, generator=generator)
            for x in (part.weight, part.running_var):
                nn.init.uniform_(x, 0.5, 1.5, generator=generator)
    return model


def as_defined(scale: Scale, device: str) -> str:
    """Features of networks without gradients, and gradients of a training step, are at most 1.5 times as far from
    float64 as the definition in the same dtype."""
    said = []
    for name in scale.sans.values():
        model = _random_norms(create_model(name, num_classes=10)).to(device, memory_format=torch.channels_last)
        images = torch.rand(2, 3, 64, 64, device=device)
        for what, run in (("features", _features), ("gradients", _gradients)):
            exact = run(model, images, torch.float64, "reference")
            near, far = (
                float((run(model, images, torch.bfloat16, each) - exact).norm() / exact.norm())
                for each in ("auto", "reference")
            )
            _expect(near <= 1.5 * far, f"{name}, {what}: {near:.2g} off, but the definition {far:.2g}")
            said.append(f"{name} {what} {near:.1e} against {far:.1e}")
    return ", ".join(said)


@torch.no_grad()
def _features(model: Any, images: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    with ops.use_backend(backend):
        return copy.deepcopy(model).eval().to(dtype).forward_features(images.to(dtype)).double()


def _gradients(model: Any, images: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Of all parameters, in training mode, under autocast where `dtype` is a half one."""
    model, half = copy.deepcopy(model), dtype is not torch.float64
    model = model if half else model.double()
    with ops.use_backend(backend):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            y = model.forward_features(images if half else images.double())
        y.double().square().mean().backward()
    return torch.cat([each.grad.double().flatten() for each in model.parameters() if each.grad is not None])


def trains_in_mixed_precision(scale: Scale, device: str) -> str:
    """Steps in float16 with a scaled loss: finite loss and parameters, and every weight moves.

    Biases may stay: BatchNorm takes those of query and key away again, and softmax γ's last one.
    """
    for name in scale.small.values():
        model = create_model(name, num_classes=10).to(device, memory_format=torch.channels_last)
        before = {key: x.detach().clone() for key, x in model.named_parameters()}
        losses = _mixed_steps(model, device)
        still = [key for key, x in model.named_parameters() if key.endswith("weight") and torch.equal(x, before[key])]
        broken = [key for key, x in model.named_parameters() if not bool(x.isfinite().all())]
        _expect(bool(torch.tensor(losses).isfinite().all()), f"{name}: losses {losses}")
        _expect(not broken and not still, f"{name}: not finite: {broken}; not moved: {still}")
    return "float16, GradScaler, SGD"


def _mixed_steps(model: nn.Module, device: str, steps: int = 6) -> list[float]:
    """Losses of a few steps on one batch. The first scales may be too large, which the scaler finds out by itself."""
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), torch.amp.GradScaler(device)
    images = torch.rand(4, 3, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4, device=device)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses


def _expect(right: bool, sentence: str) -> None:
    if not right:
        raise AssertionError(sentence)


FEATURES: dict[str, Callable[[Scale, str], str]] = {
    "networks as defined": as_defined,
    "chosen without asking": chosen_without_asking,
    "refused in a sentence": refused_in_a_sentence,
    "two runs, the same bits": repeatable,
    "CUDA graphs": captured_by_graphs,
    "mixed precision": trains_in_mixed_precision,
}

GPU_ONLY = ("CUDA graphs",)

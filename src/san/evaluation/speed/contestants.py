"""What takes part in a round: a network ready to run a task, in one of the variants that may be its fastest.

A network gets every advantage that costs its user nothing in accuracy: both memory formats, compilation, and, in
inference of networks without attention layers, BatchNorm folded into the convolutions (ours fold by themselves).
Legend: B batch, S side of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from san.checkpoints import load_model
from san.errors import UserError
from san.evaluation.speed.attention import AttentionOperator, attention_operators, has_attention
from san.models import create_model, list_models
from san.ops import use_backend

__all__ = [
    "AttentionLayers",
    "Runner",
    "Task",
    "Variant",
    "build_network",
    "draw",
    "fold_batch_norm",
    "prepare",
    "variants",
]


@dataclass(frozen=True)
class Task:
    """What every contestant of a round does: `mode` inference or training on [batch, 3, resolution, resolution]."""

    mode: str
    batch: int
    resolution: int
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.resolution} px, {self.dtype}"

    @property
    def trains(self) -> bool:
        """Whether the step has a backward pass."""
        return self.mode == "training"

    def precision(self, autocast: bool) -> AbstractContextManager[Any]:
        """Autocast to the task's dtype, if wanted."""
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.dtype), enabled=autocast)


@dataclass(frozen=True)
class Variant:
    """One way of running a network. Without `autocast` its weights and images are cast to the task's dtype."""

    channels_last: bool
    compiled: bool
    autocast: bool

    def __str__(self) -> str:
        words = ["compiled" if self.compiled else "eager", "channels-last" if self.channels_last else "contiguous"]
        return ", ".join([*words, *(["autocast"] if self.autocast else [])])

    @property
    def memory_format(self) -> torch.memory_format:
        """As PyTorch names it."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def variants(task: Task, compiled: bool) -> list[Variant]:
    """The variants to choose from: both memory formats, eager and (if `compiled`) compiled.

    In lower precision training uses autocast, which keeps weights in float32; inference tries that and casting.
    """
    autocast = [False] if task.dtype == "float32" else [True] if task.trains else [True, False]
    return [
        Variant(channels_last, compile, cast)
        for compile in ([False, True] if compiled else [False])
        for channels_last in (False, True)
        for cast in autocast
    ]


@dataclass(frozen=True)
class Runner:
    """A network with its images and labels: calling it does one step of the task.

    A training step sets the gradients to None, then runs forward, cross-entropy with random labels, and backward. The
    optimiser's step is left out: it costs the same for every parameter of every network.
    """

    model: nn.Module
    network: Callable[[Tensor], Tensor]
    task: Task
    variant: Variant
    backend: str
    images: Tensor
    labels: Tensor
    operators: list[AttentionOperator]
    folded: bool

    def forward(self) -> Tensor:
        """Logits [B, classes], or in training the loss."""
        with use_backend(self.backend), self.task.precision(self.variant.autocast):
            logits = self.network(self.images)
            return F.cross_entropy(logits, self.labels) if self.task.trains else logits

    def __call__(self) -> None:
        """One step."""
        if not self.task.trains:
            with torch.inference_mode():
                self.forward()
            return
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()


class AttentionLayers:
    """The operator calls of all attention layers of a network in inference, with query, key and value given.

    The maps are random, in the dtype and memory format of the runner that they are taken from.
    """

    def __init__(self, runner: Runner) -> None:
        task, variant = runner.task, runner.variant
        dtype = getattr(torch, task.dtype)
        self.backend = runner.backend
        self.calls = [
            partial(operator, *operator.maps(task.batch, dtype, task.device, variant.channels_last))
            for operator in runner.operators
        ]

    def __call__(self) -> None:
        """Run them all, one after the other."""
        with torch.inference_mode(), use_backend(self.backend):
            for call in self.calls:
                call()


def prepare(network: str, backend: str, task: Task, variant: Variant) -> Runner:
    """Build a network for a task and run one step of it, so that everything lazy is done.

    Args:
        network: A name or a checkpoint.
        backend: Which backend its attention layers use.
        task: What it does.
        variant: How.

    Raises:
        UserError: It does not take these images, or the backend refuses. Of a compiled variant also `RuntimeError`,
            where it does not compile.
    """
    model = build_network(network)
    model.train(task.trains)
    operators = attention_operators(model, task.resolution) if has_attention(model) else []
    if folds := not (task.trains or operators):
        model, folds = fold_batch_norm(model)
    dtype = torch.float32 if variant.autocast else getattr(torch, task.dtype)
    model.to(device=task.device, dtype=dtype).to(memory_format=variant.memory_format)
    # Constants folded into the code are an advantage that inference alone can have.
    options: dict[str, Any] = {} if task.trains else {"freezing": True}
    compiled: Any = torch.compile(model, dynamic=False, options=options) if variant.compiled else model
    images, labels = draw(model, task, task.resolution, dtype, variant)
    runner = Runner(model, compiled, task, variant, backend, images, labels, operators, folds)
    try:
        runner()
    except (RuntimeError, ValueError) as problem:
        if isinstance(problem, UserError) or variant.compiled:
            raise
        raise UserError(f"{network} does not run {task}: {' '.join(str(problem).split())}") from problem
    return runner


def draw(model: nn.Module, task: Task, resolution: int, dtype: torch.dtype, variant: Variant) -> tuple[Tensor, Tensor]:
    """Random images [B, 3, S, S] and labels [B]."""
    images = torch.rand(task.batch, 3, resolution, resolution, device=task.device).to(dtype)
    labels = torch.randint(getattr(model, "num_classes", 1000), (task.batch,), device=task.device)
    return images.to(memory_format=variant.memory_format), labels


def build_network(network: str) -> nn.Module:
    """A network by the name that `san.create_model` or timm knows, with random weights, or from a checkpoint."""
    if Path(network).exists():
        return load_model(network)
    if network not in list_models() and timm.is_model(network):
        return timm.create_model(network)
    return create_model(network)


def fold_batch_norm(model: nn.Module) -> tuple[nn.Module, bool]:
    """A copy whose BatchNorms are part of the convolutions before them: w' = w·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε) + β.

    The model must be in eval mode. One that torch.fx cannot follow comes back as it is, with False.
    """
    try:
        return fuse(model), True
    except (TraceError, TypeError, RuntimeError):
        return model, False

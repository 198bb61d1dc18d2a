"""What `san benchmark` is asked to measure, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm

from san.errors import UserError
from san.models import create_model, list_models
from san.ops import use_backend

__all__ = ["DTYPES", "MODES", "Settings"]

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("inference", "training")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    `models` (names or checkpoints) are compared with `baseline` for every batch size, resolution (side of the square
    image), dtype and mode, on every backend. `rounds` count after a pre-selection of each network's fastest variant;
    `compile` lets the baseline be compiled too, `compile_models` the others. `peak` starts a process of its own for
    every network to see its peak memory. `threads` None leaves PyTorch's number. `networks`, `operators` and `sweep`
    say which tables to measure.

    Raises `UserError` for an unknown name and for numbers below 1.
    """

    models: tuple[str, ...] = ("san10_pairwise", "san10_patchwise")
    baseline: str = "baseline_resnet26"
    batches: tuple[int, ...] = (1, 4)
    resolutions: tuple[int, ...] = (224,)
    dtypes: tuple[str, ...] = ("float32",)
    backends: tuple[str, ...] = ("auto",)
    modes: tuple[str, ...] = MODES
    rounds: int = 15
    threads: int | None = None
    device: str = "cpu"
    compile: bool = True
    compile_models: bool = False
    peak: bool = True
    networks: bool = True
    operators: bool = False
    sweep: bool = False

    def __post_init__(self) -> None:
        numbers = {"batch": self.batches, "resolution": self.resolutions, "rounds": (self.rounds,)}
        numbers["threads"] = () if self.threads is None else (self.threads,)
        for name, values in numbers.items():
            if wrong := [value for value in values if value < 1]:
                raise UserError(f"{name} is {wrong[0]}, but it must be at least 1")
        for name, values, known in (("dtype", self.dtypes, DTYPES), ("mode", self.modes, MODES)):
            if wrong := [value for value in values if value not in known]:
                raise UserError(f"{name} {wrong[0]!r} is unknown; choose among: {', '.join(known)}")
        if not self.device.startswith(("cpu", "cuda")):
            raise UserError(f"device is {self.device}, but time and memory are measured on cpu or cuda only")
        for backend in self.backends:
            with use_backend(backend):
                pass
        for network in (self.baseline, *self.models):
            if not (Path(network).exists() or network in list_models() or timm.is_model(network)):
                create_model(network)
        if not (self.networks or self.operators or self.sweep):
            raise UserError("there is nothing to measure: leave networks on, or ask for operators or sweep")

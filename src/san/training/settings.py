"""The settings of a run, which are the arguments of `san.training.train`: completing, continuing and checking them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers

from san.errors import UserError
from san.training.folder import RunFolder

__all__ = ["PRECISIONS", "check", "continued", "started"]

PRECISIONS = {"32": "32-true", "64": "64-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}

# What a continued run may be given anew, because it belongs to the machine or its disk and not to the experiment.
OF_THE_MACHINE = (
    "data",
    "max_broken",
    "workers",
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "checkpoint_minutes",
)

# Each setting's range: a test, and what would be right.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda value: value >= 1, "at least 1"),
    "batch_size": (lambda value: value >= 1, "at least 1"),
    "accumulate": (lambda value: value >= 1, "at least 1"),
    "learning_rate": (lambda value: value > 0, "above 0"),
    "weight_decay": (lambda value: value >= 0, "0 or more"),
    "warmup_epochs": (lambda value: value >= 0, "0 or more"),
    "label_smoothing": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "mixup": (lambda value: value >= 0, "0 or more"),
    "cutmix": (lambda value: value >= 0, "0 or more"),
    "drop_path": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "ema_decay": (lambda value: value is None or 0 < value < 1, "between 0 and 1"),
    "image_size": (lambda value: value is None or value >= 1, "at least 1"),
    "validation_share": (lambda value: 0 <= value < 1, "from 0 to below 1"),
    "max_broken": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "seed": (lambda value: value >= 0, "0 or more"),
    "workers": (lambda value: value is None or value >= 0, "0 or more"),
    "checkpoint_minutes": (lambda value: value >= 0, "0 or more"),
}


def started(settings: SimpleNamespace) -> SimpleNamespace:
    """Settings of a new run, complete: a free run folder, and files by names that hold in any working directory."""
    given = dict(vars(settings))
    for name in ("data", "checkpoint"):
        if given[name] is not None and Path(given[name]).exists():
            given[name] = str(Path(given[name]).absolute())
    if given["learning_rate"] is None:
        # Chosen by the validation images of the digits; larger networks were not tried with as much.
        given["learning_rate"] = 5e-3 if given["model"].startswith("san4") else 3e-3
    given["precision"] = str(given["precision"])
    given["crop_scale"] = None if given["crop_scale"] is None else list(given["crop_scale"])
    given["out"] = str(given["out"] or _free_folder(f"{Path(given['data']).name}-{given['model']}"))
    return SimpleNamespace(**given)


def _free_folder(name: str) -> Path:
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def continued(settings: SimpleNamespace, function: Callable[..., Any]) -> SimpleNamespace:
    """Settings of the run that `settings.resume` names; raises `UserError` where others were given with it."""
    stored = RunFolder(settings.resume).settings()
    parameters = inspect.signature(function).parameters
    complete = {name: stored.get(name, parameter.default) for name, parameter in parameters.items()}
    for name, value in vars(settings).items():
        same = value == parameters[name].default or str(value) == str(complete[name])
        if same or name in ("resume", "out"):
            continue
        if name not in OF_THE_MACHINE:
            option = name.replace("_", "-")
            raise UserError(
                f"a continued run keeps its settings, and that of {settings.resume} has {option} {complete[name]}: "
                f"leave --{option} {value} away or start a new run"
            )
        complete[name] = value
    return SimpleNamespace(**{**complete, "resume": settings.resume, "out": str(settings.resume)})


def check(settings: SimpleNamespace) -> None:
    """Raise `UserError` for the first setting that no run could work with."""
    for name, (fits, right) in RANGES.items():
        value = getattr(settings, name)
        if not fits(value):
            raise UserError(f"--{name.replace('_', '-')} must be {right}, not {value}")
    if settings.optimizer not in list_optimizers():
        raise UserError(
            f"optimizer {settings.optimizer!r} is unknown; timm has {', '.join(map(str, list_optimizers()))}"
        )
    _check_optimizer_works(settings)
    if settings.precision not in PRECISIONS:
        raise UserError(f"precision {settings.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    on_cpu = settings.accelerator == "cpu" or not torch.cuda.is_available()
    if settings.strategy.startswith("fsdp") and on_cpu:
        raise UserError("strategy fsdp needs a GPU; on the CPU use ddp")
    if settings.strategy.startswith("fsdp") and settings.ema_decay:
        raise UserError("--ema-decay does not go together with strategy fsdp, which holds no whole network; use ddp")
    if settings.precision == "16-mixed" and on_cpu and settings.accelerator in ("cpu", "auto"):
        raise UserError("precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32")


def _check_optimizer_works(settings: SimpleNamespace) -> None:
    """Some of timm's optimisers need another package or a GPU, and say so only when made."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        create_optimizer_v2([parameter], opt=settings.optimizer, lr=settings.learning_rate, momentum=settings.momentum)
    except Exception as error:
        raise UserError(f"optimizer {settings.optimizer} does not work here: {error}") from error

"""What `san robustness` measures: several networks side by side on the same images."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from san.errors import UserError
from san.evaluation.robustness.attack import Attack, attack_accuracy
from san.evaluation.robustness.checks import gradient_checks
from san.evaluation.robustness.inputs import LabelledImages
from san.evaluation.robustness.rotation import rotation_accuracy
from san.evaluation.speed.machine import describe_machine, describe_versions

__all__ = ["AIMS", "CURVE", "Settings", "measure"]

AIMS = ("untargeted", "targeted")
CURVE = 50
"""Iterations up to which a curve goes."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    `rotation` asks for the five views and the `angles` (degrees, clockwise); `aims` name the attacks, none of them
    for none; tables show the `iterations`, and with `curve` the attacks go on to `CURVE`. The rest is as in `Attack`,
    and `checks` as in `gradient_checks`.

    Raises `UserError` for an unknown aim, values out of range, and where nothing is to be measured.
    """

    rotation: bool = True
    angles: tuple[float, ...] = ()
    aims: tuple[str, ...] = AIMS
    epsilon: float = 8 / 255
    step: float = 2 / 255
    iterations: tuple[int, ...] = (2, 4)
    curve: bool = False
    random_start: bool = False
    restarts: int = 1
    seed: int = 0
    checks: bool = True
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        if wrong := [aim for aim in self.aims if aim not in AIMS]:
            raise UserError(f"attack {wrong[0]!r} is unknown; choose among: {', '.join(AIMS)}")
        if wrong := [angle for angle in self.angles if not math.isfinite(angle)]:
            raise UserError(f"an angle is {wrong[0]}, but it must be a number of degrees")
        if not self.iterations or min(self.iterations) < 1:
            raise UserError(f"iterations are {list(self.iterations)}, but give at least one, and each at least 1")
        if not (self.rotation or self.aims):
            raise UserError("there is nothing to measure: leave rotation on, or ask for an attack")
        self.attack(AIMS[0])

    def attack(self, aim: str) -> Attack:
        """The attack with this aim that serves all `iterations`."""
        return Attack(
            self.epsilon,
            self.step,
            max(*self.iterations, CURVE if self.curve else 1),
            aim == "targeted",
            self.random_start,
            self.restarts,
            self.seed,
            self.loss,
        )


def measure(models: Mapping[str, nn.Module], examples: LabelledImages, settings: Settings) -> dict[str, Any]:
    """Measure what `settings` ask for, of every model by its name.

    The result is plain data for JSON: `date`, `machine`, `versions`, `settings`, `data` (what the images are called),
    `images` (how many were judged), `broken` (names of those that could not be read), `checks` (see
    `gradient_checks`), and `models`, rows of `model`, `rotation` (`views` and `angles` as `rotation_accuracy`, None if
    not asked for) and `attacks`, for every aim what `attack_accuracy` gives, after every number of iterations.

    Args:
        models: As `san.create_model` or `san.checkpoints.load_model` give them, all on one device.
        examples: What to judge them by.
        settings: What to measure, and how.

    Raises:
        UserError: A model does not know the images' classes, the images have no labels, or cannot be read.
    """
    rows = [_row(name, model, examples, settings) for name, model in models.items()]
    checked = gradient_checks(models, examples, settings.attack(AIMS[0])) if settings.checks and settings.aims else []
    device = str(next(next(iter(models.values())).parameters()).device)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "settings": asdict(settings),
        "data": examples.name,
        "images": len(examples.images) - len(examples.broken),
        "broken": examples.broken.names,
        "models": rows,
        "checks": checked,
    }


def _row(name: str, model: nn.Module, examples: LabelledImages, settings: Settings) -> dict[str, Any]:
    try:
        rotation = rotation_accuracy(model, examples, settings.angles) if settings.rotation else None
        attacks = {aim: attack_accuracy(model, examples, settings.attack(aim)) for aim in settings.aims}
    except UserError as problem:
        raise UserError(f"{name} cannot be judged: {problem}") from problem
    return {"model": name, "rotation": rotation, "attacks": attacks}

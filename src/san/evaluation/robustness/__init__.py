"""How a network fares on images that it was not trained for: rotated, turned upside down, or attacked.

`measure` does all that `Settings` ask for, several networks side by side; its parts serve alone as well:
`rotation_accuracy` and `rotate` for rotation, `attack_accuracy`, `attack_images` and `pgd` for attacks, and
`gradient_checks` to see whether an attack meets gradients that are worth following. Attacks see pixels in [0, 1]:
`PixelModel` holds the network's normalisation. Experiments of the paper's section 5.
"""

from __future__ import annotations

from san.evaluation.robustness.attack import (
    LOSSES,
    Attack,
    Attacked,
    Iterate,
    attack_accuracy,
    attack_images,
    frozen,
    margin,
    pgd,
    random_start,
    wrong_labels,
)
from san.evaluation.robustness.checks import gradient_checks
from san.evaluation.robustness.inputs import LabelledImages, PixelModel, Progress, silently, spread
from san.evaluation.robustness.measuring import Settings, measure
from san.evaluation.robustness.rotation import VIEWS, rotate, rotation_accuracy, turn

__all__ = [
    "LOSSES",
    "VIEWS",
    "Attack",
    "Attacked",
    "Iterate",
    "LabelledImages",
    "PixelModel",
    "Progress",
    "Settings",
    "attack_accuracy",
    "attack_images",
    "frozen",
    "gradient_checks",
    "margin",
    "measure",
    "pgd",
    "random_start",
    "rotate",
    "rotation_accuracy",
    "silently",
    "spread",
    "turn",
    "wrong_labels",
]

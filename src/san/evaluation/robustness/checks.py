"""Whether an attack meets gradients that are worth following: a network that hides them only looks robust.

Three signs of hidden gradients (Athalye, Carlini, Wagner, 2018): more iterations do not raise the loss, an attack
without a bound does not always succeed, and images made against another network do more harm than its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import nn

from san.evaluation.robustness.attack import Attack, attack_accuracy, attack_images
from san.evaluation.robustness.inputs import LabelledImages, PixelModel, percent

__all__ = ["CHECKED", "gradient_checks"]

CHECKED = 128
"""How many images the checks attack, at most."""
UNBOUNDED = Attack(epsilon=1.0, step=1 / 8, iterations=20)
"""Pixels may become anything, and get there in 8 of the 20 iterations."""
ABOUT_ZERO = 1.0
"""Percent of the images that may still be classified right then."""
DIP = 0.01
"""Share by which the loss may fall in one iteration: once the bound is reached it only trembles."""


def gradient_checks(
    models: Mapping[str, nn.Module], examples: LabelledImages, attack: Attack | None = None
) -> list[dict[str, Any]]:
    """Check that gradients are not masked, by untargeted attacks on at most `CHECKED` of the images.

    Each network is attacked as `attack` says, in one run; then without a bound; and then with the images made against
    each other network that sees the same pixels, which must not do more harm than those made against itself.

    Returns:
        Rows of `check` ("loss", "large epsilon", "transfer"), `model`, `holds` (None where there was nothing to
        compare), a `sentence`, and its numbers: `losses` after 0 to N iterations, `top1` in percent, or `source`,
        `transfer` and `white_box` (success in percent).

    Raises:
        UserError: As `LabelledImages.batches`.
    """
    attack, few = replace(attack or Attack(), targeted=False, restarts=1), examples.some(CHECKED)
    rows = [_loss(name, model, few, attack) for name, model in models.items()]
    rows += [_large_epsilon(name, model, few, attack.loss) for name, model in models.items()]
    networks = {name: PixelModel(model) for name, model in models.items()}
    harm = {source: _harm(source, networks, few, attack) for source in networks}
    pairs = [(source, target) for target in networks for source in networks if source != target]
    changes = bool(attack.epsilon * attack.step)
    return rows + [_transfer(source, target, harm, changes) for source, target in pairs if target in harm[source]]


def _loss(name: str, model: nn.Module, examples: LabelledImages, attack: Attack) -> dict[str, Any]:
    losses = [row["loss"] for row in attack_accuracy(model, examples, attack)["rows"]]
    result = {"check": "loss", "model": name, "losses": losses}
    if None in losses:
        return {**result, "holds": None, "sentence": "no image has a finite loss"}
    grows = losses[-1] > losses[0] and all(later >= earlier - DIP * abs(earlier) for earlier, later in pairwise(losses))
    # Nothing can grow where no pixel may change.
    holds = grows if attack.epsilon * attack.step else None
    sentence = f"loss from {losses[0]:.3g} to {losses[-1]:.3g} in {attack.iterations} iterations"
    if holds is False and losses[-1] > losses[0]:
        sentence += ", but it falls in between"
    return {**result, "holds": holds, "sentence": sentence}


def _large_epsilon(name: str, model: nn.Module, examples: LabelledImages, loss: str) -> dict[str, Any]:
    top1 = attack_accuracy(model, examples, replace(UNBOUNDED, loss=loss))["rows"][-1]["top1"]
    holds = top1 <= ABOUT_ZERO
    sentence = f"top-1 {top1:.2f} % where pixels may become anything"
    if not holds and loss != "margin":
        sentence += "; try the loss margin, whose gradient stays where softmax is saturated"
    return {"check": "large epsilon", "model": name, "holds": holds, "sentence": sentence, "top1": top1}


def _harm(
    source: str, networks: Mapping[str, PixelModel], examples: LabelledImages, attack: Attack
) -> dict[str, float | None]:
    """Success, in percent, of images made against `source` on every network that sees the same pixels."""
    targets = {name: network for name, network in networks.items() if _view(network) == _view(networks[source])}
    fooled, right = dict.fromkeys(targets, 0), dict.fromkeys(targets, 0)
    if len(targets) < 2:
        return {}
    for found in zip(*(examples.batches(network, "transfer") for network in targets.values()), strict=True):
        # Each network has its own numbers for the classes.
        batches = dict(zip(targets, found, strict=True))
        own = batches[source]
        images = attack_images(networks[source], own.images, own.labels, attack, own.indices.tolist()).images
        for name, network in targets.items():
            is_right = network.classes(batches[name].images) == batches[name].labels
            right[name] += int(is_right.sum())
            fooled[name] += int((is_right & (network.classes(images) != batches[name].labels)).sum())
    return {name: percent(fooled[name], right[name]) for name in targets}


def _view(network: PixelModel) -> dict[str, Any]:
    """What decides which pixels a network sees of an image."""
    reading = network.preprocessing
    size = {"input_size": tuple(reading["input_size"])}
    return {key: reading[key] for key in ("interpolation", "crop_pct", "crop_mode")} | size


def _transfer(
    source: str, target: str, harm: Mapping[str, Mapping[str, float | None]], changes: bool
) -> dict[str, Any]:
    transfer, white_box = harm[source][target], harm[target][target]
    row = {"check": "transfer", "model": target, "source": source, "transfer": transfer, "white_box": white_box}
    if transfer is None or white_box is None:
        return {**row, "holds": None, "sentence": "no image was classified right at first"}
    sentence = f"success {transfer:.2f} % with the images made against {source}, {white_box:.2f} % with its own"
    return {**row, "holds": transfer <= white_box if changes else None, "sentence": sentence}

"""Everything about invariance that is measured of trained networks, side by side on the same images."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Mapping
from typing import Any

from torch import nn

from san.errors import UserError
from san.evaluation.invariance.networks import in_random_order, measure_network
from san.evaluation.invariance.operators import measure_operators, unplaced
from san.evaluation.robustness import LabelledImages, PixelModel
from san.evaluation.speed.machine import describe_machine, describe_versions
from san.layers import PairwiseAttention

__all__ = ["FEW", "measure"]

FEW = 16
"""How many images the operators see: they are measured in float64, and exact or not on any of them."""


def measure(models: Mapping[str, nn.Module], examples: LabelledImages) -> dict[str, Any]:
    """Measure what networks, and the operators in them, are invariant to.

    The result is plain data for JSON: `date`, `machine`, `versions`, `data` (what the images are called), `images`
    (how many were judged), `broken` (names of those that could not be read), and `networks`, rows of `network` (its
    name), `views` (rows as `measure_network` gives them), `operators` (rows as `measure_operators` gives them, on the
    first `FEW` images), and `unplaced`: the same of pairwise operators whose relative position was taken away, none
    where there is none.

    Args:
        models: As `san.create_model` or `san.checkpoints.load_model` give them.
        examples: What to judge them by.

    Raises:
        UserError: A model does not know the images' classes, the images have no labels, cannot be read, or are fewer
            than two.
    """
    if len(examples.images) < 2:
        raise UserError("one image has none to be compared with; give at least two")
    mixed = in_random_order(examples)
    rows = [_row(name, model, mixed) for name, model in models.items()]
    device = str(next(next(iter(models.values())).parameters()).device)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "data": examples.name,
        "images": len(mixed.images) - len(mixed.broken),
        "broken": mixed.broken.names,
        "networks": rows,
    }


def _row(name: str, model: nn.Module, examples: LabelledImages) -> dict[str, Any]:
    network = PixelModel(model)
    pixels = network.normalise(next(examples.some(FEW).batches(network)).images)
    without = _without_position(model)
    return {
        "network": name,
        "views": measure_network(model, examples),
        "operators": measure_operators(model, pixels),
        "unplaced": [] if without is None else measure_operators(without, pixels),
    }


def _without_position(model: nn.Module) -> nn.Module | None:
    """A copy in which relative position says nothing; None where there is none."""
    changed = copy.deepcopy(model)
    placed = {
        name: part
        for name, part in changed.named_modules()
        if isinstance(part, PairwiseAttention) and part.position == "relative"
    }
    for name, part in placed.items():
        changed.set_submodule(name, unplaced(part))
    return changed if placed else None

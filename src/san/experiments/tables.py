"""The paper's comparisons as data: what is compared in each table, and on what at each scale.

A variant is one base network with an option or two changed; what two tables have in common is one and the same variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from san.evaluation.cost import COMPARED
from san.weights import NETWORKS

__all__ = ["REPORTED", "SCALES", "TABLES", "Scale", "Table", "Variant"]

FORMS = ("pairwise", "patchwise")


@dataclass(frozen=True)
class Variant:
    """One row: `network` is a name, or pairwise or patchwise for the scale's base network of that form.

    `options` are what `create_model` is told besides; `footprint` is k of all stages but the first.
    """

    label: str
    network: str
    options: Mapping[str, Any] = field(default_factory=dict)
    footprint: int | None = None

    def resolve(self, scale: Scale) -> tuple[str, dict[str, Any]]:
        """Name and options for `create_model`; options that change nothing are left out."""
        name = f"{scale.base}_{self.network}" if self.network in FORMS else self.network
        options = dict(self.options)
        if scale.small_images and not name.startswith("san4"):
            options["small_images"] = True
        usual = list(NETWORKS.get(name.partition("_")[0], {}).get("kernels", ()))
        kernels = [*usual[:1], *[self.footprint] * (len(usual) - 1)]
        if self.footprint is not None and kernels != usual:
            options["kernels"] = kernels
        return name, options


@dataclass(frozen=True)
class Table:
    """One of the paper's comparisons; `measures` is accuracy, rotation or pgd."""

    title: str
    question: str
    variants: tuple[Variant, ...]
    measures: str = "accuracy"


@dataclass(frozen=True)
class Scale:
    """What the tables are trained on: images, the base network, and how `train` is called.

    With `small_images`, networks of five stages halve their maps three times instead of five.
    """

    summary: str
    data: str | None
    base: str
    small_images: bool
    settings: Mapping[str, Any]


def _label(name: str) -> str:
    return name.removeprefix("baseline_").replace("resnet", "ResNet").replace("san", "SAN").replace("_", " ")


def _of_both_forms(option: str, values: Mapping[str, Any]) -> tuple[Variant, ...]:
    """A row for every value of an option, of both forms; None leaves the default."""
    return tuple(
        Variant(f"{form}, {value}", form, {} if given is None else {option: given})
        for form in FORMS
        for value, given in values.items()
    )


_COMPARED = tuple(Variant(_label(name), name) for name in COMPARED)
_REDUCED = {"value_reduction": 4, "relation_reduction": 4}

TABLES: dict[str, Table] = {
    "main": Table(
        "Networks", "Do self-attention networks match convolutional ones of the same depth at less cost?", _COMPARED
    ),
    "scalar": Table(
        "Scalar and vector attention",
        "Is a weight for every group of channels better than one weight for all?",
        (
            Variant("scalar", "pairwise", {"attention": "scalar"}),
            Variant("pairwise", "pairwise"),
            Variant("patchwise", "patchwise"),
        ),
    ),
    "relation": Table(
        "Relation",
        "How should query and key be compared?",
        (
            Variant("pairwise, subtraction", "pairwise"),
            Variant("pairwise, summation", "pairwise", {"relation": "summation"}),
            Variant("pairwise, hadamard", "pairwise", {"relation": "hadamard"}),
            Variant("pairwise, concatenation", "pairwise", {"relation": "concatenation"}),
            Variant("pairwise, dot", "pairwise", {"relation": "dot"}),
            Variant("patchwise, concatenation", "patchwise"),
            Variant("patchwise, star", "patchwise", {"relation": "star"}),
            Variant("patchwise, clique", "patchwise", {"relation": "clique"}),
        ),
    ),
    "mapping": Table(
        "Mapping",
        "How many linear layers should lead from the relation to the weights?",
        _of_both_forms("mapping", {"L": "L", "LRL": None, "LRLRL": "LRLRL"}),
    ),
    "transformation": Table(
        "Transformations",
        "Need query, key and value be different transformations?",
        tuple(
            Variant(f"{form}, {label}", form, options)
            for form in FORMS
            for label, options in {
                "query=key=value, all widths C/4": {"transformations": "query=key=value", **_REDUCED},
                "query=key": {"transformations": "query=key"},
                "different": {},
            }.items()
        ),
    ),
    "footprint": Table(
        "Footprint",
        "How far should attention look?",
        tuple(Variant(f"{form}, {k}×{k}", form, footprint=k) for form in FORMS for k in (3, 5, 7, 9, 11)),
    ),
    "position": Table(
        "Position",
        "Does pairwise attention need to know where a pixel lies?",
        (
            Variant("none", "pairwise", {"position": "none"}),
            Variant("absolute", "pairwise", {"position": "absolute"}),
            Variant("relative", "pairwise"),
        ),
    ),
    "rotation": Table(
        "Rotation", "How do networks fare on images turned or flipped, untrained for it?", _COMPARED, "rotation"
    ),
    "pgd": Table("Attack", "How do networks withstand projected gradient descent?", _COMPARED, "pgd"),
}

REPORTED: dict[str, tuple[float, float]] = {
    "ResNet26": (73.6, 91.7),
    "SAN10 pairwise": (74.9, 92.1),
    "SAN10 patchwise": (77.1, 93.5),
    "ResNet38": (76.0, 93.0),
    "SAN15 pairwise": (76.6, 93.1),
    "SAN15 patchwise": (78.0, 93.9),
    "ResNet50": (76.9, 93.5),
    "SAN19 pairwise": (76.9, 93.4),
    "SAN19 patchwise": (78.2, 93.9),
}
"""Top-1 and top-5 accuracy of `main` on ImageNet, in percent, as Zhao, Jia, Koltun report them (CVPR 2020)."""

_SMALL = {
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "schedule_per": "step",
    "warmup_epochs": 1,
    "label_smoothing": 0.1,
    "validation_share": 0.1,
    "learning_rate": 0.003,
}

SCALES: dict[str, Scale] = {
    "digits": Scale(
        "5,000 handwritten digits that come with the package: minutes for a SAN4",
        "digits",
        "san4",
        True,
        {**_SMALL, "epochs": 8, "batch_size": 32},
    ),
    "cifar10": Scale(
        "CIFAR-10, 32×32",
        "cifar10",
        "san4",
        True,
        {**_SMALL, "epochs": 20, "batch_size": 128, "crop_scale": [0.5, 1.0], "horizontal_flip": 0.5},
    ),
    "tinyimagenet": Scale(
        "Tiny ImageNet or a part of it, 64×64; name it with --data",
        None,
        "san10",
        False,
        {**_SMALL, "epochs": 40, "batch_size": 64, "crop_scale": [0.35, 1.0], "horizontal_flip": 0.5},
    ),
    "imagenet": Scale(
        "ImageNet with the paper's recipe, for GPUs; name it with --data",
        None,
        "san10",
        False,
        {
            "optimizer": "momentum",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule_per": "epoch",
            "warmup_epochs": 0,
            "label_smoothing": 0.1,
            "validation_share": 0.0,
            "epochs": 100,
            "batch_size": 256,
            "crop_scale": [0.08, 1.0],
            "horizontal_flip": 0.5,
            "devices": "auto",
        },
    ),
}

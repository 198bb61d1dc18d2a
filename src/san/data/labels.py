"""Class numbers: a fair choice of images per class, and the numbers of a data set in those of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from san.errors import UserError

__all__ = ["align_labels", "first", "stratified_split"]


def align_labels(class_names: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """The model's class number for every class of a data set.

    Args:
        class_names: Names of the data's classes, by number.
        label_names: Names of the model's classes, by number; there may be more of them, in any order.

    Returns:
        int64 [len(class_names)], to be indexed with the data's labels.

    Raises:
        UserError: A class is unknown to the model, or its name stands for several of the model's classes.
    """
    if list(class_names) == list(label_names):
        return np.arange(len(class_names))
    counts = Counter(label_names)
    if unknown := [name for name in class_names if not counts[name]]:
        raise UserError(
            f"the model does not know {len(unknown)} of the data's {len(class_names)} classes "
            f"({first(unknown)}): use data with classes among its {len(label_names)} ({first(label_names)})"
        )
    if ambiguous := [name for name in class_names if counts[name] > 1]:
        raise UserError(f"several classes of the model are called {ambiguous[0]!r}: give them distinct names")
    numbers = {name: number for number, name in enumerate(label_names)}
    return np.array([numbers[name] for name in class_names], dtype=np.int64)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rest, part), ascending; `part` is a random `share` of all images, and of each class alike.

    Images are ranked by how far through its shuffled class each one stands, and the first ones are taken: so the
    total is exact, and the last image of a class goes only when nothing else is left.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    progress = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        progress[members] = np.arange(1, len(members) + 1) / len(members)
    ranking = shuffled[np.argsort(progress[shuffled], kind="stable")]
    size = round(share * len(labels))
    return np.sort(ranking[size:]), np.sort(ranking[:size])


def first(names: Sequence[str], count: int = 3) -> str:
    """The first few names, for a sentence."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")

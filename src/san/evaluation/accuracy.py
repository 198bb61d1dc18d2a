"""How often a network is right, over all images and class by class, with every image that could not be read named."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import nn

from san.data import Batch, BrokenImages, ImageSet, make_loader
from san.errors import UserError
from san.evaluation.classes import match_classes

__all__ = ["Accuracy", "eval_mode", "evaluate"]


@dataclass(frozen=True)
class Accuracy:
    """Counts over the images of one set, from which the shares follow.

    Args:
        class_names: Names of the model's classes.
        confusion: int64 [C, C], images of the row's class that were taken for the column's.
        in_top5: int64 [C], images whose class was among the five likeliest (all, with fewer than five classes).
        broken: Names of the images that could not be read, which count nowhere else.
    """

    class_names: list[str]
    confusion: np.ndarray
    in_top5: np.ndarray
    broken: list[str]

    @property
    def images(self) -> int:
        """Images that were read and judged."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Images whose likeliest class was right, in percent."""
        return _percent(np.trace(self.confusion), self.images)

    @property
    def top5(self) -> float:
        """Images whose class was among the five likeliest, in percent; always 100 with five classes or fewer."""
        return _percent(self.in_top5.sum(), self.images)

    def per_class(self) -> list[dict[str, Any]]:
        """`class`, `images`, `top1`, `top5` and `confused_with` (the likeliest mistake) of every class with images."""
        rows = []
        for number in np.flatnonzero(self.confusion.sum(1)):
            taken_for = self.confusion[number].copy()
            right, images = taken_for[number], taken_for.sum()
            taken_for[number] = 0
            rows.append(
                {
                    "class": self.class_names[number],
                    "images": int(images),
                    "top1": _percent(right, images),
                    "top5": _percent(self.in_top5[number], images),
                    "confused_with": self.class_names[taken_for.argmax()] if taken_for.any() else None,
                }
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        return {
            "images": self.images,
            "top1": self.top1,
            "top5": self.top5,
            "broken": self.broken,
            "per_class": self.per_class(),
            "class_names": self.class_names,
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    model: nn.Module,
    images: ImageSet,
    names: Sequence[str],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_broken: float = 0.01,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Accuracy:
    """Judge a model on labelled images, on the device where it is and with the preprocessing that it carries.

    The model runs in eval mode, and each part of it is left in the mode that it had.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it.
        images: Labelled images.
        names: Names of the images' classes, by which `match_classes` finds them among the model's.
        batch_size: Images at a time.
        workers: Processes that read ahead; 0 reads in this one.
        max_broken: Share of the images that may be unreadable.
        progress: Wraps the batches, to show how far it is.

    Raises:
        UserError: The classes do not match, the images have no labels, or too many of them cannot be read.
    """
    numbers, known = match_classes(model, names)
    confusion = np.zeros((len(known), len(known)), dtype=np.int64)
    in_top5 = np.zeros(len(known), dtype=np.int64)
    broken = BrokenImages(images)
    batches = make_loader(
        images, resolve_model_data_config(model), batch_size=batch_size, training=False, workers=workers
    )
    with eval_mode(model):
        for batch in progress(batches):
            broken.add(batch.broken)
            labels, ranking = _rank(model, batch, numbers)
            np.add.at(confusion, (labels, ranking[:, 0]), 1)
            np.add.at(in_top5, labels[(ranking == labels[:, None]).any(1)], 1)
    broken.check(max_broken)
    if not confusion.any():
        raise UserError("there is not a single image to judge")
    return Accuracy(known, confusion, in_top5, broken.names)


def _rank(model: nn.Module, batch: Batch, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels [B] in the model's numbers, and its likeliest classes [B, ≤ 5], best first.

    Without finite scores an image's own class is the last of all.
    """
    if (batch.labels < 0).any():
        raise UserError("the images have no labels, so there is nothing to compare answers with; use `san predict`")
    labels = numbers[batch.labels.numpy()]
    with torch.inference_mode():
        scores = model(batch.images.to(next(model.parameters()).device))
        # No answer is a wrong one, but `topk` takes what is no number for the largest.
        lost = ~scores.isfinite().all(1)
        own = torch.from_numpy(labels).to(scores.device)
        scores[lost] = 0
        scores[lost, own[lost]] = -1
    return labels, scores.topk(min(5, scores.shape[1])).indices.cpu().numpy()


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Running statistics and no dropout inside; afterwards every part has the mode that it had, frozen ones too."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # First the whole, for parts that do more than remember their mode.
        model.train(modes[model])
        for part, training in modes.items():
            part.training = training


def _percent(part: int, whole: int) -> float:
    return 100.0 * float(part) / float(whole)

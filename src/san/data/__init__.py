"""Images and labels: from one option (`digits`, a folder, an archive, a name) to reproducible batches.

`load_dataset` finds the images and cuts training, validation and test sets. `make_loader` turns a set into
batches whose order and augmentation depend on seed, epoch and image alone, so that a run may be interrupted,
continued and spread over processes without changing what the network sees. Every batch tells which of its
images are broken.
"""

from __future__ import annotations

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

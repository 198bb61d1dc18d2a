"""WebDataset shards on disk: tar files that hold `KEY.jpg` beside `KEY.cls`, read at random places.

Streaming readers shuffle within a buffer that depends on the number of workers, and cannot resume. An index
of the shards gives the same order and the same guarantees as single files.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from san.data.folders import SPLIT_NAMES
from san.data.images import ImageSet, Splits
from san.errors import UserError

__all__ = ["ImageShards", "in_shards"]


class ImageShards(ImageSet):
    """Images inside uncompressed tar files."""

    def __init__(self, shards: list[Path]):
        samples = [(number, *sample) for number, shard in enumerate(shards) for sample in _samples(shard)]
        self.shards = [str(shard) for shard in shards]
        self.members = [f"{shards[number].name}/{member.name}" for number, member, _ in samples]
        self.places = np.array([(number, member.offset_data, member.size) for number, member, _ in samples])
        self.labels = np.array([label for *_, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.members)

    def names(self, index: int) -> str:
        return self.members[index]

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self.places[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size)))


def in_shards(folder: Path) -> Splits:
    """The shards of a folder, each in the split that its path names; class names may be in `classnames.txt`.

    Raises:
        UserError: There are no shards, they are damaged or compressed, or a sample has no label.
    """
    split_of = {name: split for split, names in SPLIT_NAMES.items() for name in names}
    shards: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.tar")):
        words = re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())
        for split in {split_of[word] for word in words if word in split_of}:
            shards.setdefault(split, []).append(path)
    if not shards:
        raise UserError(f"{folder} has no shards: give a folder with train-0000.tar, val-0000.tar or the like")
    sets: dict[str, ImageSet] = {split: ImageShards(paths) for split, paths in shards.items()}
    return Splits(_class_names(folder / "classnames.txt", sets), sets)


def _class_names(file: Path, sets: dict[str, ImageSet]) -> list[str]:
    classes = 1 + max(int(images.labels.max(initial=-1)) for images in sets.values())
    if not file.is_file():
        return [str(number) for number in range(classes)]
    names = file.read_text().splitlines()
    if len(names) < classes:
        raise UserError(f"{file} names {len(names)} classes, but labels go up to {classes - 1}: add the others")
    return names


def _samples(shard: Path) -> list[tuple[tarfile.TarInfo, int]]:
    """Image member and label of every sample of a shard."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if extension.lower() in ("jpg", "jpeg", "png", "webp"):
                    images[folder + slash + stem] = member
                elif extension == "cls" and (file := archive.extractfile(member)):
                    labels[folder + slash + stem] = int(file.read())
    except (tarfile.TarError, ValueError) as problem:
        raise UserError(
            f"{shard} cannot be read ({problem}): shards are plain .tar files with KEY.jpg and KEY.cls"
        ) from problem
    if unlabelled := [key for key in images if key not in labels]:
        raise UserError(f"{shard}: {images[unlabelled[0]].name} has no label: add its number as {unlabelled[0]}.cls")
    return [(member, labels[key]) for key, member in images.items()]

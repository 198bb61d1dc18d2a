"""Folders of class folders: `train/CLASS/IMAGE`, and `val/CLASS/IMAGE` or `test/CLASS/IMAGE`."""

from __future__ import annotations

from pathlib import Path

from san.data.images import ImageFiles, ImageSet, Splits
from san.data.labels import first
from san.errors import UserError

__all__ = ["SPLIT_NAMES", "in_folder"]

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Our name of each split, and the names that it goes by elsewhere."""

LAYOUT = "train/CLASS/IMAGE and val/CLASS/IMAGE or test/CLASS/IMAGE"


def in_folder(folder: Path, where: str) -> Splits:
    """Images of a folder that has train/, val/ or test/: itself, or in its only subfolder.

    Args:
        folder: Where to look.
        where: What the user calls it, for messages.

    Raises:
        UserError: There are no such folders, or one of them or of their class folders holds no images, or
            they differ in their classes.
    """
    root = _with_splits(folder)
    paths = {split: root / name for split, names in SPLIT_NAMES.items() for name in names if (root / name).is_dir()}
    if not paths:
        raise UserError(_what_is_wrong(folder, where))
    scans = {split: _scan(path, f"{where}: {path.name}") for split, path in paths.items()}
    class_names = _common_classes(scans, where)
    sets: dict[str, ImageSet] = {}
    for split, scan in scans.items():
        files = [(path, label) for label, name in enumerate(class_names) for path in scan[name]]
        sets[split] = ImageFiles([path for path, _ in files], [label for _, label in files], root)
    return Splits(class_names, sets)


def _with_splits(folder: Path) -> Path:
    """`folder`, or the only folder in it (archives often wrap all in one), and so on down to the splits."""
    inside = _folders(folder)
    known = {name for names in SPLIT_NAMES.values() for name in names}
    if len(inside) == 1 and inside[0].name not in known:
        return _with_splits(inside[0])
    return folder


def _folders(folder: Path) -> list[Path]:
    hidden = (".", "__MACOSX")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(hidden))


def _scan(folder: Path, where: str) -> dict[str, list[str]]:
    """Image files of every class folder."""
    from torchvision.datasets.folder import make_dataset

    names = [path.name for path in _folders(folder)]
    if not names:
        raise UserError(f"{where}/ has no class folders: arrange its images as {folder.name}/CLASS/IMAGE")
    numbers = {name: number for number, name in enumerate(names)}
    files: dict[str, list[str]] = {name: [] for name in names}
    for path, number in make_dataset(str(folder), numbers, is_valid_file=_is_image, allow_empty=True):
        files[names[number]].append(path)
    if empty := [name for name, paths in files.items() if not paths]:
        raise UserError(f"{where}/ has class folders without images ({first(empty)}): fill or remove them")
    return files


def _is_image(path: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.lower().endswith((*IMG_EXTENSIONS, ".gif")) and not Path(path).name.startswith(".")


def _common_classes(scans: dict[str, dict[str, list[str]]], where: str) -> list[str]:
    reference, *others = scans
    for other in others:
        for some, none in ((reference, other), (other, reference)):
            if missing := sorted(set(scans[some]) - set(scans[none])):
                raise UserError(
                    f"{where}: {some}/ has classes that {none}/ has not ({first(missing)}): "
                    "both need the same class folders"
                )
    return sorted(scans[reference])


def _what_is_wrong(folder: Path, where: str) -> str:
    if not any(_is_image(path.name) for path in folder.rglob("*")):
        return f"{where} holds no images: give a folder with {LAYOUT}"
    return f"{where} has no train/, val/ or test/ folder: arrange its images as {LAYOUT}"

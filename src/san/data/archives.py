"""Archives are extracted once into a cache, so that training has random access to their images.

A file from the network must not be able to write anywhere else: paths that leave the folder, links and device
files are refused.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from san.errors import UserError

__all__ = ["cache_folder", "extracted", "made_once"]


def cache_folder() -> Path:
    """Where extracted and downloaded data are kept: `$SAN_CACHE`, `$XDG_CACHE_HOME/san` or `~/.cache/san`."""
    if chosen := os.environ.get("SAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "san"


def extracted(archive: Path) -> Path:
    """Folder with the content of a .tar, .tar.gz, .tar.bz2 or .tar.xz file, extracted now or before.

    The folder's name follows from the archive's path, size and time of change.

    Raises:
        UserError: The file is no such archive, is damaged, or holds more than files and folders inside it.
    """
    state = archive.stat()
    identity = f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = cache_folder() / "archives" / f"{archive.name.partition('.')[0]}-{digest}"
    return made_once(target, lambda partial: _extract(archive, partial))


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target`; where it is missing, `make` fills another one, which gets this name when complete.

    Processes that want the same folder wait for the first one. What an interrupted one left is removed.
    """
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"{target.parent} cannot be made ({problem}): set SAN_CACHE to a folder with room") from problem
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            try:
                make(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _extract(archive: Path, target: Path) -> None:
    from tqdm import tqdm

    reading = {"desc": f"Extracting {archive.name}", "total": archive.stat().st_size, "disable": None}
    with (
        archive.open("rb") as file,
        tqdm.wrapattr(file, "read", **reading) as stream,
        _opened(archive, stream) as content,
    ):
        target.mkdir()
        try:
            content.extractall(target, filter=_files_and_folders)
        except tarfile.FilterError as problem:
            raise UserError(
                f"{archive} holds {problem.tarinfo.name!r}, which is no plain file or folder inside it: "
                "pack it anew without links and outside paths"
            ) from problem
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as problem:
            raise UserError(
                f"{archive} cannot be extracted into {cache_folder()} ({problem}): "
                "fetch the archive again, or set SAN_CACHE to a folder with room"
            ) from problem


def _opened(archive: Path, stream: Any) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=stream, mode="r|*")
    except tarfile.TarError as problem:
        raise UserError(
            f"{archive} is no tar archive ({problem}): give a folder, or a .tar, .tar.gz or .tar.xz file"
        ) from problem


def _files_and_folders(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo:
    safe = tarfile.data_filter(member, target)
    if safe.issym() or safe.islnk():
        raise tarfile.SpecialFileError(safe)
    return safe

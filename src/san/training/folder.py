"""The run folder: everything needed to repeat, continue and judge a training run.

Every file is written whole under another name and then renamed, so a process that dies at any moment leaves either the
old or the new file. The truth about a run is `checkpoints/last.ckpt`; `metrics.csv` and the TensorBoard events are
written from the rows inside it, which is why they can have neither gaps nor duplicates.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

import san
from san.errors import UserError

__all__ = ["RunFolder", "replacing"]


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Give a temporary name to write to; on success its content, safely on disk, takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(path)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class RunFolder:
    """Names and writes the files of one run; knows nothing about training."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "checkpoints" / "last.ckpt"
        self.best = self.path / "checkpoints" / "best.ckpt"
        self.model = self.path / "model.safetensors"
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.report = self.path / "report.md"
        self._events: SummaryWriter | None = None
        self._rows_in_events = 0

    @property
    def finished(self) -> bool:
        """The report is written last, so it tells whether a run came to its end; a lost model is made from `last`."""
        return self.report.exists() and (self.model.exists() or not self.last.exists())

    def check_free(self) -> None:
        """Raise `UserError` where files lie, of another run for example.

        What `replacing` left when the process was killed before the run's first file is none.
        """
        if self.path.exists() and (
            not self.path.is_dir() or any(not each.match(".*.part") for each in self.path.iterdir())
        ):
            raise UserError(
                f"{self.path} exists already: continue that run with --resume {self.path} or choose another --out"
            )

    def create(self, settings: dict[str, Any]) -> None:
        """Start a new run."""
        _write(self.config, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    def settings(self) -> dict[str, Any]:
        """What the run was started with; raises `UserError` where there is no run to continue."""
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run folder: it has no config.yaml, so there is nothing to resume")
        try:
            found = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.config} is damaged: delete {self.path} and train this run again")
        return found

    def write_versions(self) -> None:
        """Record what bit-for-bit repetition depends on besides the settings: versions, machine, threads."""
        packages = ("san-vision", "torch", "timm", "lightning", "torchvision", "numpy", "pillow")
        facts = {"python": platform.python_version()}
        facts |= {name: _version(name) for name in packages}
        facts |= {
            "git commit": _git_commit(),
            "machine": f"{platform.platform()}, {_processor()}",
            "threads": str(torch.get_num_threads()),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        }
        _write(self.path / "versions.txt", "".join(f"{name}: {value}\n" for name, value in facts.items()))

    def versions(self) -> dict[str, str]:
        """What `write_versions` recorded last, by its names; empty where its file is gone."""
        record = self.path / "versions.txt"
        lines = record.read_text(encoding="utf-8", errors="replace").splitlines() if record.exists() else []
        return dict(line.split(": ", 1) for line in lines if ": " in line)

    def forget_unless_trained(self) -> None:
        """Delete what a run that failed before its first checkpoint has left: its settings and versions."""
        left = [self.config, self.path / "versions.txt"]
        if self.path.is_dir() and all(each in left for each in self.path.iterdir()):
            for file in left:
                file.unlink(missing_ok=True)
            with suppress(OSError):
                self.path.rmdir()

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write `metrics.csv` anew from the rows of all epochs so far; TensorBoard events too, once in a process."""
        if not rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _write(self.metrics, text.getvalue())
        self._write_events(rows)

    def write_report(self, text: str) -> None:
        """Write `report.md`, which marks the run as finished."""
        _write(self.report, text)

    def keep_as_last(self, checkpoint: Path) -> None:
        """Make a checkpoint that is already written the last one too, without writing it twice where links work."""
        with replacing(self.last) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(checkpoint, temporary)
            except OSError:
                shutil.copyfile(checkpoint, temporary)

    def _write_events(self, rows: list[dict[str, Any]]) -> None:
        if self._events is None:
            for old in self.path.glob("events.out.tfevents.*"):
                old.unlink()
            self._events = SummaryWriter(str(self.path))
        for row in rows[self._rows_in_events :]:
            for name, value in row.items():
                if value is not None and name != "epoch":
                    self._events.add_scalar(name, value, row["epoch"])
        self._rows_in_events = len(rows)
        self._events.flush()


def _version(package: str) -> str:
    if package == "san-vision":
        return san.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    root = Path(san.__file__).parents[2]
    if not (root / ".git").exists():
        return "not a git checkout"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

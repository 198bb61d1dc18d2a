"""Training every variant of a table once: run folders that any number of processes share and any of them continues.

A variant and a seed are one run folder, named by what was trained and not by the table, so tables share runs. Who works
on one holds its lock, which the operating system releases when a process dies; on another machine too where the shared
file system has `flock`.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from re import sub
from tempfile import TemporaryDirectory
from time import sleep
from types import SimpleNamespace
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout

from san.errors import UserError
from san.evaluation.robustness import Progress, silently
from san.experiments.tables import SCALES, TABLES, Scale, Variant
from san.training import train
from san.training.folder import RunFolder
from san.training.interruption import Interrupted, StopRequest
from san.training.settings import OF_THE_MACHINE, check, started
from san.weights import NETWORKS

__all__ = ["Campaign", "Run", "check_settings", "chosen", "scale_of", "shard_of"]


@dataclass(frozen=True)
class Run:
    """A variant trained with one seed: its folder, and the arguments of `train`."""

    variant: Variant
    seed: int
    folder: RunFolder
    settings: dict[str, Any]


@dataclass(frozen=True)
class Campaign:
    """Runs of a scale below `folder`; `settings` are added to the scale's own, and `data` replaces the scale's.

    `progress` wraps the batches of what is measured after training, with a word for it, as `LabelledImages` takes it.
    Raises `UserError` where the scale does not know its data.
    """

    scale: Scale
    folder: Path
    data: str | None
    settings: dict[str, Any]
    progress: Progress = silently

    def __post_init__(self) -> None:
        if self.data is None and self.scale.data is None:
            raise UserError(
                f"this scale's images do not come with the package ({self.scale.summary}): give --data WHERE"
            )

    def runs(self, variants: Sequence[Variant], seeds: int) -> list[Run]:
        """Every variant with seeds 0 to `seeds` − 1, seed by seed."""
        return [self._run(variant, seed) for seed in range(seeds) for variant in variants]

    def _run(self, variant: Variant, seed: int) -> Run:
        model, options = variant.resolve(self.scale)
        name = "-".join([model, *(f"{key}-{_word(value)}" for key, value in sorted(options.items()))])
        folder = RunFolder(self.folder / "runs" / f"{name}-seed{seed}")
        settings = {
            **self.scale.settings,
            **self.settings,
            "data": self.data or self.scale.data,
            "model": model,
            "options": options,
            "seed": seed,
        }
        return Run(variant, seed, folder, settings)

    def train(self, runs: Sequence[Run]) -> tuple[list[Run], dict[str, str]]:
        """Train what is not finished; gives the runs that others work on, and what went wrong with a run, by its name.

        What `train` says goes to standard error.
        """
        busy: list[Run] = []
        failed: dict[str, str] = {}
        for number, run in enumerate(runs, 1):
            if run.folder.finished:
                continue
            with self.locked(run.folder.path.name) as mine:
                if mine is None:
                    busy.append(run)
                    continue
                print(f"[{number}/{len(runs)}] {run.variant.label}, seed {run.seed}", file=sys.stderr, flush=True)
                try:
                    _train(run, mine)
                except UserError as error:
                    # What fails for every run, such as missing images, is told once.
                    if str(error) not in failed.values():
                        print(f"san: {run.variant.label}, seed {run.seed}: {error}", file=sys.stderr, flush=True)
                    failed[run.folder.path.name] = str(error)
                    run.folder.forget_unless_trained()
                except SystemExit:
                    print(
                        "san: the same command again goes on with this run and all others", file=sys.stderr, flush=True
                    )
                    raise
        return busy, failed

    @contextmanager
    def locked(self, name: str, wait: bool = False) -> Generator[BaseFileLock | None]:
        """The lock of this name, ours until the end of the block, or None if another has it; `wait` for that one."""
        place = self.folder / "locks"
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / f"{name}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                yield None
                return
            print(f"waiting for the process that measures {name}", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield lock
        finally:
            lock.release()


def _word(value: Any) -> str:
    return sub(r"[^A-Za-z0-9.]+", "-", str(value)).strip("-").lower()


def _train(run: Run, lock: BaseFileLock) -> None:
    arguments: dict[str, Any] = {**run.settings, "out": str(run.folder.path)}
    stored: dict[str, Any] = {}
    # Another process may have finished it between the look and the lock.
    if run.folder.config.is_file():
        _check_same(run)
        stored = run.folder.settings()
        given = {name: value for name, value in run.settings.items() if name in OF_THE_MACHINE}
        arguments = {**given, "resume": str(run.folder.path)}
    devices = str(run.settings.get("devices", stored.get("devices", 1)))
    if devices != "1":
        _train_in_its_own_process(arguments, lock)
        return
    # As text, because `train` takes its default, the number, for not given where it resumes.
    arguments["devices"] = devices
    with redirect_stdout(sys.stderr):
        train(**arguments)


def _train_in_its_own_process(arguments: dict[str, Any], lock: BaseFileLock) -> None:
    """For several devices Lightning starts the whole command again for each, which must be `san train` of this run."""
    with TemporaryDirectory(prefix="san-") as place:
        recipe = Path(place) / "run.yaml"
        recipe.write_text(yaml.safe_dump(arguments), encoding="utf-8")
        code = _code_of([sys.executable, "-m", "san", "train", "--config", str(recipe)], lock)
    if code != 0:
        raise UserError(f"its training ended with exit code {code}, for the reason that it told above")


def _code_of(command: Sequence[str], lock: BaseFileLock) -> int:
    """How a command ends that runs in a session of its own and is told once if this process is asked to stop.

    It has the lock too, so that the lock lasts as long as the command where this process is killed.
    """
    told, standard_error = False, 2
    with StopRequest() as stop:
        stop.patient = True
        kept = [file for file in (lock._context.lock_file_fd,) if file is not None]
        process = subprocess.Popen(command, stdout=standard_error, start_new_session=True, pass_fds=kept)
        try:
            while process.poll() is None:
                if stop.made and not told:
                    told = True
                    _tell(process, signal.SIGINT)
                sleep(0.2)
        except Interrupted:
            _tell(process, signal.SIGKILL)
    if stop.made:
        raise SystemExit(128 + signal.SIGINT)
    return process.wait()


def _tell(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def check_settings(runs: Sequence[Run]) -> None:
    """Raise `UserError` where a folder holds a run of other settings, or a setting fits no run."""
    for run in runs:
        if run.folder.config.is_file():
            _check_same(run)
        else:
            check(_complete(run))


def _check_same(run: Run) -> None:
    """Raise `UserError` where the folder holds a run of other settings, given ones or `train`'s own."""
    asked, stored = vars(_complete(run)), {**_defaults(), **run.folder.settings()}
    for name, value in asked.items():
        if name not in ("out", "resume", *OF_THE_MACHINE):
            _compare(run, name, stored.get(name), value)
    # The same images may lie elsewhere on another machine.
    _compare(run, "data", Path(stored["data"]).name, Path(asked["data"]).name)


def _defaults() -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}


def _complete(run: Run) -> SimpleNamespace:
    """All settings with which `train` would start this run."""
    return started(SimpleNamespace(**{**_defaults(), **run.settings, "out": str(run.folder.path)}))


def _compare(run: Run, name: str, stored: Any, asked: Any) -> None:
    if stored != asked:
        values = ("the default" if value is None else value for value in (stored, asked))
        raise UserError(
            f"{run.folder.path} was trained with {name} {', not '.join(map(str, values))}: choose another --out"
        )


def chosen(table: str, only: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The variants of a table, or those whose labels `only` names, whatever the case.

    Raises:
        UserError: There is no such table or label.
    """
    if table not in TABLES:
        raise UserError(f"table {table!r} is unknown; choose among: {', '.join(TABLES)}")
    variants = {variant.label.lower(): variant for variant in TABLES[table].variants}
    if unknown := [label for label in only if label.lower() not in variants]:
        labels = "; ".join(variant.label for variant in variants.values())
        raise UserError(f"table {table} has no row {unknown[0]!r}; its rows are: {labels}")
    return tuple(variants[label.lower()] for label in only) or TABLES[table].variants


def shard_of(runs: Sequence[Run], shard: str) -> list[Run]:
    """The i-th of n parts of the runs, i from 0, for "i/n".

    Raises:
        UserError: `shard` is not of this form.
    """
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise UserError(f"--shard must be i/n with i from 0 to n − 1, such as 0/4, not {shard}")
    return list(runs[int(number) :: int(count)])


def scale_of(name: str, base: str | None = None, small_images: bool | None = None) -> Scale:
    """A scale by its name, with another base network or halving if given.

    Raises:
        UserError: There is no such scale or base network.
    """
    if base is not None and base not in NETWORKS:
        raise UserError(f"base network {base!r} is unknown; choose among: {', '.join(NETWORKS)}")
    if name not in SCALES:
        raise UserError(f"scale {name!r} is unknown; choose among: {', '.join(SCALES)}")
    changes = {"base": base, "small_images": small_images}
    return replace(SCALES[name], **{key: value for key, value in changes.items() if value is not None})

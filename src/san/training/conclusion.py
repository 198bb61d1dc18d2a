"""The end of a run: save the network, judge it on the test images for the first time, and write the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from san.checkpoints import save_model
from san.data import Batch, ImageSet
from san.data.images import ImageSubset
from san.errors import UserError
from san.evaluation.accuracy import Accuracy, evaluate
from san.models import create_model
from san.training.folder import replacing
from san.training.journal import Journal
from san.training.lightning_parts import AtomicCheckpoints
from san.training.report import report

__all__ = ["conclude"]

PART = 2048
"""Test images between two notes of how far the evaluation is."""


def conclude(network: Any, journal: Journal, device: torch.device) -> None:
    """Write `model.safetensors` from the last epoch, judge last and best epoch on the test images, write the report.

    `network` says what was trained; the weights come from the checkpoints, those of the moving average if there is one.
    """
    settings, folder = journal.settings, journal.folder
    network = _same_network(network, settings)
    _load(network, folder.last, settings)
    save_model(network, folder.model)
    judged: dict[str, Accuracy] = {}
    if journal.dataset.test is not None:
        network = network.float().to(device)
        judged["last"] = _judge(network, journal.dataset.test, "last", journal)
        if folder.best.exists():
            _load(network, folder.best, settings)
            judged["best"] = _judge(network, journal.dataset.test, "best", journal)
    for name, accuracy in judged.items():
        journal.console.say(f"test, {name} epoch: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %")
    folder.write_report(report(network, journal, judged))
    journal.console.say(f"report: {folder.report}")


def _same_network(network: Any, settings: SimpleNamespace) -> Any:
    """A new network like the trained one, which may be compiled, synchronised or spread over processes."""
    fresh = cast(Any, create_model(network.architecture, network.num_classes, **network.options))
    fresh.pretrained_cfg.update(network.pretrained_cfg)
    return fresh.double() if settings.precision == "64" else fresh


def _load(network: nn.Module, checkpoint: Path, settings: SimpleNamespace) -> None:
    prefix = "average.module." if settings.ema_decay else "model."
    tensors = AtomicCheckpoints().load_checkpoint(checkpoint)["state_dict"]
    network.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})


def _judge(network: nn.Module, images: ImageSet, name: str, journal: Journal) -> Accuracy:
    """Accuracy over all images, noted part by part, so that a killed process need not judge them all again."""
    console = journal.console
    notes = journal.folder.path / "checkpoints" / f"test-{name}.json"
    judged, accuracy = _noted(notes, journal.dataset.class_names)
    console.start(f"test images, {name} epoch", len(images), judged)
    while judged < len(images):
        indices = np.arange(judged, min(judged + PART, len(images)))
        part = _judge_part(network, ImageSubset(images, indices), journal)
        judged += len(indices)
        accuracy = _together(accuracy, part)
        _note(notes, judged, accuracy)
    console.stop()
    most = journal.settings.max_broken * len(images)
    if len(accuracy.broken) > most:
        notes.unlink()
        raise UserError(
            f"{len(accuracy.broken)} of {len(images)} test images cannot be read, the first is {accuracy.broken[0]}: "
            f"repair them and go on with --resume {journal.folder.path}, the trained network is saved there"
        )
    return accuracy


def _judge_part(network: nn.Module, images: ImageSet, journal: Journal) -> Accuracy:
    def shown(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            journal.console.advance(len(batch.images))

    return evaluate(
        network,
        images,
        journal.dataset.class_names,
        batch_size=max(1, journal.settings.batch_size // journal.settings.accumulate),
        workers=journal.workers,
        max_broken=1.0,
        progress=shown,
    )


def _together(one: Accuracy, other: Accuracy) -> Accuracy:
    return replace(
        one,
        confusion=one.confusion + other.confusion,
        in_top5=one.in_top5 + other.in_top5,
        broken=[*one.broken, *other.broken],
    )


def _note(path: Path, judged: int, accuracy: Accuracy) -> None:
    plain = {
        "judged": judged,
        "confusion": accuracy.confusion.tolist(),
        "in_top5": accuracy.in_top5.tolist(),
        "broken": accuracy.broken,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain))


def _noted(path: Path, names: list[str]) -> tuple[int, Accuracy]:
    """How many images were judged so far, and with what result."""
    if not path.exists():
        return 0, Accuracy(names, np.zeros((len(names),) * 2, np.int64), np.zeros(len(names), np.int64), [])
    plain = json.loads(path.read_text())
    confusion, in_top5 = np.array(plain["confusion"]), np.array(plain["in_top5"])
    return plain["judged"], Accuracy(names, confusion, in_top5, plain["broken"])

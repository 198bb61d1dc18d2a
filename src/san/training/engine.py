"""From settings to a finished run: check them, build data and network, let Lightning fit, conclude with the report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from san.checkpoints import load_model
from san.data import Dataset, load_dataset
from san.errors import UserError
from san.models import create_model
from san.ops.normalization import synchronize_batch_norm
from san.training.conclusion import conclude
from san.training.console import Console, hush
from san.training.folder import RunFolder
from san.training.interruption import Interrupted, StopRequest
from san.training.journal import Journal
from san.training.lightning_parts import AtomicCheckpoints, Batches
from san.training.module import Classifier
from san.training.settings import PRECISIONS, check, continued, started

__all__ = ["run"]


def run(settings: SimpleNamespace, function: Callable[..., Any]) -> Path:
    """Do what `san.training.train`, the `function`, was called for; exits with code 130 when asked to stop."""
    hush()
    first = getattr(rank_zero_only, "rank", 0) == 0
    settings = started(settings) if settings.resume is None else continued(settings, function)
    folder = RunFolder(settings.out)
    console = Console(speaks=first)
    if settings.resume is None:
        if first:
            folder.check_free()
    elif folder.finished:
        console.say(f"{folder.path} is finished already; its report is {folder.report}")
        return folder.path
    try:
        with StopRequest() as stop:
            _run(settings, folder, console, stop, first)
    except Interrupted:
        console.stop()
        if not first:
            sys.exit(0)
        print(_farewell(folder), file=sys.stderr)
        sys.exit(130)
    return folder.path


def _farewell(folder: RunFolder) -> str:
    if not folder.config.exists():
        return "san: stopped before anything was trained"
    return f"san: stopped; go on with: san train --resume {folder.path}"


def _run(settings: SimpleNamespace, folder: RunFolder, console: Console, stop: StopRequest, first: bool) -> None:
    """The run from its data to its report; only the `first` process writes files."""
    check(settings)
    dataset = _dataset(settings)
    network = _network(settings, dataset)
    journal = Journal(settings, dataset, folder, console, stop)
    trainer = _trainer(settings, journal)
    module = Classifier(network, settings, _batches(journal, trainer))
    if first:
        if settings.resume is None:
            folder.create(vars(settings))
        folder.write_versions()
    console.say(_introduction(network, journal))
    _fit(trainer, module, folder)
    stop.patient = False
    if first:
        conclude(network, journal, trainer.strategy.root_device)


def _dataset(settings: SimpleNamespace) -> Dataset:
    """The images, with the input size and augmentation that the settings ask for."""
    dataset = load_dataset(settings.data, validation_share=settings.validation_share, seed=settings.seed)
    dataset.split("train")
    asked = {
        "scale": settings.crop_scale,
        "horizontal_flip": settings.horizontal_flip,
        "color_jitter": settings.color_jitter,
        "rand_augment": settings.rand_augment,
        "random_erasing": settings.random_erasing,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    preprocessing = dict(dataset.preprocessing)
    if settings.image_size is not None:
        preprocessing["input_size"] = (3, settings.image_size, settings.image_size)
    return replace(dataset, preprocessing=preprocessing, augmentation=replace(dataset.augmentation, **given))


def _network(settings: SimpleNamespace, dataset: Dataset) -> Any:
    """The network with its first weights; preprocessing and class names travel with it from here on."""
    torch.manual_seed(settings.seed)
    options = dict(settings.options or {})
    if settings.drop_path:
        options["drop_path_rate"] = settings.drop_path
    classes = len(dataset.class_names)
    if settings.checkpoint is None:
        network = cast(Any, create_model(settings.model, classes, **options))
    else:
        network = _pretrained(settings, classes, options)
    network.pretrained_cfg.update(dataset.preprocessing, num_classes=classes, label_names=dataset.class_names)
    network.train()
    return network.to(memory_format=torch.channels_last) if settings.channels_last else network


def _pretrained(settings: SimpleNamespace, classes: int, options: dict[str, Any]) -> Any:
    network = cast(Any, load_model(settings.checkpoint))
    if settings.model not in (network.architecture, "san4_patchwise"):
        raise UserError(f"{settings.checkpoint} holds a {network.architecture}, not a {settings.model}")
    if options:
        options = {**network.options, **options}
        network = cast(Any, create_model(network.architecture, network.num_classes, settings.checkpoint, **options))
    if settings.new_classifier:
        network.reset_classifier(classes)
    if network.num_classes != classes:
        raise UserError(
            f"{settings.checkpoint} tells {network.num_classes} classes apart, but the data have {classes}: add "
            "--new-classifier to train a fresh classifier on its features"
        )
    return network


def _trainer(settings: SimpleNamespace, journal: Journal) -> Trainer:
    """Lightning's trainer without anything that the journal does itself."""
    devices, num_nodes = settings.devices, settings.num_nodes
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has decided
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=settings.strategy,
            precision=cast(Any, PRECISIONS[settings.precision]),
            max_epochs=-1,  # the journal ends the run, because Lightning would skip a last validation
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip_gradient,
            callbacks=[journal],
            plugins=[AtomicCheckpoints()],
            default_root_dir=settings.out,
            benchmark=True,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Lightning cannot train like that on this machine: {reason}") from error


def _batches(journal: Journal, trainer: Trainer) -> Batches:
    settings, dataset = journal.settings, journal.dataset
    images = settings.batch_size // (trainer.world_size * settings.accumulate)
    if images % 2 and (settings.mixup or settings.cutmix):
        raise UserError(f"mixup and cutmix take images in pairs, so each micro-batch must be even, not {images} images")
    return Batches(
        journal,
        images=dataset.train,
        preprocessing=dataset.preprocessing,
        batch_size=settings.batch_size,
        training=True,
        seed=settings.seed,
        rank=trainer.global_rank,
        ranks=trainer.world_size,
        accumulate=settings.accumulate,
        workers=journal.workers,
        augmentation=dataset.augmentation,
    )


def _fit(trainer: Trainer, module: Classifier, folder: RunFolder) -> None:
    if module.settings.sync_batch_norm:
        synchronize_batch_norm(module.model)
    if module.settings.compile:
        module.model.compile()
    checkpoint = folder.last if folder.last.exists() else None
    trainer.fit(module, ckpt_path=checkpoint, weights_only=True)


def _introduction(network: Any, journal: Journal) -> str:
    dataset = journal.dataset
    parameters = sum(parameter.numel() for parameter in network.parameters())
    sets = {"training": dataset.train, "validation": dataset.validation, "test": dataset.test}
    images = ", ".join(f"{len(images):,} {name}" for name, images in sets.items() if images is not None)
    return (
        f"{network.architecture} ({parameters:,} parameters) on {dataset.name} ({images} images); "
        f"run folder {journal.folder.path}"
    )

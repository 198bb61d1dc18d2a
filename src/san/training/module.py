"""What one training step computes: loss, optimiser, learning rate, moving average, all as a `LightningModule`.

Nothing here has a memory of its own besides weights, optimiser state and the sums of the running epoch: the learning
rate is a function of the step, and every random number of a step (drop path, mixup) is drawn after seeding with (seed,
micro-batch, rank). A run that starts again at a step therefore computes what the uninterrupted one computed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from san.fused.rehearsal import compile_kernels
from san.training.lightning_parts import Batches

__all__ = ["Classifier", "torch_label_smoothing"]


def torch_label_smoothing(epsilon: float, num_classes: int) -> float:
    """PyTorch's smoothing that equals the paper's: theirs spreads ε over the C−1 other classes, torch's over all C."""
    return epsilon * num_classes / (num_classes - 1)


class Classifier(LightningModule):
    """A network in training, with its moving average beside it when one is asked for.

    `settings` are the arguments of `san.training.train`.
    """

    def __init__(self, model: nn.Module, settings: SimpleNamespace, batches: Batches) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.batches = batches
        num_classes = int(cast(Any, model).num_classes)
        decay = settings.ema_decay
        # Without gradients: data-parallel engines wait for those of every parameter that wants one.
        self.average = ModelEmaV3(model, decay=decay, use_warmup=True).requires_grad_(False) if decay else None
        self.smoothing = torch_label_smoothing(settings.label_smoothing, num_classes)
        self.mixup = _mixup(settings, num_classes, self.smoothing)
        self.sums = torch.zeros(3, dtype=torch.float64)

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts: the moving average if there is one."""
        return self.model if self.average is None else self.average.module

    def train_dataloader(self) -> Batches:
        """Micro-batches from where the run stands."""
        return self.batches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """timm's optimiser of that name; its learning rate is set anew at every step from timm's schedule."""
        settings = self.settings
        optimizer = create_optimizer_v2(
            self.model,
            opt=settings.optimizer,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=not settings.decay_all,
        )
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            sched=settings.schedule,
            num_epochs=settings.epochs,
            warmup_epochs=min(settings.warmup_epochs, settings.epochs // 2),
            warmup_lr=settings.learning_rate / 100,
            step_on_epochs=settings.schedule_per == "epoch",
            updates_per_epoch=len(self.batches) // settings.accumulate,
        )
        return optimizer

    def on_train_start(self) -> None:
        """Have a GPU's kernels compiled several at a time, which the first step would do one by one."""
        model: Any = self.model
        # Other strategies hold parts of the parameters, from which no copy of the network can be made.
        whole = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if whole and self.device.type == "cuda" and not (self.settings.compile or self.trainer.should_stop):
            shape = (2, *model.pretrained_cfg["input_size"])
            with self.trainer.precision_plugin.forward_context():
                compile_kernels(model, self.laid_out(torch.zeros(shape, device=self.device)))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this micro-batch's randomness and set its learning rate."""
        epoch = self.trainer.current_epoch
        position = epoch * len(self.batches) + batch_idx
        seeds = np.random.SeedSequence([self.settings.seed, position, self.global_rank]).generate_state(2)
        torch.manual_seed(int(seeds[0]))
        np.random.seed(int(seeds[1]))
        self.set_learning_rate(epoch, position // self.settings.accumulate)

    def set_learning_rate(self, epoch: int, step: int) -> None:
        """Give the optimiser the learning rate of a step, or of an epoch, counted from 0 over the whole run."""
        self.schedule.step(epoch)
        self.schedule.step_update(step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch; adds to the epoch's sums of loss, right answers and images."""
        images, labels = self.laid_out(batch.images), batch.labels
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            targets = targets.to(images.dtype)
        logits = self.model(images)
        smoothing = self.smoothing if self.mixup is None else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        with torch.no_grad():
            right = (logits.argmax(1) == labels).sum()
            self.sums += torch.stack([loss.to(self.sums.dtype) * len(labels), right, right.new_tensor(len(labels))])
        return loss

    def laid_out(self, images: Tensor) -> Tensor:
        """Images in the memory format that the network works in."""
        return images.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else images

    def start_sums(self, values: list[float]) -> None:
        """Set the epoch's sums; in float64 where the device has it."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.tensor(values, dtype=wide, device=self.device)

    def move_average(self) -> None:
        """Let the moving average follow, after each step of the optimiser."""
        if self.average is not None:
            self.average.update(self.model, step=self.trainer.global_step)


def _mixup(settings: SimpleNamespace, num_classes: int, smoothing: float) -> Mixup | None:
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )

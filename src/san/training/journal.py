"""The memory of a run: checkpoints, the rows of `metrics.csv`, validation, and stopping without losing anything.

Lightning restores weights, optimiser, precision and its step counters; `Journal` adds what it does not keep: sums of
the running epoch, rows of the epochs before, broken images, and how far a validation got. Checkpoints are written at
the end of each epoch and whenever `checkpoint_minutes` have passed, in validation too, so that no more work than that
is ever repeated. A row is a function of the checkpoint, so continuing a run neither loses nor doubles one.
"""

from __future__ import annotations

import math
import os
import time
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from san.data import Batch, BrokenImages, Dataset, Loader, make_loader
from san.errors import UserError
from san.training.console import Console
from san.training.folder import RunFolder
from san.training.interruption import Interrupted, StopRequest
from san.training.module import Classifier
from san.training.processes import agree, gather, share_buffers, total, whole_parameters

__all__ = ["Journal", "best_row"]

LOSS_CHECKED_EVERY = 20


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the highest validation accuracy, then the lowest loss; None where nothing was validated."""
    validated = [row for row in rows if row["validation_top1"] is not None]
    return max(validated, key=lambda row: (row["validation_top1"], -row["validation_loss"]), default=None)


class Journal(Callback):
    """Keeps a run's memory, and tells it when to save, to validate, and to end.

    `settings` are the arguments of `san.training.train`.
    """

    def __init__(
        self,
        settings: SimpleNamespace,
        dataset: Dataset,
        folder: RunFolder,
        console: Console,
        stop: StopRequest,
    ) -> None:
        self.settings, self.dataset, self.folder, self.console, self.stop = (
            settings,
            dataset,
            folder,
            console,
            stop,
        )
        tiny = dataset.preprocessing["input_size"][-1] < 64
        automatic = 0 if tiny else min(os.cpu_count() or 1, 8)
        self.workers = automatic if settings.workers is None else settings.workers
        self.rows: list[dict[str, Any]] = []
        self.batches = 0
        self.sums = [0.0] * 3
        self.broken = {
            name: BrokenImages(images)
            for name, images in (("train", dataset.train), ("validation", dataset.validation))
            if images is not None
        }
        self.seconds = 0.0
        self.trained: dict[str, Any] | None = None
        self.validated = 0
        self.validation_sums = [0.0] * 4
        self._since = self._saved = time.monotonic()

    @property
    def epoch(self) -> int:
        """Number of the epoch to train on now or next, from 0."""
        return len(self.rows) + (self.trained is not None)

    @property
    def finished(self) -> bool:
        """Whether every epoch has its row."""
        return len(self.rows) >= self.settings.epochs

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: checkpoints are loaded safely."""
        return {
            "rows": self.rows,
            "batches": self.batches,
            "sums": self.sums,
            "broken": {name: sorted(broken.indices) for name, broken in self.broken.items()},
            "seconds": self.seconds + time.monotonic() - self._since,
            "trained": self.trained,
            "validated": self.validated,
            "validation_sums": self.validation_sums,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        state = dict(state_dict)
        for name, indices in state.pop("broken").items():
            self.broken[name].add(indices)
        vars(self).update(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up where the checkpoint stands: in an epoch, in its validation, or behind the last one."""
        module = cast(Classifier, pl_module)
        self.stop.listen()
        self.stop.patient = True
        self._since = self._saved = time.monotonic()
        module.start_sums(self.sums if trainer.is_global_zero else [0.0] * 3)
        if trainer.is_global_zero:
            self.folder.write_metrics(self.rows)
        if self.trained is not None:
            self._finish_epoch(trainer, module)
        trainer.should_stop = self.finished

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Show the bar from where the epoch begins or goes on."""
        if not self.console.busy:
            self.console.start(f"epoch {self.epoch + 1}", int(trainer.num_training_batches), batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Behind each step of the optimiser, save if it is time to, and stop if somebody asked."""
        self.batches = batch_idx + 1
        self.console.advance()
        self._note_broken("train", batch)
        if self.batches % self.settings.accumulate:
            return
        module = cast(Classifier, pl_module)
        module.move_average()
        # Lightning cannot restart behind the last batch of an epoch; the epoch's end follows at once, and there it can.
        if self.batches < trainer.num_training_batches:
            self._pause(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the epoch's sums, then validate and write its row."""
        module = cast(Classifier, pl_module)
        loss, right, images = self._checked_sums(trainer, module)
        self.trained = {
            "epoch": len(self.rows) + 1,
            "step": trainer.global_step,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": loss / images,
            "train_top1": 100 * right / images,
        }
        self.batches = 0
        module.start_sums([0.0] * 3)
        self._pause(trainer, module)
        self._finish_epoch(trainer, module)
        trainer.should_stop = self.finished

    def _finish_epoch(self, trainer: Trainer, module: Classifier) -> None:
        """Validate what was trained and make a row of both."""
        validation = self._validate(trainer, module)
        self._gather_broken(trainer)
        now = time.monotonic()
        rest = {
            "broken_images": sum(map(len, self.broken.values())),
            "seconds": round(self.seconds + now - self._since, 3),
        }
        self.rows.append({**(self.trained or {}), **validation, **rest})
        self.trained, self.validated, self.validation_sums = None, 0, [0.0] * 4
        self.seconds, self._since = 0.0, now
        self._save(trainer, module, best=best_row(self.rows) is self.rows[-1])
        if trainer.is_global_zero:
            self.folder.write_metrics(self.rows)
        self.console.stop()
        self.console.say(_line(self.rows[-1], self.settings.epochs))

    def _validate(self, trainer: Trainer, module: Classifier) -> dict[str, Any]:
        """Loss and accuracies on the validation images, from the batch on that an earlier process left off at."""
        names = ("validation_loss", "validation_top1", "validation_top5")
        if self.dataset.validation is None:
            return dict.fromkeys(names)
        loader = self._validation_loader(trainer)
        self.console.start("validation", len(loader), self.validated)
        begun = self.validation_sums if trainer.is_global_zero else [0.0] * 4
        sums = module.sums.new_tensor(begun)
        share_buffers(trainer, module.evaluated)
        module.eval()
        for batch in loader:
            sums += _judge(trainer, module, batch)
            self._note_broken("validation", batch)
            self.validated += 1
            self.console.advance()
            self._pause(trainer, module, sums)
        module.train()
        loss, top1, top5, images = total(trainer, sums)
        if not math.isfinite(loss):
            # Not the end, as in training, where the network is sound: an image's scores may overflow all the same.
            if _is_unsound(trainer, module):
                self._check_loss(trainer, loss)
            loss = math.inf
            self.console.say("san: some validation images get no finite scores, see docs/training.md")
        return dict(zip(names, (loss / images, 100 * top1 / images, 100 * top5 / images), strict=True))

    def _validation_loader(self, trainer: Trainer) -> Loader:
        assert self.dataset.validation is not None
        return make_loader(
            self.dataset.validation,
            self.dataset.preprocessing,
            batch_size=self.settings.batch_size // self.settings.accumulate,
            training=False,
            start=self.validated,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            workers=self.workers,
        )

    def _note_broken(self, name: str, batch: Batch) -> None:
        if batch.broken:
            self.broken[name].add(batch.broken)
            self.broken[name].check(self.settings.max_broken)

    def _gather_broken(self, trainer: Trainer) -> None:
        for broken in self.broken.values():
            broken.add(gather(trainer, broken.indices))

    def _pause(self, trainer: Trainer, module: Classifier, validation: Tensor | None = None) -> None:
        """Between two steps: save if it is time to or somebody wants to stop, and look after the loss."""
        due = time.monotonic() - self._saved >= 60 * self.settings.checkpoint_minutes
        stop, due = agree(trainer, self.stop.made, due)
        if stop or due:
            if validation is not None:
                self.validation_sums = total(trainer, validation)
            self._save(trainer, module)
        elif trainer.global_step % LOSS_CHECKED_EVERY == 0:
            self._checked_sums(trainer, module)
        if stop:
            raise Interrupted

    def _checked_sums(self, trainer: Trainer, module: Classifier) -> list[float]:
        """The epoch's sums over all processes."""
        sums = total(trainer, module.sums)
        self._check_loss(trainer, sums[0])
        return sums

    def _check_loss(self, trainer: Trainer, loss: float) -> None:
        """A loss that is no number ends the run before that is saved."""
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not a finite number any more (epoch {len(self.rows) + 1}, step {trainer.global_step}): "
                f"try a smaller --learning-rate or --clip-gradient 1; what {self.folder.path} holds is from before"
            )

    def _save(self, trainer: Trainer, module: Classifier, best: bool = False) -> None:
        self.sums = self._checked_sums(trainer, module)
        self._gather_broken(trainer)
        trainer.save_checkpoint(self.folder.best if best else self.folder.last)
        if best and trainer.is_global_zero:
            self.folder.keep_as_last(self.folder.best)
        self._saved = time.monotonic()


def _is_unsound(trainer: Trainer, module: Classifier) -> bool:
    """Whether any process has a weight or running average that is no finite number; all get the same answer.

    Each looks at what it holds: under FSDP a part of the weights, and averages of its own where BatchNorm is not
    synchronised.
    """
    held = chain(module.parameters(), module.buffers())
    return agree(trainer, not all(tensor.isfinite().all() for tensor in held))[0]


def _judge(trainer: Trainer, module: Classifier, batch: Batch) -> Tensor:
    """Sums of loss, right answers, right answers among the first five, and images of one batch: [4].

    An image without finite scores has no answer; `topk` alone would take what is no number for the largest.
    """
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    with whole_parameters(trainer), trainer.precision_plugin.val_step_context(), torch.no_grad():
        if len(batch.labels) == 0:  # every image broken, or none left for this process
            return module.sums.new_zeros(4)
        logits = module.evaluated(module.laid_out(batch.images))
    loss = F.cross_entropy(logits, batch.labels, reduction="sum")
    likeliest = logits.topk(min(5, logits.shape[1])).indices
    right = (likeliest == batch.labels[:, None]) & logits.isfinite().all(1, keepdim=True)
    return torch.stack([loss, right[:, 0].sum(), right.sum(), loss.new_tensor(len(right))]).to(module.sums.dtype)


def _line(row: dict[str, Any], epochs: int) -> str:
    """One line about an epoch."""
    words = [f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}", f"loss {_number(row['train_loss'])}"]
    if row["validation_top1"] is not None:
        words += [f"validation loss {_number(row['validation_loss'])}", f"top-1 {row['validation_top1']:.2f} %"]
    return "  ".join([*words, f"{row['seconds']:.1f} s"])


def _number(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.3g}"

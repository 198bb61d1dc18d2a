"""Labelled images as pixels in [0, 1], and networks that take such pixels.

What is done to an image has to be the same for every network, and to be bounded in pixels; so normalisation, which
differs between networks, is taken out of the images and put into the network. Both do the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, cast

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from san.data import Batch, BrokenImages, ImageSet, make_loader
from san.data.images import ImageSubset
from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.evaluation.classes import match_classes

__all__ = ["LabelledImages", "PixelModel", "Progress", "best_classes", "percent", "silently", "spread"]

Progress: TypeAlias = Callable[[Iterable[Batch], str], Iterable[Batch]]
"""Wraps batches, with a word for what is done with them, to show how far it is."""


class PixelModel(nn.Module):
    """A network with its normalisation inside: pixels in [0, 1] [B, 3, H, W] → logits [B, num_classes].

    `network` is a model as `san.create_model` or `san.checkpoints.load_model` give it, whose preprocessing says mean
    and standard deviation. It is held, not copied: mode and device of both are the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = resolve_model_data_config(network)
        self.num_classes = cast("int", network.num_classes)
        like = next(network.parameters())
        for name in ("mean", "std"):
            values = torch.tensor(self.preprocessing[name], dtype=like.dtype, device=like.device)
            self.register_buffer(name, values[:, None, None])
        # Not `train`, which would set the parts of a network of which some are frozen.
        self.training = network.training

    def normalise(self, pixels: Tensor) -> Tensor:
        """(pixels − mean) / std, as the network's own preprocessing ends."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of pixels in [0, 1]."""
        return self.network(self.normalise(pixels))

    def classes(self, pixels: Tensor) -> Tensor:
        """Likeliest classes of pixels in [0, 1], in eval mode: int64 [B], as `best_classes`."""
        with eval_mode(self), torch.inference_mode():
            return best_classes(self(pixels))[:, 0]


def silently(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
    """The batches, without showing how far they are."""
    return batches


class LabelledImages:
    """Images and their classes, to be read once for every network and every way of treating them.

    Args:
        images: Labelled images.
        class_names: Names of their classes, by which `match_classes` finds them among a model's.
        name: What to call them in a report; default "N images".
        batch_size: Images at a time.
        workers: Processes that read ahead; 0 reads in this one.
        max_broken: Share of the images that may be unreadable.
        progress: Wraps the batches of each pass over the images, with a word for what is done, to show how far it is.
    """

    def __init__(
        self,
        images: ImageSet,
        class_names: Sequence[str],
        *,
        name: str | None = None,
        batch_size: int = 64,
        workers: int = 0,
        max_broken: float = 0.01,
        progress: Progress = silently,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}, but it must be at least 1")
        if workers < 0:
            raise UserError(f"the number of workers is {workers}, but it must be at least 0")
        self.images, self.class_names = images, class_names
        self.name = f"{len(images)} images" if name is None else name
        self.batch_size, self.workers, self.max_broken, self.progress = batch_size, workers, max_broken, progress
        self.broken = BrokenImages(images)

    def some(self, count: int) -> LabelledImages:
        """At most `count` of them, as `spread` chooses; how many of these are broken does not matter any more."""
        return LabelledImages(
            spread(self.images, count),
            self.class_names,
            batch_size=self.batch_size,
            workers=self.workers,
            max_broken=1.0,
            progress=self.progress,
        )

    def batches(self, model: PixelModel, what: str = "judging") -> Iterator[Batch]:
        """Batches for a model, on its device: pixels in [0, 1] of its input size, labels in the model's numbers.

        Unreadable images are left out and noted in `broken`; batches without a readable image do not come.

        Raises:
            UserError: The classes do not match, the images have no labels, or too many of them cannot be read.
        """
        numbers, _ = match_classes(model.network, self.class_names)
        unnormalised = {**model.preprocessing, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        loader = make_loader(
            self.images, unnormalised, batch_size=self.batch_size, training=False, workers=self.workers
        )
        read = 0
        for batch in self.progress(loader, what):
            self.broken.add(batch.broken)
            if (batch.labels < 0).any():
                raise UserError("the images have no labels, so there is nothing to compare answers with")
            labels = torch.from_numpy(numbers[batch.labels.numpy()])
            read += len(labels)
            if len(labels):
                yield batch._replace(images=batch.images.to(model.mean.device), labels=labels.to(model.mean.device))
        self.broken.check(self.max_broken)
        if not read:
            raise UserError("there is not a single image to judge")


def spread(images: ImageSet, count: int) -> ImageSet:
    """At most `count` of the images, evenly spread over the set, so that a set sorted by class stays mixed.

    Raises:
        UserError: `count` is not positive.
    """
    if count < 1:
        raise UserError(f"the number of images is limited to {count}, but it must be at least 1")
    if count >= len(images):
        return images
    return ImageSubset(images, np.arange(count) * len(images) // count)


def best_classes(logits: Tensor) -> Tensor:
    """The likeliest classes [B, ≤ 5], best first; −1, which is no class, where scores are not all finite."""
    # `topk` takes what is no number for the largest.
    return logits.topk(min(5, logits.shape[1])).indices.where(logits.isfinite().all(1, keepdim=True), -1)


def percent(part: float, whole: float) -> float | None:
    """A share in percent; None of nothing."""
    return 100.0 * float(part) / float(whole) if whole else None

"""Segmentation on a SAN backbone: which pixels of a picture belong to which digit?

timm builds any network of this package as a backbone: with `features_only=True` it gives the map of every stage instead
of logits. The head here is the smallest that uses all of them: a 1×1 convolution brings each map to one width, the maps
are enlarged to the finest and summed, another 1×1 convolution tells the classes apart. A head of your own, for
segmentation or detection, goes in its place; `backbone.feature_info` tells it channels and strides.

    python examples/segmentation.py                                      # about a minute on 2 cores
    python examples/segmentation.py --backbone san4_patchwise --steps 600
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from typing import Any

import timm
import torch
from digits import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import san.models  # noqa: F401 (registers the networks with timm)

BACKGROUND = 10
CLASSES = 11
SIDE = 48


class Segmentation(nn.Module):
    """Images [B, 1, H, W] → logits of every pixel [B, classes, H, W]."""

    def __init__(self, backbone: Any, classes: int, width: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in backbone.feature_info.channels())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [layer(y) for layer, y in zip(self.lateral, self.backbone(x), strict=True)]
        finest = maps[0].shape[2:]
        together = torch.stack([F.interpolate(y, finest, mode="bilinear") for y in maps]).sum(0)
        return F.interpolate(self.head(F.relu(together)), x.shape[2:], mode="bilinear")


def scenes(digits: tuple[Tensor, Tensor], count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [count, 1, SIDE, SIDE] with two digits each, and the class of every pixel [count, SIDE, SIDE]."""
    images, labels = digits
    pictures = torch.zeros(count, 1, SIDE, SIDE)
    classes = torch.full((count, SIDE, SIDE), BACKGROUND)
    for picture, label in zip(pictures[:, 0], classes, strict=True):
        for index in torch.randint(len(images), (2,), generator=random).tolist():
            row, column = torch.randint(SIDE - 28 + 1, (2,), generator=random).tolist()
            window = (slice(row, row + 28), slice(column, column + 28))
            picture[window] = torch.maximum(picture[window], images[index])
            label[window][images[index] > 0.5] = labels[index]
    return pictures, classes


@torch.no_grad()
def mean_iou(model: nn.Module, pictures: Tensor, classes: Tensor) -> float:
    """Mean over the classes of intersection / union of the pixels that are, and that are taken for, the class."""
    model.eval()
    confusion = torch.zeros(CLASSES, CLASSES)
    for some, truth in zip(pictures.split(50), classes.split(50), strict=True):
        pairs = CLASSES * truth + model(some).argmax(1)
        confusion += torch.bincount(pairs.flatten(), minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    both = confusion.diagonal()
    return float((both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean())


def train(model: nn.Module, digits: tuple[Tensor, Tensor], steps: int, batch: int, random: torch.Generator) -> None:
    """AdamW on new pictures at every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.005)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=steps)
    for step in range(steps):
        pictures, classes = scenes(digits, batch, random)
        loss = F.cross_entropy(model(pictures), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}")


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train, print and return the mean IoU before and after, and that of calling every pixel background."""
    parser = ArgumentParser(description="Segmentation on a SAN backbone", formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", default="san4_pairwise", help="a network of san.list_models()")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--judged", type=int, default=200, help="pictures of test digits to judge by")
    options = parser.parse_args(words)

    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    pictures, classes = scenes(load_digits("test"), options.judged, random)
    # Every stage of the backbone halves its map, the first one too: maps of 24, 12 and 6 pixels a side.
    backbone = timm.create_model(options.backbone, features_only=True, in_chans=1, pools=(True, True, True))
    model = Segmentation(backbone, CLASSES)

    found = {"background": float((classes == BACKGROUND).float().mean()) / CLASSES}
    found["before"] = mean_iou(model, pictures, classes)
    train(model, load_digits("train"), options.steps, options.batch, random)
    found["after"] = mean_iou(model, pictures, classes)
    print(f"mean IoU: {found['before']:.3f} before training, {found['after']:.3f} after")
    print(f"(calling every pixel background: {found['background']:.3f})")
    return found


if __name__ == "__main__":
    main()

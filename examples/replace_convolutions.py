"""Attention in a network that somebody else built: a ResNet of timm, trained with convolutions, some of them replaced.

First the ResNet learns the digits. Then `san.replace_convolutions` puts attention in place of the 3×3 convolutions of
its middle stages; all other weights stay what they were, bit for bit, so only the new layers have to be trained.
Printed are parameters, multiply-adds and accuracy on the test digits at each point.

    python examples/replace_convolutions.py                                  # about a minute on 2 cores
    python examples/replace_convolutions.py --layers layer3 --form patchwise --footprint 7
"""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import timm
import torch
from digits import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import san
from san.evaluation.cost import complexity

SIDE = 64


def prepared(split: str) -> tuple[Tensor, Tensor]:
    """Digits as the ResNet takes them, [N, 3, SIDE, SIDE] around 0: its stem alone divides the side by 4."""
    images, labels = load_digits(split)
    enlarged = F.interpolate((images[:, None] - 0.13) / 0.31, (SIDE, SIDE), mode="bilinear")
    return enlarged.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), labels


def train(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, rate: float = 0.003) -> list[float]:
    """AdamW on batches of 32, on whatever weights take gradients; the loss of every step."""
    images, labels = data
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of the images whose digit is found."""
    model.eval()
    images, labels = data
    right = [(model(some).argmax(1) == truth) for some, truth in zip(images.split(100), labels.split(100), strict=True)]
    return float(torch.cat(right).float().mean())


def describe(what: str, model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """Print parameters, multiply-adds of one image and accuracy; return the accuracy."""
    cost, share = complexity(model, SIDE), accuracy(model, test)
    print(f"{what:32} {cost['params']:>10,} {cost['macs'] / 1e6:>12.1f} M {100 * share:>9.1f} %")
    return share


def arguments() -> ArgumentParser:
    """What the command line takes."""
    parser = ArgumentParser(
        description="Attention in place of a ResNet's convolutions", formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", default=["layer2", "layer3"], help="where, by names or patterns")
    parser.add_argument("--form", default="pairwise", help="pairwise, patchwise or scalar")
    parser.add_argument("--footprint", type=int, default=3, help="width, in places")
    parser.add_argument("--steps", type=int, default=150, help="of training, before replacing and after")
    parser.add_argument("--judged", type=int, default=1000, help="test images")
    return parser


def main(words: list[str] | None = None) -> dict[str, float]:
    """Train, replace, train the new layers; return the accuracies, and the share of weights kept."""
    options = arguments().parse_args(words)

    torch.manual_seed(0)
    training, (images, labels) = prepared("train"), prepared("test")
    judged = torch.randperm(len(images))[: options.judged]
    test = images[judged], labels[judged]
    # A quarter of the usual width is enough for digits.
    model = timm.create_model("resnet26", num_classes=10, channels=(16, 32, 64, 128))
    model = model.to(memory_format=torch.channels_last)
    print(f"{'':32} {'parameters':>10} {'multiply-adds':>14} {'accuracy':>11}")
    train(model, training, options.steps)
    found = {"convolutions": describe("convolutions, trained", model, test)}

    # What has been learnt stays: only the new layers take gradients.
    model.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model, replaced = san.replace_convolutions(model, options.layers, options.form, kernel_size=options.footprint)
    found["replaced"] = describe(f"{len(replaced)} of them replaced", model, test)
    train(model, training, options.steps)
    found["attention"] = describe("the new layers trained", model, test)
    kept = [torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before]
    print("replaced:", ", ".join(replaced))
    print(f"{sum(kept)} of the {len(kept)} other weights are what they were")
    found["kept"] = sum(kept) / len(kept)
    return found


if __name__ == "__main__":
    main()

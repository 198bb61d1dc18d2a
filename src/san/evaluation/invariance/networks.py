"""What a trained network makes of altered images, and of weight groups in another order.

Legend: B images, C features, H W their size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from san.data.images import ImageSubset
from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.evaluation.invariance.groups import permute_groups, relabel_groups
from san.evaluation.invariance.views import VIEWS
from san.evaluation.robustness import LabelledImages, PixelModel
from san.layers import SelfAttentionBlock

__all__ = ["GROUP_CHANGES", "in_random_order", "measure_network"]


def _swapped(block: SelfAttentionBlock, order: Tensor) -> nn.Module:
    changed: Any = copy.deepcopy(block)
    changed.sam = permute_groups(changed.sam, order)
    return changed


GROUP_CHANGES: dict[str, Callable[[SelfAttentionBlock, Tensor], nn.Module]] = {
    "groups numbered anew": relabel_groups,
    "groups swapped": _swapped,
}
"""What is done to every block: weight groups change places with their values, or without them."""


class _Sums:
    """Sums over images from which a view's row follows."""

    def __init__(self) -> None:
        self.kept = self.right = 0
        self.cosine = self.difference = 0.0

    def add(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], labels: Tensor) -> None:
        """Features [B, C] and classes [B], of the images as they are and altered."""
        self.kept += int((after[1] == before[1]).sum())
        self.right += int((after[1] == labels).sum())
        self.cosine += float(torch.cosine_similarity(before[0], after[0]).sum())
        self.difference += float((after[0] - before[0]).square().sum())

    def row(self, view: str, count: int, variance: float) -> dict[str, Any]:
        """Means over `count` pairs; `variance` of the features is the sum over channels."""
        return {
            "view": view,
            "kept": 100 * self.kept / count,
            "top1": 100 * self.right / count,
            "cosine": self.cosine / count,
            "change": (self.difference / count / variance) ** 0.5,
        }


def measure_network(model: nn.Module, examples: LabelledImages) -> list[dict[str, Any]]:
    """Compare what a network makes of images with what it makes of them altered as in `VIEWS`.

    Then weight groups change places in every attention block, as `GROUP_CHANGES` says, and images stay as they are;
    networks without such blocks, or where value has no transformation of its own, have no such rows. "another image" is
    the next one of its batch, so images should come `in_random_order`. The model is left as it was.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it.
        examples: At least two images.

    Returns:
        Rows of `view`; `kept`, images that are classified as before, in percent; `top1`, images classified right, in
        percent; `cosine`, mean cosine similarity to the pooled features before; and `change`, the root mean square of
        the features' difference over their standard deviation, as `relative_change` has it.

    Raises:
        UserError: As `LabelledImages.batches`, and for fewer than two images.
    """
    network, width = PixelModel(model), cast("int", model.num_features)
    others = {name: PixelModel(changed) for name, changed in _with_other_groups(model).items()}
    sums = {name: _Sums() for name in (*VIEWS, *others)}
    moments, images = torch.zeros(2, width, dtype=torch.float64), 0
    with eval_mode(model), torch.inference_mode():
        for batch in examples.batches(network, "invariance"):
            before, images = _answers(network, batch.images), images + len(batch.labels)
            moments += torch.stack([before[0].sum(0), before[0].square().sum(0)]).cpu()
            for name, view in VIEWS.items():
                for alter in view.alterations:
                    sums[name].add(before, _answers(network, alter(batch.images)), batch.labels)
            for name, other in others.items():
                sums[name].add(before, _answers(other, batch.images), batch.labels)
    if images < 2:
        raise UserError("one image has none to be compared with; give at least two")
    mean, square = moments / images
    variance = float((square - mean.square()).sum())
    counts = {name: images * len(VIEWS[name].alterations) if name in VIEWS else images for name in sums}
    return [each.row(name, counts[name], variance) for name, each in sums.items()]


def in_random_order(examples: LabelledImages, seed: int = 0) -> LabelledImages:
    """The same images in an order of chance."""
    order = np.random.default_rng(seed).permutation(len(examples.images))
    return LabelledImages(
        ImageSubset(examples.images, order),
        examples.class_names,
        name=examples.name,
        batch_size=examples.batch_size,
        workers=examples.workers,
        max_broken=examples.max_broken,
        progress=examples.progress,
    )


def _with_other_groups(model: nn.Module) -> dict[str, nn.Module]:
    blocks = {name: part for name, part in model.named_modules() if isinstance(part, SelfAttentionBlock)}
    layers: list[Any] = [block.sam for block in blocks.values()]
    if not layers or not all(hasattr(layer, "groups") and hasattr(layer, "conv3") for layer in layers):
        return {}
    networks = {name: copy.deepcopy(model) for name in GROUP_CHANGES}
    for change, network in networks.items():
        for name, block in blocks.items():
            network.set_submodule(name, GROUP_CHANGES[change](block, _next_group(block)))
    return {name: network.eval() for name, network in networks.items()}


def _next_group(block: Any) -> Tensor:
    return torch.arange(block.sam.groups).roll(1)


def _answers(network: PixelModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features in float64 [B, C], and the likeliest classes [B]."""
    model: Any = network.network
    features = model.forward_head(model.forward_features(network.normalise(pixels)), pre_logits=True)
    return features.double(), model.get_classifier()(features).argmax(1)

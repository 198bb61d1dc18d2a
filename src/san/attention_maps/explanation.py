"""Everything about one image at once: what `san explain` shows, as arrays and as rows of a table.

Legend: C value channels, G weight groups, K places, H W a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from san.attention_maps.evidence import grad_cam
from san.attention_maps.extent import EffectiveFootprint, effective_footprint
from san.attention_maps.observation import ObservedLayer, check_pixel, find_layers, observe
from san.attention_maps.propagation import rollout
from san.attention_maps.weights import PixelAttention, attention_weights, pixel_attention
from san.data import BrokenImage, ImageFiles, transform
from san.data.images import to_rgb
from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.evaluation.classes import class_words

__all__ = ["Explanation", "explain", "prepare_image", "shown_image"]


@dataclass(frozen=True)
class Explanation:
    """What a network sees in one image.

    Args:
        shown: The preprocessed image, as `shown_image` gives it, float32 [H, W, 3] in [0, 1].
        pixel: (x, y) in it.
        target: The class that Grad-CAM looks for, by number, its name and its probability.
        grad_cam: [h, w].
        pixels: What the pixel attends to, in the chosen layers, in the order in which they ran.
        footprints: How far every layer looks.
        rollout: As `san.attention_maps.rollout` gives it; empty where there are no attention layers.
    """

    shown: np.ndarray
    pixel: tuple[int, int]
    target: tuple[int, str, float]
    grad_cam: Tensor
    pixels: dict[str, PixelAttention]
    footprints: dict[str, EffectiveFootprint]
    rollout: dict[str, Tensor]

    def rows(self) -> list[dict[str, Any]]:
        """A row for every attention layer: its form, map and footprint, and means over pixels and groups.

        Distances are in pixels of the image, entropy in bits beside the most that it can be, log₂ K; negative weights
        are in percent of all.
        """
        return [_row(footprint) for footprint in self.footprints.values()]

    def arrays(self, *, whole_maps: bool = False) -> dict[str, np.ndarray]:
        """All numbers by name, as `docs/attention.md` lists them, without the axis of the batch.

        `whole_maps` adds α of all pixels of the chosen layers.
        """
        number, name, probability = self.target
        found = {
            "image": np.round(self.shown * 255).astype(np.uint8),
            "pixel": np.array(self.pixel),
            "class": np.array(number),
            "class_name": np.array(name),
            "probability": np.array(probability, dtype=np.float32),
            "grad_cam": _array(self.grad_cam),
            "layers": np.array(list(self.footprints), dtype=str),
        }
        for layer, footprint in self.footprints.items():
            for quantity in ("distance", "entropy", "negative"):
                found[f"{layer}/{quantity}"] = _array(getattr(footprint, quantity)[0])
            found[f"{layer}/rollout"] = _array(self.rollout[layer][0])
        if self.rollout:
            found["rollout"] = _array(self.rollout["image"][0])
        for layer, attention in self.pixels.items():
            found |= {f"{layer}/{key}": _array(value) for key, value in _pixel_arrays(attention).items()}
            if whole_maps:
                weights = attention_weights(attention.observed)[0].unflatten(2, attention.observed.output_size)
                found[f"{layer}/all_weights"] = _array(weights)
        return found


def _row(footprint: EffectiveFootprint) -> dict[str, Any]:
    observed = footprint.observed
    rule = observed.layer.footprint
    return {
        "layer": observed.name,
        "form": observed.form,
        "map": "×".join(map(str, observed.size)),
        "footprint": f"{rule.kernel_size}×{rule.kernel_size}",
        "groups": observed.groups,
        "distance": float(footprint.distance.mean()),
        "uniform": float(footprint.uniform.mean()),
        "entropy": float(footprint.entropy.mean()),
        "most": log2(rule.places),
        "negative": 100 * float(footprint.negative.mean()),
    }


def _pixel_arrays(attention: PixelAttention) -> dict[str, Tensor]:
    return {
        "weights": attention.weights[0],
        "values": attention.values[0],
        "output": attention.output()[0],
        "rows": attention.rows,
        "columns": attention.columns,
        "outside": attention.outside,
        "place": torch.tensor([attention.row, attention.column]),
    }


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def explain(
    model: nn.Module,
    prepared: Tensor,
    *,
    pixel: tuple[int, int] | None = None,
    layers: Iterable[str] | None = None,
    target: int | None = None,
    progress: Callable[[list[ObservedLayer]], Iterable[ObservedLayer]] = iter,
) -> Explanation:
    """Look at one image: the pixel's attention, how far layers look, roll-out and Grad-CAM.

    A network without attention layers gets Grad-CAM alone. Runs where the model is, in eval mode, and leaves it as it
    was; α of more than one band of one layer is never in memory.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it, whose preprocessing is used.
        prepared: One image as `prepare_image` gives it, [1, 3, H, W].
        pixel: (x, y) in it; default its middle.
        layers: In which layers to look at the pixel, as `find_layers` takes names; default all.
        target: Class to look for by Grad-CAM; default the likeliest.
        progress: Wraps the list of layers, to show how far it is.

    Raises:
        UserError: Unknown layers; a pixel outside; a class that there is not; scores that are no finite numbers.
    """
    height, width = prepared.shape[2:]
    pixel = (width // 2, height // 2) if pixel is None else pixel
    check_pixel(pixel, (height, width))
    chosen = find_layers(model, layers)
    observed = observe(model, prepared)
    found = {name: pixel_attention(each, pixel) for name, each in observed.items() if name in chosen}
    number, word, probability = _class(model, prepared, target)
    return Explanation(
        shown=shown_image(model, prepared),
        pixel=pixel,
        target=(number, word, probability),
        grad_cam=grad_cam(model, prepared, number)[0],
        pixels=found,
        footprints={each.name: effective_footprint(each) for each in progress(list(observed.values()))},
        rollout=rollout(observed, pixel) if observed else {},
    )


@torch.no_grad()
def _class(model: nn.Module, prepared: Tensor, target: int | None) -> tuple[int, str, float]:
    words = class_words(model)
    if not words:
        raise UserError("the network has no classifier, so there is no class to explain")
    with eval_mode(model):
        probabilities = model(prepared)[0].float().softmax(0)
    if not probabilities.isfinite().all():
        raise UserError("the network gives the image no finite scores, so there is no class to explain")
    if target is not None and not 0 <= target < len(words):
        raise UserError(f"there is no class {target}; the network has classes 0 to {len(words) - 1}")
    number = int(probabilities.argmax()) if target is None else target
    return number, words[number], float(probabilities[number])


def prepare_image(model: nn.Module, image: str | Path | Image.Image) -> Tensor:
    """An image file, or image, as the model takes it, on its device: normalised, [1, 3, H, W].

    Preprocessed as `san evaluate` and `san predict` do, by what the model carries. Raises `UserError` if it cannot be
    read.
    """
    like = next(model.parameters())
    prepare = transform(resolve_model_data_config(model), training=False)
    return prepare(_read(image))[None].to(like)


def _read(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not Path(image).exists():
        raise UserError(f"there is no file {image}")
    try:
        return ImageFiles([image]).load(0)
    except BrokenImage as problem:
        raise UserError(f"{image} is not a readable image") from problem


def shown_image(model: nn.Module, prepared: Tensor) -> np.ndarray:
    """What `prepare_image` gave, or one image of a batch, back in colours: float32 [H, W, 3] in [0, 1]."""
    preprocessing = resolve_model_data_config(model)
    mean, std = (torch.tensor(preprocessing[name])[:, None, None] for name in ("mean", "std"))
    colours = prepared[0].detach().cpu().float() * std + mean
    return colours.clamp(0, 1).permute(1, 2, 0).numpy()

"""What the networks answer: to a picture, to what it becomes when it is turned or attacked, and for a pixel of it.

Three steps, each on the result of the one before, so that a click needs only the last. All of them run in one thread,
one after the other, whoever asks: torch has one team of threads then, networks are not shared, and nobody starves.
Legend: C classes, H W the network's input.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from san.attention_maps import PixelAttention, observe, pixel_attention, prepare_image
from san.demo.networks import Network
from san.evaluation.robustness import Attack, attack_images, rotate

__all__ = ["MOST_STRENGTH", "Changed", "Taken", "attend", "change", "in_turn", "pixel_at", "prepare", "take"]

Result = TypeVar("Result")

MOST_STRENGTH = 16
"""Of the attack, for pixels from 0 to 255."""
_ITERATIONS = 10
# Between the angles of the curve, in degrees; twice that for inputs wider than _SMALL pixels, which take longer.
_STEP, _SMALL = 15, 128
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="san-demo")


def in_turn(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in the thread where all networks run, when everything before it is done."""
    return _THREAD.submit(function, *arguments).result()


@dataclass(frozen=True)
class Taken:
    """A picture as a network takes it.

    Args:
        prepared: Its input, normalised, [1, 3, H, W].
        probabilities: [C].
        turning: Angles in degrees, the probability of the likeliest class there, and whether it still is the likeliest.
    """

    prepared: Tensor
    probabilities: Tensor
    turning: list[tuple[int, float, bool]]

    @property
    def answer(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())


@dataclass(frozen=True)
class Changed:
    """What a network sees after turning and attack, and what it says then.

    Args:
        degrees: Turned clockwise by so much.
        strength: The attack's largest change of a pixel, for pixels from 0 to 255.
        turned: Pixels before the attack, [1, 3, H, W] in [0, 1].
        pixels: Pixels after it.
        probabilities: [C].
    """

    degrees: float
    strength: float
    turned: Tensor
    pixels: Tensor
    probabilities: Tensor


def prepare(network: Network, image: Image.Image) -> Tensor:
    """An image as the network takes it, normalised, [1, 3, H, W], on its device."""
    return prepare_image(network.model, image)


@torch.no_grad()
def take(network: Network, prepared: Tensor) -> Taken:
    """Ask for a picture as it is, and turned all the way round."""
    probabilities = _probabilities(network, prepared)
    answer, turning = int(probabilities.argmax()), []
    for degrees in range(0, 361, _STEP if prepared.shape[-1] <= _SMALL else 2 * _STEP):
        turned = _probabilities(network, rotate(prepared, degrees % 360))
        turning.append((degrees, float(turned[answer]), int(turned.argmax()) == answer))
    return Taken(prepared, probabilities, turning)


def change(network: Network, taken: Taken, degrees: float, strength: float) -> Changed:
    """Turn a picture clockwise, then attack it by PGD, away from what the network says to the turned picture.

    Ten iterations of a quarter of `strength`, which is the bound in the L∞ norm, for pixels from 0 to 255.
    """
    turned = rotate(taken.prepared, degrees % 360)
    model = network.pixel_model
    pixels = (turned * model.std + model.mean).clamp(0, 1)
    attacked = pixels
    if strength:
        attack = Attack(epsilon=strength / 255, step=strength / 255 / 4, iterations=_ITERATIONS)
        # Where scores overflow there is no class to lead away from, and no gradient either; any will do. A new tensor,
        # because classes come from inference mode, where gradients cannot be followed.
        attacked = attack_images(model, pixels, model.classes(pixels).clamp(min=0), attack).images
    seen = _probabilities(network, model.normalise(attacked))
    return Changed(degrees, strength, pixels, attacked, seen)


def attend(network: Network, changed: Changed, point: tuple[float, float], layer: str) -> PixelAttention:
    """What the pixel at `point`, from the left and the top as parts of the picture, attends to in a layer."""
    observed = observe(network.model, network.pixel_model.normalise(changed.pixels), [layer])
    return pixel_attention(observed[layer], pixel_at(changed.pixels, point))


def pixel_at(pixels: Tensor, point: tuple[float, float]) -> tuple[int, int]:
    """(x, y) of the pixel of [1, 3, H, W] at a point whose coordinates go from 0 to 1; beyond them, the nearest."""
    height, width = pixels.shape[2:]
    x, y = (min(max(int(part * size), 0), size - 1) for part, size in zip(point, (width, height), strict=True))
    return x, y


@torch.no_grad()
def _probabilities(network: Network, normalised: Tensor) -> Tensor:
    return network.model(normalised)[0].float().softmax(0).cpu()

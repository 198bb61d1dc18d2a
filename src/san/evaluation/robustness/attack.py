"""Projected gradient descent (PGD) in the L∞ norm: Madry et al., 2018; the paper's section 5.

x₀ is the image or a random start, and x₊ = clip(x ± step·sign(∂loss/∂x)) to within ε of the image and to [0, 1]. An
untargeted attack raises the loss of the true class, a targeted one lowers that of another class. Every iterate of one
run is judged, by the logits that its gradient needs anyway: what 50 iterations cost tells of 1 to 50.
Losses: `LOSSES`, of which the paper takes the cross-entropy.
Legend: B images, N iterations, H W their size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.evaluation.robustness.inputs import LabelledImages, PixelModel, best_classes, percent

__all__ = [
    "LOSSES",
    "Attack",
    "Attacked",
    "Iterate",
    "attack_accuracy",
    "attack_images",
    "frozen",
    "margin",
    "pgd",
    "random_start",
    "wrong_labels",
]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the largest other logit exceeds the label's: [B], of logits [B, C], C ≥ 2, and labels int64 [B].

    Positive just where another class wins. Its gradient does not vanish where softmax is saturated, as that of the
    cross-entropy does (Carlini, Wagner, 2017, f₆ without its bound).
    """
    label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(1) - logits[label]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": _cross_entropy, "margin": margin}
"""Functions of logits [B, C] and labels [B] that an attack can follow, [B], the larger the less the label wins."""


@dataclass(frozen=True)
class Attack:
    """How to attack; the defaults are the paper's sizes, untargeted, from the image itself.

    `epsilon` is the largest change of a pixel and `step` that of one iteration, for pixels in [0, 1]. A `targeted`
    attack aims at a wrong class, which `wrong_labels` draws. `random_start` begins at `random_start` instead of the
    image; of `restarts` such runs each image's first that reaches the aim counts. `seed` fixes everything drawn. `loss`
    is one of `LOSSES`; the paper's is the cross-entropy.

    Raises `UserError` for values out of range and an unknown loss.
    """

    epsilon: float = 8 / 255
    step: float = 2 / 255
    iterations: int = 4
    targeted: bool = False
    random_start: bool = False
    restarts: int = 1
    seed: int = 0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        for name in ("epsilon", "step"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"{name} is {value:g}, but pixels go from 0 to 1: give a part of that, such as 8/255")
        for name in ("iterations", "restarts"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} is {value}, but it must be at least 1")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}, but it must be at least 0")
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r} is unknown; choose among: {', '.join(LOSSES)}")
        if self.restarts > 1 and not self.random_start:
            raise UserError(f"{self.restarts} restarts from the image itself are all the same: add a random start")


class Iterate(NamedTuple):
    """Where an attack stands after `number` iterations.

    images: [B, 3, H, W], pixels.
    logits: [B, C] of these images.
    losses: [B], with the labels of the attack.
    """

    number: int
    images: Tensor
    logits: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Attacked:
    """What became of B images; rows 0 to N are after as many iterations.

    Args:
        images: [B, 3, H, W], after N iterations.
        predicted: int64 [N+1, B], likeliest classes, as `best_classes`.
        reached: bool [N+1, B], whether these are the aim: the target, or anything but the true class.
        losses: [N+1, B], with the target or the true class.
    """

    images: Tensor
    predicted: Tensor
    reached: Tensor
    losses: Tensor

    def or_else(self, other: Attacked) -> Attacked:
        """Each image of `other` where that reached the aim and this did not, for every number of iterations alone."""
        better = other.reached & ~self.reached
        return Attacked(
            torch.where(better[-1][:, None, None, None], other.images, self.images),
            torch.where(better, other.predicted, self.predicted),
            self.reached | other.reached,
            torch.where(better, other.losses, self.losses),
        )


def pgd(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 8 / 255,
    step: float = 2 / 255,
    iterations: int = 4,
    targeted: bool = False,
    start: Tensor | None = None,
    loss: str = "cross_entropy",
) -> Iterator[Iterate]:
    """Attack images; yields the start and what each iteration makes of it, `iterations` + 1 in all.

    Each iterate is what a run of so many iterations would end with. The network is used as it is: `frozen` around the
    loop keeps its statistics and spares the gradients of its parameters. Any floating dtype and device.

    Args:
        network: From pixels in [0, 1] to logits, such as a `PixelModel`.
        images: [B, C, H, W], pixels in [0, 1].
        labels: int64 [B]: the true classes, or with `targeted` the classes to reach.
        epsilon: Largest change of a pixel.
        step: Change of a pixel in one iteration.
        iterations: How many.
        targeted: Whether to come nearer to the labels instead of away from them.
        start: Where to begin, [B, C, H, W]; default the images.
        loss: One of `LOSSES`.
    """
    images = images.detach()
    lowest, highest = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    x = torch.clamp(images if start is None else start, lowest, highest)
    for number in range(iterations):
        logits, losses, gradient = _differentiated(network, x, labels, LOSSES[loss])
        yield Iterate(number, x, logits, losses)
        x = torch.clamp(x + (-step if targeted else step) * gradient.sign(), lowest, highest)
    with torch.no_grad():
        logits = network(x)
    yield Iterate(iterations, x, logits, LOSSES[loss](logits, labels))


def _differentiated(
    network: nn.Module, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, each image's loss, and its gradient by the image."""
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        logits = network(x)
        losses = loss(logits, labels)
        # Images do not mix in eval mode, so the gradient of the sum holds that of each.
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return logits.detach(), losses.detach(), gradient


@contextmanager
def frozen(network: nn.Module) -> Generator[None]:
    """Eval mode inside, and no gradients of parameters; mode and `requires_grad` as they were afterwards."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        with eval_mode(network):
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


def wrong_labels(labels: Tensor, classes: int, indices: Sequence[int], seed: int = 0) -> Tensor:
    """A class for each image that is not its own, uniformly drawn by seed and index: int64 [B].

    Raises:
        UserError: There is only one class.
    """
    if classes < 2:
        raise UserError("a targeted attack needs a network that tells at least two classes apart")
    drawn = [np.random.default_rng([seed, index]).integers(1, classes) for index in indices]
    return (labels + torch.tensor(drawn, dtype=torch.int64, device=labels.device)) % classes


def random_start(images: Tensor, epsilon: float, indices: Sequence[int], seed: int = 0, restart: int = 0) -> Tensor:
    """Images with uniform noise of up to ±`epsilon` on every pixel, drawn by seed, index and number of the restart."""
    # From 1 on: NumPy takes a missing number for 0, which would be the stream of `wrong_labels`.
    generators = [np.random.default_rng([seed, index, restart + 1]) for index in indices]
    noise = np.stack([generator.random(images.shape[1:], dtype=np.float32) for generator in generators])
    return (images + epsilon * (2 * torch.from_numpy(noise).to(images) - 1)).clamp(0, 1)


def attack_images(
    network: PixelModel, images: Tensor, labels: Tensor, attack: Attack, indices: Sequence[int] | None = None
) -> Attacked:
    """Attack images of known classes with everything that `attack` asks for; `network` is frozen meanwhile.

    Args:
        network: A model with its normalisation inside.
        images: [B, 3, H, W], pixels in [0, 1], B ≥ 1.
        labels: int64 [B], the true classes.
        attack: How to attack.
        indices: The images' places in their set, by which targets and starts are drawn, whatever the batch; default
            0 to B−1.
    """
    indices = range(len(images)) if indices is None else indices
    aims = wrong_labels(labels, network.num_classes, indices, attack.seed) if attack.targeted else labels
    found: Attacked | None = None
    with frozen(network):
        for restart in range(attack.restarts):
            noisy = random_start(images, attack.epsilon, indices, attack.seed, restart) if attack.random_start else None
            run = _run(network, images, aims, attack, noisy)
            found = run if found is None else found.or_else(run)
    assert found is not None
    return found


def _run(network: PixelModel, images: Tensor, aims: Tensor, attack: Attack, start: Tensor | None) -> Attacked:
    how = {name: getattr(attack, name) for name in ("epsilon", "step", "iterations", "targeted", "loss")}
    predicted, losses, last = [], [], images
    for iterate in pgd(network, images, aims, **how, start=start):
        predicted.append(best_classes(iterate.logits)[:, 0])
        losses.append(iterate.losses)
        last = iterate.images
    classes = torch.stack(predicted)
    return Attacked(last, classes, (classes == aims) == attack.targeted, torch.stack(losses))


def attack_accuracy(model: nn.Module, examples: LabelledImages, attack: Attack | None = None) -> dict[str, Any]:
    """How often an attack succeeds, and how often the model is still right, after 0 to N iterations.

    `success` is the share of attacked images on which the attack reaches its aim: for a targeted one, of all images
    those taken for their target; for an untargeted one, of those first classified right those that no longer are.
    `top1` is the share of all images, attacked, that are classified right. After 0 iterations stands the start. All
    in percent. The model is used where it is, with frozen statistics, and left as it was.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it.
        examples: What to attack.
        attack: How; default `Attack()`.

    Returns:
        `images`, `top1` without attack, and `rows` of `iterations`, `success` (None where there was nothing to
        attack), `top1` and `loss`, the attack's mean loss with the true class or the target over the images whose loss
        is a finite number after every number of iterations (None if there are none: scores may overflow).

    Raises:
        UserError: As `LabelledImages.batches`.
    """
    attack, network = attack or Attack(), PixelModel(model)
    # Columns: reached, right, loss, images that have one.
    sums = torch.zeros(attack.iterations + 1, 4, dtype=torch.float64)
    images = right = attacked = 0
    for batch in examples.batches(network, "targeted attack" if attack.targeted else "untargeted attack"):
        is_right = network.classes(batch.images) == batch.labels
        found = attack_images(network, batch.images, batch.labels, attack, batch.indices.tolist())
        worth = torch.ones_like(is_right) if attack.targeted else is_right
        finite = found.losses.isfinite().all(0).expand_as(found.losses)
        losses = found.losses.where(finite, 0)
        parts = (found.reached & worth, found.predicted == batch.labels, losses, finite)
        sums += torch.stack([part.cpu().double().sum(1) for part in parts], 1)
        images, right, attacked = images + len(is_right), right + int(is_right.sum()), attacked + int(worth.sum())
    rows = [
        {"success": percent(reached, attacked), "top1": percent(still, images), "loss": loss / known if known else None}
        for reached, still, loss, known in sums.tolist()
    ]
    return {
        "images": images,
        "top1": percent(right, images),
        "rows": [{"iterations": number, **row} for number, row in enumerate(rows)],
    }

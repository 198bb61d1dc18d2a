"""Grad-CAM by Captum: which parts of the last map speak for a class, for any network with a global pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from san.errors import UserError
from san.evaluation.accuracy import eval_mode

__all__ = ["grad_cam"]


class _Head(nn.Module):
    """A network behind its last map, with a place for Captum to listen at that is nobody else's."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.last_map = nn.Identity()
        self._head = network.forward_head

    def forward(self, x: Tensor) -> Tensor:
        return self._head(self.last_map(x))


def grad_cam(model: nn.Module, images: Tensor, target: int | None = None) -> Tensor:
    """ReLU(Σ_c w_c A_c), with A the last map [B, C, h, w] and w_c the mean over it of ∂(logit of a class)/∂A_c.

    `images` [B, channels, H, W] on the network's device → [B, h, w], 0 where nothing speaks for class `target`, by
    default each image's likeliest. The network has timm's `forward_features` and `forward_head`, as all of
    `san.create_model` and timm's convolutional networks; it runs in eval mode and is left as it was. Without
    gradients up to the last map, so it costs little more than the forward pass.

    Source: Selvaraju et al., Grad-CAM (2017), by Captum's `LayerGradCam`. Raises `UserError` for a network without
    such a map or classifier, or a class that it does not have.
    """
    from captum.attr import LayerGradCam

    network: Any = model
    if not hasattr(network, "forward_features") or not hasattr(network, "forward_head"):
        raise UserError(f"Grad-CAM needs forward_features and forward_head, which {type(model).__name__} lacks")
    if not getattr(network, "num_classes", True):
        raise UserError("Grad-CAM needs a classifier, but the network has none")
    with eval_mode(model):
        with torch.no_grad():
            last = network.forward_features(images)
            if last.dim() != 4:
                raise UserError(f"Grad-CAM needs a last map [B, C, h, w], but the network gives {list(last.shape)}")
            classes = _classes(network.forward_head(last), target)
        head = _Head(network)
        found = LayerGradCam(head, head.last_map).attribute(last, classes, relu_attributions=True)
    return found.detach()[:, 0]


def _classes(logits: Tensor, target: int | None) -> Tensor:
    """The class to look for in each image, int64 [B]."""
    if target is None:
        return logits.argmax(1)
    if not 0 <= target < logits.shape[1]:
        raise UserError(f"there is no class {target}; the network has classes 0 to {logits.shape[1] - 1}")
    return torch.full((len(logits),), target, device=logits.device)

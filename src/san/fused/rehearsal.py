"""Have the kernels of a network's step on a GPU compiled before the first step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from san.ops.kernels.gpu import launch
from san.ops.kernels.gpu.rehearsal import rehearsal

__all__ = ["compile_kernels"]


def compile_kernels(network: nn.Module, images: Tensor) -> None:
    """Compile what a step of the network on such images launches: in training mode with gradients, else without.

    A copy of the network does the step, so that nothing of it changes; two images [2, C, H, W] are enough, because no
    batch compiles anything new. Their device, size, dtype and memory format count, and so does autocast where it is
    called. Without Triton, and where it interprets, nothing is done. Nobody else may launch kernels meanwhile.
    """
    if not launch.installed() or launch.interpreting():
        return
    network = copy.deepcopy(network)
    with rehearsal(), torch.set_grad_enabled(network.training):
        y = network(images)
        if network.training:
            y.float().sum().backward()

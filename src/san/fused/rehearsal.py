"""Have the kernels of a network's step on a GPU compiled before the first step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from san.ops.kernels.gpu import launch
from san.ops.kernels.gpu.rehearsal import rehearsal

__all__ = ["compile_kernels"]


def compile_kernels(network: nn.Module, images: Tensor) -> None:
    """Compile what Triton's kernels need for a step of the network on such images: forward, and backward if it trains.

    Two images [2, C, H, W] are enough, because no batch compiles anything new. Their device, dtype and memory format
    count, and so does autocast where this is called. A copy of the network does the step, so that neither its tensors
    nor the random numbers after it change; its hooks are called, and processes that share a BatchNorm's statistics must
    all call this. Nobody else may launch kernels meanwhile. Does nothing where the kernels do not run.
    """
    refused = launch.map_refusal(images) or launch.gpu_refusal(images)
    if not launch.installed() or launch.interpreting() or refused:
        return
    network = copy.deepcopy(network)
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), rehearsal(), torch.set_grad_enabled(network.training):
        y = network(images)
        if network.training:
            y.float().sum().backward()

"""When a training step elsewhere than on the CPU may keep fewer maps than the modules' own `forward` would.

There attention has kernels of its own; what surrounds it is PyTorch's, but joined to nodes of autograd that keep their
input alone: see `kernels/pointwise_training/portable.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from san.fused.parts import look
from san.ops.dispatch import forced_backend
from san.ops.kernels.native import operators
from san.ops.kernels.pointwise_training.portable import autocasts
from san.ops.normalization import SynchronizedBatchNorm2d

__all__ = ["suits", "trains"]

# Types of devices, and dtypes of maps; tests add the CPU, and float64 to measure against.
DEVICES = {"cuda"}
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def suits(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] and the moment allow joined nodes of autograd, which nothing observes."""
    return (
        operators.unobserved()
        and x.device.type in DEVICES
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and x.dtype in DTYPES
        and not x.is_neg()
        and not x._is_zerotensor()
        and x.dim() == 4
        and x.numel() > 0
        and forced_backend() in ("auto", "triton")
        and not nn.modules.module._has_any_global_hook()
    )


def trains(x: Tensor, *modules: nn.Module) -> bool:
    """Whether gradients of x or of these modules are wanted, and plain tensors tell all of what the modules do.

    Tensors are on x's device and in its dtype, under autocast in float32; BatchNorm is not synchronised.
    """
    readable = partial(_is_like, device=x.device, dtype=torch.float32 if autocasts(x) else x.dtype)
    states = [look(module, readable)[1] for module in modules]
    if any(map(_is_synchronised, modules)) or not all(states):
        return False
    tensors = [tensor for state in states if state is not None for tensor in state.tensors]
    return x.requires_grad or any(tensor.requires_grad for tensor in tensors)


def _is_like(x: Tensor, *, device: torch.device, dtype: torch.dtype) -> bool:
    return x.device == device and x.dtype is dtype and not x.is_neg()


def _is_synchronised(module: nn.Module) -> bool:
    parts = (part for part in module.modules() if type(part) is SynchronizedBatchNorm2d)
    return any(part.training and part.several_processes() for part in parts)

"""When a network on a GPU may do with fewer passes over its maps than the modules' own `forward`.

There attention has kernels of its own, and what surrounds it joins them where maps have their channels last: without
gradients in `kernels/pointwise/triton.py`, in training in nodes of autograd that keep their input alone, see
`kernels/pointwise_training/triton.py`. For other maps such nodes are made of PyTorch's operators, in `portable.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from san.fused.parts import look
from san.ops.dispatch import forced_backend
from san.ops.kernels.native import operators
from san.ops.kernels.pointwise import triton
from san.ops.kernels.pointwise_training import portable, portable_stem, triton_stem
from san.ops.kernels.pointwise_training import triton as triton_training
from san.ops.kernels.pointwise_training.portable import autocasts, product_dtype
from san.ops.normalization import SynchronizedBatchNorm2d

__all__ = ["norm_products", "stem", "suits", "takes", "wants_gradients"]

# Types of devices, and dtypes of maps; tests add the CPU, and float64 to measure against.
DEVICES = {"cuda"}
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def suits(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] and the moment allow what nothing can observe."""
    return (
        operators.unobserved()
        and x.device.type in DEVICES
        and type(x) is Tensor
        and x.dtype in DTYPES
        and not x.is_neg()
        and not x._is_zerotensor()
        and x.dim() == 4
        and x.numel() > 0
        and forced_backend() in ("auto", "triton")
        and not nn.modules.module._has_any_global_hook()
    )


def wants_gradients(x: Tensor, *modules: nn.Module) -> bool | None:
    """Whether gradients of x or of these modules are wanted; None where plain tensors do not tell all that is done.

    Tensors are on x's device and in its dtype, under autocast in float32. Without gradients BatchNorm takes its running
    averages.
    """
    readable = partial(_is_like, device=x.device, dtype=torch.float32 if autocasts(x) else x.dtype)
    states = [look(module, readable)[1] for module in modules]
    known = [state for state in states if state is not None]
    if len(known) < len(states):
        return None
    wanted = x.requires_grad or any(tensor.requires_grad for state in known for tensor in state.tensors)
    if torch.is_grad_enabled() and wanted:
        return True
    return None if any(state.uses_batch for state in known) else False


def takes(x: Tensor, *layers: Any, image: bool = False) -> bool:
    """Whether the Triton kernel makes these layers' products of a map, or of an `image`."""
    last = image or x.is_contiguous(memory_format=torch.channels_last)
    return last and triton.runs(x, [layer.out_channels for layer in layers], product_dtype(x))


def norm_products(x: Tensor, layers: Sequence[Any], *modules: nn.Module) -> Callable[..., tuple[Tensor, ...]] | None:
    """The node of autograd for these layers' products of a map, or None where BatchNorm is synchronised.

    Processes must then exchange the same, and one of them may have to run the modules as they are written.
    """
    if any(map(_is_synchronised, modules)):
        return None
    return triton_training.norm_products if takes(x, *layers) else portable.norm_products


def stem(image: Tensor, convolution: Any, norm: nn.Module, layer: Any) -> Callable[..., Tensor] | None:
    """The same for a network's stem."""
    if _is_synchronised(norm):
        return None
    narrow = max(convolution.out_channels, layer.out_channels) <= triton_stem.MAX_CHANNELS
    kernels = narrow and not image.requires_grad and takes(image, layer, image=True)
    return triton_stem.stem if kernels else portable_stem.stem


def _is_like(x: Tensor, *, device: torch.device, dtype: torch.dtype) -> bool:
    return x.device == device and x.dtype is dtype and not x.is_neg()


def _is_synchronised(module: nn.Module) -> bool:
    """Whether a BatchNorm of it waits for other processes."""
    parts = (part for part in module.modules() if type(part) is SynchronizedBatchNorm2d)
    return any(part.training and part.several_processes() for part in parts)

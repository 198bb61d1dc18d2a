"""Blocks and networks on the CPU in few passes over their maps; layers and models turn here by themselves.

The definition is the modules' own `forward`. Where nothing but their tensors matters (no hooks, no altered parts, no
tracer, float32 on the CPU, the native backend), kernels do the same and read a map once and write it once: BatchNorm,
ReLU and pooling join the products behind them, φ, ψ and β are one pass, the residual is added where the sum is written,
and the stem's full-size map never exists. For backward a block keeps its input, query, key, value and what aggregation
gives; the rest is recomputed. BatchNorm is folded at every call, so weights may change in any way.
Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from san.ops.dispatch import forced_backend
from san.ops.kernels.native import library
from san.ops.kernels.pointwise.native import MAX_STEM_CHANNELS, Linear, Norm, fold, products
from san.ops.kernels.pointwise_training.native import norm_products
from san.ops.kernels.pointwise_training.native import stem as training_stem
from san.ops.normalization import BatchNorm, SynchronizedBatchNorm2d

__all__ = [
    "attention_block",
    "chained_norms",
    "is_plain",
    "lone_norms",
    "needs_gradients",
    "norm_pool_linear",
    "register_part",
    "stem",
    "suits",
    "takes_stem",
]

_NORMS = (nn.BatchNorm2d, SynchronizedBatchNorm2d)
_PARTS = (*_NORMS, nn.Conv2d, nn.ReLU, nn.Sequential, nn.Identity)


class _Parts:
    """The parts of a module as they were found; valid while nothing is replaced."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = [(part, type(part), dict(part._modules)) for part in root.modules()]
        # The block itself is of the caller's kind; a lone layer must be of a known one.
        inside = self.modules[1:] or self.modules
        self.known = all(kind in (*_PARTS, *_REGISTERED) and _is_pointwise(part) for part, kind, _ in inside)

    def unchanged(self) -> bool:
        return all(part.__class__ is kind and part._modules == parts for part, kind, parts in self.modules)

    def silent(self) -> bool:
        """Whether no hook and no replaced `forward` hears or changes what the parts compute."""
        return not any(
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or "forward" in part.__dict__
            for part, _, _ in self.modules
        )


_REGISTERED: list[type] = []
_known: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _is_pointwise(part: Any) -> bool:
    if type(part) is not nn.Conv2d:
        return True
    return (part.kernel_size, part.stride, part.padding, part.groups) == ((1, 1), (1, 1), (0, 0), 1)


def register_part(*kinds: type) -> None:
    """Let blocks with parts of these classes be fused, where the caller knows that they do what is expected of them."""
    _REGISTERED.extend(kinds)


def is_plain(root: nn.Module) -> bool:
    """Whether a module's parts are pointwise convolutions, BatchNorm and ReLU whose tensors tell all that they do."""
    found = _known.get(root)
    if found is None or not found.unchanged():
        found = _known[root] = _Parts(root)
    return found.known and found.silent() and all(map(_is_single, root.parameters()))


def _is_single(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def suits(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] and the moment allow kernels that nothing observes."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and forced_backend() in ("auto", "native")
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not _python_dispatch._len_torch_dispatch_stack()
        and not nn.modules.module._has_any_global_hook()
        and library.load() is not None
    )


def needs_gradients(x: Tensor, *modules: nn.Module) -> bool:
    """Whether autograd will ask for gradients of x or of a parameter, or a BatchNorm takes the batch's statistics."""
    tensors = (parameter for module in modules for parameter in module.parameters())
    if torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        return True
    parts: Any = (part for module in modules for part in module.modules() if type(part) in _NORMS)
    return any(part.training or part.running_mean is None for part in parts)


def _linear(layer: Any) -> Linear:
    return Linear(layer._parameters["weight"], layer._parameters["bias"])


def _norm(layer: Any) -> Norm:
    parameters, buffers = layer._parameters, layer._buffers
    statistics = buffers["running_mean"], buffers["running_var"]
    return Norm(parameters["weight"], parameters["bias"], *statistics, layer.eps)


def attention_block(block: Any, x: Tensor) -> Tensor:
    """x + conv(ReLU(bn2(sam(ReLU(bn1(x)))))) of a `SelfAttentionBlock` that is plain, for a contiguous x."""
    sam, layers = block.sam, [_linear(layer) for layer in block.sam.transformations_of_input()]
    if needs_gradients(x, block):
        *maps, x = norm_products(x, BatchNorm.of(block.bn1), layers, passes=True)
        y = sam.attend(*sam.arranged(maps))
        return norm_products(y, BatchNorm.of(block.bn2), [_linear(block.conv)], residual=x)[0]
    before, behind, *gamma = fold([(_norm(block.bn1), None), (_norm(block.bn2), None), *sam.norms_to_fold()])
    y = sam.attend_folded(*sam.arranged(products(x, layers, norm=before)), gamma)
    return products(y, [_linear(block.conv)], norm=behind, residual=x)[0]


def chained_norms(parts: Any) -> list[tuple[Norm, Linear | None]]:
    """γ's BatchNorms, [norm, ReLU, Linear, …], all but the first with the Linear before them."""
    linears = [None, *map(_linear, parts[2::3])]
    return [(_norm(norm), linear) for norm, linear in zip(parts[0::3], linears[:-1], strict=True)]


def lone_norms(parts: Any) -> list[tuple[Norm, Linear | None]]:
    """γ's BatchNorms, [norm, ReLU, Linear, …], each alone."""
    return [(_norm(norm), None) for norm in parts[0::3]]


def norm_pool_linear(norm: Any, layer: Any, x: Tensor, *, pooled: bool) -> Tensor:
    """layer(pool(ReLU(norm(x)))), where one stage ends and the next begins."""
    if needs_gradients(x, norm, layer):
        return norm_products(x, BatchNorm.of(norm), [_linear(layer)], pooled=pooled)[0]
    (folded,) = fold([(_norm(norm), None)])
    return products(x, [_linear(layer)], norm=folded, pooled=pooled)[0]


def takes_stem(convolution: Any, norm: nn.Module, image: Tensor) -> bool:
    """Whether `stem` does: few image channels, and no gradient of the image through a batch's statistics."""
    dense = image.requires_grad and torch.is_grad_enabled() and (norm.training or norm.running_mean is None)
    return convolution.in_channels <= MAX_STEM_CHANNELS and convolution.bias is None and not dense


def stem(convolution: Any, norm: Any, layer: Any, image: Tensor, *, pooled: bool) -> Tensor:
    """layer(pool(ReLU(norm(convolution(image)))))."""
    if needs_gradients(image, convolution, norm, layer):
        return training_stem(image, convolution.weight, BatchNorm.of(norm), layer.weight, pooled=pooled)
    (folded,) = fold([(_norm(norm), _linear(convolution))])
    return products(image, [_linear(layer)], stem=folded, pooled=pooled)[0]

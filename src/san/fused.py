"""Blocks and networks on the CPU in few passes over their maps; layers and models turn here by themselves.

The definition is the modules' own `forward`. Where nothing but their tensors matters (no hooks, no altered parts, no
tracer, float32 on the CPU, the native backend), kernels do the same and read a map once and write it once: BatchNorm,
ReLU and pooling join the products behind them, φ, ψ and β are one pass, the residual is added where the sum is written,
and the stem's full-size map never exists. For backward a block keeps its input, query, key, value and what aggregation
gives; the rest is recomputed. BatchNorm is folded at every call, so weights may change in any way.
Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
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
    "on_own_map",
    "register_block",
    "stem",
    "suits",
    "takes_block",
    "takes_stem",
]

_NORMS = (nn.BatchNorm2d, SynchronizedBatchNorm2d)


class _Parts:
    """The parts of a module as they were found; valid while nothing is replaced.

    They are held weakly: this lies in a cache, and a part's hook may well hold the whole network.
    """

    def __init__(self, root: nn.Module) -> None:
        # A part may stand in several places.
        named = list(root.named_modules(remove_duplicate=False))
        self._found = [(ref(part), type(part), _children(part), _shapes(part)) for _, part in named]
        self._known = all(_plays_its_role(name, part) for name, part in named)
        self._known = self._known and (type(root) not in _agreements or _agreements[type(root)](root))

    def present(self) -> list[Any] | None:
        """The parts, or None if some were replaced since."""
        parts: list[Any] = [part() for part, *_ in self._found]
        pairs = zip(parts, self._found, strict=True)
        same = all(part.__class__ is kind and _children(part) == there for part, (_, kind, there, _) in pairs)
        return parts if same else None

    def are_plain(self, parts: list[Any]) -> bool:
        """Whether the parts' tensors, of the declared sizes, tell all that the parts do."""
        shapes = (shapes for *_, shapes in self._found)
        return self._known and not any(map(_is_heard, parts)) and all(map(_has_tensors, parts, shapes))


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("bn1", "bn2"), _NORMS),
    **dict.fromkeys(("conv", "conv1", "conv2", "conv3", "conv_p"), (nn.Conv2d,)),
    "conv_w": (nn.Sequential,),
    "drop_path": (nn.Identity,),
}
_LAYER = (_NORMS, (nn.ReLU,), (nn.Conv2d,))
_TENSORS = (nn.Parameter, Tensor)
_agreements: dict[type, Callable[[Any], bool]] = {}
_known: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _children(part: Any) -> dict[str, int] | None:
    return {name: id(child) for name, child in part._modules.items()} if part._modules else None


def _shapes(part: Any) -> dict[str, tuple[int, ...]]:
    """What kernels take the shapes of a part's tensors to be."""
    if type(part) is nn.Conv2d:
        return {"weight": (part.out_channels, part.in_channels, 1, 1), "bias": (part.out_channels,)}
    if type(part) in _NORMS:
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (part.num_features,))
    return {}


def _plays_its_role(name: str, part: Any) -> bool:
    *_, last = name.split(".")
    if last.isdigit():
        kinds = _LAYER[int(last) % 3]
    else:
        kinds = _KINDS.get(last, (*_NORMS, nn.Conv2d, *_agreements) if not last else ())
    return type(part) in kinds and (type(part) is not nn.Conv2d or _is_pointwise(part))


def _is_pointwise(part: Any) -> bool:
    return (part.kernel_size, part.stride, part.padding, part.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _is_heard(part: Any) -> bool:
    """Whether a hook or a replaced `forward` hears or changes what a part computes."""
    hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
    return bool(hooks) or "forward" in part.__dict__


def _has_tensors(part: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a part holds its tensors itself, as kernels read them."""
    parameters, buffers = part._parameters, part._buffers
    for name, shape in shapes.items():
        held = parameters if name in parameters else buffers
        if name not in held:
            return False
        if held[name] is not None and not _is_readable(held[name], shape):
            return False
    return True


def _is_readable(x: Tensor, shape: tuple[int, ...]) -> bool:
    # Asked for every tensor at every call: `x.device` takes three times as long as `x.is_cpu`.
    usual = type(x) in _TENSORS and x.is_cpu and x.dtype is torch.float32
    return usual and x.shape == shape and x.is_contiguous() and not x.is_neg()


def register_block(kind: type, agrees: Callable[[Any], bool], **parts: tuple[type, ...]) -> None:
    """Let blocks of a class be fused, whose own `parts` are of these classes, and whose parts' sizes `agrees`."""
    _agreements[kind] = agrees
    for name, kinds in parts.items():
        _KINDS[name] = (*_KINDS.get(name, ()), *kinds)


def is_plain(root: nn.Module) -> bool:
    """Whether a block, pointwise convolution or BatchNorm does only what its parts' tensors tell."""
    found = _known.get(root)
    parts = found.present() if found else None
    if found is None or parts is None:
        found = _known[root] = _Parts(root)
        parts = found.present()
    return parts is not None and found.are_plain(parts)


def suits(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] and the moment allow kernels that nothing observes."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and not x.is_neg()
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


def takes_block(block: Any, x: Tensor) -> bool:
    """Whether `attention_block` does what a block would."""
    if not (suits(x) and x.is_contiguous() and type(block) in _agreements and is_plain(block)):
        return False
    drops = type(block.drop_path) is not nn.Identity and block.drop_path.training
    return not drops and x.shape[1] == block.bn1.num_features


def on_own_map(block: Any, x: Tensor) -> Tensor:
    """block(x) for a map that nobody else holds, as another such map; without gradients it is made in x's memory."""
    if takes_block(block, x) and not needs_gradients(x, block):
        return attention_block(block, x, in_place=True)
    y = block(x)
    # What a module gave, it or its hooks may have kept; with gradients nobody writes to it.
    return y if y.requires_grad else y.clone()


def attention_block(block: Any, x: Tensor, *, in_place: bool = False) -> Tensor:
    """x + conv(ReLU(bn2(sam(ReLU(bn1(x)))))) of a `SelfAttentionBlock` that is plain, for a contiguous x."""
    sam, layers = block.sam, [_linear(layer) for layer in block.sam.transformations_of_input()]
    if needs_gradients(x, block):
        *maps, x = norm_products(x, BatchNorm.of(block.bn1), layers, passes=True)
        y = sam.attend(*sam.arranged(maps))
        return norm_products(y, BatchNorm.of(block.bn2), [_linear(block.conv)], residual=x)[0]
    before, behind, *gamma = fold([(_norm(block.bn1), None), (_norm(block.bn2), None), *sam.norms_to_fold()])
    y = sam.attend_folded(*sam.arranged(products(x, layers, norm=before)), gamma)
    return products(y, [_linear(block.conv)], norm=behind, residual=x, output=x if in_place else None)[0]


def chained_norms(parts: Any) -> list[tuple[Norm, Linear | None]]:
    """γ's BatchNorms, [norm, ReLU, Linear, …], all but the first with the Linear before them."""
    linears = [None, *map(_linear, parts[2::3])]
    return [(_norm(norm), linear) for norm, linear in zip(parts[0::3], linears[:-1], strict=True)]


def lone_norms(parts: Any) -> list[tuple[Norm, Linear | None]]:
    """γ's BatchNorms, [norm, ReLU, Linear, …], each alone."""
    return [(_norm(norm), None) for norm in parts[0::3]]


def norm_pool_linear(norm: Any, layer: Any, x: Tensor, *, pooled: bool) -> Tensor:
    """layer(pool(ReLU(norm(x)))), where one stage ends and the next begins."""
    # What a block of the user's own makes may be any map.
    if not (suits(x) and _follows(norm, layer) and x.shape[1] == norm.num_features):
        return _pooled_linear(layer, norm(x), pooled=pooled)
    x = x.contiguous()
    if needs_gradients(x, norm, layer):
        return norm_products(x, BatchNorm.of(norm), [_linear(layer)], pooled=pooled)[0]
    (folded,) = fold([(_norm(norm), None)])
    return products(x, [_linear(layer)], norm=folded, pooled=pooled)[0]


def _follows(norm: Any, layer: Any, *, before: bool = False) -> bool:
    """Whether a BatchNorm and the Linear behind it, or before it, are of the kinds and sizes that go together."""
    if type(norm) not in _NORMS or type(layer) is not nn.Conv2d:
        return False
    return norm.num_features == (layer.out_channels if before else layer.in_channels)


def _pooled_linear(layer: Any, x: Tensor, *, pooled: bool) -> Tensor:
    x = F.relu(x)
    return layer(F.max_pool2d(x, 2) if pooled else x)


def takes_stem(convolution: Any, norm: nn.Module, image: Tensor) -> bool:
    """Whether `stem` does: few image channels, and no gradient of the image through a batch's statistics."""
    if not _follows(norm, convolution, before=True) or image.shape[1] != convolution.in_channels:
        return False
    dense = image.requires_grad and torch.is_grad_enabled() and (norm.training or norm.running_mean is None)
    return convolution.in_channels <= MAX_STEM_CHANNELS and convolution.bias is None and not dense


def stem(convolution: Any, norm: Any, layer: Any, image: Tensor, *, pooled: bool) -> Tensor:
    """layer(pool(ReLU(norm(convolution(image)))))."""
    if not _follows(norm, layer) or layer.bias is not None:
        return _pooled_linear(layer, norm(convolution(image)), pooled=pooled)
    if needs_gradients(image, convolution, norm, layer):
        return training_stem(image, convolution.weight, BatchNorm.of(norm), layer.weight, pooled=pooled)
    (folded,) = fold([(_norm(norm), _linear(convolution))])
    return products(image, [_linear(layer)], stem=folded, pooled=pooled)[0]

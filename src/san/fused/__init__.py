"""Blocks and networks in few passes over their maps; layers and models turn here by themselves.

The definition is the modules' own `forward`. Where nothing but their tensors matters (no hooks, no altered parts, no
tracer, float32 on the CPU, the native backend), kernels do the same and read a map once and write it once: BatchNorm,
ReLU and pooling join the products behind them, φ, ψ and β are one pass, the residual is added where the sum is written,
and the stem's full-size map never exists. For backward a block keeps its input, query, key, value and what aggregation
gives; the rest is recomputed. BatchNorm is folded at every call, so weights may change in any way; `parts.py` looks at
everything else that may change. Networks on a GPU do likewise by other kernels: see `gpu.py`.
Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from san.fused import gpu
from san.fused.parts import NORMS, State, is_heard, look, register_block, registered
from san.fused.recordings import Recordings
from san.ops.dispatch import forced_backend
from san.ops.kernels.native import library, operators
from san.ops.kernels.native.recording import Recording
from san.ops.kernels.pointwise import triton
from san.ops.kernels.pointwise.native import MAX_STEM_CHANNELS, Linear, Norm, fold, products
from san.ops.kernels.pointwise_training import native, portable
from san.ops.normalization import BatchNorm

__all__ = [
    "Stage",
    "attention_block",
    "blocks_of",
    "chained_norms",
    "gpu",
    "lone_norms",
    "norm_pool_linear",
    "on_own_map",
    "recordings_of",
    "register_block",
    "stages_without_gradients",
    "stem",
    "suits",
    "takes_stem",
]


def suits(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] and the moment allow kernels that nothing observes."""
    return (
        operators.unobserved()
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and not x.is_neg()
        and not x._is_zerotensor()
        and x.dim() == 4
        and x.numel() > 0
        and forced_backend() in ("auto", "native")
        and not torch.is_autocast_enabled("cpu")
        and not nn.modules.module._has_any_global_hook()
        and library.load() is not None
    )


def _linear(layer: Any) -> Linear:
    return Linear(layer._parameters["weight"], layer._parameters["bias"])


def _norm(layer: Any) -> Norm:
    parameters, buffers = layer._parameters, layer._buffers
    statistics = buffers["running_mean"], buffers["running_var"]
    return Norm(parameters["weight"], parameters["bias"], *statistics, layer.eps)


def _affine(layer: Any) -> Tensor:
    return triton.folded(_norm(layer))


def on_own_map(block: Any, x: Tensor) -> Tensor:
    """block(x) for a map that nobody else holds, as another such map; without gradients it is made in x's memory."""
    y = attention_block(block, x, in_place=True)
    if y is None:
        y = block(x)
        # What a module gave, it or its hooks may have kept; with gradients, or on a GPU, nobody writes to it.
        y = y if gpu.suits(y) or (torch.is_grad_enabled() and y.requires_grad) else y.clone()
    return y


def _drops(block: Any) -> bool:
    return type(block.drop_path) is not nn.Identity and block.drop_path.training


def attention_block(block: Any, x: Tensor, *, in_place: bool = False) -> Tensor | None:
    """x + conv(ReLU(bn2(sam(ReLU(bn1(x)))))) of a `SelfAttentionBlock`, or None where kernels do not do what it would.

    Without gradients it may be made `in_place`, in x's memory.
    """
    if gpu.suits(x):
        return _on_gpu(block, x)
    if not (suits(x) and x.is_contiguous() and registered(block)):
        return None
    parts, state = look(block)
    if state is None or _drops(block) or x.shape[1] != block.bn1.num_features:
        return None
    if not block.sam.is_recordable() or state.needs_gradients(x):
        return _with_gradients(block, x, native.norm_products)
    output = x if in_place else torch.empty_like(x)
    parts.recordings.repeat(partial(_run_block, block), state.held, state.tensors, x, output)
    return output


def _on_gpu(block: Any, x: Tensor) -> Tensor | None:
    wanted = gpu.wants_gradients(x, block) if registered(block) else None
    if wanted is None or x.shape[1] != block.bn1.num_features:
        return None
    sam, conv = block.sam, block.conv
    layers = sam.transformations_of_input()
    if wanted:
        node = gpu.norm_products(x, [*layers, conv], block)
        return _with_gradients(block, x, node) if node else None
    if _drops(block) or not gpu.takes(x, *layers, conv):
        return None
    dtype = portable.product_dtype(x)
    maps = triton.products(x, [*map(_linear, layers)], _affine(block.bn1), dtype)
    y = sam.attend(*sam.arranged(maps), known_plain=True).contiguous(memory_format=torch.channels_last)
    return triton.products(y, [_linear(conv)], _affine(block.bn2), dtype, residual=x)[0]


def _with_gradients(block: Any, x: Tensor, norm_products: Callable[..., tuple[Tensor, ...]]) -> Tensor:
    sam, layers = block.sam, [_linear(layer) for layer in block.sam.transformations_of_input()]
    *maps, x = norm_products(x, BatchNorm.of(block.bn1), layers, passes=True)
    y = sam.attend(*sam.arranged(maps), known_plain=True)
    behind = y, BatchNorm.of(block.bn2), [_linear(block.conv)]
    if _drops(block):
        return x + block.drop_path(*norm_products(*behind))
    return norm_products(*behind, residual=x)[0]


def _run_block(block: Any, x: Any, output: Any) -> None:
    sam, layers = block.sam, [_linear(layer) for layer in block.sam.transformations_of_input()]
    norms = [(_norm(block.bn1), None), (_norm(block.bn2), None), *sam.norms_to_fold()]
    before, behind, *gamma = fold(norms, x)
    y = sam.attend_folded(*sam.arranged(products(x, layers, norm=before)), gamma)
    products(y, [_linear(block.conv)], norm=behind, residual=x, output=output)


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
    follows = _follows(norm, layer) and x.shape[1] == norm.num_features
    if follows and gpu.suits(x):
        wanted = gpu.wants_gradients(x, norm, layer)
        node = gpu.norm_products(x, [layer], norm) if wanted else None
        if node:
            return node(x, BatchNorm.of(norm), [_linear(layer)], pooled=pooled)[0]
        if wanted is False and gpu.takes(x, layer):
            return triton.products(x, [_linear(layer)], _affine(norm), portable.product_dtype(x), pooled=pooled)[0]
    states = _states(norm, layer) if suits(x) and follows else None
    if states is None:
        return _pooled_linear(layer, norm(x), pooled=pooled)
    x = x.contiguous()
    if any(state.needs_gradients(x) for state in states):
        return native.norm_products(x, BatchNorm.of(norm), [_linear(layer)], pooled=pooled)[0]
    (folded,) = fold([(_norm(norm), None)], x)
    return products(x, [_linear(layer)], norm=folded, pooled=pooled)[0]


def _states(*modules: nn.Module) -> list[State] | None:
    """What the parts of all these are, or None if there is more to one of them than tensors."""
    states = [look(module)[1] for module in modules]
    known = [state for state in states if state is not None]
    return known if len(known) == len(states) else None


def _follows(norm: Any, layer: Any, *, before: bool = False) -> bool:
    """Whether a BatchNorm and the Linear behind it, or before it, are of the kinds and sizes that go together."""
    if type(norm) not in NORMS or type(layer) is not nn.Conv2d:
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
    follows = _follows(norm, layer) and layer.bias is None and takes_stem(convolution, norm, image)
    if follows and gpu.suits(image):
        wanted = gpu.wants_gradients(image, convolution, norm, layer)
        node = gpu.stem(image, convolution, norm, layer) if wanted else None
        if node:
            return node(image, convolution.weight, BatchNorm.of(norm), layer.weight, pooled=pooled)
        if wanted is False and gpu.takes(image, layer, image=True):
            behind = [_linear(layer)], _affine(norm), portable.product_dtype(image)
            return triton.products(image, *behind, stem=convolution.weight.flatten(1), pooled=pooled)[0]
    states = _states(convolution, norm, layer) if follows and suits(image) else None
    if states is None:
        return _pooled_linear(layer, norm(convolution(image)), pooled=pooled)
    if any(state.needs_gradients(image) for state in states):
        return native.stem(image, convolution.weight, BatchNorm.of(norm), layer.weight, pooled=pooled)
    (folded,) = fold([(_norm(norm), _linear(convolution))], image)
    return products(image, [_linear(layer)], stem=folded, pooled=pooled)[0]


def blocks_of(layer: Any) -> list[Any] | None:
    """The blocks that a stage runs one after the other, or None if it is more than a sequence of them."""
    return list(layer._modules.values()) if type(layer) is nn.Sequential and not is_heard(layer) else None


class Stage(NamedTuple):
    """A network's stage: 2×2 pooling if `pooled`, a pointwise convolution, blocks, and BatchNorm with ReLU.

    `blocks` is None where they are more than a sequence.
    """

    pooled: bool
    convolution: Any
    blocks: list[Any] | None
    norm: Any


def stages_without_gradients(
    root: Any, convolution: Any, norm: Any, stages: list[Stage], image: Tensor
) -> Tensor | None:
    """What stem (convolution, norm, ReLU) and stages of `root` give, before the last BatchNorm, as one run of kernels.

    None where gradients are wanted or kernels do not do all; `suits` and `takes_stem` have been asked.
    """
    if not stages or not all(map(_chains, [norm, *(stage.norm for stage in stages)], stages)):
        return None
    modules = [convolution, norm]
    for stage in stages:
        modules += [stage.convolution, *(stage.blocks or ()), stage.norm]
    held: list[Any] = [stage.pooled for stage in stages]
    tensors: list[Tensor] = []
    for module in modules:
        parts, state = look(module)
        if state is None or state.needs_gradients(image):
            return None
        held += [parts, *state.held]
        tensors += state.tensors
    recordings, maps = _networks.setdefault(root, Recordings()), _maps(stages, image.shape)
    output = image.new_empty(maps[-1])
    share = max(1, len(image) * _ROOM // (4 * max(map(prod, maps))))
    run = partial(_run_stages, convolution, norm, stages)
    for images, given in zip(image.split(share), output.split(share), strict=True):
        recordings.repeat(run, held, tensors, images, given)
    return output


# Bytes of the largest map that some images of a batch may have: then a few of them stay in the processor's cache, and
# the C library keeps the memory from one call to the next.
_ROOM = 7 << 20
_networks: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()


def recordings_of(root: nn.Module) -> dict[tuple[int, ...], Recording]:
    """The runs of kernels that stand for a network without gradients, by the shapes of the images that they take."""
    return _networks[root].of_shapes() if root in _networks else {}


def _chains(before: Any, stage: Stage) -> bool:
    """Whether a stage's parts, and the BatchNorm before it, are such as `_run_stages` takes them to be."""
    if stage.blocks is None:
        return False
    if not all(registered(each) and not _drops(each) and each.sam.is_recordable() for each in stage.blocks):
        return False
    norms = [stage.norm, *(each.bn1 for each in stage.blocks)]
    return _follows(before, stage.convolution) and all(_follows(each, stage.convolution, before=True) for each in norms)


def _run_stages(convolution: Any, norm: Any, stages: list[Stage], image: Any, output: Any) -> None:
    (folded,) = fold([(_norm(norm), _linear(convolution))], image)
    maps = _maps(stages, image.shape)
    # Two maps take turns; the last one is the output.
    turns = [image.new_empty(max(map(prod, maps[turn:-1:2]), default=0)) for turn in (0, 1)]
    x: Any = image
    before = {"stem": folded}
    for number, (stage, shape) in enumerate(zip(stages, maps, strict=True)):
        y = output if number == len(maps) - 1 else turns[number % 2].reshape(*shape)
        options: dict[str, Any] = {**before, "pooled": stage.pooled, "output": y}
        products(x, [_linear(stage.convolution)], **options)
        for block in stage.blocks or ():
            with image.scratch():
                _run_block(block, y, y)
        x, before = y, {"norm": fold([(_norm(stage.norm), None)], image)[0]}


def _maps(stages: list[Stage], image: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of what every stage gives."""
    batch, _, height, width = image
    halvings = list(accumulate(stage.pooled for stage in stages))
    widths = [stage.convolution.out_channels for stage in stages]
    return [(batch, channels, height >> n, width >> n) for channels, n in zip(widths, halvings, strict=True)]

"""Blocks and networks on the CPU in few passes over their maps; layers and models turn here by themselves.

The definition is the modules' own `forward`. Where nothing but their tensors matters (no hooks, no altered parts, no
tracer, float32 on the CPU, the native backend), kernels do the same and read a map once and write it once: BatchNorm,
ReLU and pooling join the products behind them, φ, ψ and β are one pass, the residual is added where the sum is written,
and the stem's full-size map never exists. For backward a block keeps its input, query, key, value and what aggregation
gives; the rest is recomputed. BatchNorm is folded at every call, so weights may change in any way.
Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils import _python_dispatch

from san.ops.dispatch import forced_backend
from san.ops.kernels.native import library
from san.ops.kernels.native.recording import Recording, record
from san.ops.kernels.pointwise.native import MAX_STEM_CHANNELS, Linear, Norm, fold, products
from san.ops.kernels.pointwise_training.native import norm_products
from san.ops.kernels.pointwise_training.native import stem as training_stem
from san.ops.normalization import BatchNorm, SynchronizedBatchNorm2d

__all__ = [
    "Stage",
    "attention_block",
    "chained_norms",
    "is_plain",
    "lone_norms",
    "needs_gradients",
    "norm_pool_linear",
    "on_own_map",
    "register_block",
    "stages_without_gradients",
    "stem",
    "suits",
    "takes_stem",
]

_NORMS = (nn.BatchNorm2d, SynchronizedBatchNorm2d)


class _Replaced(Exception):
    """Raised where a part of a module was replaced since its parts were looked at."""


class _State(NamedTuple):
    """What a plain module's parts are at a call: where their tensors lie and all else that kernels are told."""

    held: list[Any]
    uses_batch: bool  # a BatchNorm takes the batch's statistics


class _Parts:
    """The parts of a module as they were found; valid while nothing is replaced.

    They are held weakly: this lies in a cache, and a part's hook may well hold the whole network.
    """

    def __init__(self, root: nn.Module) -> None:
        # A part may stand in several places.
        named = list(root.named_modules(remove_duplicate=False))
        self._found = [(ref(part), type(part), _children(part), _shapes(part), _options(part)) for _, part in named]
        self._known = all(_plays_its_role(name, part) for name, part in named)
        self._known = self._known and (type(root) not in _agreements or _agreements[type(root)](root))
        self.recordings = _Recordings()

    def state(self) -> _State | None:
        """What the parts are now, or None if there is more to them than tensors of the declared sizes."""
        held: list[Any] = []
        uses_batch = False
        for reference, kind, children, shapes, options in self._found:
            part: Any = reference()
            if part.__class__ is not kind or _children(part) != children:
                raise _Replaced
            own = part.__dict__
            if not self._known or _is_heard(own):
                return None
            for dictionary, name, shape in shapes:
                # The parameter that a parametrisation took away is no longer in the dictionary.
                x = own[dictionary].get(name, held)
                if x is None:
                    held.append(None)
                elif type(x) in _TENSORS and _is_readable(x, shape):
                    held.append(x.data_ptr())
                else:
                    return None
            held.extend(getattr(part, option) for option in options)
            if kind in _NORMS and (own["training"] or own["_buffers"]["running_mean"] is None):
                uses_batch = True
        return _State(held, uses_batch)

    def parameters(self) -> Iterator[Tensor]:
        """All parameters that there are."""
        parts: Any = (reference() for reference, *_ in self._found)
        return (parameter for part in parts for parameter in part._parameters.values() if parameter is not None)


class _Recordings:
    """Calls that a module makes for some sizes of map, valid while what its parts hold is the same."""

    most = 16

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[list[Any], Recording]] = {}

    def get(self, held: list[Any], key: tuple[int, ...], record: Callable[[], Recording]) -> Recording:
        """That of the calls which `key` tells apart, made anew if needed."""
        before, found = self._found.get(key, (None, None))
        if found is None or before != held:
            while len(self._found) >= self.most:
                self._found.pop(next(iter(self._found)), None)
            found = record()
            self._found[key] = held, found
        return found


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


def _shapes(part: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """What kernels take the shapes of a part's tensors to be: where it holds them, their names and shapes."""
    if type(part) is nn.Conv2d:
        weight = part.out_channels, part.in_channels, 1, 1
        return [("_parameters", "weight", weight), ("_parameters", "bias", (part.out_channels,))]
    if type(part) in _NORMS:
        names = {"_parameters": ("weight", "bias"), "_buffers": ("running_mean", "running_var")}
        return [(held, name, (part.num_features,)) for held in names for name in names[held]]
    return []


def _options(part: Any) -> tuple[str, ...]:
    """Attributes of a part that kernels are told."""
    return ("eps",) if type(part) in _NORMS else getattr(part, "kernel_options", ())


def _plays_its_role(name: str, part: Any) -> bool:
    *_, last = name.split(".")
    if last.isdigit():
        kinds = _LAYER[int(last) % 3]
    else:
        kinds = _KINDS.get(last, (*_NORMS, nn.Conv2d, *_agreements) if not last else ())
    return type(part) in kinds and (type(part) is not nn.Conv2d or _is_pointwise(part))


def _is_pointwise(part: Any) -> bool:
    return (part.kernel_size, part.stride, part.padding, part.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _is_heard(own: dict[str, Any]) -> bool:
    """Whether a hook or a replaced `forward` hears or changes what a part computes; `own` is its `__dict__`."""
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def _is_readable(x: Tensor, shape: tuple[int, ...]) -> bool:
    # Asked for every tensor at every call: `x.device` takes three times as long as `x.is_cpu`.
    return x.is_cpu and x.dtype is torch.float32 and x.shape == shape and x.is_contiguous() and not x.is_neg()


def register_block(kind: type, agrees: Callable[[Any], bool], **parts: tuple[type, ...]) -> None:
    """Let blocks of a class be fused, whose own `parts` are of these classes, and whose parts' sizes `agrees`."""
    _agreements[kind] = agrees
    for name, kinds in parts.items():
        _KINDS[name] = (*_KINDS.get(name, ()), *kinds)


def _look(root: nn.Module) -> tuple[_Parts, _State | None]:
    """The parts of a block, pointwise convolution or BatchNorm and their state, None if tensors do not tell all."""
    found = _known.get(root)
    try:
        if found is not None:
            return found, found.state()
    except _Replaced:
        pass
    found = _known[root] = _Parts(root)
    return found, found.state()


def is_plain(root: nn.Module) -> bool:
    """Whether a block, pointwise convolution or BatchNorm does only what its parts' tensors tell."""
    return _look(root)[1] is not None


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
    looked = [_look(module) for module in modules]
    return any(state is None or _needs_gradients(x, parts, state) for parts, state in looked)


def _needs_gradients(x: Tensor, parts: _Parts, state: _State) -> bool:
    asked = torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in parts.parameters()))
    return state.uses_batch or asked


def _linear(layer: Any) -> Linear:
    return Linear(layer._parameters["weight"], layer._parameters["bias"])


def _norm(layer: Any) -> Norm:
    parameters, buffers = layer._parameters, layer._buffers
    statistics = buffers["running_mean"], buffers["running_var"]
    return Norm(parameters["weight"], parameters["bias"], *statistics, layer.eps)


def on_own_map(block: Any, x: Tensor) -> Tensor:
    """block(x) for a map that nobody else holds, as another such map; without gradients it is made in x's memory."""
    y = attention_block(block, x, in_place=True)
    if y is None:
        y = block(x)
        # What a module gave, it or its hooks may have kept; with gradients nobody writes to it.
        y = y if y.requires_grad else y.clone()
    return y


def _drops(block: Any) -> bool:
    return type(block.drop_path) is not nn.Identity and block.drop_path.training


def attention_block(block: Any, x: Tensor, *, in_place: bool = False) -> Tensor | None:
    """x + conv(ReLU(bn2(sam(ReLU(bn1(x)))))) of a `SelfAttentionBlock`, or None where kernels do not do what it would.

    Without gradients it may be made `in_place`, in x's memory.
    """
    if not (suits(x) and x.is_contiguous() and type(block) in _agreements):
        return None
    parts, state = _look(block)
    if state is None or _drops(block) or x.shape[1] != block.bn1.num_features:
        return None
    if block.sam.is_recordable() and not _needs_gradients(x, parts, state):
        return _repeated(block, parts, state, x, x if in_place else torch.empty_like(x))
    return _with_gradients(block, x)


def _with_gradients(block: Any, x: Tensor) -> Tensor:
    sam, layers = block.sam, [_linear(layer) for layer in block.sam.transformations_of_input()]
    *maps, x = norm_products(x, BatchNorm.of(block.bn1), layers, passes=True)
    y = sam.attend(*sam.arranged(maps), known_plain=True)
    return norm_products(y, BatchNorm.of(block.bn2), [_linear(block.conv)], residual=x)[0]


def _repeated(block: Any, parts: _Parts, state: _State, x: Tensor, output: Tensor) -> Tensor:
    key = (*x.shape, library.threads())
    recording = parts.recordings.get(state.held, key, lambda: record(partial(_run_block, block), x.shape, x.shape))
    room = torch.empty(recording.bytes, dtype=torch.uint8)
    recording.repeat(room.data_ptr(), x.data_ptr(), output.data_ptr())
    return output


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
    if not (suits(x) and _follows(norm, layer) and x.shape[1] == norm.num_features):
        return _pooled_linear(layer, norm(x), pooled=pooled)
    x = x.contiguous()
    if needs_gradients(x, norm, layer):
        return norm_products(x, BatchNorm.of(norm), [_linear(layer)], pooled=pooled)[0]
    (folded,) = fold([(_norm(norm), None)], x)
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
    (folded,) = fold([(_norm(norm), _linear(convolution))], image)
    return products(image, [_linear(layer)], stem=folded, pooled=pooled)[0]


class Stage(NamedTuple):
    """A network's stage: 2×2 pooling if `pooled`, a pointwise convolution, blocks, and BatchNorm with ReLU."""

    pooled: bool
    convolution: Any
    blocks: list[Any]
    norm: Any


def stages_without_gradients(
    root: Any, convolution: Any, norm: Any, stages: list[Stage], image: Tensor
) -> Tensor | None:
    """What stem (convolution, norm, ReLU) and stages of `root` give, before the last BatchNorm, as one run of kernels.

    None where gradients are wanted or kernels do not do all; `suits` and `takes_stem` have been asked.
    """
    modules = [convolution, norm, *(part for each in stages for part in (each.convolution, *each.blocks, each.norm))]
    held: list[Any] = [stage.pooled for stage in stages]
    for module in modules:
        parts, state = _look(module)
        if state is None or _needs_gradients(image, parts, state):
            return None
        held += state.held
    if not stages or not all(map(_chains, [norm, *(stage.norm for stage in stages)], stages)):
        return None
    return _repeated_stages(root, partial(_run_stages, convolution, norm, stages), held, stages, image)


def _repeated_stages(
    root: Any, run: Callable[..., None], held: list[Any], stages: list[Stage], image: Tensor
) -> Tensor:
    recordings, maps = _networks.setdefault(root, _Recordings()), _maps(stages, image.shape)
    output = image.new_empty(maps[-1])
    share = max(1, len(image) * _ROOM // (4 * max(map(prod, maps))))
    for images, given in zip(image.split(share), output.split(share), strict=True):
        key = (*images.shape, library.threads())
        recording = recordings.get(held, key, partial(record, run, images.shape, given.shape))
        room = torch.empty(recording.bytes, dtype=torch.uint8)
        recording.repeat(room.data_ptr(), images.data_ptr(), given.data_ptr())
    return output


# Bytes of the largest map that some images of a batch may have: then a few of them stay in the processor's cache, and
# the C library keeps the memory from one call to the next.
_ROOM = 7 << 20
_networks: WeakKeyDictionary[nn.Module, _Recordings] = WeakKeyDictionary()


def _chains(before: Any, stage: Stage) -> bool:
    """Whether a stage's parts, and the BatchNorm before it, are such as `_run_stages` takes them to be."""
    if not all(type(each) in _agreements and not _drops(each) and each.sam.is_recordable() for each in stage.blocks):
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
        for block in stage.blocks:
            with image.scratch():
                _run_block(block, y, y)
        x, before = y, {"norm": fold([(_norm(stage.norm), None)], image)[0]}


def _maps(stages: list[Stage], image: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of what every stage gives."""
    batch, _, height, width = image
    halvings = list(accumulate(stage.pooled for stage in stages))
    widths = [stage.convolution.out_channels for stage in stages]
    return [(batch, channels, height >> n, width >> n) for channels, n in zip(widths, halvings, strict=True)]

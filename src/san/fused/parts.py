"""What a module's parts are at a call, so that kernels may do what the parts would: their kinds, options and tensors.

The structure is read once and compared at every call; whatever was changed about it since, it is read anew.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from san.fused.recordings import Recordings
from san.ops.normalization import SynchronizedBatchNorm2d

__all__ = ["NORMS", "Parts", "State", "is_heard", "is_pointwise", "look", "register_block", "registered"]

NORMS = (nn.BatchNorm2d, SynchronizedBatchNorm2d)


class _Changed(Exception):
    """Raised where a module's structure is not what was read."""


class State(NamedTuple):
    """What a module's parts are at a call.

    `held` says where their tensors lie: with the same structure, all that kernels are told. `tensors` must be kept
    alive while kernels run on them.
    """

    held: list[Any]
    tensors: list[Tensor]
    uses_batch: bool  # a BatchNorm takes the batch's statistics

    def needs_gradients(self, x: Tensor) -> bool:
        """Whether autograd will ask for gradients of x or of a tensor, or the batch's statistics are taken."""
        asked = torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in self.tensors))
        return self.uses_batch or asked


class Parts:
    """The parts of a module as they were read; valid while their structure is the same.

    They are held weakly: this lies in a cache, and a part's hook may well hold the whole network.
    """

    def __init__(self, root: nn.Module) -> None:
        # A part may stand in several places.
        named = list(root.named_modules(remove_duplicate=False))
        self._read = [(ref(part), type(part), _children(part), *_structure(part), _shapes(part)) for _, part in named]
        roles = all(_plays_its_role(name, part) for name, part in named)
        self._known = roles and (type(root) not in _agreements or _agreements[type(root)](root))
        self.recordings = Recordings()

    def state(self, readable: Callable[[Tensor], bool]) -> State | None:
        """What the parts are now, or None if there is more to them than readable tensors of the declared sizes."""
        held: list[Any] = []
        tensors: list[Tensor] = []
        uses_batch = False
        for reference, kind, children, options, structure, shapes in self._read:
            part: Any = reference()
            if part.__class__ is not kind or _children(part) != children or options(part.__dict__) != structure:
                raise _Changed
            own = part.__dict__
            if not self._known or is_heard(part):
                return None
            for dictionary, name, shape in shapes:
                # The parameter that a parametrisation took away is no longer in the dictionary.
                x = own[dictionary].get(name, _ABSENT)
                if x is None:
                    held.append(None)
                elif type(x) in _TENSORS and x.shape == shape and readable(x):
                    held.append(x.data_ptr())
                    tensors.append(x)
                else:
                    return None
            if kind in NORMS:
                mean, variance = own["_buffers"]["running_mean"], own["_buffers"]["running_var"]
                if (mean is None) != (variance is None):
                    return None
                uses_batch = uses_batch or own["training"] or mean is None
        return State(held, tensors, uses_batch)


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("bn1", "bn2"), NORMS),
    **dict.fromkeys(("conv", "conv1", "conv2", "conv3", "conv_p"), (nn.Conv2d,)),
    "conv_w": (nn.Sequential,),
    "drop_path": (nn.Identity,),
}
_LAYER = (NORMS, (nn.ReLU,), (nn.Conv2d,))
_TENSORS = (nn.Parameter, Tensor)
_ABSENT = object()
_agreements: dict[type, Callable[[Any], bool]] = {}
_cache: WeakKeyDictionary[nn.Module, Parts] = WeakKeyDictionary()


def _children(part: Any) -> dict[str, int] | None:
    return {name: id(child) for name, child in part._modules.items()} if part._modules else None


_CONVOLUTION = itemgetter("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
_NORM = itemgetter("num_features", "eps")


def _structure(part: Any) -> tuple[Callable[[dict[str, Any]], Any], Any]:
    """What besides its tensors decides what a part computes: how to read it, and what it is."""
    if type(part) is nn.Conv2d:
        options = _CONVOLUTION
    elif type(part) in NORMS:
        options = _NORM
    else:
        names = getattr(part, "kernel_options", ())
        options = itemgetter(*names) if names else _nothing
    return options, options(part.__dict__)


def _nothing(own: dict[str, Any]) -> None:
    """The structure of a part that has none."""


def _shapes(part: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """What kernels take the shapes of a part's tensors to be: where it holds them, their names and shapes."""
    if type(part) is nn.Conv2d:
        weight = part.out_channels, part.in_channels, 1, 1
        return [("_parameters", "weight", weight), ("_parameters", "bias", (part.out_channels,))]
    if type(part) in NORMS:
        names = {"_parameters": ("weight", "bias"), "_buffers": ("running_mean", "running_var")}
        return [(held, name, (part.num_features,)) for held in names for name in names[held]]
    return []


def _plays_its_role(name: str, part: Any) -> bool:
    *_, last = name.split(".")
    if last.isdigit():
        kinds = _LAYER[int(last) % 3]
    else:
        kinds = _KINDS.get(last, (*NORMS, nn.Conv2d, *_agreements) if not last else ())
    if type(part) is nn.Conv2d and not is_pointwise(part):
        return False
    return type(part) in kinds and (type(part) not in NORMS or part.eps >= 0)


def is_pointwise(part: Any) -> bool:
    """Whether a convolution is a product on the channel axis."""
    return (part.kernel_size, part.stride, part.padding, part.groups) == ((1, 1), (1, 1), (0, 0), 1)


def is_heard(part: nn.Module) -> bool:
    """Whether a hook or a replaced `forward` hears or changes what a part computes."""
    own = part.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def _is_native(x: Tensor) -> bool:
    """Whether the kernels of the CPU read a tensor."""
    # Asked for every tensor at every call: `x.device` takes three times as long as `x.is_cpu`.
    return x.is_cpu and x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg()


def register_block(kind: type, agrees: Callable[[Any], bool], **parts: tuple[type, ...]) -> None:
    """Let blocks of a class be fused, whose own `parts` are of these classes, and whose parts' sizes `agrees`."""
    _agreements[kind] = agrees
    for name, kinds in parts.items():
        _KINDS[name] = (*_KINDS.get(name, ()), *kinds)


def registered(module: nn.Module) -> bool:
    """Whether a module is a block of a registered class."""
    return type(module) in _agreements


def look(root: nn.Module, readable: Callable[[Tensor], bool] = _is_native) -> tuple[Parts, State | None]:
    """The parts of a block, pointwise convolution or BatchNorm and their state, None if tensors do not tell all.

    `readable` says of a tensor whether it may be computed with; by default, whether the kernels of the CPU read it.
    """
    found = _cache.get(root)
    try:
        if found is not None:
            return found, found.state(readable)
    except _Changed:
        pass
    found = _cache[root] = Parts(root)
    return found, found.state(readable)

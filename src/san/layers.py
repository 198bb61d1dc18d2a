"""Self-attention layers that stand where a k×k convolution stands, and the residual block of the paper's networks.

Parameter names are the authors' (conv1, conv2, conv3 for φ, ψ, β; conv_w for γ; conv_p for position), so that published
weights load as they are. Legend: B batch, C channels, R relation width, G weight groups, H W map.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from san import fused
from san.errors import UserError
from san.fused.parts import NORMS, is_heard, is_pointwise
from san.ops import BatchNorm, Footprint, Mapping, MappingLayer, Position, pairwise_attention, patchwise_attention
from san.ops.kernels.pairwise import native as pairwise_native
from san.ops.kernels.patchwise import native as patchwise_native
from san.ops.kernels.pointwise.native import Affine, Linear
from san.ops.mapping import MAPPINGS, AnyMapping
from san.ops.relations import POSITION_WIDTHS, find_relation

__all__ = [
    "ATTENTIONS",
    "TRANSFORMATIONS",
    "PairwiseAttention",
    "PatchwiseAttention",
    "ScalarAttention",
    "SelfAttentionBlock",
]

TRANSFORMATIONS = ("different", "query=key", "query=key=value")


class _Attention(nn.Module):
    """The three transformations and the geometry that every form of attention has."""

    # What native kernels are told beside sizes and tensors.
    kernel_options: tuple[str, ...] = (
        "footprint",
        "transformations",
        "in_channels",
        "out_channels",
        "relation_channels",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        dilation: int,
        border: str,
        relation_channels: int | None,
        transformations: str,
    ) -> None:
        super().__init__()
        width = max(in_channels // 16, 1) if relation_channels is None else relation_channels
        if min(in_channels, out_channels, width) < 1:
            raise UserError(
                f"in_channels, out_channels and relation_channels are {in_channels}, {out_channels} and {width}, "
                "but they must be at least 1"
            )
        if transformations not in TRANSFORMATIONS:
            raise UserError(
                f"transformations {transformations!r} is unknown; choose one of: {', '.join(TRANSFORMATIONS)}"
            )
        if transformations == "query=key=value" and width != out_channels:
            raise UserError(
                f"query=key=value needs equal widths, but relation_channels is {width} and out_channels is "
                f"{out_channels}; in blocks and networks, make relation_reduction = value_reduction"
            )
        self.in_channels, self.out_channels, self.relation_channels = in_channels, out_channels, width
        self.transformations = transformations
        self.footprint = Footprint(kernel_size, stride, dilation, border)
        self.conv1 = nn.Conv2d(in_channels, width, 1)
        if transformations == "different":
            self.conv2 = nn.Conv2d(in_channels, width, 1)
        if transformations != "query=key=value":
            self.conv3 = nn.Conv2d(in_channels, out_channels, 1)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(x), ψ(x) [B, R, H, W] and β(x) [B, out_channels, H, W]."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"the layer takes [B, {self.in_channels}, H, W], but the input is {list(x.shape)}")
        return self.arranged([layer(x) for layer in self.transformations_of_input()])

    def transformations_of_input(self) -> list[nn.Module]:
        """The layers among conv1, conv2 and conv3 that there are."""
        return [self.get_submodule(name) for name in ("conv1", "conv2", "conv3") if name in self._modules]

    def arranged(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, from what `transformations_of_input` give."""
        return maps[0], maps[1] if self.transformations == "different" else maps[0], maps[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] → y [B, out_channels, H_out, W_out]."""
        return self.attend(*self.transform(x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, known_plain: bool = False) -> Tensor:
        """y, from what the transformations give; `known_plain` tells that γ's parts have been looked at."""
        raise NotImplementedError

    def is_recordable(self) -> bool:
        """Whether native kernels do all of `attend_folded`, so that `san.fused` may repeat their calls."""
        return True

    def geometry(self) -> dict[str, Any]:
        """The footprint as operators take it: kernel_size, stride, dilation, border."""
        return vars(self.footprint).copy()

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        shape = f"{self.in_channels}, {self.out_channels}, relation_channels={self.relation_channels}"
        geometry = ", ".join(f"{name}={value}" for name, value in self.geometry().items())
        return f"{shape}, {geometry}, transformations={self.transformations}"


class PairwiseAttention(_Attention):
    """y_i = Σ_j α_ij ⊙ β(x_j), α_ij = softmax_j γ([δ(φ(x_i), ψ(x_j)), position]) (paper §3.1).

    Without position a set operator: the order of the footprint's places does not matter. Stands where
    `nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)` stands: x [B, in_channels, H, W] →
    [B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉], any map size and float dtype, contiguous or channels-last.

    `relation` δ: subtraction, summation, hadamard, concatenation, dot. `mapping` γ: L, LRL, LRLRL. `position`:
    relative, absolute, none. `transformations`: different, query=key, query=key=value (needs equal widths).
    `relation_channels` R defaults to in_channels/16, at least 1. `share` value channels use one weight and must divide
    out_channels. `border`: reflect, zeros.

    Parts of γ, `conv_w`, may be hooked, parametrised or replaced; γ then runs as a module, on the reference backend.
    Else its parts are not called, only their tensors used, so PyTorch's global module hooks do not see them. Of the
    position, `conv_p`, only weight and bias are used. Departures from the paper: see `san.ops`.
    Raises `UserError` for options that do not fit, and for an input that is not [B, in_channels, H, W].
    """

    kernel_options = (*_Attention.kernel_options, "relation", "position", "groups")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        *,
        relation: str = "subtraction",
        mapping: str = "LRL",
        position: str = "relative",
        transformations: str = "different",
        relation_channels: int | None = None,
        share: int = 8,
        border: str = "reflect",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, dilation, border, relation_channels, transformations
        )
        if position not in POSITION_WIDTHS:
            raise UserError(f"position {position!r} is unknown; choose one of: {', '.join(POSITION_WIDTHS)}")
        self.relation, self.position, self.groups = relation, position, _groups(out_channels, share)
        taken, given = self.mapping_widths()
        self.conv_w = _mapping(mapping, taken, self.relation_channels, given)
        if position != "none":
            self.conv_p = nn.Conv2d(2, 2, 1)

    def mapping_widths(self) -> tuple[int, int]:
        """Channels that γ takes and gives."""
        taken = find_relation("pairwise", self.relation).width(self.relation_channels, self.footprint.places)
        return taken + POSITION_WIDTHS[self.position], self.groups

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, known_plain: bool = False) -> Tensor:
        """y, from what the transformations give; `known_plain` tells that γ's parts have been looked at."""
        gamma, position = _gamma(self.conv_w, known_plain), self._position()
        options: dict[str, Any] = {"relation": self.relation, "position": position, **self.geometry()}
        return pairwise_attention(query, key, value, gamma, **options)

    def is_recordable(self) -> bool:
        """Whether native kernels do all."""
        return self.relation in pairwise_native.RELATIONS

    def attend_folded(self, query: Any, key: Any, value: Any, gamma: list[Affine]) -> Any:
        """y by the native kernels, with γ's BatchNorms folded; no gradients."""
        last: Any = self.conv_w[-1]
        layers = (*gamma[1:], Linear(last.weight, last.bias))
        return pairwise_native.attend_folded(
            query, key, value, self._position(), gamma[0], layers, self.relation, self.footprint
        )

    def norms_to_fold(self) -> list[Any]:
        """What `attend_folded` takes as `gamma`, before it is folded."""
        return fused.chained_norms(self.conv_w)

    def _position(self) -> Position | None:
        if self.position == "none":
            return None
        return Position(self.position, self.conv_p.weight.flatten(1), self.conv_p.bias)


class PatchwiseAttention(_Attention):
    """y_i = Σ_j α_ij ⊙ β(x_j), α_i = γ(δ(x_R(i))), without softmax (paper §3.2): it can represent any k×k convolution.

    Stands where a k×k convolution stands, as `PairwiseAttention` does. `relation` δ: concatenation, star, clique.
    `mapping` γ: L, LRL, LRLRL; its hidden width is G = out_channels/share. Other options, and what may be done to γ,
    as in `PairwiseAttention`. Raises `UserError` as it does.
    """

    kernel_options = (*_Attention.kernel_options, "relation", "groups")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        *,
        relation: str = "concatenation",
        mapping: str = "LRL",
        transformations: str = "different",
        relation_channels: int | None = None,
        share: int = 8,
        border: str = "reflect",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, dilation, border, relation_channels, transformations
        )
        self.relation, self.groups = relation, _groups(out_channels, share)
        taken, given = self.mapping_widths()
        self.conv_w = _mapping(mapping, taken, self.groups, given)

    def mapping_widths(self) -> tuple[int, int]:
        """Channels that γ takes and gives."""
        places = self.footprint.places
        return find_relation("patchwise", self.relation).width(self.relation_channels, places), self.groups * places

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, known_plain: bool = False) -> Tensor:
        """y, from what the transformations give; `known_plain` tells that γ's parts have been looked at."""
        gamma = _gamma(self.conv_w, known_plain)
        return patchwise_attention(query, key, value, gamma, relation=self.relation, **self.geometry())

    def is_recordable(self) -> bool:
        """Whether native kernels do all."""
        return self.relation in patchwise_native.RELATIONS

    def attend_folded(self, query: Any, key: Any, value: Any, gamma: list[Affine]) -> Any:
        """y by the native kernels, with γ's BatchNorms folded; no gradients."""
        linears: Any = self.conv_w[2::3]
        layers = [(norm, Linear(layer.weight, layer.bias)) for norm, layer in zip(gamma, linears, strict=True)]
        return patchwise_native.attend_folded(query, key, value, layers, self.relation, self.footprint)

    def norms_to_fold(self) -> list[Any]:
        """What `attend_folded` takes as `gamma`, before it is folded."""
        return fused.lone_norms(self.conv_w)


class ScalarAttention(_Attention):
    """y_i = Σ_j softmax_j(φ(x_i)ᵀψ(x_j)) β(x_j): dot-product attention over a footprint, the paper's comparison (§3).

    One weight for all channels, no mapping, no position, no scaling by √R. Stands where a k×k convolution stands;
    options as in `PairwiseAttention`. Raises `UserError` as it does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        *,
        transformations: str = "different",
        relation_channels: int | None = None,
        border: str = "reflect",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, dilation, border, relation_channels, transformations
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, known_plain: bool = False) -> Tensor:
        """y, from what the transformations give; `known_plain` tells that γ's parts have been looked at."""
        return pairwise_attention(query, key, value, relation="dot", **self.geometry())

    def attend_folded(self, query: Any, key: Any, value: Any, gamma: list[Affine]) -> Any:
        """y by the native kernels, there being no γ; no gradients."""
        return pairwise_native.attend_folded(query, key, value, None, None, (), "dot", self.footprint)

    def norms_to_fold(self) -> list[Any]:
        """Nothing, there being no γ."""
        return []


ATTENTIONS = {"pairwise": PairwiseAttention, "patchwise": PatchwiseAttention, "scalar": ScalarAttention}


class SelfAttentionBlock(nn.Module):
    """x + Conv1×1(ReLU(BN(Attention(ReLU(BN(x)))))), the paper's residual bottleneck (§4.2), pre-activation.

    [B, channels, H, W] → the same. Inside, value width is channels/r2 and relation width channels/r1, with r2 =
    `value_reduction` and r1 = `relation_reduction`. `attention` is pairwise, patchwise or scalar; `options` go to that
    layer. `drop_path` is the probability that training skips the residual branch of an image (0 in the paper).

    Raises `UserError` for options that do not fit.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        attention: str = "pairwise",
        *,
        value_reduction: int = 4,
        relation_reduction: int = 16,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if min(value_reduction, relation_reduction) < 1 or value_reduction > channels:
            raise UserError(
                f"value_reduction is {value_reduction} and relation_reduction {relation_reduction}, "
                f"but they must be at least 1 and leave some of {channels} channels"
            )
        _check_options(attention, options)
        width = channels // value_reduction
        options.setdefault("relation_channels", max(channels // relation_reduction, 1))
        self.bn1 = nn.BatchNorm2d(channels)
        self.sam = ATTENTIONS[attention](channels, width, kernel_size, **options)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, channels, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, channels, H, W]."""
        y = fused.attention_block(self, x)
        if y is not None:
            return y
        y = self.sam(F.relu(self.bn1(x)))
        return x + self.drop_path(self.conv(F.relu(self.bn2(y))))


def _widths_agree(block: SelfAttentionBlock) -> bool:
    """Whether the parts, which may have been changed, have sizes that go together, and attention keeps the map's."""
    sam: Any = block.sam
    layers: Any = sam.transformations_of_input()
    query, key, value = sam.arranged([layer.out_channels for layer in layers])
    channels = {block.bn1.num_features, block.conv.out_channels, *(layer.in_channels for layer in layers)}
    return (
        len(channels) == 1
        and sam.footprint.stride == 1
        and query == key == sam.relation_channels
        and value == sam.out_channels == block.bn2.num_features == block.conv.in_channels
        and (isinstance(sam, ScalarAttention) or _gamma_agrees(sam.conv_w, *sam.mapping_widths()))
    )


def _gamma_agrees(parts: Any, width: int, given: int) -> bool:
    if not parts or len(parts) % 3 or len(parts) > 3 * max(MAPPINGS.values()):
        return False
    for norm, layer in zip(parts[0::3], parts[2::3], strict=True):
        if not norm.num_features == layer.in_channels == width:
            return False
        width = layer.out_channels
    return width == given


fused.register_block(SelfAttentionBlock, _widths_agree, sam=tuple(ATTENTIONS.values()), drop_path=(DropPath,))


def _check_options(attention: str, options: dict[str, Any]) -> None:
    """Options of a block's layer: all but the widths, the kernel size and the stride, which the block decides."""
    if attention not in ATTENTIONS:
        raise UserError(f"attention {attention!r} is unknown; choose one of: {', '.join(ATTENTIONS)}")
    parameters = signature(ATTENTIONS[attention]).parameters.values()
    known = ["dilation", *(each.name for each in parameters if each.kind is each.KEYWORD_ONLY)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(
            f"a block's {attention} attention has no option {unknown[0]!r}; choose among: {', '.join(known)}"
        )


def _groups(out_channels: int, share: int) -> int:
    if share < 1 or out_channels % share:
        raise UserError(f"share is {share}, but it must divide out_channels, which is {out_channels}")
    return out_channels // share


def _mapping(name: str, width: int, hidden: int, out: int) -> nn.Sequential:
    """γ as the authors lay it out: BatchNorm, ReLU, Conv1×1 for every Linear, a bias in the last one only."""
    if name not in MAPPINGS:
        raise UserError(f"mapping {name!r} is unknown; choose one of: {', '.join(MAPPINGS)}")
    widths = [width, *[hidden] * (MAPPINGS[name] - 1), out]
    parts: list[nn.Module] = []
    for layer, (taken, given) in enumerate(itertools.pairwise(widths), start=1):
        parts += [nn.BatchNorm2d(taken), nn.ReLU(), nn.Conv2d(taken, given, 1, bias=layer == MAPPINGS[name])]
    return nn.Sequential(*parts)


def _gamma(parts: nn.Sequential, known_plain: bool = False) -> AnyMapping:
    """γ as operators take it: its tensors, or the module itself where someone changed or listens to a part."""
    if not (known_plain or _is_plain(parts)):
        return _module_mapping(parts)
    each: Any = list(parts)
    layers = zip(each[0::3], each[2::3], strict=True)
    return Mapping(
        tuple(
            MappingLayer(BatchNorm.of(norm), convolution.weight.flatten(1), convolution.bias)
            for norm, convolution in layers
        )
    )


def _module_mapping(parts: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """γ as a module, in its own dtype: operators hand over at least float32."""
    dtype = next((parameter.dtype for parameter in parts.parameters()), None)
    return lambda x: parts(x.to(dtype or x.dtype))


_LAYER = (NORMS, (nn.ReLU,), (nn.Conv2d,))


def _is_plain(parts: nn.Sequential) -> bool:
    """Whether γ is as `_mapping` builds it, so that its tensors tell all that running it would do."""
    return (
        type(parts) is nn.Sequential
        and len(parts) > 0
        and len(parts) % 3 == 0
        and all(type(part) in _LAYER[place % 3] for place, part in enumerate(parts))
        and all(map(is_pointwise, parts[2::3]))
        and not any(map(is_heard, parts.modules()))
    )

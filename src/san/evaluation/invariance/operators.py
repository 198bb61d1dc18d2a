"""What one attention layer, or one convolution, is invariant to: measured, beside what holds by construction.

Attention layers stand for the operator and its pointwise transformations φ, ψ, β. Everything is measured at stride 1,
where an output pixel stands for every input pixel, and away from the border where the border would matter.
Legend: B images, C channels, H W map, K = k·k places, P windows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from san.evaluation.invariance.groups import channel_order, relabel_groups
from san.evaluation.robustness import turn
from san.layers import PairwiseAttention, PatchwiseAttention, ScalarAttention
from san.ops import Footprint

__all__ = [
    "PROPERTIES",
    "Met",
    "Property",
    "find_operators",
    "footprint_of",
    "measure_operators",
    "operators_with_inputs",
    "relative_change",
    "shuffled",
    "unplaced",
]

_FORMS = (PairwiseAttention, PatchwiseAttention, ScalarAttention)


@dataclass(frozen=True)
class Property:
    """An equality that an operator may satisfy.

    `measure` maps an operator in eval mode and its input [B, C, H, W] to the relative change between both sides, as
    `relative_change` has it, or None where there is nothing to compare. `exact` says of an operator whether both
    sides are equal by construction, up to rounding, whatever its parameters; else they differ unless parameters
    are special.
    """

    measure: Callable[[nn.Module, Tensor], float | None]
    exact: Callable[[nn.Module], bool]


class Met(NamedTuple):
    """An operator at stride 1, its name in its network, and its input there [B, C, H, W]."""

    name: str
    operator: nn.Module
    maps: Tensor


def relative_change(changed: Tensor, expected: Tensor) -> float | None:
    """Root mean square of `changed` − `expected`, over the standard deviation of `expected` within its channels.

    0 for equal maps [B, C, H, W], about 1.4 for unrelated ones. None where nothing is left of the maps.
    """
    if not expected.numel():
        return None
    spread = (expected - expected.mean((0, 2, 3), keepdim=True)).square().sum()
    return ((changed - expected).square().sum() / spread).sqrt().item()


def measure_operators(model: nn.Module, pixels: Tensor) -> list[dict[str, Any]]:
    """Measure `PROPERTIES` of every operator of a network with a footprint, on the maps that it meets there.

    In float64, by `operators_with_inputs`. The model is left as it was.

    Args:
        model: As `san.create_model` or `san.checkpoints.load_model` give it.
        pixels: Its input, normalised, [B, 3, H, W]; a few images are enough.

    Returns:
        Rows of `operator` (its name in the network), `kind` (such as pairwise, or convolution), and `properties`: for
        each name `change` (see `Property`; None where there was nothing to compare) and `exact`.
    """
    with torch.no_grad():
        return [
            {
                "operator": found.name,
                "kind": _kind(found.operator),
                "properties": {
                    name: {"change": each.measure(found.operator, found.maps), "exact": each.exact(found.operator)}
                    for name, each in PROPERTIES.items()
                },
            }
            for found in operators_with_inputs(model, pixels)
        ]


def find_operators(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers, and convolutions that pad to keep the size, with footprints of more than one place, by name."""
    return {name: part for name, part in model.named_modules() if _has_footprint(part)}


def operators_with_inputs(model: nn.Module, pixels: Tensor) -> list[Met]:
    """What `find_operators` finds in a copy of a network in float64 and eval mode, with the maps that reach it there.

    Args:
        model: The network, which is left as it was.
        pixels: Its input, normalised, [B, 3, H, W].
    """
    network, maps = copy.deepcopy(model).double().eval(), {}

    def keep(part: nn.Module, arguments: tuple[Tensor], name: str) -> None:
        maps[name] = arguments[0]

    operators = find_operators(network)
    handles = [part.register_forward_pre_hook(partial(keep, name=name)) for name, part in operators.items()]
    with torch.no_grad():
        network(pixels.double())
    for handle in handles:
        handle.remove()
    return [Met(name, _unstrided(operator), maps[name]) for name, operator in operators.items() if name in maps]


def unplaced(layer: PairwiseAttention) -> PairwiseAttention:
    """A copy of a pairwise layer with relative position whose position is 0 everywhere, so that it says nothing."""
    changed = copy.deepcopy(layer)
    for parameter in changed.get_submodule("conv_p").parameters():
        nn.init.zeros_(parameter)
    return changed


def shuffled(x: Tensor, footprint: Footprint, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Maps in which the places around some pixels have changed places, within each one's window.

    Windows do not overlap and lie inside the map [B, C, H, W]; each has an order of its own, and its centre stays.

    Returns:
        The maps, and rows and columns of the centres, such that `x[:, :, rows, columns]` is [B, C, windows down,
        windows across].
    """
    height, width = x.shape[2:]
    reach, generator = footprint.padding, torch.Generator().manual_seed(seed)
    rows, columns = (torch.tensor(range(reach, side - reach, 2 * reach + 1)).long() for side in (height, width))
    steps = torch.arange(-reach, reach + 1, footprint.dilation)
    around = (steps[:, None] * width + steps).flatten()
    # Without the centre, which is the middle one.
    around = torch.cat([around[: len(around) // 2], around[len(around) // 2 + 1 :]])
    moved = torch.arange(height * width)
    for centre in (rows[:, None] * width + columns).flatten().tolist():
        moved[centre + around] = moved[centre + around[torch.randperm(len(around), generator=generator)]]
    return x.flatten(2)[:, :, moved].view_as(x), (rows[:, None], columns)


def _kind(operator: Any) -> str:
    if isinstance(operator, PairwiseAttention):
        return "pairwise" + {"none": " without position", "relative": ""}.get(operator.position, " absolute")
    return {PatchwiseAttention: "patchwise", ScalarAttention: "scalar"}.get(type(operator), "convolution")


def _has_footprint(part: Any) -> bool:
    if isinstance(part, _FORMS):
        return part.footprint.kernel_size > 1
    if not isinstance(part, nn.Conv2d) or part.kernel_size[0] == 1:
        return False
    reach = tuple(d * (k - 1) // 2 for d, k in zip(part.dilation, part.kernel_size, strict=True))
    return part.kernel_size[0] % 2 == 1 and len(set(part.kernel_size)) == 1 and part.padding in (reach, "same")


def _unstrided(operator: nn.Module) -> nn.Module:
    changed: Any = copy.deepcopy(operator)
    if isinstance(changed, nn.Conv2d):
        changed.stride = (1, 1)
    else:
        changed.footprint = replace(changed.footprint, stride=1)
    return changed


def footprint_of(operator: Any) -> Footprint:
    """The windows of an attention layer or a convolution, at stride 1."""
    if isinstance(operator, nn.Conv2d):
        return Footprint(operator.kernel_size[0], 1, operator.dilation[0], "zeros")
    return operator.footprint


def _inside(x: Tensor, margin: int) -> Tensor:
    """The map without `margin` pixels along its border."""
    return x[:, :, margin : x.shape[2] - margin, margin : x.shape[3] - margin]


def _places_permuted(operator: nn.Module, x: Tensor) -> float | None:
    moved, (rows, columns) = shuffled(x, footprint_of(operator))
    return relative_change(operator(moved)[:, :, rows, columns], operator(x)[:, :, rows, columns])


def _commutes(operator: nn.Module, x: Tensor, way: Callable[[Tensor], Tensor]) -> float | None:
    return relative_change(operator(way(x)), way(operator(x)))


def _shifted(operator: nn.Module, x: Tensor) -> float | None:
    margin = footprint_of(operator).padding + 1
    sides = (operator(x.roll((1, 1), (2, 3))), operator(x).roll((1, 1), (2, 3)))
    return relative_change(*(_inside(side, margin) for side in sides))


def _constant_added(operator: nn.Module, x: Tensor) -> float | None:
    """Whether every output pixel of every image moves by the same, when a number is added to each input channel."""
    margin = footprint_of(operator).padding
    before, after = (_inside(operator(each), margin) for each in (x, x + _like_channels(x)))
    return relative_change(after - (after - before).mean((0, 2, 3), keepdim=True), before)


def _constant_in_weights(operator: nn.Module, x: Tensor) -> float | None:
    """Whether the output stays when the same number is added to a channel of query and key."""
    if isinstance(operator, nn.Conv2d):
        return None
    layer, margin = cast("PairwiseAttention", operator), footprint_of(operator).padding
    query, key, value = layer.transform(x)
    constant = _like_channels(query)
    sides = (layer.attend(query + constant, key + constant, value), layer.attend(query, key, value))
    return relative_change(*(_inside(side, margin) for side in sides))


def _like_channels(x: Tensor) -> Tensor:
    """A number for each channel, as large as the channel's values are apart: [1, C, 1, 1]."""
    drawn = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return drawn[:, None, None].to(x.device) * x.std((0, 2, 3), keepdim=True)


def _doubled(operator: nn.Module, x: Tensor) -> float | None:
    """Whether doubling the input doubles the output, but for a constant."""
    nothing = operator(torch.zeros_like(x))
    return relative_change(operator(2 * x) - nothing, 2 * (operator(x) - nothing))


def _relabelled(operator: Any, x: Tensor) -> float | None:
    groups = getattr(operator, "groups", 1)
    if (
        not isinstance(operator, PairwiseAttention | PatchwiseAttention)
        or groups == 1
        or not hasattr(operator, "conv3")
    ):
        return None
    order = torch.arange(groups).roll(1)
    return relative_change(
        relabel_groups(operator, order)(x), operator(x)[:, channel_order(operator.out_channels, order)]
    )


def _is_set_operator(operator: Any) -> bool:
    """Whether it tells no places of its footprint apart."""
    if isinstance(operator, PairwiseAttention):
        parameters = list(operator.conv_p.parameters()) if operator.position != "none" else []
        return operator.position == "none" or not any(parameter.any() for parameter in parameters)
    return isinstance(operator, ScalarAttention)


def _compares_by_subtraction(operator: Any) -> bool:
    return isinstance(operator, PairwiseAttention) and operator.relation == "subtraction"


def _is_convolution(operator: Any) -> bool:
    return isinstance(operator, nn.Conv2d)


def _moves_with_constants(operator: Any) -> bool:
    # A constant moves φ(x) and ψ(x) by the same only where they are the same.
    same = _compares_by_subtraction(operator) and operator.transformations != "different"
    return same or _is_convolution(operator)


def _is_stationary(operator: Any) -> bool:
    return _is_set_operator(operator) or getattr(operator, "position", "") != "absolute"


PROPERTIES: Mapping[str, Property] = MappingProxyType(
    {
        "places permuted": Property(_places_permuted, _is_set_operator),
        "turned 90°": Property(partial(_commutes, way=partial(turn, quarters=1)), _is_set_operator),
        "turned 180°": Property(partial(_commutes, way=partial(turn, quarters=2)), _is_set_operator),
        "mirrored": Property(partial(_commutes, way=partial(torch.flip, dims=(-1,))), _is_set_operator),
        "upside down": Property(partial(_commutes, way=partial(torch.flip, dims=(-2,))), _is_set_operator),
        "shifted 1 px": Property(_shifted, _is_stationary),
        "constant added to input": Property(_constant_added, _moves_with_constants),
        "constant added to query and key": Property(_constant_in_weights, _compares_by_subtraction),
        "input doubled": Property(_doubled, _is_convolution),
        "groups numbered anew": Property(_relabelled, lambda operator: not _is_convolution(operator)),
    }
)
"""What is done to an operator, by name, with the equality that is then asked for.

Places permuted: the output at the centre stays. Turned, mirrored, upside down, shifted: the output does likewise.
Constant added to input: the output moves by the same at every pixel. Constant added to query and key: the output
stays. Input doubled: the output doubles, but for a constant. Groups numbered anew: output channels change places.
"""

"""What operators check before any backend runs, so that a bad shape ends in one sentence and never in native code."""

from __future__ import annotations

from torch import Tensor

from san.errors import UserError
from san.ops.kernels.attention import AttentionCall
from san.ops.mapping import Mapping
from san.ops.relations import Position

__all__ = ["check_groups", "check_mapping", "check_maps", "check_position"]


def check_maps(**maps: Tensor) -> None:
    """Maps must be floating [B, C, H, W] on one device, alike in all but C; query and key also in C."""
    for name, x in maps.items():
        if x.dim() != 4 or not x.is_floating_point():
            raise UserError(
                f"{name} is {x.dtype} of shape {list(x.shape)}, but it must be a floating tensor [B, C, H, W]"
            )
        if 0 in x.shape[1:]:
            raise UserError(f"{name} has shape {list(x.shape)}, but channels, height and width must be at least 1")
    (first, like), *others = maps.items()
    for name, x in others:
        if (x.shape[0], x.shape[2:], x.device) != (like.shape[0], like.shape[2:], like.device):
            raise UserError(
                f"{name} is {list(x.shape)} on {x.device} and {first} {list(like.shape)} on {like.device}, "
                "but batch, height, width and device must agree"
            )
        if name == "key" and (x.shape != like.shape or x.dtype != like.dtype):
            raise UserError(
                f"query has {like.shape[1]} channels of {like.dtype} and key {x.shape[1]} of {x.dtype}, "
                "but they must be alike"
            )


def check_mapping(call: AttentionCall, width: int) -> None:
    """γ must take δ's width and give weight groups that divide the value channels."""
    columns = call.footprint.places // call.samples_per_pixel()
    groups = width
    if isinstance(call.mapping, Mapping):
        taken, groups = call.mapping.widths()
        if taken != width:
            raise UserError(f"the mapping takes {taken} channels, but relation {call.relation!r} gives {width}")
        _check_samples(call, call.mapping)
        _check_device(call.value, _tensors(call.mapping), "the mapping")
    if isinstance(call.mapping, Mapping | None):
        if groups % columns:
            raise UserError(
                f"the mapping gives {groups} channels, but it must give a multiple of the footprint's {columns} places"
            )
        check_groups(call.value, groups // columns)


def check_groups(value: Tensor, groups: int) -> None:
    """Weight groups must divide the value channels."""
    if groups < 1 or value.shape[1] % groups:
        raise UserError(f"{groups} weight groups do not divide the {value.shape[1]} channels of value")


def _check_samples(call: AttentionCall, mapping: Mapping) -> None:
    batch, _, height, width = call.value.shape
    rows, columns = call.footprint.output_size(height, width)
    samples = batch * rows * columns * call.samples_per_pixel()
    if samples == 1 and any(layer.norm.uses_batch and not layer.norm.synchronized for layer in mapping.layers):
        raise UserError("BatchNorm in training needs more than one value per channel, but batch and map hold one pixel")


def check_position(value: Tensor, position: Position | None) -> None:
    """Position must lie on the device of the maps."""
    if position is not None:
        _check_device(value, [position.weight, position.bias], "position")


def _tensors(mapping: Mapping) -> list[Tensor | None]:
    norms = [layer.norm for layer in mapping.layers]
    averages = [x for norm in norms for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    return [*averages, *(x for layer in mapping.layers for x in (layer.weight, layer.bias))]


def _check_device(value: Tensor, tensors: list[Tensor | None], owner: str) -> None:
    for x in tensors:
        if x is not None and x.device != value.device:
            raise UserError(
                f"a tensor of {owner} is on {x.device}, but it must be on {value.device}, where the maps are"
            )

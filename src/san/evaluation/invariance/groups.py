"""Weight groups in another order: a change that a network does not notice, and one that it does.

Value channel c uses the weights of group c mod G, so channels and groups may be numbered anew together.
Legend: G weight groups, K places.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from san.errors import UserError
from san.layers import PatchwiseAttention, SelfAttentionBlock

__all__ = ["channel_order", "permute_groups", "relabel_groups"]


def permute_groups(layer: nn.Module, order: Tensor) -> nn.Module:
    """A copy of a pairwise or patchwise layer whose group g has the attention weights of group `order[g]`.

    Values stay where they are, so the copy computes something else.

    Args:
        layer: A `PairwiseAttention` or `PatchwiseAttention`.
        order: int64 [G], each group once.
    """
    changed: Any = copy.deepcopy(layer)
    places = changed.footprint.places if isinstance(layer, PatchwiseAttention) else 1
    rows = (order[:, None] * places + torch.arange(places)).flatten()
    _reorder(changed.conv_w[-1], rows)
    return changed


def relabel_groups(layer: nn.Module, order: Tensor) -> nn.Module:
    """A copy of a layer, or of a residual block, in which group `order[g]` has become group g, its values with it.

    A layer's output channels are then in the order of `channel_order`; a block computes what it did.

    Args:
        layer: A `PairwiseAttention`, a `PatchwiseAttention`, or a `SelfAttentionBlock` around one.
        order: int64 [G], each group once.

    Raises:
        UserError: Value has no transformation of its own, so its channels cannot change places.
    """
    if isinstance(layer, SelfAttentionBlock):
        block: Any = copy.deepcopy(layer)
        channels = channel_order(block.sam.out_channels, order)
        block.sam = relabel_groups(block.sam, order)
        _reorder(block.bn2, channels)
        block.conv.weight.data = block.conv.weight.data[:, channels]
        return block
    changed: Any = permute_groups(layer, order)
    if not hasattr(changed, "conv3"):
        raise UserError("groups can only be numbered anew where value has a transformation of its own")
    _reorder(changed.conv3, channel_order(changed.out_channels, order))
    return changed


def channel_order(channels: int, order: Tensor) -> Tensor:
    """Where the value channels go with their groups: int64 [channels]."""
    return torch.arange(channels).unflatten(0, (-1, len(order)))[:, order].flatten()


def _reorder(part: nn.Module, order: Tensor) -> None:
    """Put the output channels of a 1×1 convolution, or the channels of a BatchNorm, in another order."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = getattr(part, name, None)
        if values is not None:
            values.data = values.data[order]

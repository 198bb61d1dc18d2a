"""How far a layer looks: attended distance and entropy of every output pixel and weight group.

Patchwise weights have signs and no fixed sum. What they attend to is therefore told by their shares
a_j = |α_j| / Σ_l |α_l|, which pairwise weights are by themselves.
Legend: B batch, G weight groups, K places, H W the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from san.attention_maps.observation import ObservedLayer
from san.attention_maps.weights import bands, reading, shares
from san.ops.footprint import Window

__all__ = ["EffectiveFootprint", "effective_footprint"]


@dataclass(frozen=True)
class EffectiveFootprint:
    """How a layer's output pixels spread their attention.

    distance: Σ_j a_j |p_i − p_j| in pixels of the image, between centres of places [B, G, H, W]. A place that the
        border mirrors counts where it reads.
    entropy: −Σ_j a_j log₂ a_j in bits [B, G, H, W]: 0 for one place, log₂ K for all places alike; 2 to its power is
        the number of places that count.
    negative: Share of Σ_j |α_j| that negative weights have [B, G, H, W]; 0 but for patchwise attention.
    uniform: The distance if all places had the same weight [H, W], to compare with.
    """

    observed: ObservedLayer
    distance: Tensor
    entropy: Tensor
    negative: Tensor
    uniform: Tensor


@torch.no_grad()
def effective_footprint(observed: ObservedLayer) -> EffectiveFootprint:
    """How far every output pixel of a layer looks, and at how many places; weights are computed band by band.

    Attended distance is that of Dosovitskiy et al., An Image is Worth 16x16 Words, figure 7, over footprints. Places
    on a border of zeros read nothing and have no share. Raises `UserError` as `attention_weights` does.
    """
    found = [_spread(observed, window, weights) for window, weights in bands(observed)]
    size = observed.output_size
    joined = [torch.cat(parts, dim=-1).unflatten(-1, size) for parts in zip(*found, strict=True)]
    return EffectiveFootprint(observed, *joined)


def _spread(observed: ObservedLayer, window: Window, weights: Tensor) -> tuple[Tensor, ...]:
    """Distance, entropy, negative share [B, G, P] and uniform distance [P] of a band."""
    rows, columns = reading(window, weights.device)
    share = shares(weights, rows)
    apart = _distances(observed, window, rows.to(share.dtype), columns.to(share.dtype))
    distance = torch.einsum("bgkp,kp->bgp", share, apart)
    # Adding 0 turns −0 into 0.
    entropy = torch.special.entr(share).sum(2) / torch.log(share.new_tensor(2.0)) + 0.0
    negative = (share * (weights < 0)).sum(2)
    even = (rows >= 0).to(share.dtype)
    return distance, entropy, negative, (even * apart).sum(0) / even.sum(0)


def _distances(observed: ObservedLayer, window: Window, rows: Tensor, columns: Tensor) -> Tensor:
    """From each output pixel's centre to what its places read, in pixels of the image: [K, P]."""
    down, across = observed.stride
    stride = window.footprint.stride
    centre_rows = torch.arange(window.row, window.row_stop, device=rows.device) * stride
    centre_columns = torch.arange(observed.output_size[1], device=rows.device) * stride
    y, x = torch.meshgrid(centre_rows, centre_columns, indexing="ij")
    return torch.hypot((rows - y.flatten()) * down, (columns - x.flatten()) * across)

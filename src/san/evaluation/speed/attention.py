"""The attention layers of a network by themselves: which there are, on which maps, and their operator calls alone.

A layer's transformations φ, ψ, β and what surrounds it are left out: query, key and value are given.
Legend: B batch, R relation width, C value channels, G weight groups, D δ's width, K places, H W map, P output pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from san.evaluation.accuracy import eval_mode
from san.layers import ATTENTIONS, PatchwiseAttention
from san.ops import BatchNorm, Mapping, MappingLayer, Position, pairwise_attention, patchwise_attention, use_backend

__all__ = ["AttentionOperator", "attention_operators", "has_attention"]


def has_attention(model: nn.Module) -> bool:
    """Whether the network has attention layers of ours, so that backends make a difference."""
    return any(isinstance(part, tuple(ATTENTIONS.values())) for part in model.modules())


@dataclass(frozen=True)
class AttentionOperator:
    """The operator call of one attention `layer` on an input map of `height` × `width`; `name` is its place."""

    name: str
    layer: Any
    height: int
    width: int

    @property
    def shape(self) -> tuple[Any, ...]:
        """What decides the cost: layers of equal shape take equal time."""
        layer = self.layer
        widths = [tuple(weight.shape) for weight in layer.parameters()]
        return (
            type(layer).__name__,
            layer.footprint,
            getattr(layer, "relation", "dot"),
            self.height,
            self.width,
            *widths,
        )

    def maps(self, batch: int, dtype: torch.dtype, device: str, channels_last: bool) -> list[Tensor]:
        """Random query, key [B, R, H, W] and value [B, C, H, W]."""
        form = torch.channels_last if channels_last else torch.contiguous_format
        widths = (self.layer.relation_channels, self.layer.relation_channels, self.layer.out_channels)
        sizes = [(batch, width, self.height, self.width) for width in widths]
        return [torch.randn(size, device=device).to(dtype, memory_format=form) for size in sizes]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """y [B, C, H_out, W_out], with the layer's mapping, position and geometry."""
        layer, mapping = self.layer, _mapping(self.layer)
        if isinstance(layer, PatchwiseAttention):
            return patchwise_attention(query, key, value, mapping, relation=layer.relation, **layer.geometry())
        position = None
        if getattr(layer, "position", "none") != "none":
            position = Position(layer.position, layer.conv_p.weight[:, :, 0, 0], layer.conv_p.bias)
        relation = getattr(layer, "relation", "dot")
        return pairwise_attention(query, key, value, mapping, relation=relation, position=position, **layer.geometry())

    def operations(self, batch: int) -> int:
        """Floating-point operations: 2 per multiply-add of γ's products and of the aggregation, nothing else."""
        places = self.layer.footprint.places
        pixels = batch * self._pixels()
        columns = pixels if isinstance(self.layer, PatchwiseAttention) else pixels * places
        products = sum(part.weight.numel() for part in list(getattr(self.layer, "conv_w", ()))[2::3])
        return 2 * (columns * products + pixels * places * self.layer.out_channels)

    def least_bytes(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes that any implementation moves: query, key and value read once, y written once."""
        read = self.height * self.width * (2 * self.layer.relation_channels + self.layer.out_channels)
        return batch * (read + self._pixels() * self.layer.out_channels) * dtype.itemsize

    def _pixels(self) -> int:
        rows, columns = self.layer.footprint.output_size(self.height, self.width)
        return rows * columns


def _mapping(layer: Any) -> Mapping | None:
    parts: Sequence[Any] = list(getattr(layer, "conv_w", ()))
    layers = [
        MappingLayer(BatchNorm.of(norm), convolution.weight[:, :, 0, 0], convolution.bias)
        for norm, convolution in zip(parts[0::3], parts[2::3], strict=True)
    ]
    return Mapping(tuple(layers)) if layers else None


def attention_operators(model: nn.Module, resolution: int) -> list[AttentionOperator]:
    """The operator calls of every attention layer for square images of side `resolution`, in the network's order.

    The network runs once on tensors without data, on the CPU where it must be.
    """
    found: list[AttentionOperator] = []
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, tuple(ATTENTIONS.values()))]
    names: dict[nn.Module, str] = {layer: name for name, layer in layers}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(AttentionOperator(names[layer], layer, *inputs[0].shape[2:]))

    hooks = [layer.register_forward_pre_hook(note) for layer in names]
    without_data = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with eval_mode(model), torch.no_grad(), use_backend("reference"), without_data:
            model(torch.empty(1, 3, resolution, resolution))
    finally:
        for hook in hooks:
            hook.remove()
    return found

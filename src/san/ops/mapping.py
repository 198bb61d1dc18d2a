"""γ, the small network that maps relations to attention weights, in tensors and plain values (paper §3.1, §4.1).

Operators take γ in this form rather than as a module, so that a fused backend sees its parts. Anything else that maps
[B, D, K, P] to [B, G, K, P], a module with hooks for instance, is accepted too and runs as it is on the reference.
Legend: B batch, D width, K places (1 for patchwise), P output pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from san.errors import UserError
from san.ops.normalization import BatchNorm

__all__ = ["MAPPINGS", "AnyMapping", "Mapping", "MappingLayer", "linear"]

MAPPINGS = {"L": 1, "LRL": 2, "LRLRL": 3}


@dataclass(frozen=True)
class MappingLayer:
    """Linear(ReLU(BatchNorm(x))) on the channel axis: x [B, D_in, K, P] → [B, D_out, K, P].

    `weight` is [D_out, D_in], `bias` [D_out] or None.
    """

    norm: BatchNorm
    weight: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        given, taken = self.weight.shape
        for name in ("weight", "bias", "running_mean", "running_var"):
            x = getattr(self.norm, name)
            if x is not None and x.shape != (taken,):
                raise UserError(
                    f"BatchNorm's {name} is {list(x.shape)}, but the Linear behind it takes {taken} channels"
                )
        if self.bias is not None and self.bias.shape != (given,):
            raise UserError(f"the Linear's bias is {list(self.bias.shape)}, but it gives {given} channels")

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return linear(F.relu(self.norm(x)), self.weight, self.bias)


@dataclass(frozen=True)
class Mapping:
    """γ as a chain of layers: one for `L`, two for `LRL`, three for `LRLRL`.

    Departure from the paper's text, as in the authors' code: BatchNorm and ReLU precede the first Linear too.
    """

    layers: tuple[MappingLayer, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("a mapping needs at least one layer; pass mapping=None for the identity")
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            if before.weight.shape[0] != after.weight.shape[1]:
                raise UserError(
                    f"a layer of the mapping gives {before.weight.shape[0]} channels, "
                    f"but the next one takes {after.weight.shape[1]}"
                )

    def widths(self) -> tuple[int, int]:
        """Channels that γ takes and gives."""
        return self.layers[0].weight.shape[1], self.layers[-1].weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply all layers."""
        for layer in self.layers:
            x = layer(x)
        return x


AnyMapping = Mapping | Callable[[Tensor], Tensor] | None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear on the channel axis of x [B, D_in, K, P], as a 1×1 convolution: the form that every device does well."""
    return F.conv2d(x, weight.to(x.dtype)[:, :, None, None], None if bias is None else bias.to(x.dtype))

"""Patchwise attention that computes a given convolution: why it is at least as powerful (paper §3.2).

Where γ's last Linear has weight 0, every attention weight is its bias, whatever the input. With a 1×1 output
transformation O behind it the layer is then the convolution with kernel

    W[o, c, j] = Σ_v O[o, v] · α[v mod G, j] · β[v, c]

so a kernel needs as many value channels v as there are such terms in a sum that gives it.
Legend: C_in and C_out channels of the convolution, V value channels, G weight groups, K = k·k places (row-major).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from san.errors import UserError
from san.layers import PatchwiseAttention
from san.ops.footprint import BORDERS

__all__ = ["patchwise_from_convolution"]


class _Factors(NamedTuple):
    """O [C_out, V], α [G, K] and β [V, C_in], whose product as above is a kernel."""

    output: Tensor
    weight: Tensor
    value: Tensor


def patchwise_from_convolution(
    convolution: nn.Conv2d,
    *,
    relation: str = "concatenation",
    mapping: str = "LRL",
    relation_channels: int | None = None,
) -> nn.Sequential:
    """A `PatchwiseAttention` and the 1×1 convolution behind it that together compute `convolution`, exactly.

    In training and eval mode alike. The attention does not depend on its input yet, but gradients reach γ: training
    goes on from the convolution. Value width and groups are the least of three ways to write any kernel:
    V = K·C_in with G = K: each value channel is an input channel seen at one place;
    V = K·C_out with G = K: each is one place's share of an output channel;
    V = G = C_in·C_out / convolution.groups: each is an input channel weighted for one output channel.
    So a depthwise convolution needs V = C. A kernel of low rank may need less than this gives.

    Args:
        convolution: Odd square kernel, equal strides and dilations, padding d·(k−1)/2 by zeros or by reflection.
        relation: δ of the attention, which has no say yet.
        mapping: γ of the attention, whose last Linear is overwritten.
        relation_channels: Relation width R, as in `PatchwiseAttention`.

    Raises:
        UserError: No footprint is like that of `convolution`, or an option does not exist.
    """
    footprint, border = _footprint(convolution)
    factors = _smallest(convolution)
    (width, channels), groups = factors.value.shape, len(factors.weight)
    attention = PatchwiseAttention(
        channels,
        width,
        *footprint,
        relation=relation,
        mapping=mapping,
        relation_channels=relation_channels,
        share=width // groups,
        border=border,
    )
    output = nn.Conv2d(width, convolution.out_channels, 1, bias=convolution.bias is not None)
    pair = nn.Sequential(attention, output).to(convolution.weight).train(convolution.training)
    _fill(attention, output, factors, convolution.bias)
    return pair


def _footprint(convolution: nn.Conv2d) -> tuple[tuple[int, int, int], str]:
    """Kernel size, stride and dilation, and the border rule."""
    name = f"a convolution of kernel {convolution.kernel_size}, stride {convolution.stride}, "
    name += f"dilation {convolution.dilation}, padding {convolution.padding} by {convolution.padding_mode}"
    sizes = (convolution.kernel_size, convolution.stride, convolution.dilation)
    k, stride, dilation = (size[0] for size in sizes)
    same = dilation * (k - 1) // 2
    if k % 2 == 0 or any(len(set(size)) > 1 for size in sizes) or convolution.padding not in ((same, same), "same"):
        raise UserError(f"no footprint is like that of {name}: make it odd, square and padded by d·(k−1)/2")
    if convolution.padding_mode not in BORDERS:
        raise UserError(f"no border rule is like that of {name}: pad by {' or '.join(BORDERS)}")
    return (k, stride, dilation), convolution.padding_mode


def _smallest(convolution: nn.Conv2d) -> _Factors:
    """The factors of least value width, of three ways to write any kernel."""
    kernel = _dense(convolution)
    outputs, inputs, places = kernel.shape
    one = {size: torch.eye(size, dtype=kernel.dtype, device=kernel.device) for size in (outputs, inputs, places)}
    o, c = _connected(convolution).nonzero(as_tuple=True)
    return min(
        _Factors(kernel.flatten(1), one[places], one[inputs].repeat_interleave(places, 0)),
        _Factors(one[outputs].repeat_interleave(places, 1), one[places], kernel.transpose(1, 2).flatten(0, 1)),
        _Factors(one[outputs][:, o], kernel[o, c], one[inputs][c]),
        key=lambda factors: len(factors.value),
    )


def _connected(convolution: nn.Conv2d) -> Tensor:
    """Which input channels an output channel sees: bool [C_out, C_in]."""
    groups = convolution.groups
    each = torch.ones(convolution.out_channels // groups, convolution.in_channels // groups, dtype=torch.bool)
    return torch.block_diag(*[each] * groups).bool().to(convolution.weight.device)


def _dense(convolution: nn.Conv2d) -> Tensor:
    """The kernel [C_out, C_in, K], with 0 where an output channel does not see an input channel."""
    weight = convolution.weight.detach().flatten(2)
    kernel = weight.new_zeros(convolution.out_channels, convolution.in_channels, weight.shape[2])
    kernel[_connected(convolution)] = weight.flatten(0, 1)
    return kernel


@torch.no_grad()
def _fill(attention: PatchwiseAttention, output: nn.Conv2d, factors: _Factors, bias: Tensor | None) -> None:
    value: Any = attention.conv3
    last: Any = attention.conv_w[-1]
    value.weight.copy_(factors.value[:, :, None, None])
    value.bias.zero_()
    last.weight.zero_()
    last.bias.copy_(factors.weight.flatten())
    output.weight.copy_(factors.output[:, :, None, None])
    if output.bias is not None and bias is not None:
        output.bias.copy_(bias)

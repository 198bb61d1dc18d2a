"""What a network costs before it runs on any machine: parameters, the paper's count, and plain multiply-adds.

The count watches one forward of the network on tensors without data, so it follows what the network really calls at
hardly any cost. Attention layers are the exception: fused backends leave nothing to watch inside them, so their cost
follows from their geometry.
Legend: K footprint places, P output pixels, D relation width with position.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from san.errors import UserError
from san.evaluation.accuracy import eval_mode
from san.layers import ATTENTIONS, PatchwiseAttention
from san.models import create_model, list_models
from san.ops import use_backend
from san.ops.relations import POSITION_WIDTHS

__all__ = ["COMPARED", "complexity"]

COMPARED = [
    "baseline_resnet26",
    "san10_pairwise",
    "san10_patchwise",
    "baseline_resnet38",
    "san15_pairwise",
    "san15_patchwise",
    "baseline_resnet50",
    "san19_pairwise",
    "san19_patchwise",
]
_ACTIVATIONS = {"relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "sigmoid", "hardswish", "hardsigmoid"}
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean"}
_PRODUCTS = {"dot", "star", "clique"}


@dataclass
class _Cost:
    """Multiply-adds, and what the paper counts beside them."""

    macs: int = 0
    others: int = 0

    def __add__(self, more: _Cost) -> _Cost:
        return _Cost(self.macs + more.macs, self.others + more.others)


def complexity(network: str | nn.Module, input_size: int | None = None) -> dict[str, Any]:
    """Parameters and cost of one image, as `{"model", "params", "paper_cost", "macs"}`.

    `paper_cost` is the count that gives the figures of the paper's tables: multiply-adds of convolutions, with their
    bias adds, and of linear layers; K per aggregated output; 1 per output of a relation (R where it is a
    product of R channels); 2 per element of a BatchNorm, 1 per element of an activation, 1 per element that is pooled.
    Softmax and residual sums are free. `macs` are the multiply-adds alone: convolution, linear layer, matrix product,
    product relation, aggregation. Exact for networks of these parts; other operations cost nothing here.

    Args:
        network: A name that `san.create_model` or timm knows, or a network.
        input_size: Side of the square input; default the network's own.

    Raises:
        UserError: The name is unknown, or the network does not take images of this size.
    """
    model = _create(network) if isinstance(network, str) else network
    size = _input_size(model, input_size)
    cost = _count(model, size)
    return {
        "model": network if isinstance(network, str) else getattr(model, "architecture", type(model).__name__),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "paper_cost": cost.macs + cost.others,
        "macs": cost.macs,
    }


def _create(name: str) -> nn.Module:
    if name not in list_models() and timm.is_model(name):
        return timm.create_model(name)
    # Weights are not looked at, and drawing them would take longer than all the rest.
    with torch.device("meta"):
        model = create_model(name)
    return model.to_empty(device="cpu")


def _input_size(model: nn.Module, side: int | None) -> tuple[int, int, int]:
    channels, height, width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    if side is not None and side < 1:
        raise UserError(f"input_size is {side}, but it must be at least 1")
    return (channels, side or height, side or width)


def _count(model: nn.Module, size: tuple[int, int, int]) -> _Cost:
    meter, without_data = _Meter(), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with eval_mode(model), torch.no_grad(), use_backend("reference"), without_data, meter.watching(model), meter:
            model(torch.empty(1, *size))
    except (RuntimeError, AssertionError) as problem:
        reason = " ".join(str(problem).split())
        raise UserError(f"the network does not take images of {size[1]}×{size[2]} pixels: {reason}") from problem
    return meter.cost


class _Meter(TorchFunctionMode):
    """Adds up what torch's functions cost while it is active, and attention layers as wholes."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = _Cost()
        self.inside_attention = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside_attention:
            self.cost += _function_cost(func.__name__, (*args, *(kwargs or {}).values()), result)
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Generator[None]:
        """Count the attention layers of `model` by their geometry instead of their calls."""
        with ExitStack() as hooks:
            for layer in model.modules():
                if isinstance(layer, tuple(ATTENTIONS.values())):
                    hooks.callback(layer.register_forward_pre_hook(self._enter).remove)
                    hooks.callback(layer.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inside_attention = True

    def _leave(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inside_attention = False
        self.cost += _attention_cost(layer, inputs[0], output)


def _function_cost(name: str, args: tuple[Any, ...], result: Any) -> _Cost:
    if name in ("conv1d", "conv2d", "conv3d", "linear"):
        weight, bias = args[1], args[2] if len(args) > 2 else None
        return _Cost(result.numel() * weight[0].numel(), 0 if bias is None else result.numel())
    if name in ("matmul", "bmm", "__matmul__"):
        return _Cost(result.numel() * args[0].shape[-1])
    if name == "scaled_dot_product_attention":
        query, key, value = args[:3]
        return _Cost(query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    if name == "batch_norm":
        return _Cost(others=2 * result.numel())
    if name in _ACTIVATIONS:
        return _Cost(others=result.numel())
    if name in _POOLS:
        return _Cost(others=args[0].numel())
    return _Cost()


def _attention_cost(layer: Any, x: Tensor, y: Tensor) -> _Cost:
    """One attention layer: transformations and position, relation, mapping γ, aggregation."""
    pixels, centres, places = x[0, 0].numel(), y[0, 0].numel(), layer.footprint.places
    # One relation vector per pair, or one for a whole footprint.
    relations = centres if isinstance(layer, PatchwiseAttention) else places * centres
    cost = _Cost(macs=places * y.numel()) + _relation_cost(layer, relations)
    for name in ("conv1", "conv2", "conv3", "conv_p"):
        if hasattr(layer, name):
            cost += _convolution_cost(getattr(layer, name), pixels)
    mapping = list(getattr(layer, "conv_w", ()))
    for norm, linear in zip(mapping[0::3], mapping[2::3], strict=True):
        # 2 for the BatchNorm and 1 for the ReLU behind it.
        cost += _Cost(others=3 * relations * norm.num_features) + _convolution_cost(linear, relations)
    return cost


def _relation_cost(layer: Any, relations: int) -> _Cost:
    position = POSITION_WIDTHS[getattr(layer, "position", "none")]
    width = layer.conv_w[0].num_features - position if hasattr(layer, "conv_w") else 1
    if getattr(layer, "relation", "dot") in _PRODUCTS:
        return _Cost(relations * width * layer.relation_channels, relations * position)
    return _Cost(others=relations * (width + position))


def _convolution_cost(convolution: nn.Conv2d, times: int) -> _Cost:
    """A 1×1 convolution at so many places."""
    bias = 0 if convolution.bias is None else convolution.out_channels
    return _Cost(times * convolution.weight.numel(), times * bias)

"""The paper's networks once more, written from the formulas alone and with nothing of ours, to compare against.

It runs on a state dict with the authors' keys. Legend: B batch, C channels, K places of a footprint, P pixels, H W map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def plain_san(state: State, x: Tensor, network: dict[str, Any], *, pairwise: bool, training: bool = False) -> Tensor:
    """Logits; in training the running averages inside `state` move. `network` has kernels, and pools if not all."""
    pools = network.get("pools", [True] * len(network["kernels"]))
    x = F.relu(_norm(state, "bn_in", _linear(state, "conv_in", x), training))
    for stage, (kernel, pooled) in enumerate(zip(network["kernels"], pools, strict=True)):
        x = _linear(state, f"conv{stage}", F.max_pool2d(x, 2) if pooled else x)
        block = 0
        while f"layer{stage}.{block}.conv.weight" in state:
            x = x + _branch(state, f"layer{stage}.{block}.", x, kernel, pairwise, training)
            block += 1
        x = F.relu(_norm(state, f"bn{stage}", x, training))
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def _branch(state: State, name: str, x: Tensor, kernel: int, pairwise: bool, training: bool) -> Tensor:
    x = F.relu(_norm(state, f"{name}bn1", x, training))
    query, key, value = (_linear(state, f"{name}sam.conv{number}", x) for number in (1, 2, 3))
    if pairwise:
        y = _pairwise(state, f"{name}sam.", query, _places(key, kernel), _places(value, kernel), training)
    else:
        y = _patchwise(state, f"{name}sam.", query, _places(key, kernel), _places(value, kernel), training)
    return _linear(state, f"{name}conv", F.relu(_norm(state, f"{name}bn2", y.unflatten(2, x.shape[2:]), training)))


def _pairwise(state: State, name: str, query: Tensor, keys: Tensor, values: Tensor, training: bool) -> Tensor:
    height, width = query.shape[2:]
    y, x = torch.meshgrid(_line(height, query), _line(width, query), indexing="ij")
    position = _linear(state, f"{name}conv_p", torch.stack([x, y]).unsqueeze(0))
    to_places = position.flatten(2).unsqueeze(2) - _places(position, round(keys.shape[2] ** 0.5))
    relation = query.flatten(2).unsqueeze(2) - keys
    relation = torch.cat([relation, to_places.expand(len(relation), -1, -1, -1)], dim=1)
    weight = _gamma(state, name, relation, training).exp()
    weight = weight / weight.sum(2, keepdim=True)
    return _aggregate(weight, values)


def _patchwise(state: State, name: str, query: Tensor, keys: Tensor, values: Tensor, training: bool) -> Tensor:
    relation = torch.cat([query.flatten(2), keys.flatten(1, 2)], dim=1).unsqueeze(2)
    weight = _gamma(state, name, relation, training)
    return _aggregate(weight.reshape(len(weight), -1, keys.shape[2], keys.shape[3]), values)


def _gamma(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    hidden = _linear(state, f"{name}conv_w.2", F.relu(_norm(state, f"{name}conv_w.0", x, training)))
    return _linear(state, f"{name}conv_w.5", F.relu(_norm(state, f"{name}conv_w.3", hidden, training)))


def _aggregate(weight: Tensor, values: Tensor) -> Tensor:
    """weight [B, G, K, P], values [B, C, K, P] → [B, C, P]; channel c uses weight group c mod G."""
    channels = [(weight[:, c % weight.shape[1]] * values[:, c]).sum(1) for c in range(values.shape[1])]
    return torch.stack(channels, dim=1)


def _places(x: Tensor, kernel: int) -> Tensor:
    """Every pixel's k×k window, mirrored at the border: [B, C, H, W] → [B, C, K, P]."""
    columns = F.unfold(_mirrored(_mirrored(x, kernel // 2).mT, kernel // 2).mT, kernel)
    return columns.unflatten(1, (x.shape[1], kernel * kernel))


def _mirrored(x: Tensor, padding: int) -> Tensor:
    """Longer by `padding` on both sides of the last axis; torch mirrors at most n − 1 pixels at a time."""
    if x.shape[-1] == 1:
        return x.expand(*x.shape[:-1], 1 + 2 * padding)
    while padding:
        step = min(padding, x.shape[-1] - 1)
        x = F.pad(x, [step, step, 0, 0], mode="reflect")
        padding -= step
    return x


def _line(length: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, length, dtype=like.dtype)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _norm(state: State, name: str, x: Tensor, training: bool) -> Tensor:
    mean, variance, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, variance, weight, bias, training, 0.1, 1e-5)


def randomised(state: State) -> State:
    """A state dict whose every tensor is random, at sizes that keep activations finite; float32 values in float64."""
    generator = torch.Generator().manual_seed(1)
    return {key: _random(key, value, generator) for key, value in state.items()}


def _random(key: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return torch.randint(1, 1000, value.shape, generator=generator)
    noise = torch.randn(value.shape, generator=generator)
    if value.dim() > 1:
        noise /= 2 * value[0].numel() ** 0.5
    elif key.endswith(("running_var", "weight")):
        noise = 0.5 + noise.abs()
    else:
        noise /= 10
    return noise.double()

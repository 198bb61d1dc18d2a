"""Attention in place of the 3×3 convolutions of a network that was built elsewhere.

A layer of attention takes and gives what the convolution took and gave, so nothing around it has to change, and the
weights around it stay what they were trained to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from itertools import accumulate
from math import gcd
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import nn

from san.errors import UserError
from san.layers import ATTENTIONS
from san.models import list_models

__all__ = ["replace_convolutions"]

Layers = str | Sequence[str] | Callable[[str, nn.Conv2d], bool]
_ANY_ATTENTION = tuple(ATTENTIONS.values())


def replace_convolutions(
    model: nn.Module,
    layers: Layers = "*",
    form: str = "pairwise",
    *,
    kernel_size: int = 3,
    relation_reduction: int = 16,
    **options: Any,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Replace 3×3 convolutions by attention, in place; return the model and the new layers by their names.

    A new layer has the convolution's input and output channels, stride, dilation, device, dtype, memory format and
    training mode. Its weights are fresh, PyTorch's defaults, and take gradients. Every other weight stays as it is,
    bit for bit. A convolution that stands in several of the chosen places gives way to one layer in all of them. Hooks
    on a replaced convolution, and what its kind does to its weight, go with it. Attention that is there already is left
    alone, so a second call changes nothing. Where any layer does not fit, nothing is replaced.

    A network of `san.create_model` can then no longer be written by `save_model`; its state dict can.

    Args:
        model: Any network; if it is a convolution itself, the new layer is returned in its place.
        layers: Names of convolutions or of what they lie in, such as "layer3", or glob patterns of such names, such as
            "layer[34].*.conv2", where * also matches dots; or a function of name and convolution that says whether to
            replace it. Of what they name, convolutions of other sizes than 3×3 are left alone.
        form: pairwise, patchwise or scalar.
        kernel_size: k of the new layers' footprint; odd.
        relation_reduction: Query and key have in_channels / relation_reduction channels, at least 1.
        options: What the layers take besides: relation, mapping, position, transformations, share, border; see
            `san.PairwiseAttention`. Borders are reflected unless given, whatever the convolution's padding holds.

    Raises:
        UserError: Nothing is found by a name, a chosen convolution is grouped, does not keep the map's size or has
            other strides or dilations down and across, `share` does not divide its out_channels, or an option is wrong.
    """
    _check_options(form, relation_reduction, options)
    chosen = _chosen(model, layers)
    _check_geometry(model, chosen)
    _check_share(form, chosen, options)
    made = {
        convolution: _attention(form, convolution, kernel_size, relation_reduction, options)
        for convolution in dict.fromkeys(chosen.values())
    }
    replaced = {name: made[convolution] for name, convolution in chosen.items()}
    for name, layer in replaced.items():
        if name == "":
            return layer, replaced
        model.set_submodule(name, layer)
    # By its name and options alone the network could no longer be built again.
    if replaced and getattr(model, "architecture", None) in list_models():
        del model.architecture
    return model, replaced


def _check_options(form: str, relation_reduction: int, options: dict[str, Any]) -> None:
    if form not in ATTENTIONS:
        raise UserError(f"form {form!r} is unknown; choose one of: {', '.join(ATTENTIONS)}")
    if relation_reduction < 1:
        raise UserError(f"relation_reduction is {relation_reduction}, but it must be at least 1")
    parameters = signature(ATTENTIONS[form]).parameters.values()
    keywords = [each.name for each in parameters if each.kind is Parameter.KEYWORD_ONLY]
    known = ["kernel_size", "relation_reduction", *(name for name in keywords if name != "relation_channels")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"{form} attention has no option {unknown[0]!r} here; choose among: {', '.join(known)}")


def _candidates(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The 3×3 convolutions outside attention, by every name that they have."""
    named = list(model.named_modules(remove_duplicate=False))
    attention = tuple(f"{name}." for name, part in named if isinstance(part, _ANY_ATTENTION))
    return {
        name: part
        for name, part in named
        if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3) and not name.startswith(attention)
    }


def _chosen(model: nn.Module, layers: Layers) -> dict[str, nn.Conv2d]:
    candidates = _candidates(model)
    attention = [name for name, part in model.named_modules() if isinstance(part, _ANY_ATTENTION)]
    if not candidates and not attention:
        raise UserError("the network has no 3×3 convolution that attention could replace")
    if callable(layers):
        return {name: part for name, part in candidates.items() if layers(name, part)}
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in [*candidates, *attention]):
            raise UserError(_not_found(model, pattern, list(candidates)))
    return {name: part for name, part in candidates.items() if any(_matches(name, pattern) for pattern in patterns)}


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name, or the name of something that it lies in."""
    containers = accumulate(name.split("."), "{}.{}".format)
    return any(fnmatchcase(each, pattern) for each in containers)


def _not_found(model: nn.Module, pattern: str, candidates: list[str]) -> str:
    part: Any = dict(model.named_modules()).get(pattern)
    if isinstance(part, nn.Conv2d):
        size = "×".join(map(str, part.kernel_size))
        return f"{pattern} is a {size} convolution, but only 3×3 ones are replaced; {_offer(candidates)}"
    return f"nothing that {pattern!r} names is or holds a 3×3 convolution; {_offer(candidates)}"


def _offer(names: list[str]) -> str:
    return f"choose among: {', '.join(names)}" if names else "there is none that fits"


def _check_geometry(model: nn.Module, chosen: dict[str, nn.Conv2d]) -> None:
    for name, convolution in chosen.items():
        problem = _problem(convolution)
        if problem:
            others = [other for other, part in _candidates(model).items() if _problem(part) is None]
            raise UserError(f"{name or 'the convolution'} {problem}; {_offer(others)}")


def _problem(convolution: nn.Conv2d) -> str | None:
    """What attention has no counterpart of."""
    if convolution.in_channels < 1:
        return "does not know its channels before its first input"
    if convolution.groups > 1:
        return f"has {convolution.groups} groups, but attention takes all channels together"
    for what in ("stride", "dilation"):
        down, across = getattr(convolution, what)
        if down != across:
            return f"has {what} {down} down and {across} across, but attention has one for both"
    if not _keeps_size(convolution):
        return (
            f"has padding {convolution.padding}, but attention gives the size that padding {convolution.dilation} gives"
        )
    return None


def _keeps_size(convolution: nn.Conv2d) -> bool:
    """Whether the output has ⌈H/stride⌉ rows."""
    # timm's "same" padding is found when the layer runs.
    same = isinstance(convolution, Conv2dSame) or getattr(convolution, "same_pad", False)
    return same or convolution.padding in ("same", convolution.dilation)


def _check_share(form: str, chosen: dict[str, nn.Conv2d], options: dict[str, Any]) -> None:
    parameter = signature(ATTENTIONS[form]).parameters.get("share")
    if parameter is None or not chosen:
        return
    share = options.get("share", parameter.default)
    common = gcd(*(convolution.out_channels for convolution in chosen.values()))
    if share < 1 or common % share:
        name = next((name for name, part in chosen.items() if share < 1 or part.out_channels % share), "")
        divisors = [str(number) for number in range(1, min(common, 64) + 1) if common % number == 0]
        raise UserError(
            f"share is {share}, but it must divide out_channels, which is {chosen[name].out_channels} in "
            f"{name or 'the convolution'}; for the chosen layers choose among: {', '.join(divisors)}"
        )


def _attention(
    form: str, convolution: nn.Conv2d, kernel_size: int, relation_reduction: int, options: dict[str, Any]
) -> nn.Module:
    """The layer that stands where the convolution stood."""
    weight = convolution.weight
    with torch.device(weight.device):
        layer = ATTENTIONS[form](
            convolution.in_channels,
            convolution.out_channels,
            kernel_size,
            convolution.stride[0],
            convolution.dilation[0],
            relation_channels=max(convolution.in_channels // relation_reduction, 1),
            **options,
        )
    layer = layer.to(weight.dtype).train(convolution.training)
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return layer.to(memory_format=torch.channels_last) if channels_last else layer

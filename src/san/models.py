"""The paper's networks and their ResNet baselines, built by name; importing this module registers them with timm.

Parameter names are the authors': conv_in, bn_in, then conv{s}, layer{s}, bn{s} for each stage s, and fc. timm's protocol
(features_only, forward_intermediates, reset_classifier, gradient checkpointing, …) holds for all of them.
Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from san.errors import UserError
from san.layers import ATTENTIONS, SelfAttentionBlock
from san.weights import read_weights

__all__ = ["SAN", "create_model", "list_models", "load_weights"]

_STEM_WIDTH = 64


class SAN(nn.Module):
    """Self-attention network: a pointwise stem, then stages of MaxPool → Conv1×1 → self-attention blocks → BN·ReLU (§4.2).

    [B, in_chans, H, W] → [B, num_classes]; any H, W that survive the poolings. `blocks`, `widths` and `kernels` have one
    entry a stage; `pools` says which stages halve the map and defaults to all, or, with `small_images`, to all but the
    first two. `attention` is pairwise, patchwise or scalar; `attention_options` (relation, mapping, position,
    transformations, share, border, value_reduction, relation_reduction) go to every block. `drop_path_rate` grows
    linearly over the blocks; `drop_rate` is dropout before the classifier; both are 0 in the paper.

    Initialisation is PyTorch's defaults, as the authors'. Raises `UserError` for options that do not fit.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (2, 1, 2, 4, 1),
        widths: Sequence[int] = (64, 256, 512, 1024, 2048),
        kernels: Sequence[int] = (3, 7, 7, 7, 7),
        attention: str = "pairwise",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        small_images: bool = False,
        pools: Sequence[bool] | None = None,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        stages = len(blocks)
        pools = [not small_images or stage >= 2 for stage in range(stages)] if pools is None else list(pools)
        if not len(widths) == len(kernels) == len(pools) == stages:
            raise UserError(
                f"blocks, widths, kernels and pools must have one entry a stage, but they have "
                f"{stages}, {len(widths)}, {len(kernels)} and {len(pools)}"
            )
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.pools = pools
        self.feature_info: list[dict[str, Any]] = []
        self.conv_in = nn.Conv2d(in_chans, _STEM_WIDTH, 1, bias=False)
        self.bn_in = nn.BatchNorm2d(_STEM_WIDTH)
        rates = calculate_drop_path_rates(drop_path_rate, list(blocks), stagewise=True)
        for stage in range(stages):
            self._add_stage(stage, widths, kernels[stage], attention, rates[stage], attention_options)
        self.num_features = self.head_hidden_size = widths[-1]
        self.global_pool, self.fc = create_classifier(widths[-1], num_classes, pool_type=global_pool)

    def _add_stage(
        self,
        stage: int,
        widths: Sequence[int],
        kernel_size: int,
        attention: str,
        rates: Sequence[float],
        options: dict[str, Any],
    ) -> None:
        before = widths[stage - 1] if stage else _STEM_WIDTH
        width = widths[stage]
        self.add_module(f"conv{stage}", nn.Conv2d(before, width, 1, bias=False))
        layer = [SelfAttentionBlock(width, kernel_size, attention, drop_path=rate, **options) for rate in rates]
        self.add_module(f"layer{stage}", nn.Sequential(*layer))
        self.add_module(f"bn{stage}", nn.BatchNorm2d(width))
        reduction = 2 ** sum(self.pools[: stage + 1])
        self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"bn{stage}"})

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        if self.pools[stage]:
            x = F.max_pool2d(x, 2)
        x = self.get_submodule(f"conv{stage}")(x)
        layer = self.get_submodule(f"layer{stage}")
        recompute = self.grad_checkpointing and not torch.jit.is_scripting()
        x = checkpoint_seq(layer, x) if recompute else layer(x)
        return F.relu(self.get_submodule(f"bn{stage}")(x))

    def _stem(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise UserError(f"the network takes [B, {self.in_chans}, H, W], but the input is {list(x.shape)}")
        if min(x.shape[2:]) < self.feature_info[-1]["reduction"]:
            raise UserError(
                f"the input is {x.shape[2]}×{x.shape[3]}, but the network halves it to nothing below "
                f"{self.feature_info[-1]['reduction']} pixels; use small_images=True or larger images"
            )
        return F.relu(self.bn_in(self.conv_in(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] → the last stage's map [B, C, H/32, W/32]."""
        x = self._stem(x)
        for stage in range(len(self.feature_info)):
            x = self._stage(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the last map and, unless `pre_logits`, classify it."""
        x = self.global_pool(x)
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] → logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps after the chosen stages (all for None, the last n for an int), and the last map unless only those.

        `norm` changes nothing: every stage ends in BatchNorm. `stop_early` skips stages that nothing needs.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt is {output_fmt!r}, but maps come as NCHW only")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self._stem(x)
        found = []
        for stage in range(last + 1 if stop_early else len(self.feature_info)):
            x = self._stage(stage, x)
            if stage in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one that `indices` names, and the classifier; return the indices."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        for stage in range(last + 1, len(self.feature_info)):
            for part in ("conv", "layer", "bn"):
                delattr(self, f"{part}{stage}")
        del self.feature_info[last + 1 :], self.pools[last + 1 :]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping what they computed."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` (0: none), and the pooling if given ("" : none)."""
        self.num_classes = num_classes
        kind = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=kind)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameter names group into stem and blocks, for layer-wise learning rates."""
        stage = r"^(?:conv|layer|bn)(\d+)"
        blocks = stage if coarse else [(r"^layer(\d+)\.(\d+)", None), (stage, (0,))]
        return {"stem": r"^(?:conv|bn)_in", "blocks": blocks}


_BLOCKS = {"san10": (2, 1, 2, 4, 1), "san15": (3, 2, 3, 5, 2), "san19": (3, 3, 4, 6, 3)}
_SMALL = {"blocks": (1, 2, 1), "widths": (64, 128, 256), "kernels": (3, 5, 5)}
_BASELINES = {"26": (1, 2, 4, 1), "38": (2, 3, 5, 2), "50": (3, 4, 6, 3)}


def _create_san(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
    size, attention = variant.split("_")
    defaults = _SMALL if size == "san4" else {"blocks": _BLOCKS[size]}
    arguments = {"attention": attention, **defaults, **options}
    model = build_model_with_cfg(
        SAN, variant, pretrained, feature_cfg={"feature_cls": "getter", "out_indices": _stages(arguments)}, **arguments
    )
    return _remember(model, variant, options)


def _stages(arguments: dict[str, Any]) -> tuple[int, ...]:
    return tuple(range(len(arguments["blocks"])))


def _create_baseline(variant: str, pretrained: bool = False, small_images: bool = False, **options: Any) -> nn.Module:
    arguments = {"block": Bottleneck, "layers": _BASELINES[variant[-2:]], "zero_init_last": False, **options}
    builder = _small_resnet if small_images else ResNet
    model = build_model_with_cfg(builder, variant, pretrained, **arguments)
    return _remember(model, variant, {"small_images": small_images, **options} if small_images else options)


def _small_resnet(**arguments: Any) -> ResNet:
    """ResNet without its first two halvings, for images of 28 to 64 pixels."""
    model = ResNet(**arguments)
    model.conv1.stride = (1, 1)
    model.maxpool = nn.Identity()
    for info, factor in zip(model.feature_info, (2, 4, 4, 4, 4), strict=True):
        info["reduction"] //= factor
    return model


def _remember(model: nn.Module, architecture: str, options: dict[str, Any]) -> nn.Module:
    """Note on the model how to build it again, for checkpoints."""
    own = {"num_classes", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only", "out_indices"}
    model.architecture = architecture  # ty: ignore[unresolved-attribute]
    model.options = {name: value for name, value in options.items() if name not in own}  # ty: ignore[unresolved-attribute]
    return model


def _default_cfg(variant: str) -> dict[str, Any]:
    resnet = variant.startswith("baseline")
    side = 28 if variant.startswith("san4") else 224
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (3, 3) if side == 28 else (7, 7),
        "crop_pct": 1.0 if side == 28 else 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1" if resnet else "conv_in",
        "classifier": "fc",
        "paper_ids": ["arXiv:1512.03385" if resnet else "arXiv:2004.13621"],
    }


_SANS = [f"{size}_{form}" for size in ("san4", *_BLOCKS) for form in ("pairwise", "patchwise")]
default_cfgs = {name: _default_cfg(name) for name in (*_SANS, *(f"baseline_resnet{n}" for n in _BASELINES))}


def _entry_point(name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The function that timm's registry wants for a name."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return build(name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build {name}; see `san.create_model`."
    return create


for _name in default_cfgs:
    register_model(_entry_point(_name, _create_san if _name in _SANS else _create_baseline))
    __all__.remove(_name)


def list_models() -> list[str]:
    """Names that `create_model` knows: san{4,10,15,19}_{pairwise,patchwise} and baseline_resnet{26,38,50}."""
    return list(default_cfgs)


def create_model(
    name: str, num_classes: int = 1000, checkpoint: str | Path | None = None, **options: Any
) -> nn.Module:
    """Build a network by name, in training mode, in float32 on the CPU; with `checkpoint`, load its weights.

    `name` is one of `list_models()`, or what timm loads from a hub or a folder: "hf-hub:owner/model", "local-dir:path".
    `checkpoint` is a run folder, a safetensors file of ours or a published `.pth`; its network and number of classes must
    be these. `options` for SANs: attention, relation, mapping, position, transformations, share, border, kernels, blocks,
    widths, value_reduction, relation_reduction, small_images, in_chans, drop_rate, drop_path_rate; for the
    baselines: small_images and what timm's `ResNet` takes.

    Raises `UserError` for an unknown name or option, or a checkpoint that does not fit.
    """
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return timm.create_model(name, pretrained=True, **options)
    if name not in default_cfgs:
        near = difflib.get_close_matches(name, default_cfgs, 1, 0.0)[0]
        raise UserError(f"model {name!r} is unknown, did you mean {near}? Choose one of: {', '.join(default_cfgs)}")
    try:
        model = timm.create_model(name, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"{name} cannot be built with these options: {error}") from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the weights of a file into a model of the same shape; `UserError` says what differs."""
    found = read_weights(checkpoint).tensors
    expected = model.state_dict()
    missing = [key for key in expected if key not in found]
    foreign = [key for key in found if key not in expected]
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which the network lacks"
        raise UserError(f"{checkpoint} is not a checkpoint of this network: it {what}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"{checkpoint} does not fit: {key} is {list(tensor.shape)} there and {list(expected[key].shape)} in the "
                "network; check the name, num_classes and options"
            )
    model.load_state_dict(found)

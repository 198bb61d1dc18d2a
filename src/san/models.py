"""The paper's networks and their ResNet baselines, built by name; importing this module registers them with timm.

Parameter names are the authors': conv_in, bn_in, then conv{s}, layer{s}, bn{s} for each stage s, and fc. timm's
protocol (features_only, forward_intermediates, reset_classifier, gradient checkpointing, …) holds for all of them.
torch.compile, torch.export and torch.jit.trace take the networks; torch.jit.script and torch.fx do not follow them.
Legend: B batch, C channels, H W map.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from inspect import signature
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from san import fused
from san.errors import UserError
from san.layers import ATTENTIONS, SelfAttentionBlock
from san.ops.dispatch import forced_backend, use_backend
from san.weights import NETWORKS, PREPROCESSING, Weights, read_weights

__all__ = ["SAN", "build_model", "check_weights", "create_model", "list_models", "load_weights", "outline"]

_STEM_WIDTH = 64


class SAN(nn.Module):
    """Self-attention network (§4.2): pointwise stem, then stages of MaxPool → Conv1×1 → attention blocks → BN·ReLU.

    [B, in_chans, H, W] → [B, num_classes]; any H, W that survive the poolings. `blocks`, `widths` and `kernels` have
    one entry a stage; `pools` says which stages halve the map and defaults to all, or, with `small_images`, to all but
    the first two. `attention` is pairwise, patchwise or scalar; `attention_options` go to every block: relation,
    mapping, position, transformations, share, border, dilation, value_reduction, relation_reduction. `drop_path_rate`
    grows linearly over the blocks; `drop_rate` is dropout before the classifier; both are 0 in the paper.

    Initialisation is PyTorch's defaults, as the authors'. Raises `UserError` for options that do not fit.
    """

    def __init__(
        self,
        blocks: Sequence[int] = NETWORKS["san10"]["blocks"],
        widths: Sequence[int] = NETWORKS["san10"]["widths"],
        kernels: Sequence[int] = NETWORKS["san10"]["kernels"],
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
        usual = [not small_images or stage >= 2 for stage in range(len(blocks))]
        self.pools = [bool(pool) for pool in (usual if pools is None else pools)]
        _check_stages(blocks, widths, kernels, self.pools)
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []
        self.conv_in = nn.Conv2d(in_chans, _STEM_WIDTH, 1, bias=False)
        self.bn_in = nn.BatchNorm2d(_STEM_WIDTH)
        step = drop_path_rate / max(sum(blocks) - 1, 1)
        for stage in range(len(blocks)):
            before = sum(blocks[:stage])
            rates = [step * (before + block) for block in range(blocks[stage])]
            self._add_stage(stage, widths, kernels[stage], attention, rates, attention_options)
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
        return F.relu(self.get_submodule(f"bn{stage}")(self._layer(stage, x)))

    def _layer(self, stage: int, x: Tensor) -> Tensor:
        layer = self.get_submodule(f"layer{stage}")
        if not self.grad_checkpointing:
            return layer(x)
        for block in fused.blocks_of(layer) or [layer]:
            x = _recomputed(block, x)
        return x

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise UserError(f"the network takes [B, {self.in_chans}, H, W], but the input is {list(x.shape)}")
        smallest = self.feature_info[-1]["reduction"]
        if min(x.shape[2:]) < smallest:
            raise UserError(
                f"the input is {x.shape[2]}×{x.shape[3]}, but the poolings need at least {smallest}×{smallest} pixels; "
                "give larger images or build it with small_images=True"
            )

    def _stem(self, x: Tensor) -> Tensor:
        self._check_input(x)
        return F.relu(self.bn_in(self.conv_in(x)))

    def _stages(self) -> list[fused.Stage]:
        parts: Any = self._modules
        return [
            fused.Stage(pooled, parts[f"conv{stage}"], fused.blocks_of(parts[f"layer{stage}"]), parts[f"bn{stage}"])
            for stage, pooled in enumerate(self.pools)
        ]

    def _fused_features(self, x: Tensor) -> Tensor:
        """The same as stem and stages, where a stage's end, the pooling and the next stage's begin are one product."""
        x = fused.stem(self.conv_in, self.bn_in, self.conv0, x, pooled=self.pools[0])
        for stage, pool in enumerate([*self.pools[1:], False]):
            blocks = None if self.grad_checkpointing else fused.blocks_of(self.get_submodule(f"layer{stage}"))
            x = (
                self._layer(stage, x)
                if blocks is None
                else reduce(lambda y, block: fused.on_own_map(block, y), blocks, x)
            )
            norm: Any = self._modules[f"bn{stage}"]
            following = self._modules.get(f"conv{stage + 1}")
            x = F.relu(norm(x)) if following is None else fused.norm_pool_linear(norm, following, x, pooled=pool)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] → the last stage's map [B, C, H/32, W/32]."""
        if fused.suits(x) and fused.takes_stem(self.conv_in, self.bn_in, x):
            self._check_input(x)
            y = fused.stages_without_gradients(self, self.conv_in, self.bn_in, self._stages(), x.contiguous())
            if y is not None:
                return F.relu(self.get_submodule(f"bn{len(self.pools) - 1}")(y))
            return self._fused_features(x.contiguous())
        if fused.gpu.suits(x):
            self._check_input(x)
            return self._fused_features(x)
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
        """Drop the stages behind the last one that `indices` names, and the classifier; return the indices.

        `prune_norm` changes nothing: every stage ends in BatchNorm.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        for stage in range(last + 1, len(self.feature_info)):
            for part in ("conv", "layer", "bn"):
                delattr(self, f"{part}{stage}")
        del self.feature_info[last + 1 :], self.pools[last + 1 :]
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping what they computed; running averages still move once."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` (0: none), and the pooling if given ("": none)."""
        self.num_classes = num_classes
        kind = self.global_pool.pool_type if global_pool is None else global_pool
        pool, classifier = create_classifier(self.num_features, num_classes, pool_type=kind)
        self.global_pool, self.fc = pool.train(self.training), classifier.train(self.training).to(self.conv_in.weight)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How parameter names group into stem and stages, or blocks unless `coarse`, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^(?:conv|bn)_in", "blocks": r"^(?:conv|layer|bn)(\d+)"}
        # A stage's convolution goes with its first block, its BatchNorm with its last (timm's sign for "as before").
        ends = [(r"^conv(\d+)", (0,)), (r"^bn(\d+)", (99999,))]
        return {"stem": r"^(?:conv|bn)_in", "blocks": [(r"^layer(\d+)\.(\d+)", None), *ends]}


def _check_stages(blocks: Sequence[int], widths: Sequence[int], kernels: Sequence[int], pools: Sequence[bool]) -> None:
    if not len(blocks) == len(widths) == len(kernels) == len(pools) > 0:
        raise UserError(
            "blocks, widths, kernels and pools must have one entry a stage, but they have "
            f"{len(blocks)}, {len(widths)}, {len(kernels)} and {len(pools)}"
        )
    if min(blocks) < 0 or min(widths) < 1:
        raise UserError(f"blocks are {list(blocks)} and widths {list(widths)}, but they must be at least 0 and 1")


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x) that keeps x alone for backward."""
    # Compiled code moves running averages once by itself, and takes no contexts.
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=partial(_checkpoint_contexts, block))


def _checkpoint_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _recomputing(block, forced_backend())


@contextmanager
def _recomputing(block: nn.Module, backend: str) -> Generator[None]:
    """Inside, `backend` is forced, and BatchNorm's running averages stay as they are.

    Another backend would keep other tensors than the forward's did, and recomputing must not move averages again.
    """
    norms: list[Any] = [part for part in block.modules() if getattr(part, "running_mean", None) is not None]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    # Without averages BatchNorm would keep other tensors than in the forward, which checkpointing refuses.
    for norm in norms:
        norm.momentum = 0.0
    try:
        with use_backend(backend):
            yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


_BASELINES = {"26": (1, 2, 4, 1), "38": (2, 3, 5, 2), "50": (3, 4, 6, 3)}


def _create_san(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
    size, attention = variant.split("_")
    arguments: dict[str, Any] = {"attention": attention, **NETWORKS[size], **options}
    if "pools" not in options and (options.get("small_images") or "blocks" in options):
        arguments.pop("pools", None)
    features = {"feature_cls": "getter", "out_indices": tuple(range(len(arguments["blocks"])))}
    model = build_model_with_cfg(SAN, variant, pretrained, feature_cfg=features, **arguments)
    return _remember(model, variant, options)


def _create_baseline(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
    arguments: dict[str, Any] = {
        "block": Bottleneck,
        "layers": _BASELINES[variant[-2:]],
        "zero_init_last": False,
        **options,
    }
    builder = _small_resnet if arguments.pop("small_images", False) else ResNet
    return _remember(build_model_with_cfg(builder, variant, pretrained, **arguments), variant, options)


def _small_resnet(**arguments: Any) -> ResNet:
    """ResNet without its first two halvings, for images of 28 to 64 pixels."""
    model: Any = ResNet(**arguments)
    if not isinstance(model.conv1, nn.Conv2d):
        raise UserError("small_images goes with the plain stem only; leave out stem_type")
    model.conv1.stride = (1, 1)
    model.maxpool = nn.Identity()
    for place, info in enumerate(model.feature_info):
        info["reduction"] //= 4 if place else 2
    return model


def _remember(model: nn.Module, architecture: str, options: dict[str, Any]) -> nn.Module:
    """Note on the model how to build it again and, in `pretrained_cfg`, what travels with it."""
    if options.get("features_only"):
        return model
    remembered: Any = model
    remembered.architecture = architecture
    remembered.options = {name: options[name] for name in _option_names(architecture) if name in options}
    carried, names = remembered.pretrained_cfg, remembered.pretrained_cfg.get("label_names")
    # Read from JSON, tuples are lists.
    carried.update({key: tuple(value) for key, value in carried.items() if isinstance(value, list)})
    carried["input_size"] = (options.get("in_chans", 3), *carried["input_size"][1:])
    carried["label_names"] = list(names) if names and len(names) == remembered.num_classes else None
    return model


def _default_cfg(variant: str) -> dict[str, Any]:
    resnet = variant.startswith("baseline")
    side = 28 if variant.startswith("san4") else 224
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (7, 7),
        "crop_pct": 1.0 if side == 28 else 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1" if resnet else "conv_in",
        "classifier": "fc",
        "paper_ids": ["arXiv:1512.03385" if resnet else "arXiv:2004.13621"],
    }


_SANS = [f"{size}_{form}" for size in NETWORKS for form in ("pairwise", "patchwise")]
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


_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")


def create_model(name: str, num_classes: int = 1000, checkpoint: str | Path | None = None, **options: Any) -> nn.Module:
    """Build a network by name, in training mode, in float32 on the CPU; with `checkpoint`, load its weights.

    `name` is one of `list_models()`, or what timm loads from a hub or a folder, "hf-hub:owner/model" or
    "local-dir:path"; there, 1000 leaves the number of classes as published, and another number makes a new classifier.
    `checkpoint` is a run folder, a safetensors file of ours or a published `.pth`. Its network and number of classes
    must be these; options, preprocessing and class names that it carries hold where `options` does not give others.

    `options` for SANs: attention, relation, mapping, position, transformations, share, border, dilation, kernels,
    blocks, widths, pools, value_reduction, relation_reduction, small_images, in_chans, drop_rate, drop_path_rate,
    global_pool; for the baselines: small_images and what timm's `ResNet` takes, such as layers and channels for
    a smaller one; for both features_only, out_indices.

    The model carries `architecture`, `options`, `num_classes`, and in `pretrained_cfg` preprocessing and class names.
    Raises `UserError` for an unknown name or option, or a checkpoint that does not fit.
    """
    weights = None if checkpoint is None else read_weights(checkpoint)
    if name.startswith(_HUBS):
        model = _from_hub(name, num_classes, options)
    else:
        options = {**_stored_options(name, weights), **options}
        if weights is not None:
            check_weights(outline(name, num_classes, options, weights), weights)
        model = build_model(name, num_classes, options)
    if weights is not None:
        load_weights(model, weights)
    return model


def build_model(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """`create_model` without weights and for names of `list_models()` only: what a file may ask for.

    Raises `UserError` for an unknown name or option, or options that do not fit.
    """
    if name not in default_cfgs:
        near = difflib.get_close_matches(name, default_cfgs, 1, 0.0)[0]
        raise UserError(f"model {name!r} is unknown (the nearest is {near}); choose one of: {', '.join(default_cfgs)}")
    # timm takes options of its own beside these, and some would make it read other files.
    known = [*_option_names(name), "features_only", "out_indices"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(f"{name} has no option {unknown[0]!r}; choose among: {', '.join(known)}")
    _check_rates(options)
    try:
        return timm.create_model(name, num_classes=num_classes, **options)
    except UserError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be built with {options}: {' '.join(str(error).split())}") from error


def _check_rates(options: dict[str, Any]) -> None:
    for option, rate in options.items():
        if option.endswith("_rate") and not (isinstance(rate, int | float) and 0 <= rate <= 1):
            raise UserError(f"{option} is {rate!r}, but it must be a number from 0 to 1")


def outline(name: str, num_classes: int, options: dict[str, Any], weights: Weights) -> nn.Module:
    """`build_model` without memory for tensors, so that numbers from a file cost nothing until `check_weights` passes.

    Raises `UserError` as `build_model`, and for more stages and blocks than there are tensors in `weights`.
    """
    for option in ("blocks", "layers"):
        counts = options.get(option, ())
        # Other values than these `build_model` refuses.
        plain = isinstance(counts, list | tuple) and all(isinstance(count, int) for count in counts)
        if plain and sum(1 + abs(count) for count in counts) > len(weights.tensors):
            raise UserError(f"{option} are more than the {len(weights.tensors)} tensors of {weights.source} can fill")
    with torch.device("meta"):
        return build_model(name, num_classes, options)


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Compare names and shapes of a checkpoint's tensors with a model's; raise `UserError` that says what differs."""
    found, expected = weights.tensors, model.state_dict()
    missing = [key for key in expected if key not in found]
    foreign = [key for key in found if key not in expected]
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which the network lacks"
        raise UserError(f"{weights.source} is not a checkpoint of this network: it {what}")
    for key, tensor in expected.items():
        if tensor.shape != found[key].shape:
            advice = "load it as it is and call reset_classifier" if key.startswith("fc.") else "check name and options"
            raise UserError(
                f"{weights.source} does not fit: {key} is {list(found[key].shape)} there and {list(tensor.shape)} "
                f"in the network; {advice}"
            )


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Load a checkpoint into a model of the same shape, with the preprocessing and class names that it carries.

    Raises `UserError` that says what differs.
    """
    check_weights(model, weights)
    model.load_state_dict(weights.tensors)
    metadata = weights.metadata or {"preprocessing": {}, "label_names": None}
    stored = {key: metadata["preprocessing"].get(key) for key in PREPROCESSING}
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items() if value}
    cast("dict[str, Any]", model.pretrained_cfg).update(
        known, num_classes=model.num_classes, label_names=metadata["label_names"]
    )


def _stored_options(name: str, weights: Weights | None) -> dict[str, Any]:
    """Options that a file of ours was built with."""
    if weights is None or weights.metadata is None:
        return {}
    if weights.metadata["architecture"] != name:
        raise UserError(f"{weights.source} holds a {weights.metadata['architecture']}, not a {name}")
    return weights.metadata["options"]


def _option_names(name: str) -> list[str]:
    """What `create_model` takes for a name beside the number of classes, from the signatures that take it."""
    san = name in _SANS
    takers = (SAN, SelfAttentionBlock, *ATTENTIONS.values()) if san else (ResNet,)
    taken = [parameter for taker in takers for parameter in signature(taker).parameters.values()]
    names = dict.fromkeys(each.name for each in taken if each.kind is not each.VAR_KEYWORD)
    # What the name, or the place in the network, decides.
    decided = {"num_classes", "block", "device", "dtype"}
    if san:
        decided |= {
            "channels",
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "relation_channels",
            "drop_path",
        }
    return [each for each in names | {"small_images": None} if each not in decided]


def _from_hub(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    given = options if num_classes == 1000 else {"num_classes": num_classes, **options}
    try:
        model = timm.create_model(name, pretrained=True, **given)
    # What a missing, unreachable or foreign repository raises is up to timm and the hub's client.
    except Exception as error:
        raise UserError(f"{name} cannot be loaded: {' '.join(str(error).split())}") from error
    if not hasattr(model, "architecture") and not options.get("features_only"):
        raise UserError(f"{name} holds a {type(model).__name__} of timm's, not one of: {', '.join(default_cfgs)}")
    return model

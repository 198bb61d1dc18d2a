"""Fused blocks and networks against the plain path: the same numbers, the same side effects, and only where they may.

The reference backend runs the modules' own `forward`; in float64 it is the truth for values and gradients.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import san
from san import fused
from san.errors import UserError
from san.fused.recordings import Recordings
from san.layers import ATTENTIONS, SelfAttentionBlock
from san.models import SAN
from san.ops import Footprint, use_backend
from san.ops.kernels.native import library
from san.ops.normalization import synchronize_batch_norm
from san.ops.relations import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not installed")


def randomised(module: nn.Module) -> Any:
    """`module` with every BatchNorm tensor random: at its first values it hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if not isinstance(part, nn.BatchNorm2d):
            continue
        for tensor in (part.bias, part.running_mean):
            if tensor is not None:
                nn.init.normal_(tensor, generator=generator)
        for tensor in (part.weight, part.running_var):
            if tensor is not None:
                nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
    return module


def block_of(attention: str = "pairwise", channels: int = 32, kernel: int = 3, **options: Any) -> Any:
    return randomised(SelfAttentionBlock(channels, kernel, attention, **options))


def network_of(attention: str = "pairwise", blocks: tuple[int, ...] = (1, 2), **options: Any) -> Any:
    widths, kernels = (32, 64, 64)[: len(blocks)], (3, 5, 3)[: len(blocks)]
    return randomised(SAN(blocks, widths, kernels, attention, 5, **options))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


class Spy:
    """Counts the calls of the fused paths, which otherwise look like any other."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = dict.fromkeys(("attention_block", "stem", "norm_pool_linear"), 0)
        for name in self.calls:
            patch.setattr(fused, name, self._counted(name, getattr(fused, name)))
        patch.setattr(fused, "stages_without_gradients", self._counted_stages(fused.stages_without_gradients))

    def _counted(self, name: str, function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def counted(*arguments: Any, **options: Any) -> Tensor | None:
            found = function(*arguments, **options)
            self.calls[name] += found is not None
            return found

        return counted

    def _counted_stages(self, function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def counted(*arguments: Any) -> Tensor | None:
            found, stages = function(*arguments), arguments[3]
            if found is not None:
                self.calls["attention_block"] += sum(len(stage.blocks) for stage in stages)
                self.calls["stem"] += 1
                self.calls["norm_pool_linear"] += len(stages) - 1
            return found

        return counted

    def blocks(self) -> int:
        """Blocks fused since the last question."""
        found, self.calls["attention_block"] = self.calls["attention_block"], 0
        return found


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def outcome(module: nn.Module, x: Tensor, *, image_gradient: bool = True) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step of a copy of `module`."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_(image_gradient)
    y = module(x)
    if y.requires_grad:
        y.backward(images(*y.shape).to(y.dtype))
    gradients = {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
    found = {"y": y.detach(), "dx": x.grad, **gradients, **dict(module.named_buffers())}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 5e-5) -> None:
    """By norms; gradients that are zero in exact arithmetic are measured by the largest one."""
    assert found.keys() == expected.keys()
    yardstick = max((float(tensor.norm()) for name, tensor in expected.items() if name.startswith("d")), default=0.0)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        error = float((found[name].double() - tensor.double()).norm())
        floor = 5e-6 * yardstick if name.startswith("d") else 0.0
        assert error <= tolerance * float(tensor.double().norm()) + floor, (name, error, float(tensor.norm()))


def plain(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """`outcome` of the modules' own `forward`, in float64."""
    with use_backend("reference"):
        return outcome(copy.deepcopy(module).double(), x.double(), **options)


def plain_output(module: Any, x: Tensor) -> Tensor:
    with use_backend("reference"), torch.no_grad():
        return copy.deepcopy(module).double()(x.double())


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


BLOCKS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("pairwise", {}, (3, 7, 7)),
    ("pairwise", {"kernel": 7}, (1, 9, 13)),
    ("pairwise", {"relation": "dot", "mapping": "L", "position": "none"}, (2, 7, 7)),
    ("pairwise", {"relation": "concatenation", "mapping": "LRLRL", "position": "absolute"}, (1, 9, 13)),
    ("pairwise", {"relation": "summation", "transformations": "query=key", "border": "zeros"}, (3, 7, 7)),
    ("pairwise", {"relation": "hadamard", "dilation": 2, "share": 4}, (2, 7, 7)),
    ("pairwise", {"transformations": "query=key=value", "relation_reduction": 4}, (2, 9, 13)),
    ("patchwise", {}, (3, 7, 7)),
    ("patchwise", {"mapping": "L", "kernel": 5}, (1, 9, 13)),
    ("patchwise", {"mapping": "LRLRL", "transformations": "query=key"}, (2, 7, 7)),
    ("patchwise", {"transformations": "query=key=value", "relation_reduction": 4}, (2, 7, 7)),
    ("patchwise", {"relation": "star", "mapping": "L"}, (3, 7, 7)),
    ("patchwise", {"relation": "star", "mapping": "LRLRL", "border": "zeros"}, (1, 9, 13)),
    ("patchwise", {"relation": "clique"}, (2, 7, 7)),
    ("scalar", {}, (3, 7, 7)),
    ("scalar", {"transformations": "query=key", "kernel": 5}, (1, 9, 13)),
    ("scalar", {"transformations": "query=key=value", "relation_reduction": 4}, (2, 7, 7)),
]


def _set_norms(**values: Any) -> Callable[[nn.Module], Any]:
    def change(module: nn.Module) -> Any:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                vars(part).update(values)
        return module

    return change


def _without_averages(module: nn.Module) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
    return module


def _without_affine(module: nn.Module) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.affine, part.weight, part.bias = False, None, None
    return module


def _norms_in_eval(module: nn.Module) -> Any:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return module


NORMS: dict[str, Callable[[nn.Module], Any]] = {
    "averages over all batches": _set_norms(momentum=None),
    "other momentum": _set_norms(momentum=0.3),
    "no averages": _without_averages,
    "averages kept but not moved": _set_norms(track_running_stats=False),
    "not affine": _without_affine,
    "large eps": _set_norms(eps=0.1),
    "frozen statistics": _norms_in_eval,
}
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


@pytest.mark.parametrize(("attention", "options", "size"), BLOCKS, ids=str)
def test_block_is_its_definition(attention: str, options: dict[str, Any], size: tuple[int, int, int], spy: Spy):
    block, x = block_of(attention, **options), images(size[0], 32, *size[1:])
    for training in (True, False):
        assert_close(outcome(block.train(training), x), plain(block, x))
        assert spy.blocks() == 1
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same(block(x), plain_output(block, x))
        assert spy.blocks() == 1


@TRAINING
@pytest.mark.parametrize("change", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_options_of_batch_norm_hold(attention: str, change: Callable[..., Any], training: bool, spy: Spy):
    block = change(block_of(attention).train(training))
    x = images(3, 32, 7, 9)
    assert_close(outcome(block, x), plain(block, x))
    assert spy.blocks() == 1
    network = change(network_of(attention).train(training))
    assert_close(outcome(network, images(3, 3, 13, 18)), plain(network, images(3, 3, 13, 18)), 3e-4)


NETWORKS: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("pairwise", {}, (3, 13, 18)),
    ("patchwise", {}, (1, 13, 18)),
    ("scalar", {}, (2, 8, 12)),
    ("pairwise", {"small_images": True}, (2, 9, 7)),
    ("patchwise", {"pools": (False, True)}, (2, 9, 7)),
    ("patchwise", {"pools": (True, False), "in_chans": 1, "relation": "star"}, (2, 8, 12)),
    ("pairwise", {"in_chans": 4, "blocks": (0, 1, 1)}, (2, 16, 24)),
    ("patchwise", {"in_chans": 6}, (2, 8, 12)),
]


@pytest.mark.parametrize(("attention", "options", "size"), NETWORKS, ids=str)
def test_network_is_its_definition(attention: str, options: dict[str, Any], size: tuple[int, int, int], spy: Spy):
    network = network_of(attention, **options)
    channels = options.get("in_chans", 3)
    x, count = images(size[0], channels, *size[1:]), sum(options.get("blocks", (1, 2)))
    for training in (True, False):
        network.train(training)
        # Gradients of an image through a batch's statistics are the plain stem's.
        for image_gradient in (True, False):
            options = {"image_gradient": image_gradient}
            assert_close(outcome(network, x, **options), plain(network, x, **options), 2e-4)
            assert spy.blocks() == count
    assert (spy.calls["stem"] > 0) == (channels <= 4)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same(network(x), plain_output(network, x))
        assert spy.blocks() == count


# What must make a block step aside, and be honoured.


def _hook(path: str, register: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        getattr(block.get_submodule(path), f"register_{register}")(lambda *_: None)

    return change


def _louder(path: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        block.get_submodule(path).register_forward_hook(lambda module, inputs, output: 1.5 * output)

    return change


def _forward_of_its_own(path: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        part = block.get_submodule(path)
        part.forward = lambda x, forward=part.forward: 2 * forward(x)

    return change


def _replaced(path: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, make(block.get_submodule(path)))

    return change


class LowRank(nn.Module):
    """A convolution with a low-rank addition, as adapters have it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Conv2d(base.in_channels, 2, 1), nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Other(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Marked(nn.Parameter):
    """A parameter of a class that may do anything behind the scenes."""


def _marked(block: Any) -> None:
    block.conv.weight = Marked(block.conv.weight.detach())


def _tensor_for_parameter(block: Any) -> None:
    weight = 2 * block.conv.weight.detach()
    del block.conv.weight
    block.conv.weight = weight


def _expanded_average(block: Any) -> None:
    block.bn1.running_mean = torch.ones(1).expand(32)


def _transposed_weight(block: Any) -> None:
    block.conv.weight = nn.Parameter(torch.randn(8, 32, 1, 1).transpose(0, 1))


ALTERED: dict[str, Callable[[Any], Any]] = {
    **{f"forward hook on {path}": _louder(path) for path in ("bn1", "sam", "sam.conv1", "sam.conv_w.2", "conv")},
    **{f"forward hook on {path}": _louder(path) for path in ("bn2", "sam.conv_w", "sam.conv_w.1", "sam.conv3")},
    "pre-hook on sam": _hook("sam", "forward_pre_hook"),
    "pre-hook on conv": _hook("conv", "forward_pre_hook"),
    "backward hook on bn1": _hook("bn1", "full_backward_hook"),
    "backward pre-hook on conv_w.3": _hook("sam.conv_w.3", "full_backward_pre_hook"),
    "forward of bn1": _forward_of_its_own("bn1"),
    "forward of sam": _forward_of_its_own("sam"),
    "forward of drop_path": _forward_of_its_own("drop_path"),
    "weight norm": lambda block: parametrizations.weight_norm(block.conv),
    "spectral norm": lambda block: parametrizations.spectral_norm(block.sam.conv3).eval(),
    "pruning": lambda block: prune.l1_unstructured(block.sam.conv1, "weight", 0.5),
    "older weight norm": lambda block: nn.utils.weight_norm(block.conv),
    "bn1 as GroupNorm": _replaced("bn1", lambda norm: nn.GroupNorm(4, 32)),
    "bn1 as Identity": _replaced("bn1", lambda norm: nn.Identity()),
    "bn1 of a class of its own": _replaced("bn1", lambda norm: Other(32)),
    "bn2 as Conv2d": _replaced("bn2", lambda norm: nn.Conv2d(8, 8, 1)),
    "conv as adapter": _replaced("conv", LowRank),
    "conv as Sequential": _replaced("conv", lambda layer: nn.Sequential(layer)),
    "conv of another geometry": _replaced("conv", lambda layer: nn.Conv2d(8, 32, 3, padding=1)),
    "conv in groups": _replaced("conv", lambda layer: nn.Conv2d(8, 32, 1, groups=2)),
    "γ without a ReLU": _replaced("sam.conv_w.1", lambda part: nn.Identity()),
    "γ with two more": _replaced("sam.conv_w", lambda γ: γ.append(nn.BatchNorm2d(γ[-1].out_channels)).append(Halved())),
    "norm in a ReLU's place": lambda block: block.sam.conv_w.__setitem__(4, block.sam.conv_w[3]),
    "another ReLU": _replaced("sam.conv_w.1", lambda part: nn.GELU()),
    "drop_path as ReLU": _replaced("drop_path", lambda part: nn.ReLU()),
    "drop_path as Halved": _replaced("drop_path", lambda part: Halved()),
    "sam as convolution": _replaced("sam", lambda part: nn.Conv2d(32, 8, 1)),
    "parameter of another class": _marked,
    "tensor in a parameter's place": _tensor_for_parameter,
    "expanded running mean": _expanded_average,
    "transposed weight": _transposed_weight,
}


@TRAINING
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_altered_part_is_honoured(change: Callable[[Any], Any], attention: str, training: bool, spy: Spy):
    if training and change is _expanded_average:
        pytest.skip("cannot be written to")
    block, x = block_of(attention).train(training), images(2, 32, 7, 7)
    block(x).sum().backward()  # so that the block is known already
    assert spy.blocks() == 1
    change(block)
    with torch.no_grad():
        found = block(x)
        with use_backend("reference"):
            assert_same(found, block(x), 1e-5)
    block(x).sum().backward()
    assert spy.blocks() == 0


def test_every_kind_of_hook_fires_once():
    block, fired = block_of(), []
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        for path in ("bn1", "sam.conv1", "conv"):
            hook: Any = lambda *_, key=(register, path): fired.append(key)  # noqa: E731
            getattr(block.get_submodule(path), f"register_{register}")(hook)
    block(images(2, 32, 7, 7).requires_grad_()).sum().backward()
    assert len(fired) == len(set(fired)) == 12


def test_block_is_fused_again_when_a_hook_is_gone(spy: Spy):
    block, x = block_of().eval(), images(2, 32, 7, 7)
    handle = block.bn1.register_forward_hook(lambda *_: None)
    block(x)
    assert spy.blocks() == 0
    handle.remove()
    block(x)
    assert spy.blocks() == 1


MOMENTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "reference": lambda: use_backend("reference"),
    "tiled": lambda: use_backend("tiled"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "flop counter": lambda: FlopCounterMode(display=False),
    "forward mode": forward_ad.dual_level,
    "global hook": lambda: _GlobalHook(),
}


class _GlobalHook:
    def __enter__(self) -> None:
        self.seen: list[nn.Module] = []
        self.handle = nn.modules.module.register_module_forward_hook(lambda module, *_: self.seen.append(module))

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()
        assert any(isinstance(module, nn.BatchNorm2d) for module in self.seen)


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_observer_sees_the_parts(attention: str, moment: Callable[..., Any], spy: Spy):
    network, x = network_of(attention).eval(), images(2, 3, 13, 18)
    expected = plain_output(network, x)
    with moment():
        assert_same(network(x), expected, 0.05 if torch.is_autocast_enabled("cpu") else 2e-5)
    assert set(spy.calls.values()) == {0}


def test_flops_are_counted():
    network, x = network_of().eval(), images(2, 3, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() > 2 * 2 * 64 * 3 * 64


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "every second pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "slice of channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "slice of a batch": lambda x: torch.cat([x, x])[1 : 1 + len(x)],
    "parameter": lambda x: nn.Parameter(x.clone()),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("form", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_any_input_is_right_and_stays_as_it_is(attention: str, form: Callable[[Tensor], Tensor]):
    block, network = block_of(attention).eval(), network_of(attention).eval()
    several = nn.Sequential(block, block_of(attention), block_of(attention)).eval()
    for module, x in ((block, images(2, 32, 7, 7)), (several, images(2, 32, 7, 7)), (network, images(2, 3, 9, 13))):
        x = form(x)
        before, version = x.detach().clone(), x._version
        for mode in (torch.no_grad, torch.inference_mode, nullcontext):
            with mode():
                y = module(x)
            assert_same(y.detach(), plain_output(module, x))
            assert torch.equal(x, before)
            assert x._version == version
            assert y.numel() == 0 or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_relation_that_kernels_do_not_know_is_what_it_says(form: str, monkeypatch: pytest.MonkeyPatch):
    """Of a block and of a whole network, without gradients, where kernels would otherwise do all."""
    relations = {"pairwise": PAIRWISE_RELATIONS, "patchwise": PATCHWISE_RELATIONS}[form]
    monkeypatch.setitem(relations, "own", replace(relations["concatenation"], formula=_twice(relations)))
    network = san.create_model(f"san4_{form}", num_classes=3, relation="own").eval()
    image = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        y = network(image)
        with use_backend("reference"):
            expected = network(image)
    assert y.isfinite().all()
    torch.testing.assert_close(y, expected)


def _twice(relations: Any) -> Callable[[Tensor, Tensor], Tensor]:
    known = relations["concatenation"].formula
    return lambda query, key: 2 * known(query, key)


@pytest.mark.parametrize("size", [(2, 16, 7, 7), (2, 64, 7, 7)], ids=str)
@TRAINING
def test_wrong_number_of_channels_is_an_error(size: tuple[int, ...], training: bool):
    block, network = block_of().train(training), network_of().train(training)
    with torch.no_grad(), pytest.raises(RuntimeError, match="should contain"):
        block(images(*size))
    with torch.no_grad(), pytest.raises(UserError, match="the network takes"):
        network(images(*size))


MISFITS: dict[str, Callable[[Any], Any]] = {
    "bn1": _replaced("bn1", lambda norm: nn.BatchNorm2d(16)),
    "bn2": _replaced("bn2", lambda norm: nn.BatchNorm2d(16)),
    "conv": _replaced("conv", lambda layer: nn.Conv2d(16, 32, 1)),
    "conv1": _replaced("sam.conv1", lambda layer: nn.Conv2d(32, 4, 1)),
    "conv3": _replaced("sam.conv3", lambda layer: nn.Conv2d(16, 8, 1)),
    "γ's first norm": _replaced("sam.conv_w.0", lambda norm: nn.BatchNorm2d(2)),
    "γ's last Linear": _replaced("sam.conv_w.5", lambda layer: nn.Conv2d(layer.in_channels, 3, 1)),
    "weight": lambda block: setattr(block.conv, "weight", nn.Parameter(torch.randn(32, 2, 1, 1))),
    "average": lambda block: block.bn1.register_buffer("running_mean", torch.randn(4)),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_parts_that_do_not_fit_are_an_error(attention: str, change: Callable[[Any], Any], spy: Spy):
    block = block_of(attention).eval()
    change(block)
    with torch.no_grad(), pytest.raises((RuntimeError, UserError)):
        block(images(2, 32, 7, 7))
    assert spy.blocks() == 0


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_one_pixel_has_no_statistics(attention: str):
    with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
        block_of(attention)(images(1, 32, 1, 1))
    with torch.no_grad():
        block = block_of(attention).eval()
        assert_same(block(images(1, 32, 1, 1)), plain_output(block, images(1, 32, 1, 1)))


class Turned(nn.Module):
    """A block of the user's own, whose map is not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * x.mT.contiguous().mT


STAGES: dict[str, Callable[[Any], Any]] = {
    "block not contiguous": _replaced("layer0.0", lambda block: Turned()),
    "block as Identity": _replaced("layer1.0", lambda block: nn.Identity()),
    "block as convolution": _replaced("layer1.1", lambda block: nn.Conv2d(64, 64, 1)),
    "bn_in as Identity": _replaced("bn_in", lambda norm: nn.Identity()),
    "bn0 as Identity": _replaced("bn0", lambda norm: nn.Identity()),
    "conv1 as Sequential": _replaced("conv1", lambda layer: nn.Sequential(layer)),
    "conv0 with a bias": _replaced("conv0", lambda layer: nn.Conv2d(64, 32, 1)),
    "conv1 with a bias": _replaced("conv1", lambda layer: nn.Conv2d(32, 64, 1)),
    "conv_in with a bias": _replaced("conv_in", lambda layer: nn.Conv2d(3, 64, 1)),
    "hook on conv1": _louder("conv1"),
    "hook on bn_in": _louder("bn_in"),
    "hook on bn1": _louder("bn1"),
    "hook on a block": _louder("layer1.0"),
}


@TRAINING
@pytest.mark.parametrize("change", STAGES.values(), ids=STAGES)
def test_altered_stage_is_honoured(change: Callable[[Any], Any], training: bool):
    network, x = network_of().train(training), images(2, 3, 13, 18)
    network(x)
    change(network)
    network.train(training)
    assert_close(outcome(network, x, image_gradient=False), plain(network, x, image_gradient=False), 3e-4)
    with torch.no_grad():
        assert_same(network.eval()(x), plain_output(network, x))


def test_what_hooks_keep_is_not_overwritten():
    network, x = network_of(blocks=(1, 3)).eval(), images(2, 3, 8, 8)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        kept.extend((tensor, tensor.clone()) for tensor in (*inputs, output))

    for place in (0, 1):
        network.layer1[place].register_forward_hook(keep)
    with torch.no_grad():
        network(x)
    assert len(kept) == 4
    assert all(torch.equal(tensor, then) for tensor, then in kept)


def test_drop_path_drops_whenever_it_is_in_training(spy: Spy):
    block, x = block_of(drop_path=0.5), images(16, 32, 4, 4)
    for training, path_training in ((True, True), (False, False), (False, True)):
        block.train(training).drop_path.train(path_training)
        with torch.no_grad():
            assert bool((block(x) == x).flatten(1).all(1).any()) is path_training
        assert spy.blocks() == (not path_training)
    block.train().drop_path.eval()
    assert_close(outcome(block, x), plain(block, x))
    assert spy.blocks() == 1
    assert type(block.drop_path) is DropPath


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda module: [parameter.data.mul_(1.1) for parameter in module.parameters()],
    "data": lambda module: [setattr(part, "data", part.data * 1.1) for part in module.parameters()],
    "state dict": lambda module: module.load_state_dict(
        {key: 1.1 * value if value.is_floating_point() else value for key, value in module.state_dict().items()}
    ),
    "assigned": lambda module: module.load_state_dict(
        {key: 1.1 * value if value.is_floating_point() else value for key, value in module.state_dict().items()},
        assign=True,
    ),
    "parameter": lambda module: setattr(module.bn1, "weight", nn.Parameter(module.bn1.weight.detach() + 1)),
    "round trip": lambda module: module.half().float(),
    "part": lambda module: setattr(module, "bn1", nn.BatchNorm2d(module.bn1.num_features).eval()),
    "averages": lambda module: [norm.add_(0.5) for name, norm in module.named_buffers() if "running" in name],
    "eps": lambda module: setattr(module.bn1, "eps", 0.5),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_edited_weights_are_honoured(attention: str, edit: Callable[[Any], Any], spy: Spy):
    network, block = network_of(attention).eval(), block_of(attention).eval()
    for module, x, blocks in ((network, images(2, 3, 8, 12), 3), (block, images(2, 32, 7, 7), 1)):
        with torch.no_grad():
            before = module(x)
            edit(module)
            spy.blocks()
            found = module(x)
            assert spy.blocks() == blocks
        assert not torch.allclose(found, before, rtol=1e-6)
        assert_same(found, plain_output(module, x))


def test_functional_calls_are_honoured():
    block, x = block_of().eval(), images(2, 32, 7, 7)
    state = {name: 1.1 * tensor.detach() for name, tensor in block.named_parameters()}
    changed = copy.deepcopy(block)
    changed.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert_same(torch.func.functional_call(block, state, (x,)), changed(x))
    mean = {"bn1.running_mean": torch.ones(32).expand(32) / 2, "bn2.running_var": torch.ones(1).expand(8)}
    changed = copy.deepcopy(block)
    changed.load_state_dict(mean, strict=False)
    with torch.no_grad():
        assert_same(torch.func.functional_call(block, mean, (x,)), changed(x))


def test_transformations_of_functions_are_honoured(spy: Spy):
    block, x = block_of().eval(), images(2, 32, 5, 5)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (image.unsqueeze(0),)).square().sum()

    state = {name: tensor.detach() for name, tensor in block.named_parameters()}
    spy.blocks()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, x)
    assert spy.blocks() == 0
    for parameter in block.parameters():
        parameter.grad = None
    block(x).square().sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    step = 1e-3
    with torch.no_grad(), use_backend("reference"):
        wide = copy.deepcopy(block).double()
        assert_same(tangent, (wide(x.double() + step) - wide(x.double() - step)) / (2 * step), 0.02)


@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_tracers_get_the_definition(attention: str):
    block, x = block_of(attention).eval(), images(2, 32, 7, 7)
    expected = plain_output(block, x)
    with torch.no_grad():
        exported = torch.export.export(block, (x,)).module()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for tracer in (exported, compiled):
            assert_same(tracer(x), expected)
    compiled(x).sum().backward()
    assert block.conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_traces_get_the_definition(attention: str):
    block, x = block_of(attention).eval(), images(2, 32, 7, 7)
    with torch.no_grad():
        assert_same(torch.jit.trace(block, x)(x), plain_output(block, x))


def test_double_precision_is_the_reference_s():
    block, x = block_of().eval().double(), images(2, 32, 7, 7).double()
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain_output(block, x), rtol=1e-12, atol=1e-12)


# Autograd.


@pytest.mark.parametrize("attention", ["pairwise", "patchwise", "scalar"])
def test_backward_may_run_twice_and_gradients_add_up(attention: str):
    network, x = network_of(attention), images(2, 3, 8, 12)
    loss = network(x).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in network.parameters()]
    loss.backward()
    for parameter, gradient in zip(network.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)
    network.zero_grad()
    for _ in range(2):
        network(x).square().sum().backward()
    for parameter, gradient in zip(network.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_second_derivatives_are_refused_and_the_reference_has_them(attention: str):
    block, x = block_of(attention).eval(), images(2, 32, 5, 5).requires_grad_()
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
    with use_backend("reference"):
        (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "frozen", ["bn", "conv", "sam", "sam.conv1", "sam.conv_w", "layer0", "layer1.0.bn2", "bias", ""]
)
@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_frozen_parameters(attention: str, frozen: str, spy: Spy):
    network, x = network_of(attention), images(2, 3, 8, 12)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_close(outcome(network, x, image_gradient=False), plain(network, x, image_gradient=False), 2e-4)
    block, x = block_of(attention), images(2, 32, 7, 7)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for image_gradient in (False, True):
        options = {"image_gradient": image_gradient}
        assert_close(outcome(block, x, **options), plain(block, x, **options))
    assert spy.blocks() == 5


def test_gradients_of_a_few_tensors():
    block, x = block_of(), images(2, 32, 7, 7).requires_grad_()
    few = [x, block.sam.conv2.weight, block.bn2.bias]
    found = torch.autograd.grad(block(x).square().sum(), few)
    block(x).square().sum().backward()
    assert all(torch.equal(one, tensor.grad) for one, tensor in zip(found, few, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_outputs_may_be_changed_in_place(training: bool):
    block, x = block_of().train(training), images(2, 32, 7, 7).requires_grad_()
    twin, before = copy.deepcopy(block), x.detach().clone()
    for change in (lambda y: y.add_(1), lambda y: F.relu(y, inplace=True), lambda y: y.view(2, -1).mul_(2)):
        found, expected = torch.autograd.grad(change(block(x)).square().sum(), x), None
        with use_backend("reference"):
            expected = torch.autograd.grad(change(twin(x)).square().sum(), x)
        assert_same(found[0], expected[0], 1e-4)
        assert torch.equal(x, before)
    several = nn.Sequential(block, block)
    y = block(x)
    z = several[1](y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_give_the_same(reentrant: bool):
    network, x = network_of(), images(2, 3, 8, 12)
    kept = outcome(network, x)
    network.set_grad_checkpointing()
    recomputed = outcome(network, x)
    for name, tensor in kept.items():
        assert torch.equal(tensor, recomputed[name]), name
    block, x = block_of().eval(), images(2, 32, 7, 7).requires_grad_()
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    # The reentrant kind computes without gradients first, by other kernels.
    assert_same(x.grad, *torch.autograd.grad(block(x).square().sum(), x))


def test_saved_tensors_may_be_stored_elsewhere():
    network, x = network_of("patchwise"), images(2, 3, 8, 12)
    expected = outcome(network, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.numpy(force=True).copy(), torch.from_numpy):
        found = outcome(network, x)
    # PyTorch's own BatchNorm rounds otherwise where memory starts at another place.
    assert_close(found, expected)


@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_training_keeps_few_maps(attention: str):
    channels, size = 256, (4, 256, 14, 14)
    block, x = block_of(attention, channels, 7), images(*size).requires_grad_()
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = block(x)
    # Input, query, key, value and aggregate; patchwise attention's hidden layer besides.
    widths = channels + 2 * channels // 16 + 2 * channels // 4 + (channels // 32 if attention == "patchwise" else 0)
    maps, found = 4 * widths * 4 * 14 * 14, sum(kept.values())
    assert y.grad_fn is not None
    assert maps / 2 < found <= 1.1 * maps


# Processes, threads, copies, lifetimes.


def _synchronised(attention: str, synchronise: bool = True) -> Any:
    torch.manual_seed(0)
    network = network_of(attention)
    return synchronize_batch_norm(network) if synchronise else network


def _part(network: Any, rank: int | None) -> dict[str, Tensor]:
    shares = {None: slice(None), 0: slice(0, 2), 1: slice(2, 5)}
    x, direction = images(5, 3, 8, 12)[shares[rank]], images(5, 5)[shares[rank]]
    with Spied() as calls:
        network(x).backward(direction)
    assert calls.count == 3
    gradients = {f"d {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {**gradients, **dict(network.named_buffers())}


class Spied:
    """Counts fused blocks where no fixture is."""

    def __enter__(self) -> Spied:
        self.count, self.function = 0, fused.attention_block
        fused.attention_block = self._call
        return self

    def _call(self, *arguments: Any, **options: Any) -> Tensor | None:
        found = self.function(*arguments, **options)
        self.count += found is not None
        return found

    def __exit__(self, *_: Any) -> None:
        fused.attention_block = self.function


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    cases = [(attention, synchronise) for attention in ("pairwise", "patchwise") for synchronise in (True, False)]
    torch.save({case: _part(_synchronised(*case), rank) for case in cases}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path):
    """Summed gradients and running averages of unequal shares; without synchronisation they differ."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case in first:
        whole = _part(_synchronised(*case), None)
        found = {
            name: first[case][name] + second[case][name] if name.startswith("d ") else first[case][name]
            for name in whole
        }
        if case[1]:
            assert_close(found, whole, 3e-4)
        else:
            with pytest.raises(AssertionError):
                assert_close(found, whole, 0.01)


def test_copies_and_pickles_after_use(spy: Spy):
    network, x = network_of().eval(), images(2, 3, 8, 12)
    with torch.no_grad():
        expected = network(x)
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301 (made here)
            spy.blocks()
            assert torch.equal(twin(x), expected)
            assert spy.blocks() == 3


@pytest.mark.parametrize("hooked", [False, True])
def test_used_networks_are_not_kept_alive(hooked: bool):
    network = network_of()
    if hooked:
        network.layer0[0].bn1.register_forward_hook(lambda *_, network=network: None)
        network.bn_in.register_forward_hook(lambda *_, network=network: None)
    network(images(2, 3, 8, 12)).sum().backward()
    network.eval()(images(2, 3, 8, 12))
    held = [weakref.ref(part) for part in network.modules()]
    del network
    gc.collect()
    assert not any(each() is not None for each in held)


def test_two_threads_run_two_networks():
    networks = [network_of(attention) for attention in ("pairwise", "patchwise")]
    x = images(2, 3, 8, 12)
    expected = [outcome(network, x) for network in networks]
    found: list[list[dict[str, Tensor]]] = [[], []]

    def work(place: int) -> None:
        found[place].extend(outcome(networks[place], x) for _ in range(5))

    workers = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each, results in zip(expected, found, strict=True):
        assert len(results) == 5
        assert all(torch.equal(each[name], result[name]) for result in results for name in each)


def test_feature_maps_are_those_of_the_definition(spy: Spy):
    network = san.create_model("san4_pairwise", features_only=True).eval()
    x = images(1, 3, 16, 24)
    with torch.no_grad():
        found = network(x)
        assert spy.calls == {"attention_block": 4, "stem": 0, "norm_pool_linear": 0}
        with use_backend("reference"):
            for one, other in zip(found, network(x), strict=True):
                assert_same(one, other)


def _doubled(layer: Any) -> None:
    layer.weight.data = 2 * layer.weight.data


def _halved(layer: Any) -> None:
    layer.weight.data.mul_(0.5)


CHANGES: dict[str, Callable[[Any], None]] = {
    "weights in place": lambda network: _halved(network.layer1[0].conv),
    "weights elsewhere": lambda network: _doubled(network.layer1[1].sam.conv3),
    "another parameter": lambda network: setattr(network.conv1, "weight", nn.Parameter(network.conv1.weight + 0.1)),
    "averages": lambda network: network.layer0[0].bn2.running_mean.add_(0.3),
    "eps": lambda network: setattr(network.layer1[0].sam.conv_w[0], "eps", 0.5),
    "relation": lambda network: setattr(network.layer1[0].sam, "relation", "summation"),
    "border": lambda network: setattr(network.layer0[0].sam, "footprint", Footprint(3, 1, 1, "zeros")),
    "another block": lambda network: network.layer1.__setitem__(0, copy.deepcopy(network.layer1[1])),
    "one block less": lambda network: network.layer1.__delitem__(0),
    "bias": lambda network: setattr(network.layer1[0].conv, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_recorded_calls_follow_every_change(change: Callable[[Any], None], spy: Spy):
    network, x = network_of().eval(), images(2, 3, 16, 24)
    with torch.no_grad():
        before = network(x)
        change(network)
        assert_same(network(x), plain_output(network, x))
        assert not torch.equal(network(x), before)
    assert spy.blocks() == 3 * 3 - 2 * (len(network.layer1) == 1)


def test_shares_of_a_batch_give_what_the_batch_gives(monkeypatch: pytest.MonkeyPatch):
    network, x = network_of().eval(), images(5, 3, 16, 24)
    with torch.no_grad():
        whole = network(x)
        monkeypatch.setattr(fused, "_ROOM", 2 * 4 * 32 * 8 * 12)
        assert_same(network(x), whole.double(), 1e-6)


def test_sizes_without_end_keep_few_recordings():
    network = network_of().eval()
    with torch.no_grad():
        for width in range(16, 16 + 4 * Recordings.most, 2):
            network(images(1, 3, 16, width))
    assert len(fused._networks[network]._found) == Recordings.most


def test_threads_share_a_network_without_gradients():
    network = network_of().eval()
    inputs = [images(1 + place, 3, 16, 24) for place in range(4)]
    found: list[list[Tensor]] = [[] for _ in inputs]

    def work(place: int) -> None:
        with torch.no_grad():
            found[place].extend(network(inputs[place]) for _ in range(20))

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with torch.no_grad():
        for x, results in zip(inputs, found, strict=True):
            assert len(results) == 20
            assert all(torch.equal(result, network(x)) for result in results)


def _narrow_stage(network: Any) -> None:
    """The last stage keeps half of its channels, in views of the old tensors: nothing moves in memory."""
    convolution, norm = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32).eval()
    convolution.weight = nn.Parameter(network.conv1.weight.detach()[:32])
    for name, tensor in (*network.bn1.named_parameters(), *network.bn1.named_buffers()):
        if tensor.dim():
            kept = tensor.detach()[:32]
            setattr(norm, name, nn.Parameter(kept) if name in ("weight", "bias") else kept)
    network.conv1, network.bn1, network.fc = convolution, norm, nn.Linear(32, 5)


def _attribute(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda network: setattr(network.get_submodule(path), name, value)


STRUCTURES = {
    "sizes of views": _narrow_stage,
    "stride of a stage": _attribute("conv1", "stride", (2, 2)),
    "padding of a stage": _attribute("conv1", "padding", (1, 1)),
    "an empty layer": lambda network: setattr(network, "layer1", nn.Sequential()),
    "shared blocks": lambda network: network.layer0.append(network.layer0[0]),
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("change", STRUCTURES.values(), ids=STRUCTURES)
def test_changed_structure_is_honoured_after_use(change: Callable[[Any], None], training: bool):
    network, x = network_of(blocks=(1, 0)).train(training), images(2, 3, 16, 24)
    with torch.set_grad_enabled(training):
        network(x)
    change(network)
    if training:
        assert_close(outcome(network, x), plain(network, x))
    with torch.no_grad():
        network.eval()
        assert_same(network(x), plain_output(network, x))


@pytest.mark.parametrize("name", ["stride", "relation"])
def test_changed_options_that_do_not_fit_are_an_error(name: str):
    block, x = block_of("patchwise").eval(), images(1, 32, 8, 8)
    with torch.no_grad():
        block(x)
        if name == "stride":
            block.sam.footprint = Footprint(3, stride=2)
        else:
            block.sam.relation = "star"
        with pytest.raises((RuntimeError, UserError), match=r"size of tensor|the mapping takes"):
            block(x)


def test_weights_live_until_kernels_end(monkeypatch: pytest.MonkeyPatch):
    """Another thread may load other weights meanwhile."""
    network, x, alive = network_of().eval(), images(1, 3, 16, 16), []
    found = [weakref.ref(parameter) for parameter in network.parameters()]
    found.pop(-1), found.pop(-1)  # the classifier's, which PyTorch holds

    def repeat(*memories: int) -> None:
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(state, assign=True)
        gc.collect()
        alive.extend(reference() is not None for reference in found)

    monkeypatch.setattr("san.ops.kernels.native.recording.Recording.repeat", lambda self, *memories: repeat(*memories))
    with torch.no_grad():
        network(x)
        assert alive
        assert all(alive)
        gc.collect()
        assert not any(reference() is not None for reference in found)


def test_the_default_device_is_no_matter():
    network, x = network_of().eval(), images(1, 3, 16, 16)
    with torch.no_grad():
        expected = network(x)
        with torch.device("meta"):
            assert torch.equal(network(x), expected)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_hooks_on_a_whole_stage_fire(training: bool):
    network, seen = network_of().train(training), []
    network.layer1.register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    with torch.set_grad_enabled(training):
        network(images(2, 3, 16, 16))
    assert seen == [(2, 64, 4, 4)]


def test_parts_of_gamma_may_be_shared():
    block, x = block_of().eval(), images(1, 32, 6, 6)
    block.sam.conv_w[4] = block.sam.conv_w[1]
    assert_close(outcome(block, x), plain(block, x))


@pytest.mark.parametrize("eps", [-1e-3, 1e-2])
def test_eps_is_honoured_or_refused_as_batch_norm_refuses_it(eps: float):
    block, x = block_of().eval(), images(1, 32, 6, 6)
    block.bn2.eps = eps
    with torch.no_grad():
        if eps < 0:
            with pytest.raises((ValueError, RuntimeError), match="eps"):
                block(x)
        else:
            assert_same(block(x), plain_output(block, x))


class Cached(nn.Module):
    """Gives one map, whatever it is given."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def test_maps_that_others_hold_are_not_overwritten():
    network, y = network_of().eval(), images(2, 64, 4, 4).requires_grad_()
    before = y.detach().clone()
    network.layer1.insert(0, Cached(y))
    with torch.no_grad():
        network(images(2, 3, 16, 16))
    assert torch.equal(y, before)

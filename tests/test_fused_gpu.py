"""Blocks and networks as GPUs run them, with and without gradients: against the modules' own `forward`, what they keep,
and when they must step aside.

`elsewhere` lets the CPU be a GPU; float64, which the CPU's own kernels do not take, tells the two apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.test_fused import ALTERED, BLOCKS, MOMENTS, Spy, assert_close, block_of, images, network_of, outcome, plain
from torch import Tensor, nn

import san
from san import fused
from san.fused import gpu
from san.ops import use_backend
from san.ops.kernels.gpu import launch
from san.ops.kernels.native import library
from san.ops.kernels.pointwise import triton
from san.ops.kernels.pointwise_training import triton as triton_training
from san.ops.kernels.pointwise_training import triton_stem
from san.ops.normalization import SynchronizedBatchNorm2d, synchronize_batch_norm

ATTENTION = pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
INTERPRETED = pytest.mark.skipif(
    not launch.interpreting() or not launch.installed(), reason="needs Triton, interpreted"
)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.setattr(gpu, "DTYPES", {*gpu.DTYPES, torch.float64})


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def is_joined(y: Tensor) -> bool:
    """Whether a block's output comes from a joined node of autograd."""
    return type(y.grad_fn).__name__ == "_NormProductsBackward"


@pytest.mark.parametrize("training", [True, False])
@ATTENTION
def test_block_is_its_definition(attention: str, training: bool, spy: Spy) -> None:
    block, x = block_of(attention).double().train(training), images(3, 32, 7, 9).double()
    assert_close(outcome(block, x), plain(block, x), 1e-9)
    assert is_joined(block(x))
    assert spy.blocks() == 2


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("pairwise", {}),
    ("patchwise", {"small_images": True}),
    ("pairwise", {"in_chans": 6}),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("attention", "options"), NETWORKS, ids=str)
def test_network_is_its_definition(attention: str, training: bool, options: dict[str, Any], spy: Spy) -> None:
    """Images may want gradients, and may have more channels than the stem takes."""
    network = network_of(attention, **options).double().train(training)
    x = images(3, options.get("in_chans", 3), 13, 18).double()
    for image_gradient in (True, False):
        gradient: Any = {"image_gradient": image_gradient}
        assert_close(outcome(network, x, **gradient), plain(network, x, **gradient), 1e-8)
        assert spy.calls == {"attention_block": 3, "stem": 1, "norm_pool_linear": 1}
        spy.calls = dict.fromkeys(spy.calls, 0)


@ATTENTION
def test_float32_is_near(attention: str) -> None:
    network, x = network_of(attention), images(3, 3, 13, 18)
    assert_close(outcome(network, x), plain(network, x), 2e-4)


@ATTENTION
def test_autocast_rounds_no_more_than_the_definition(attention: str) -> None:
    network, x = network_of(attention), images(3, 3, 16, 24)
    exact = _features_and_gradients(network.double(), x.double(), "reference")
    errors = []
    for forced in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            found = _features_and_gradients(network.float(), x, forced)
        errors.append([float((one.double() - other).norm()) for one, other in zip(found, exact, strict=True)])
    for joined, defined in zip(*errors, strict=True):
        assert joined <= 1.25 * defined


def _features_and_gradients(network: Any, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Of a copy; all gradients in one vector."""
    network = copy.deepcopy(network)
    with use_backend(backend):
        y = network.forward_features(x)
    with torch.autocast("cpu", enabled=False):
        y.double().square().sum().backward()
    return y.detach(), torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None])


@INTERPRETED
@pytest.mark.parametrize(("attention", "options"), [("pairwise", {"position": "none"}), ("patchwise", {})], ids=str)
def test_attention_of_gpus_fits_in(attention: str, options: dict[str, Any], spy: Spy) -> None:
    """With the shortest γ, which the interpreter is done with soonest."""
    block = block_of(attention, mapping="L", **options)
    x = images(2, 32, 3, 4).contiguous(memory_format=torch.channels_last)
    with use_backend("triton"):
        found = outcome(block, x)
    assert spy.blocks() == 1
    assert_close(found, plain(block, x), 1e-4)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes of autograd that Triton's kernels made."""
    made: list[str] = []

    def noting(module: Any, name: str) -> None:
        node = getattr(module, name)

        def note(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return node(*arguments, **options)

        monkeypatch.setattr(module, name, note)

    noting(triton_training, "norm_products")
    noting(triton_stem, "stem")
    # The CPU's own kernels would be asked first.
    monkeypatch.setattr(fused, "suits", lambda x: False)
    return made


@INTERPRETED
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("attention", "options", "shape"), BLOCKS, ids=str)
def test_trained_block_is_its_definition(
    attention: str, options: dict[str, Any], shape: tuple[int, int, int], training: bool, nodes: list[str]
) -> None:
    batch, height, width = shape
    block, x = block_of(attention, **options).train(training), last(images(batch, 32, height, width))
    assert_close(outcome(block, x), plain(block, x), 2e-4)
    assert nodes == ["norm_products"] * 2


@INTERPRETED
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("attention", "options"), NETWORKS, ids=str)
def test_trained_network_is_its_definition(
    attention: str, options: dict[str, Any], training: bool, format_: torch.memory_format, nodes: list[str]
) -> None:
    network = network_of(attention, **options).train(training)
    x = images(3, options.get("in_chans", 3), 13, 18).contiguous(memory_format=format_)
    for image_gradient in (False, True):
        nodes.clear()
        gradient: Any = {"image_gradient": image_gradient}
        assert_close(outcome(network, x, **gradient), plain(network, x, **gradient), 5e-4)
        # Where the stem is not theirs, maps lie as the image does.
        stem = "in_chans" not in options and not image_gradient
        assert nodes == (["stem"] * stem + ["norm_products"] * 7 if stem or format_ is torch.channels_last else [])


@INTERPRETED
def test_recomputed_blocks_give_the_same_by_kernels(nodes: list[str]) -> None:
    network, x = network_of(), images(2, 3, 8, 12)
    kept = outcome(network, x, image_gradient=False)
    network.set_grad_checkpointing()
    assert_close(outcome(network, x, image_gradient=False), kept, 1e-6)
    assert nodes.count("norm_products") == 7 + 13


@INTERPRETED
def test_stochastic_depth_drops_the_same_by_kernels(nodes: list[str]) -> None:
    block, x = block_of(drop_path=0.5), last(images(16, 32, 4, 4))
    found = []
    for forced in ("auto", "reference"):
        torch.manual_seed(3)
        with use_backend(forced):
            found.append(outcome(block, x))
    assert nodes
    assert bool((found[0]["y"] == x).flatten(1).all(1).any())
    assert_close(*found, 2e-4)


def test_biases_may_lie_anyhow(nodes: list[str], kernel: list[dict[str, Any]]) -> None:
    """A parameter may be part of a larger tensor."""
    block, x = block_of("patchwise").eval(), last(images(2, 32, 7, 7))
    wide = torch.stack([block.conv.bias.detach(), torch.full((32,), 9.0)], 1)
    expected = plain(block, x)
    block.conv.bias = nn.Parameter(wide[:, 0])
    assert not block.conv.bias.is_contiguous()
    found = block(x)
    with torch.no_grad():
        without = block(x)
    assert len(nodes) == len(kernel) == 2
    for y in (found, without):
        torch.testing.assert_close(y.detach().double(), expected["y"], rtol=1e-4, atol=1e-4)


@INTERPRETED
def test_averages_in_half_precision_move(nodes: list[str]) -> None:
    block, x = block_of("patchwise"), last(images(4, 32, 7, 7))
    exact = copy.deepcopy(block)
    with use_backend("reference"):
        exact(x)
    block.bfloat16()(x.bfloat16())
    assert nodes
    for norm in ("bn1", "bn2"):
        for name in ("running_mean", "running_var"):
            found, expected = (getattr(each.get_submodule(norm), name).double() for each in (block, exact))
            torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_channels_last_stays() -> None:
    block, x = block_of().double(), images(2, 32, 7, 9).double()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = block(x)
    (of_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (y, of_x))
    assert_close(outcome(block, x.detach()), plain(block, x.detach()), 1e-9)


def test_stochastic_depth_drops_what_the_definition_drops() -> None:
    block, x = block_of(drop_path=0.5).double(), images(16, 32, 4, 4).double()
    found = []
    for forced in ("auto", "reference"):
        torch.manual_seed(3)
        with use_backend(forced):
            found.append(outcome(block, x))
    assert bool((found[0]["y"] == x).flatten(1).all(1).any())
    assert_close(*found, 1e-9)


@ATTENTION
def test_recomputed_blocks_give_the_same(attention: str) -> None:
    network, x = network_of(attention), images(2, 3, 8, 12)
    kept = outcome(network, x)
    network.set_grad_checkpointing()
    assert_close(outcome(network, x), kept, 1e-6)


# How tensors lie in memory is no matter here.
HONOURED = {
    name: change for name, change in ALTERED.items() if name not in ("expanded running mean", "transposed weight")
}


@pytest.mark.parametrize("change", HONOURED.values(), ids=HONOURED)
def test_altered_part_is_honoured(change: Callable[[Any], Any], spy: Spy) -> None:
    block, x = block_of("patchwise").eval(), images(2, 32, 7, 7)
    block(x).sum().backward()  # so that the block is known already
    assert spy.blocks() == 1
    change(block)
    y = block(x)
    assert spy.blocks() == 0
    with use_backend("reference"):
        torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moment", [MOMENTS[name] for name in MOMENTS if name != "autocast"])
def test_observer_sees_the_parts(moment: Callable[..., Any]) -> None:
    block, x = block_of().double(), images(2, 32, 7, 7).double()
    with moment():
        assert not is_joined(block(x))
    assert is_joined(block(x))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of every call of the kernel that makes products without gradients."""
    calls: list[dict[str, Any]] = []
    products = triton.products

    def note(*arguments: Any, **options: Any) -> list[Tensor]:
        calls.append(options)
        return products(*arguments, **options)

    monkeypatch.setattr(triton, "products", note)
    # The CPU's own kernels would be asked first.
    monkeypatch.setattr(fused, "suits", lambda x: False)
    return calls


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(module).requires_grad_(False)(x)


def without(moment: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        with moment():
            return module(x)

    return run


@INTERPRETED
@pytest.mark.parametrize("run", [without(torch.no_grad), without(torch.inference_mode), frozen])
@ATTENTION
def test_block_without_gradients_is_its_definition(
    attention: str, run: Callable[..., Tensor], kernel: list[dict[str, Any]]
) -> None:
    block, x = block_of(attention).eval(), last(images(3, 32, 7, 9))
    before = x.clone()
    found = run(block, x)
    assert [set(options) for options in kernel] == [set(), {"residual"}]
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    with use_backend("reference"):
        torch.testing.assert_close(found, block(x), rtol=1e-4, atol=1e-4)


@INTERPRETED
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("attention", "options"), NETWORKS, ids=str)
@torch.no_grad()
def test_network_without_gradients_is_its_definition(
    attention: str, options: dict[str, Any], format_: torch.memory_format, kernel: list[dict[str, Any]]
) -> None:
    """The stem's product lays maps channels-last; images of too many channels for it leave all as it is written."""
    network, x = network_of(attention, **options).eval(), images(3, options.get("in_chans", 3), 13, 18)
    x = x.contiguous(memory_format=format_)
    found = network(x)
    takes_all = "in_chans" not in options or format_ is torch.channels_last
    # Three blocks of two products, one between the stages, and the stem.
    assert len(kernel) == (6 + 1 + ("in_chans" not in options)) * takes_all
    with use_backend("reference"):
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-4)


@INTERPRETED
@ATTENTION
@torch.no_grad()
def test_autocast_without_gradients_rounds_no_more_than_the_definition(
    attention: str, kernel: list[dict[str, Any]]
) -> None:
    # In float16, because Triton's interpreter cuts off what it should round to bfloat16.
    network, x = network_of(attention).eval(), images(3, 3, 16, 24)
    exact = network.double().forward_features(x.double())
    errors = []
    for forced in ("auto", "reference"):
        with torch.autocast("cpu", torch.float16), use_backend(forced):
            features = network.float().forward_features(x)
        errors.append(float((features.double() - exact).norm()))
    assert len(kernel) == 8
    assert errors[0] <= 1.25 * errors[1]


@INTERPRETED
@torch.no_grad()
def test_half_precision_without_gradients_is_near(kernel: list[dict[str, Any]]) -> None:
    block, x = block_of("patchwise").eval(), last(images(2, 32, 7, 7))
    exact = block(x)
    found = block.bfloat16()(x.bfloat16())
    assert len(kernel) == 4
    assert found.dtype == torch.bfloat16
    assert float((found - exact).norm()) <= 0.02 * float(exact.norm())


def _strided(x: Tensor) -> Tensor:
    return torch.cat([x, x], 3)[..., ::2]


@INTERPRETED
@pytest.mark.parametrize("form", [_strided, lambda x: x[:1].expand_as(x), lambda x: x.mT], ids=["strided", "one", "mT"])
@torch.no_grad()
def test_images_may_lie_anyhow(form: Callable[[Tensor], Tensor], kernel: list[dict[str, Any]]) -> None:
    network, x = network_of(blocks=(1,)).eval(), form(images(2, 3, 8, 8))
    found = network(x)
    assert kernel
    with use_backend("reference"):
        torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-4)


def _trained(block: Any) -> None:
    block.bn2.train()


@INTERPRETED
@pytest.mark.parametrize("change", [*HONOURED.values(), _trained], ids=[*HONOURED, "statistics of the batch"])
@torch.no_grad()
def test_altered_part_is_honoured_without_gradients(change: Callable[[Any], Any], kernel: list[dict[str, Any]]) -> None:
    block, x = block_of("patchwise").eval(), last(images(2, 32, 7, 7))
    block(x)  # so that the block is known already
    assert len(kernel) == 2
    change(block)
    y = copy.deepcopy(block)(x)
    assert len(kernel) == 2
    with use_backend("reference"):
        torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)


@INTERPRETED
@pytest.mark.parametrize("moment", [MOMENTS[name] for name in MOMENTS if name != "autocast"])
@torch.no_grad()
def test_observer_sees_the_parts_without_gradients(moment: Callable[..., Any], kernel: list[dict[str, Any]]) -> None:
    block, x = block_of().eval(), last(images(2, 32, 7, 7))
    with moment():
        block(x)
    assert not kernel
    block(x)
    assert kernel


@torch.no_grad()
def test_what_no_kernel_takes_runs_as_it_is_written(kernel: list[dict[str, Any]]) -> None:
    """Double precision, and maps with channels first."""
    block, x = block_of().eval(), images(2, 32, 8, 8)
    assert fused.attention_block(block, x) is None
    assert fused.attention_block(block.double(), last(x.double())) is None
    assert not kernel


def test_frozen_blocks_give_their_maps_without_a_copy() -> None:
    x = images(2, 32, 8, 8)
    assert fused.on_own_map(nn.Identity(), x) is x


def test_several_processes_synchronise_as_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = synchronize_batch_norm(block_of()), last(images(2, 32, 7, 7))
    assert gpu.norm_products(x, [block.conv], block)
    monkeypatch.setattr(SynchronizedBatchNorm2d, "several_processes", lambda norm: True)
    assert gpu.norm_products(x, [block.conv], block) is None
    assert gpu.norm_products(x, [block.conv], block.eval())


def test_one_pixel_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block_of()(images(1, 32, 1, 1))


def kept(module: nn.Module, x: Tensor, backend: str = "auto") -> int:
    """Bytes of distinct storages that autograd keeps, without those of parameters and buffers."""
    own = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), use_backend(backend):
        y = module(x)
    assert y.grad_fn is not None
    return sum(found.values())


# The portable backends keep an array per pair inside attention.
NATIVE = pytest.mark.skipif(library.load() is None, reason="the native library is not installed")


@NATIVE
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
@ATTENTION
def test_block_keeps_few_maps(attention: str, format_: torch.memory_format) -> None:
    """Input, query, key, value and aggregate; patchwise attention's hidden layer besides."""
    channels, x = 256, images(4, 256, 14, 14).contiguous(memory_format=format_).requires_grad_()
    block = block_of(attention, channels, 7)
    widths = channels + 2 * channels // 16 + 2 * channels // 4 + (channels // 32 if attention == "patchwise" else 0)
    maps = 4 * widths * 4 * 14 * 14
    found = kept(block, x)
    assert is_joined(block(x))
    assert maps <= found <= 1.05 * maps


@NATIVE
def test_networks_keep_no_more_than_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """In PyTorch's operators; what kernels keep is counted in tests/test_gpu_benchmark.py without running them."""
    monkeypatch.setattr(triton, "runs", lambda *_: False)
    x = images(2, 3, 64, 64)
    resnet = kept(san.create_model("baseline_resnet26", num_classes=10), x)
    networks = [san.create_model(f"san10_{attention}", num_classes=10) for attention in ("pairwise", "patchwise")]
    found = [kept(network, x) for network in networks]
    assert max(found) < 0.9 * resnet
    monkeypatch.setattr(gpu, "DEVICES", set())
    monkeypatch.setattr(fused, "suits", lambda x: False)
    for few, network in zip(found, networks, strict=True):
        assert few < 0.5 * kept(network, x)

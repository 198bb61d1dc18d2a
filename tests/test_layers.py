"""The layers inside anyone's network: in place of a convolution, with every option, in every dtype, changed by hand."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import san
from san.errors import UserError
from san.layers import ATTENTIONS, PairwiseAttention, PatchwiseAttention, ScalarAttention, SelfAttentionBlock
from san.ops import Footprint, backends, use_backend
from san.ops.normalization import SynchronizedBatchNorm2d, synchronize_batch_norm

LAYERS = list(ATTENTIONS.values())


def _random(module: nn.Module) -> Any:
    """`module` with every BatchNorm tensor random: at its first values it hides mistakes."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)
            for tensor in (part.weight, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return module


GEOMETRIES = [(3, 1, 1), (7, 1, 1), (5, 2, 1), (3, 1, 2), (7, 3, 2), (1, 2, 1)]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 7), (14, 9)], ids=str)
@pytest.mark.parametrize("border", ["reflect", "zeros"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), GEOMETRIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_stands_where_a_convolution_stands(
    layer: type, kernel: int, stride: int, dilation: int, border: str, size: tuple[int, int]
):
    geometry = (32, 16, kernel, stride)
    convolution = nn.Conv2d(*geometry, padding=dilation * (kernel // 2), dilation=dilation)
    attention = layer(*geometry, dilation, border=border)
    x = torch.randn(3, 8, *size)
    sizes = []
    for middle in (convolution, attention):
        y = nn.Sequential(nn.Conv2d(8, 32, 1), middle, nn.ReLU(), nn.Conv2d(16, 4, 1))(x)
        y.square().sum().backward()
        sizes.append(y.shape)
        assert all(parameter.grad.isfinite().all() for parameter in middle.parameters())
    assert sizes[0] == sizes[1]


OPTIONS: list[tuple[type, dict[str, Any]]] = [
    *((PairwiseAttention, {"relation": each}) for each in ("summation", "hadamard", "concatenation", "dot")),
    *((PatchwiseAttention, {"relation": each}) for each in ("star", "clique")),
    *((layer, {"mapping": each}) for layer in LAYERS[:2] for each in ("L", "LRL", "LRLRL")),
    *((PairwiseAttention, {"position": each}) for each in ("absolute", "none")),
    *((layer, {"share": each}) for layer in LAYERS[:2] for each in (1, 16)),
    *((layer, {"transformations": "query=key"}) for layer in LAYERS),
    *((layer, {"transformations": "query=key=value", "relation_channels": 16}) for layer in LAYERS),
    *((layer, {"relation_channels": 3}) for layer in LAYERS),
    *((layer, {"kernel_size": 3, "stride": 2, "dilation": 3, "border": "zeros"}) for layer in LAYERS),
]


@pytest.mark.parametrize(("layer", "options"), OPTIONS, ids=str)
def test_every_option_computes_the_same_on_every_backend_that_takes_it(layer: type, options: dict[str, Any]):
    attention = _random(layer(32, 16, **options)).double()
    x = torch.randn(2, 32, 6, 5).double()
    found = {}
    for backend in backends():
        twin = copy.deepcopy(attention)
        try:
            with use_backend(backend):
                y = twin(x)
        except UserError:
            continue
        y.square().sum().backward()
        found[backend] = [y, *(parameter.grad for parameter in twin.parameters()), *twin.buffers()]
    assert {"tiled", "reference"} <= found.keys()
    for each, other in itertools.combinations(found.values(), 2):
        for one, two in zip(each, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_options_change_the_function():
    x = torch.randn(2, 32, 6, 5)
    seen = set()
    for layer, options in [(layer, {}) for layer in LAYERS] + OPTIONS:
        torch.manual_seed(0)
        seen.add(layer(32, 16, **options)(x).sum().item())
    assert len(seen) == len(OPTIONS) + len(LAYERS) - 2  # mapping LRL is the default of two layers


def test_parameter_names_and_shapes():
    shapes = {name: tuple(each.shape) for name, each in PairwiseAttention(64, 32, 5).named_parameters()}
    assert shapes == {
        "conv1.weight": (4, 64, 1, 1),
        "conv1.bias": (4,),
        "conv2.weight": (4, 64, 1, 1),
        "conv2.bias": (4,),
        "conv3.weight": (32, 64, 1, 1),
        "conv3.bias": (32,),
        "conv_w.0.weight": (6,),
        "conv_w.0.bias": (6,),
        "conv_w.2.weight": (4, 6, 1, 1),
        "conv_w.3.weight": (4,),
        "conv_w.3.bias": (4,),
        "conv_w.5.weight": (4, 4, 1, 1),
        "conv_w.5.bias": (4,),
        "conv_p.weight": (2, 2, 1, 1),
        "conv_p.bias": (2,),
    }
    patchwise = {name: tuple(each.shape) for name, each in PatchwiseAttention(64, 32, 5).named_parameters()}
    assert not any(name.startswith("conv_p") for name in patchwise)
    assert patchwise["conv_w.2.weight"] == (4, 4 * 26, 1, 1)
    assert patchwise["conv_w.5.weight"] == (100, 4, 1, 1)
    assert set(dict(ScalarAttention(64, 32, 5).named_children())) == {"conv1", "conv2", "conv3"}
    one = ScalarAttention(64, 4, transformations="query=key=value")
    assert set(dict(one.named_children())) == {"conv1"}


def test_description_names_the_geometry():
    text = repr(PatchwiseAttention(64, 32, 5, dilation=2, border="zeros"))
    assert "64, 32, relation_channels=4, kernel_size=5, stride=1, dilation=2, border=zeros" in text


@pytest.mark.parametrize("channels", [1, 15, 16, 31, 64])
def test_relation_width_is_a_sixteenth_of_the_input_and_at_least_one(channels: int):
    assert ScalarAttention(channels, 8).relation_channels == max(channels // 16, 1)


def test_value_channel_uses_weight_group_c_mod_g():
    layer = PatchwiseAttention(4, 6, 3, share=2)
    nn.init.zeros_(layer.conv_w[5].weight)
    nn.init.zeros_(layer.conv_w[5].bias)
    # Group g weighs the centre by g + 1 and nothing else.
    with torch.no_grad():
        layer.conv_w[5].bias.view(3, 9)[:, 4] = torch.tensor([1.0, 2, 3])
    x = torch.randn(2, 4, 5, 5)
    expected = layer.conv3(x) * torch.tensor([1, 2, 3, 1, 2, 3]).view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer", LAYERS[:2])
@pytest.mark.parametrize("training", [False, True])
def test_hook_on_a_part_of_the_mapping_is_honoured(layer: type, training: bool):
    attention = _random(layer(32, 16, 5)).double().train(training)
    x = torch.randn(2, 32, 6, 5).double()
    listened, seen = copy.deepcopy(attention), []
    listened.conv_w[2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = listened(x)
    assert len(seen) == 1
    torch.testing.assert_close(y, copy.deepcopy(attention)(x), rtol=1e-10, atol=1e-12)
    attention.conv_w[2].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    changed = attention(x)
    assert not torch.allclose(changed, y)
    nn.init.zeros_(attention.conv_w[2].weight)
    torch.testing.assert_close(attention(x), changed)
    with pytest.raises(ValueError, match="opaque callable"), use_backend("tiled"):
        attention(x)


@pytest.mark.parametrize("register", ["forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_every_kind_of_hook_fires(register: str):
    attention, fired = PairwiseAttention(32, 16, 5), []
    getattr(attention.conv_w[3], f"register_{register}")(lambda *_: fired.append(register))
    attention(torch.randn(2, 32, 6, 5)).sum().backward()
    assert fired == [register]


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("layer", LAYERS[:2])
def test_parametrisation_of_a_part_of_the_mapping_is_honoured(layer: type):
    attention = _random(layer(32, 16, 5))
    x = torch.randn(2, 32, 6, 5)
    doubled = copy.deepcopy(attention)
    parametrize.register_parametrization(doubled.conv_w[5], "weight", _Doubled())
    with torch.no_grad():
        attention.conv_w[5].weight.mul_(2)
    torch.testing.assert_close(doubled(x), attention(x))
    doubled(x).square().sum().backward()
    assert doubled.conv_w[5].parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["conv1", "conv3", "conv_p"])
def test_parametrisation_of_a_transformation_is_honoured(name: str):
    attention = _random(PairwiseAttention(32, 16, 5))
    x = torch.randn(2, 32, 6, 5)
    doubled = copy.deepcopy(attention)
    parametrize.register_parametrization(getattr(doubled, name), "weight", _Doubled())
    with torch.no_grad():
        getattr(attention, name).weight.mul_(2)
    torch.testing.assert_close(doubled(x), attention(x))


def test_parts_of_the_mapping_may_be_replaced():
    x = torch.randn(2, 32, 6, 5)
    attention = PairwiseAttention(32, 16, 5)
    attention.conv_w[1] = nn.GELU()
    assert attention(x).isfinite().all()
    attention.conv_w = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1))
    assert attention(x).shape == (2, 16, 6, 5)
    scalar = PairwiseAttention(32, 16, 5, relation="dot", position="none")
    scalar.conv_w = nn.Identity()
    like = ScalarAttention(32, 16, 5)
    like.load_state_dict(scalar.state_dict())
    torch.testing.assert_close(scalar(x), like(x))


@pytest.mark.parametrize("layer", LAYERS[:2])
@pytest.mark.parametrize("place", [2, 5])
@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 1}], ids=str)
def test_convolution_of_another_geometry_in_the_mapping_is_not_taken_for_a_pointwise_one(
    layer: type, place: int, geometry: dict[str, int]
):
    attention = layer(32, 16, 5)
    taken, given = attention.conv_w[place].in_channels, attention.conv_w[place].out_channels
    attention.conv_w[place] = nn.Conv2d(taken, given, 1, **geometry)
    with pytest.raises(UserError, match="mapping"):
        attention(torch.randn(2, 32, 6, 5))


@pytest.mark.parametrize("layer", LAYERS[:2])
@pytest.mark.parametrize("path", ["conv_w", "conv_w.0", "conv_w.1", "conv_w.5"])
def test_forward_put_on_a_part_of_the_mapping_is_honoured(layer: type, path: str):
    attention = _random(layer(32, 16, 5)).eval()
    part, x = attention.get_submodule(path), torch.randn(2, 32, 6, 5)
    before, forward = attention(x), part.forward
    part.forward = lambda x: 3 * forward(x)
    changed = attention(x)
    assert not torch.allclose(changed, before)
    part.forward = forward
    torch.testing.assert_close(attention(x), before)


HALVES = [(torch.bfloat16, 0.05), (torch.float16, 0.008)]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), HALVES)
@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision_stays_close(layer: type, dtype: torch.dtype, tolerance: float, hooked: bool):
    attention = layer(32, 16, 5)
    x = torch.randn(2, 32, 9, 8)
    expected = attention(x)
    if hooked and layer is not ScalarAttention:
        attention.conv_w[2].register_forward_hook(lambda *_: None)
    y = attention.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_stays_close(layer: type):
    attention = layer(32, 16, 5)
    x = torch.randn(2, 32, 9, 8)
    expected = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
        y.square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() <= 0.03 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_synchronised_batch_norm_takes_its_place():
    block = _random(SelfAttentionBlock(64, 5)).double()
    twin = synchronize_batch_norm(copy.deepcopy(block))
    norms = [part for part in twin.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {type(part) for part in norms} == {SynchronizedBatchNorm2d}
    x = torch.randn(2, 64, 6, 5).double()
    torch.testing.assert_close(twin(x), block(x), rtol=0, atol=0)
    assert twin.state_dict().keys() == block.state_dict().keys()
    for (name, one), other in zip(twin.named_buffers(), block.buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("layer", [*LAYERS, SelfAttentionBlock])
def test_copies_and_pickles_compute_the_same(layer: type):
    attention = _random(layer(32, 16, 5) if layer in LAYERS else layer(32, 5)).eval()
    x = torch.randn(2, 32, 6, 5)
    fresh = copy.deepcopy(attention)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    fresh.load_state_dict(attention.state_dict())
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), fresh):  # noqa: S301 (made here)
        assert torch.equal(twin(x), attention(x))
        assert twin.training is False


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_block_is_a_residual_bottleneck(attention: str):
    block = SelfAttentionBlock(64, 5, attention)
    assert (block.sam.out_channels, block.sam.relation_channels) == (16, 4)
    wide = SelfAttentionBlock(64, 5, attention, value_reduction=2, relation_reduction=8, dilation=2)
    assert (wide.sam.out_channels, wide.sam.relation_channels) == (32, 8)
    assert wide.sam.footprint == Footprint(5, 1, 2)
    x = torch.randn(2, 64, 6, 5)
    assert wide(x).shape == block(x).shape == x.shape
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    assert torch.equal(block(x), x)


def test_drop_path_skips_whole_images_in_training_only():
    block = SelfAttentionBlock(32, 3, drop_path=0.5)
    x = torch.randn(64, 32, 4, 4)
    skipped = (block(x) == x).flatten(1).all(1)
    assert 10 < skipped.sum() < 54
    plain = SelfAttentionBlock(32, 3).eval()
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x), plain(x))


@pytest.mark.parametrize(
    ("layer", "arguments", "options", "reason"),
    [
        (PairwiseAttention, (32, 16, 4), {}, "kernel_size is 4, but it must be odd and at least 1"),
        (PatchwiseAttention, (32, 16, -1), {}, "kernel_size is -1"),
        (ScalarAttention, (32, 16, 3, 0), {}, "stride is 0 and dilation 1, but both must be at least 1"),
        (ScalarAttention, (32, 16, 3, 1, 0), {}, "dilation 0"),
        (PairwiseAttention, (0, 16), {}, "in_channels, out_channels and relation_channels are 0, 16 and 1"),
        (PairwiseAttention, (32, 16), {"relation_channels": 0}, "are 32, 16 and 0, but they must be at least 1"),
        (PairwiseAttention, (32, 16), {"share": 3}, "share is 3, but it must divide out_channels, which is 16"),
        (PairwiseAttention, (32, 16), {"share": 0}, "share is 0"),
        (PatchwiseAttention, (32, 4), {}, "share is 8, but it must divide out_channels, which is 4"),
        (
            PairwiseAttention,
            (32, 16),
            {"relation": "star"},
            "pairwise relation 'star' is unknown; choose one of",
        ),
        (
            PatchwiseAttention,
            (32, 16),
            {"relation": "dot"},
            "patchwise relation 'dot' is unknown; choose one of",
        ),
        (PairwiseAttention, (32, 16), {"mapping": "LL"}, "mapping 'LL' is unknown; choose one of: L, LRL, LRLRL"),
        (PairwiseAttention, (32, 16), {"position": "x"}, "position 'x' is unknown; choose one of: none, relative, abs"),
        (ScalarAttention, (32, 16), {"border": "wrap"}, "border 'wrap' is unknown; choose one of: reflect, zeros"),
        (
            ScalarAttention,
            (32, 16),
            {"transformations": "same"},
            "transformations 'same' is unknown; choose one",
        ),
        (
            ScalarAttention,
            (32, 16),
            {"transformations": "query=key=value"},
            "is 2 and out_channels is 16",
        ),
        (
            SelfAttentionBlock,
            (64, 7, "local"),
            {},
            "attention 'local' is unknown; choose one of: pairwise",
        ),
        (
            SelfAttentionBlock,
            (64,),
            {"stride": 2},
            "a block's pairwise attention has no option 'stride'; choose among",
        ),
        (SelfAttentionBlock, (64, 7, "scalar"), {"share": 8}, "a block's scalar attention has no option 'share'"),
        (
            SelfAttentionBlock,
            (64,),
            {"value_reduction": 128},
            "leave some of 64 channels",
        ),
    ],
)
def test_mistakes_in_building(layer: type, arguments: tuple[Any, ...], options: dict[str, Any], reason: str):
    with pytest.raises(UserError) as caught:
        layer(*arguments, **options)
    assert reason in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 31, 5, 5), (32, 5, 5), (2, 5, 5, 32)])
@pytest.mark.parametrize("layer", LAYERS)
def test_mistakes_in_the_input(layer: type, shape: tuple[int, ...]):
    with pytest.raises(UserError, match=r"the layer takes \[B, 32, H, W\], but the input is \["):
        layer(32, 16)(torch.randn(shape))


def test_batchnorm_over_one_value_is_refused_in_training():
    layer = PatchwiseAttention(32, 16)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(torch.randn(1, 32, 1, 1))
    assert layer.eval()(torch.randn(1, 32, 1, 1)).shape == (1, 16, 1, 1)


def test_layers_are_public():
    assert san.PairwiseAttention is PairwiseAttention
    assert san.SelfAttentionBlock is SelfAttentionBlock

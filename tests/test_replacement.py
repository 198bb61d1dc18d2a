"""Attention in place of 3×3 convolutions: where, with what geometry, and that everything else stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

import san
from san import PairwiseAttention, PatchwiseAttention, ScalarAttention, replace_convolutions
from san.checkpoints import save_model
from san.errors import UserError

FORMS = {"pairwise": PairwiseAttention, "patchwise": PatchwiseAttention, "scalar": ScalarAttention}


def _resnet(**options: Any) -> nn.Module:
    """timm's ResNet26 with an eighth of its width."""
    return timm.create_model("resnet26", num_classes=5, **{"channels": (8, 16, 32, 64), **options})


def _kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in model.named_modules()}


@pytest.mark.parametrize("form", FORMS)
def test_chosen_layers_are_replaced_and_all_else_is_kept_bit_for_bit(form: str):
    model = _resnet()
    model(torch.randn(2, 3, 64, 64))  # running averages that differ from a new network's
    kinds, state = _kinds(model), copy.deepcopy(model.state_dict())
    returned, replaced = replace_convolutions(model, "layer[34]", form)
    assert returned is model
    assert list(replaced) == [f"layer{stage}.{block}.conv2" for stage in (3, 4) for block in (0, 1)]
    inside = tuple(f"{name}." for name in replaced)
    for name, kind in _kinds(model).items():
        if name in replaced:
            assert (kind, kinds[name]) == (FORMS[form], nn.Conv2d)
            assert model.get_submodule(name) is replaced[name]
        elif not name.startswith(inside):
            assert kind is kinds[name], name
    now = model.state_dict()
    kept = [key for key in state if not key.startswith(inside)]
    assert kept == [key for key in now if not key.startswith(inside)]
    assert all(torch.equal(state[key], now[key]) for key in kept)


def test_the_network_calls_the_layer_where_it_called_the_convolution():
    first, last = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1)
    model, replaced = replace_convolutions(nn.Sequential(first, nn.Conv2d(16, 8, 3, 2, 1), nn.ReLU(), last))
    x = torch.randn(2, 3, 9, 10)
    model.eval()
    assert torch.equal(model(x), last(replaced["1"](first(x)).relu()))


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("size", [(8, 8), (11, 6)])
def test_stride_and_dilation_are_honoured(kind: type, stride: int, dilation: int, size: tuple[int, int]):
    convolution = kind(16, 24, 3, stride=stride, padding=dilation, dilation=dilation)
    layer, replaced = replace_convolutions(convolution, form="patchwise", kernel_size=5)
    assert replaced == {"": layer}
    assert (layer.footprint.stride, layer.footprint.dilation) == (stride, dilation)
    x = torch.randn(2, 16, *size)
    assert layer(x).shape == convolution(x).shape


def test_dilated_resnet_keeps_its_map():
    model = _resnet(output_stride=8)
    x = torch.randn(1, 3, 48, 40)
    shape = model.forward_features(x).shape
    _, replaced = replace_convolutions(model, ["layer3", "layer4"])
    assert [layer.footprint.dilation for layer in replaced.values()] == [1, 2, 2, 4]
    assert model.forward_features(x).shape == shape


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("layer4.1.conv2", ["layer4.1.conv2"]),
        ("layer4.1", ["layer4.1.conv2"]),
        ("layer?.1.conv*", [f"layer{stage}.1.conv2" for stage in (1, 2, 3, 4)]),
        (("layer1.0", "*4.1.*"), ["layer1.0.conv2", "layer4.1.conv2"]),
        (lambda name, convolution: convolution.stride == (2, 2), [f"layer{stage}.0.conv2" for stage in (2, 3, 4)]),
        (lambda name, convolution: "layer2.1" in name, ["layer2.1.conv2"]),
    ],
)
def test_layers_are_names_patterns_or_a_predicate(layers: Any, expected: list[str]):
    _, replaced = replace_convolutions(_resnet(), layers)
    assert list(replaced) == expected


def test_options_reach_the_layers():
    options: dict[str, Any] = {
        "relation": "hadamard",
        "mapping": "L",
        "position": "none",
        "share": 4,
        "border": "zeros",
    }
    _, replaced = replace_convolutions(_resnet(), "layer3", kernel_size=7, relation_reduction=4, **options)
    for layer in replaced.values():
        assert layer.footprint.kernel_size == 7
        assert layer.relation_channels == layer.in_channels // 4 == 8
        assert (layer.relation, layer.position, layer.groups, layer.footprint.border) == (
            "hadamard",
            "none",
            8,
            "zeros",
        )


@pytest.mark.parametrize("again", ["*", "layer3", lambda name, convolution: True], ids=["all", "name", "predicate"])
def test_a_second_call_changes_nothing(again: Any):
    layers = again if callable(again) else "*"
    model, first = replace_convolutions(_resnet(), layers)
    state = copy.deepcopy(model.state_dict())
    _, second = replace_convolutions(model, again, "patchwise", kernel_size=7)
    assert first
    assert second == {}
    assert all(model.get_submodule(name) is layer for name, layer in first.items())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_attention_that_is_there_is_left_alone():
    attention = PairwiseAttention(16, 16)
    attention.conv_w[2] = nn.Conv2d(attention.conv_w[2].in_channels, 1, 3, padding=1)  # someone's own γ
    model = nn.Sequential(attention, nn.Conv2d(16, 8, 3, padding=1))
    _, replaced = replace_convolutions(model)
    assert list(replaced) == ["1"]


def test_a_convolution_in_several_places_gives_way_to_one_layer():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model, replaced = replace_convolutions(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(replaced) == ["0", "2"]
    assert model[0] is model[2] is replaced["0"] is replaced["2"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_and_mode_are_the_convolutions(dtype: torch.dtype, training: bool):
    model, replaced = replace_convolutions(_resnet().to(dtype).train(training), "layer4")
    for layer in replaced.values():
        assert {tensor.dtype for tensor in layer.state_dict().values() if tensor.is_floating_point()} == {dtype}
        assert all(part.training == training for part in layer.modules())
    logits = model(torch.randn(2, 3, 64, 64, dtype=dtype))
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_device_is_the_convolutions():
    model = _resnet().to("meta")
    _, replaced = replace_convolutions(model, "layer4")
    assert {tensor.device.type for layer in replaced.values() for tensor in layer.state_dict().values()} == {"meta"}


def _are_channels_last(layers: dict[str, nn.Module]) -> set[bool]:
    """How the weights of the layers are laid out."""
    weights = [part.weight for layer in layers.values() for part in layer.modules() if isinstance(part, nn.Conv2d)]
    return {weight.stride()[2:] != (1, 1) for weight in weights if weight.shape[1] > 1}


def test_memory_format_is_the_convolutions():
    assert _are_channels_last(replace_convolutions(_resnet(), "layer4")[1]) == {False}
    model, replaced = replace_convolutions(_resnet().to(memory_format=torch.channels_last), "layer4")
    assert _are_channels_last(replaced) == {True}
    maps = model.forward_features(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_only_new_layers_train_in_a_frozen_network():
    model = _resnet().requires_grad_(False)
    _, replaced = replace_convolutions(model, "layer4")
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{name}.{key}" for name, layer in replaced.items() for key, _ in layer.named_parameters()}


def test_state_dict_goes_into_a_network_replaced_alike():
    x = torch.randn(2, 3, 64, 64)
    one, other = (replace_convolutions(_resnet(), "layer[34]", "patchwise")[0] for _ in range(2))
    one(x)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_torch_compile_takes_the_network():
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1))
    model, _ = replace_convolutions(replace_convolutions(network, "1")[0], "3", "patchwise")
    x = torch.randn(2, 3, 12, 12)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_features_only_network():
    model = timm.create_model("resnet26", features_only=True, channels=(8, 16, 32, 64))
    x = torch.randn(1, 3, 64, 64)
    before = [each.shape for each in model(x)]
    replace_convolutions(model, "layer3")
    assert [each.shape for each in model(x)] == before


def test_a_network_of_ours_is_no_longer_what_its_name_says(tmp_path):
    model = san.create_model("baseline_resnet26", 5, channels=(8, 16, 32, 64), small_images=True)
    save_model(model, tmp_path / "model.safetensors")
    replace_convolutions(model, "layer4")
    with pytest.raises(UserError, match=r"only a model made by san\.create_model can be saved"):
        save_model(model, tmp_path / "replaced.safetensors")


def _convolution(**options: Any) -> nn.Module:
    return nn.ModuleDict(
        {"odd": nn.Conv2d(16, 16, 3, **{"padding": 1, **options}), "fit": nn.Conv2d(8, 8, 3, padding=1)}
    )


@pytest.mark.parametrize(
    ("build", "arguments", "reason"),
    [
        (
            _resnet,
            {"layers": "layer5"},
            "nothing that 'layer5' names is or holds a 3×3 convolution; choose among: layer1",
        ),
        (_resnet, {"layers": ["layer4", "fc"]}, "nothing that 'fc' names is or holds"),
        (
            _resnet,
            {"layers": "conv1"},
            "conv1 is a 7×7 convolution, but only 3×3 ones are replaced; choose among: layer1",
        ),
        (lambda: nn.Linear(2, 2), {}, "the network has no 3×3 convolution"),
        (
            lambda: _convolution(groups=4),
            {},
            "odd has 4 groups, but attention takes all channels together; choose among: fit",
        ),
        (lambda: _convolution(stride=(2, 1)), {}, "odd has stride 2 down and 1 across, but attention has one"),
        (lambda: _convolution(dilation=(1, 2)), {}, "odd has dilation 1 down and 2 across"),
        (
            lambda: _convolution(padding=0),
            {},
            "odd has padding (0, 0), but attention gives the size that padding (1, 1)",
        ),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), {}, "the convolution has 8 groups, but attention takes all"),
        (
            lambda: nn.Sequential(nn.LazyConv2d(8, 3, padding=1)),
            {},
            "0 does not know its channels before its first input",
        ),
        (
            lambda: _resnet(channels=(8, 12, 16, 20)),
            {"form": "patchwise"},
            "share is 8, but it must divide out_channels, which is 12 in layer2.0.conv2; "
            "for the chosen layers choose among: 1, 2, 4",
        ),
        (_resnet, {"share": 0}, "share is 0, but it must divide out_channels"),
        (_resnet, {"form": "triplewise"}, "form 'triplewise' is unknown; choose one of: pairwise, patchwise, scalar"),
        (
            _resnet,
            {"form": "patchwise", "position": "none"},
            "patchwise attention has no option 'position' here; choose",
        ),
        (
            _resnet,
            {"relation_channels": 4},
            "no option 'relation_channels' here; choose among: kernel_size, relation_red",
        ),
        (_resnet, {"relation_reduction": 0}, "relation_reduction is 0, but it must be at least 1"),
        (_resnet, {"kernel_size": 4}, "kernel_size is 4, but it must be odd"),
        (_resnet, {"mapping": "R"}, "mapping 'R' is unknown"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_changes_nothing(build: Any, arguments: dict[str, Any], reason: str):
    model = build()
    before = _kinds(model)
    with pytest.raises(UserError) as caught:
        replace_convolutions(model, **arguments)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _kinds(model) == before


def test_a_share_that_the_sentence_offers_is_right():
    model = _resnet(channels=(8, 12, 16, 20))
    _, replaced = replace_convolutions(model, share=4)
    assert len(replaced) == 8
    logits: Tensor = model(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 5)

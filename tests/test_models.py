"""The networks: the authors' function, the paper's sizes, timm's protocol as its own tests put it, and every option."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import san
from plain_san import plain_san, randomised
from san.errors import UserError
from san.models import SAN
from san.ops import use_backend
from san.ops.dispatch import forced_backend
from san.weights import NETWORKS

NAMES = san.list_models()
SANS = [name for name in NAMES if name.startswith("san")]
SMALL = ["san4_pairwise", "san4_patchwise", "baseline_resnet26"]


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", SANS)
def test_network_is_the_authors_function(name: str, training: bool):
    model = san.create_model(name, 10).double().train(training)
    state = randomised(model.state_dict())
    model.load_state_dict(state)
    x = _images(3, 3, 64, 48).double()
    with torch.no_grad():
        logits = model(x)
    network = NETWORKS[name.split("_")[0]]
    expected = plain_san(state, x, network, pairwise="pairwise" in name, training=training)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    averages = {key: value for key, value in model.state_dict().items() if "running" in key}
    for key, value in averages.items():
        torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ["san4_pairwise", "san4_patchwise"])
def test_gradients_are_those_of_the_authors_function(name: str):
    model = san.create_model(name, 10).double()
    state = randomised(model.state_dict())
    model.load_state_dict(state)
    leaves = {key: state[key].requires_grad_() for key, _ in model.named_parameters()}
    x = _images(2, 3, 40, 32).double()
    expected = plain_san(state, x, NETWORKS["san4"], pairwise="pairwise" in name, training=True)
    direction = _images(2, 10).double()
    gradients = torch.autograd.grad(expected, list(leaves.values()), direction)
    model(x).backward(direction)
    largest = max(gradient.abs().max() for gradient in gradients)
    for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11 * largest, msg=key)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("baseline_resnet26", 13.7),
        ("baseline_resnet38", 19.6),
        ("baseline_resnet50", 25.6),
        ("san10_pairwise", 10.5),
        ("san10_patchwise", 11.8),
        ("san15_pairwise", 14.1),
        ("san15_patchwise", 16.2),
        ("san19_pairwise", 17.6),
        ("san19_patchwise", 20.5),
    ],
)
def test_parameter_count_is_the_papers(name: str, millions: float):
    with torch.device("meta"):
        model = san.create_model(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions


def test_keys_are_the_authors():
    keys = {key.removesuffix(".weight") for key in san.create_model("san10_pairwise").state_dict() if "weight" in key}
    attention = {"conv1", "conv2", "conv3", "conv_p", "conv_w.0", "conv_w.2", "conv_w.3", "conv_w.5"}
    block = {"bn1", "bn2", "conv", *(f"sam.{part}" for part in attention)}
    blocks = {f"layer{stage}.{place}" for stage, count in enumerate((2, 1, 2, 4, 1)) for place in range(count)}
    stages = {f"{part}{stage}" for part in ("conv", "bn") for stage in range(5)}
    assert keys == {"conv_in", "bn_in", "fc"} | stages | {f"{each}.{part}" for each in blocks for part in block}


def test_networks_are_registered_with_timm():
    assert set(NAMES) <= set(timm.list_models())
    assert set(timm.list_models("san*_p*wise")) == set(SANS)
    assert isinstance(timm.create_model("san10_patchwise"), SAN)


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_reach_every_parameter(name: str):
    model = san.create_model(name, 42)
    logits = model(_images(2, 3, 64, 96))
    assert logits.shape == (2, 42)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_default_config_tells_the_truth(name: str):
    model = san.create_model(name).eval()
    config = model.pretrained_cfg
    assert f"{config['first_conv']}.weight" in model.state_dict()
    assert f"{config['classifier']}.weight" in model.state_dict()
    assert (config["architecture"], config["num_classes"], config["label_names"]) == (name, 1000, None)
    assert (model.architecture, model.options, model.num_classes) == (name, {}, 1000)
    with torch.no_grad():
        features = model.forward_features(_images(1, *config["input_size"]))
        assert features.shape == (1, model.num_features, *config["pool_size"])
        assert model.forward_head(features, pre_logits=True).shape == (1, model.num_features)
        model.reset_classifier(0)
        assert model.forward_head(features).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model.forward_head(features), features)
        model.reset_classifier(7, "max")
        assert model.forward_head(features).shape == (1, 7)
        assert model.get_classifier() is model.fc


def test_new_classifier_is_of_the_models_kind():
    model = san.create_model("san4_patchwise", 3).bfloat16().eval()
    model.reset_classifier(5)
    assert (model.fc.weight.dtype, model.fc.training, model.num_classes) == (torch.bfloat16, False, 5)
    model.reset_classifier(5, "catavgmax")
    assert model.float()(_images(1, 3, 28, 28)).shape == (1, 5)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_other_numbers_of_input_channels(name: str, channels: int):
    model = san.create_model(name, 5, in_chans=channels).eval()
    assert model(_images(1, channels, 64, 64)).shape == (1, 5)
    assert model.pretrained_cfg["input_size"][0] == channels


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name: str):
    model = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        maps = model(_images(1, 3, 64, 96))
    info = model.feature_info
    assert info.reduction() == ([1, 2, 4] if name.startswith("san4") else [2, 4, 8, 16, 32])
    for found, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert found.shape == (1, channels, 64 // reduction, 96 // reduction)


@pytest.mark.parametrize("indices", [(1, 2), (0,), (-1,)])
@pytest.mark.parametrize("name", SMALL)
def test_features_of_chosen_stages(name: str, indices: tuple[int, ...]):
    model = timm.create_model(name).eval()
    chosen = timm.create_model(name, features_only=True, out_indices=indices).eval()
    missing, _ = getattr(chosen, "model", chosen).load_state_dict(model.state_dict(), strict=False)
    assert not missing
    x = _images(1, 3, 32, 32)
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
        _assert_equal(chosen(x), [maps[index] for index in indices])
    assert chosen.feature_info.channels() == [maps[index].shape[1] for index in indices]


@pytest.mark.parametrize("name", SMALL)
def test_forward_intermediates(name: str):
    model = san.create_model(name).eval()
    x = _images(2, 3, 64, 64)
    with torch.no_grad():
        last, maps = model.forward_intermediates(x)
        # Equal up to rounding: where no map is asked for, a stage's end may be joined to the next one's begin.
        torch.testing.assert_close([last, maps[-1]], [model.forward_features(x)] * 2)
        assert [found.shape[1] for found in maps] == [info["num_chs"] for info in model.feature_info]
        for indices, expected in ((2, maps[-2:]), ([0, -1], [maps[0], maps[-1]]), ((1,), maps[1:2])):
            for norm, early in itertools.product((False, True), repeat=2):
                options = {"indices": indices, "norm": norm, "stop_early": early, "intermediates_only": True}
                _assert_equal(model.forward_intermediates(x, **options), expected)
        _assert_equal([model.forward_intermediates(x, 1, stop_early=True)[0]], [last])


@pytest.mark.parametrize("indices", [1, 2, [0], [1, -2]])
def test_pruned_network_gives_the_same_maps(indices: int | list[int]):
    model = san.create_model("san10_pairwise").eval()
    pruned = copy.deepcopy(model)
    kept = pruned.prune_intermediate_layers(indices)
    x = _images(1, 3, 32, 32)
    with torch.no_grad():
        _assert_equal(pruned.forward_intermediates(x, kept, intermediates_only=True), _maps(model, x, indices))
        assert pruned(x).shape == model.forward_intermediates(x, kept, stop_early=True)[0].shape
        pruned.reset_classifier(4, "avg")
        assert pruned(x).shape == (1, 4)
    assert len(pruned.feature_info) == max(kept) + 1


def _maps(model: Any, x: Tensor, indices: int | list[int]) -> list[Tensor]:
    return model.forward_intermediates(x, indices, intermediates_only=True)


@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.3}, {"drop_rate": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["san4_pairwise", "san4_patchwise"])
def test_gradient_checkpointing_changes_nothing_but_memory(name: str, options: dict[str, float]):
    kept = san.create_model(name, 5, **options).double()
    recomputed = copy.deepcopy(kept)
    recomputed.set_grad_checkpointing()
    for model in (kept, recomputed):
        torch.manual_seed(3)
        model(_images(4, 3, 32, 32).double()).square().sum().backward()
    for (key, one), other in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12, msg=key)
    _assert_equal(list(recomputed.buffers()), list(kept.buffers()))
    recomputed.set_grad_checkpointing(False)
    assert not recomputed.grad_checkpointing


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("name", ["san4_pairwise", "san4_patchwise"])
def test_gradient_checkpointing_recomputes_on_the_backend_of_the_forward(name: str, backend: str):
    kept = san.create_model(name, 5).double()
    recomputed = copy.deepcopy(kept)
    recomputed.set_grad_checkpointing()
    for model in (kept, recomputed):
        with use_backend(backend):
            loss = model(_images(2, 3, 32, 32).double()).square().sum()
        other = "reference" if backend == "tiled" else "tiled"
        with use_backend(other):
            loss.backward()
            assert forced_backend() == other
    for (key, one), two in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12, msg=key)


def test_drop_path_grows_over_the_blocks_and_only_trains():
    model = san.create_model("san4_patchwise", 5, blocks=(2, 2, 1), drop_path_rate=0.4)
    plain = san.create_model("san4_patchwise", 5, blocks=(2, 2, 1))
    plain.load_state_dict(model.state_dict())
    blocks = [block for stage in range(3) for block in model.get_submodule(f"layer{stage}").children()]
    rates = [getattr(block.drop_path, "drop_prob", 0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    x = _images(2, 3, 28, 28)
    _assert_equal([model.eval()(x)], [plain.eval()(x)])
    model.train()
    assert not torch.equal(model(x), model(x))


def test_parameter_groups_follow_the_depth():
    model = san.create_model("san4_pairwise")
    fine = {key: group for group, keys in group_parameters(model, model.group_matcher()).items() for key in keys}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    starts = {"conv_in": (0, 0), "bn_in": (0, 0), "fc": (5, 4)}
    stages = {"conv0": 1, "layer0.0": 1, "bn0": 1, "conv1": 2, "layer1.0": 2, "layer1.1": 3, "bn1": 3}
    starts |= {key: (group, int(key.partition(".")[0][-1]) + 1) for key, group in stages.items()}
    starts |= dict.fromkeys(("conv2", "layer2.0", "bn2"), (4, 3))
    for key in dict(model.named_parameters()):
        expected = next(groups for start, groups in starts.items() if key.startswith(f"{start}."))
        assert (fine[key], coarse[key]) == expected, key
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in groups} == {0.5**power for power in range(6)}


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same(name: str):
    model = san.create_model(name, 5).double().eval()
    x = _images(2, 3, 33, 40).double()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-10, atol=1e-12)


ODD = [("san10_pairwise", (96, 131)), ("san10_patchwise", (101, 97)), ("san4_pairwise", (288, 113))]


@pytest.mark.parametrize(("name", "size"), ODD)
def test_odd_sizes(name: str, size: tuple[int, int]):
    model = san.create_model(name, 5).eval()
    with torch.no_grad():
        logits, features = model(_images(1, 3, *size)), model.forward_features(_images(1, 3, *size))
    reduction = model.feature_info[-1]["reduction"]
    assert features.shape[2:] == (size[0] // reduction, size[1] // reduction)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["san10_pairwise", "san10_patchwise", "baseline_resnet26"])
def test_small_images_keep_their_size_at_first(name: str):
    model = timm.create_model(name, features_only=True, small_images=True).eval()
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]
    with torch.no_grad():
        assert [found.shape[2:] for found in model(_images(1, 3, 32, 24))] == [
            (32, 24),
            (32, 24),
            (16, 12),
            (8, 6),
            (4, 3),
        ]
    classifier = san.create_model(name, 10, small_images=True).eval()
    assert classifier.options == {"small_images": True}
    assert classifier(_images(1, 3, 16, 16)).shape == (1, 10)


ABLATIONS = [
    *({"relation": relation} for relation in ("subtraction", "summation", "hadamard", "concatenation", "dot")),
    *({"attention": "patchwise", "relation": relation} for relation in ("concatenation", "star", "clique")),
    {"attention": "scalar"},
    *({"mapping": mapping} for mapping in ("L", "LRL", "LRLRL")),
    *({"attention": "patchwise", "mapping": mapping} for mapping in ("L", "LRLRL")),
    *({"position": position} for position in ("none", "absolute", "relative")),
    {"transformations": "query=key"},
    {"transformations": "query=key=value", "relation_reduction": 4},
    {"kernels": (3, 3, 11)},
    {"share": 1},
    {"border": "zeros", "dilation": 2},
    {"value_reduction": 2, "relation_reduction": 8},
    {"blocks": (1, 1), "widths": (32, 64), "kernels": (3, 5), "pools": (False, True)},
]


@pytest.mark.parametrize("options", ABLATIONS, ids=str)
def test_every_ablation_trains(options: dict[str, Any]):
    model = san.create_model("san4_pairwise", 3, **options)
    assert model.options == options
    model(_images(2, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_smaller_baseline():
    options = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "small_images": True}
    model = san.create_model("baseline_resnet26", 5, **options).eval()
    assert model.options == options
    assert model.forward_features(_images(1, 3, 16, 16)).shape == (1, 256, 2, 2)


def test_baselines_start_with_live_branches():
    model = san.create_model("baseline_resnet26")
    assert all((block.bn3.weight == 1).all() for stage in (1, 2, 3, 4) for block in getattr(model, f"layer{stage}"))


def _step(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Logits, gradients and running averages of a training step."""
    logits = run(_images(2, 3, 28, 28).double())
    logits.square().sum().backward()
    return [logits, *(parameter.grad for parameter in model.parameters()), *model.buffers()]


# The first backend compiles nothing: it shows quickly that a training step is one graph, and the right one.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["san4_pairwise", "san4_patchwise"])
def test_torch_compile_gives_the_same_training_step(name: str, backend: str):
    model = san.create_model(name, 5, blocks=(0, 1, 0)).double()
    compiled = copy.deepcopy(model)
    found = _step(compiled, torch.compile(compiled, fullgraph=True, backend=backend))
    for each, other in zip(found, _step(model, model), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["san4_pairwise", "san4_patchwise"])
def test_exports_with_any_batch(name: str):
    model = san.create_model(name, 5).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (_images(2, 3, 28, 28),), dynamic_shapes={"x": {0: batch}})
    x = _images(5, 3, 28, 28)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_created_under_another_default_device_and_dtype():
    with torch.device("meta"):
        assert san.create_model("san4_pairwise", drop_path_rate=0.1).fc.weight.is_meta
    assert san.create_model("san4_pairwise").fc.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "san11_pairwise",
            {},
            r"'san11_pairwise' is unknown \(the nearest is san1\d_pairwise\); choose one of: s",
        ),
        ("resnet26", {}, "the nearest is baseline_resnet26"),
        ("", {}, "is unknown"),
        ("san4_pairwise", {"kernel": 3}, "san4_pairwise has no option 'kernel'; choose among: .*kernels"),
        ("baseline_resnet26", {"kernels": 3}, "baseline_resnet26 has no option 'kernels'; .*small_images"),
        ("san4_pairwise", {"pretrained": True}, "no option 'pretrained'"),
        ("san4_pairwise", {"stride": 2}, "no option 'stride'"),
        (
            "san4_patchwise",
            {"position": "none"},
            "a block's patchwise attention has no option 'position'; choose",
        ),
        (
            "san4_pairwise",
            {"attention": "local"},
            "attention 'local' is unknown; choose one of: pairwise, pat",
        ),
        ("san4_pairwise", {"kernels": (3, 4, 5)}, "kernel_size is 4, but it must be odd"),
        ("san4_pairwise", {"kernels": (3, 5)}, "one entry a stage, but they have 3, 3, 2 and 3"),
        ("san4_pairwise", {"blocks": (-1, 1, 1)}, "blocks are .* must be at least"),
        ("san4_pairwise", {"blocks": ()}, "one entry a stage"),
        ("san4_pairwise", {"share": 5}, "share is 5, but it must divide out_channels, which is 16"),
        ("san4_pairwise", {"value_reduction": 0}, "value_reduction is 0"),
        ("san4_pairwise", {"value_reduction": 65}, "value_reduction is 65"),
        ("san4_pairwise", {"transformations": "query=key=value"}, "make relation_reduction = value_reduction"),
        ("san4_pairwise", {"widths": None, "blocks": 3}, "cannot be built"),
        ("san4_pairwise", {"global_pool": ["avg"]}, "cannot be built"),
        ("san4_pairwise", {"drop_rate": "x"}, "drop_rate is 'x', but it must be a number from 0 to 1"),
        ("baseline_resnet26", {"drop_path_rate": -0.1}, "drop_path_rate is -0.1, but it must be"),
        ("baseline_resnet26", {"block_reduce_first": 0}, "cannot be built"),
        ("baseline_resnet26", {"output_stride": 7}, "baseline_resnet26 cannot be built with"),
        ("baseline_resnet26", {"small_images": True, "stem_type": "deep"}, "plain stem only"),
    ],
)
def test_mistakes_in_building(name: str, options: dict[str, Any], reason: str):
    with pytest.raises(UserError, match=reason):
        san.create_model(name, **options)


def test_mistakes_in_the_input():
    model = san.create_model("san10_patchwise").eval()
    with pytest.raises(UserError, match=r"takes \[B, 3, H, W\], but the input is \[1, 1, 64, 64\]"):
        model(_images(1, 1, 64, 64))
    with pytest.raises(UserError, match="takes"):
        model(_images(3, 64, 64))
    with pytest.raises(UserError, match=r"31×64, but the poolings need at least 32×32 pixels"):
        model(_images(1, 3, 31, 64))
    with pytest.raises(UserError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(_images(1, 3, 64, 64), output_fmt="NHWC")

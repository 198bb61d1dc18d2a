"""Attention maps: weights against what the layer itself does, distances and roll-out by hand, figures, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import san
from plain_san import randomised
from san.attention_maps import (
    ObservedLayer,
    PixelAttention,
    attention_layers,
    attention_weights,
    effective_footprint,
    explain,
    figures,
    grad_cam,
    middle_rollout,
    observe,
    pixel_attention,
    prepare_image,
    rollout,
    shown_image,
    weights,
)
from san.attention_maps.figures import draw_distances, draw_footprints, draw_groups
from san.attention_maps.observation import find_layers, pixels_per_place
from san.checkpoints import save_model
from san.cli import main
from san.errors import UserError
from san.fused import look
from san.ops.kernels.native import library
from tiny_run import NETWORK

ROOT = Path(__file__).parents[1]

# Every form, each border rule, and strides and dilations in one.
LAYERS = {
    "pairwise": (san.PairwiseAttention, {}),
    "pairwise absolute zeros": (san.PairwiseAttention, {"position": "absolute", "border": "zeros"}),
    "pairwise dot, no position": (san.PairwiseAttention, {"relation": "dot", "position": "none", "mapping": "L"}),
    "pairwise strided": (san.PairwiseAttention, {"stride": 2, "dilation": 2, "transformations": "query=key"}),
    "patchwise": (san.PatchwiseAttention, {}),
    "patchwise star": (san.PatchwiseAttention, {"relation": "star", "mapping": "LRLRL"}),
    "patchwise clique zeros": (san.PatchwiseAttention, {"relation": "clique", "border": "zeros", "stride": 2}),
    "scalar": (san.ScalarAttention, {}),
    "scalar dilated zeros": (san.ScalarAttention, {"dilation": 2, "border": "zeros"}),
}


def _randomised(model: nn.Module) -> nn.Module:
    model.load_state_dict(randomised(model.state_dict()))
    return model.eval()


def _observed(name: str, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (6, 7)) -> ObservedLayer:
    """A layer in a network that is nothing else, with every tensor random, as it runs on two random maps."""
    kind, options = LAYERS[name]
    layer = _randomised(kind(8, 16, 5, relation_channels=3, **options)).to(dtype)
    return observe(nn.Sequential(layer), torch.randn(2, 8, *size, dtype=dtype))["0"]


def _pixels(observed: ObservedLayer) -> list[PixelAttention]:
    """All output pixels of a layer, row by row."""
    rows, columns = observed.output_size
    step = [int(each) * observed.layer.footprint.stride for each in observed.stride]
    places = [(column * step[1], row * step[0]) for row in range(rows) for column in range(columns)]
    return [pixel_attention(observed, place) for place in places]


def _output(observed: ObservedLayer) -> Tensor:
    with torch.no_grad():
        return observed.layer.attend(observed.query, observed.key, observed.value)


def _network(form: str = "pairwise", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A SAN of three small stages, each pooled but the first, with every tensor random."""
    return _randomised(san.create_model(f"san4_{form}", 5, **{**NETWORK, "pools": [False, True, True], **options})).to(
        dtype
    )


# Observation


@pytest.mark.parametrize("form", ["pairwise", "patchwise", "scalar"])
def test_observing_leaves_the_network_and_its_fast_path_alone(form):
    model = _network("pairwise", torch.float32, attention=form)
    image = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        before = model(image)
        observed = observe(model, image)
        after = model(image)
    assert torch.equal(before, after)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    assert all(look(block)[1] is not None for block in (model.layer0[0], model.layer1[0], model.layer2[0]))
    assert [layer.form for layer in observed.values()] == [form] * 3


def test_what_is_observed_is_what_the_network_computes():
    """The network run from the observed layer on, by hand, ends in its own logits."""
    model = _network()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    (observed,) = observe(model, image, ["layer2"]).values()
    inputs = []
    hook = model.layer2[0].register_forward_pre_hook(lambda block, given: inputs.append(given[0]))
    with torch.no_grad():
        logits = model(image)
        hook.remove()
        block = model.layer2[0]
        y = san.ops.aggregation(observed.value, attention_weights(observed), kernel_size=3)
        x = inputs[0] + block.conv(block.bn2(y).relu())
        found = model.forward_head(model.bn2(x).relu())
    torch.testing.assert_close(found, logits, rtol=1e-10, atol=1e-10)


def test_looking_in_training_keeps_modes_and_averages():
    model = san.create_model("san4_patchwise", 5, **NETWORK).train()
    frozen = model.layer0.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    observed = observe(model, torch.randn(2, 3, 16, 16))
    for layer in observed.values():
        attention_weights(layer)
    grad_cam(model, torch.randn(2, 3, 16, 16))
    assert {part.training for part in model.modules() if part not in set(frozen.modules())} == {True}
    assert {part.training for part in frozen.modules()} == {False}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_names_mean_layers_and_what_holds_them():
    model = san.create_model("san4_pairwise")
    every = ["layer0.0.sam", "layer1.0.sam", "layer1.1.sam", "layer2.0.sam"]
    assert list(attention_layers(model)) == every
    assert list(find_layers(model, ["layer1.1", "layer0.0.sam"])) == ["layer0.0.sam", "layer1.1.sam"]
    assert list(observe(model, torch.randn(1, 3, 28, 28), ["layer1"])) == every[1:3]
    with pytest.raises(UserError, match=r"no attention layer 'layer'; choose among: layer0\.0\.sam, layer1\.0\.sam, "):
        find_layers(model, ["layer"])
    resnet = san.create_model("baseline_resnet26", layers=(1, 1, 1, 1), channels=(8, 16, 16, 16))
    assert not observe(resnet, torch.randn(1, 3, 32, 32))
    with pytest.raises(UserError, match="the network has none at all"):
        observe(resnet, torch.randn(1, 3, 32, 32), ["layer1"])


def test_another_thread_is_not_heard():
    class Busy(nn.Module):
        """Whose layer also runs in another thread, on other images, before and after."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = san.ScalarAttention(4, 4, 3)

        def elsewhere(self) -> None:
            thread = Thread(target=lambda: self.layer(torch.zeros(1, 4, 5, 5)))
            thread.start()
            thread.join()

        def forward(self, x: Tensor) -> Tensor:
            self.elsewhere()
            y = self.layer(x)
            self.elsewhere()
            return y

    model, x = Busy(), torch.randn(1, 4, 5, 5)
    observed = observe(model, x)["layer"]
    with torch.no_grad():
        assert torch.equal(observed.query, model.layer.conv1(x))


def test_a_layer_that_does_not_run():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = san.ScalarAttention(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(UserError, match="layer layer did not run"):
        observe(Idle(), torch.zeros(1, 4, 5, 5))


# Where a place of a map lies in the image


@pytest.mark.parametrize(
    ("pixels", "places", "each"),
    [
        (224, 112, 2),
        (224, 7, 32),
        (225, 112, 2),
        (225, 113, 225 / 113),
        (35, 1, 32),
        (28, 28, 1),
        (7, 7, 1),
        (224, 16, 14),
    ],
)
def test_pixels_per_place(pixels, places, each):
    assert pixels_per_place(pixels, places) == each


def test_pixels_of_odd_images():
    """29×31 pixels: 29×31 places, then 14×15, then 7×7; what poolings dropped belongs to the last that is kept."""
    layers = list(observe(_network(dtype=torch.float32), torch.randn(1, 3, 29, 31)).values())
    assert [layer.size for layer in layers] == [(29, 31), (14, 15), (7, 7)]
    assert [layer.stride for layer in layers] == [(1, 1), (2, 2), (4, 4)]
    assert [layer.pixel_at(30, 28) for layer in layers] == [(28, 30), (13, 14), (6, 6)]
    assert [layer.pixel_at(9, 4) for layer in layers] == [(4, 9), (2, 4), (1, 2)]
    for outside in [(31, 0), (0, 29), (-1, 0), (0, -1)]:
        with pytest.raises(UserError, match=r"outside .*31×29 pixels: x must be 0 to 30 and y 0 to 28"):
            layers[0].pixel_at(*outside)


def test_strided_layers_have_their_centres_apart():
    observed = _observed("pairwise strided")
    assert observed.output_size == (3, 4)
    # Centres are at pixels 0, 2, 4, … of the map; between two of them the later one is meant.
    assert [observed.pixel_at(x, 5) for x in range(7)] == [(2, n) for n in (0, 1, 1, 2, 2, 3, 3)]


# Weights


@pytest.mark.parametrize("name", LAYERS)
def test_output_is_rebuilt_from_weights_and_value(name):
    observed = _observed(name)
    found = attention_weights(observed)
    rows, columns = observed.output_size
    assert found.shape == (2, observed.groups, 25, rows * columns)
    y = san.ops.aggregation(observed.value, found, **observed.layer.geometry())
    torch.testing.assert_close(y, _output(observed), rtol=1e-10, atol=1e-10)
    if observed.form != "patchwise":
        assert (found.sum(2) - 1).abs().max() < 1e-10


@pytest.mark.parametrize("backend", ["auto", *(name for name in san.ops.backends() if name != "triton")])
@pytest.mark.parametrize("form", ["pairwise", "patchwise", "scalar"])
def test_every_backend_in_networks(form, backend):
    """The layers' outputs inside a network, whichever backend ran it, against the recomputed weights."""
    if backend == "native" and library.load() is None:
        pytest.skip("the native library is not installed")
    model = _network("pairwise", torch.float32, attention=form)
    image, given = torch.randn(2, 3, 16, 16), {}
    layers = attention_layers(model)
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, y, name=name: given.update({name: y}))
        for name, layer in layers.items()
    ]
    with san.ops.use_backend(backend):
        observed = observe(model, image)
    for hook in hooks:
        hook.remove()
    for name, layer in observed.items():
        found = attention_weights(layer)
        y = san.ops.aggregation(layer.value, found, **layer.layer.geometry())
        torch.testing.assert_close(y, given[name], rtol=1e-5, atol=1e-5)
        if form != "patchwise":
            assert (found.sum(2) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_the_places_that_are_read(name):
    """Each weight by itself: value is 1 at one pixel of the map and 0 elsewhere, and the layer says who reads it."""
    observed = _observed(name, size=(4, 3))
    height, width = observed.size
    whole, pixels = attention_weights(observed), _pixels(observed)
    found = torch.stack([pixel.on_map(whole[..., index]) for index, pixel in enumerate(pixels)]).nan_to_num()
    for row in range(height):
        for column in range(width):
            value = torch.zeros_like(observed.value)
            value[:, :, row, column] = 1
            with torch.no_grad():
                y = observed.layer.attend(observed.query, observed.key, value)
            # Channel c uses group c mod G, so the first G channels show each group.
            expected = y[:, : observed.groups].flatten(2).permute(2, 0, 1)
            torch.testing.assert_close(found[..., row, column], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_one_pixel_is_a_part_of_the_whole(name):
    observed = _observed(name)
    whole, output = attention_weights(observed), _output(observed)
    for pixel in [(0, 0), (3, 2), (6, 5)]:
        row, column = observed.pixel_at(*pixel)
        found = pixel_attention(observed, pixel)
        assert (found.row, found.column) == (row, column)
        torch.testing.assert_close(found.weights, whole.unflatten(3, observed.output_size)[..., row, column])
        torch.testing.assert_close(found.output(), output[..., row, column], rtol=1e-10, atol=1e-10)


def test_places_at_a_corner():
    """Mirrored without repeating the edge; or zeros, which nothing is read from."""
    mirrored = pixel_attention(_observed("scalar"), (0, 5))
    assert mirrored.rows.view(5, 5)[:, 0].tolist() == [3, 4, 5, 4, 3]
    assert mirrored.columns.view(5, 5)[0].tolist() == [2, 1, 0, 1, 2]
    assert mirrored.outside.view(5, 5)[2].tolist() == [True, True, False, False, False]
    assert int(mirrored.outside.sum()) == 16
    zeros = pixel_attention(_observed("pairwise absolute zeros"), (0, 5))
    assert zeros.rows.view(5, 5)[2].tolist() == [-1, -1, 5, 5, 5]
    assert zeros.columns.view(5, 5)[2].tolist() == [-1, -1, 0, 1, 2]
    assert torch.equal(zeros.outside, mirrored.outside)
    assert torch.equal(zeros.rows < 0, zeros.outside)
    assert zeros.values[..., zeros.outside].abs().max() == 0
    # What is read twice is added up; what is not read is told apart from a weight of 0.
    laid = mirrored.on_map(torch.ones(25))
    assert laid[3].tolist()[:3] == [2, 4, 4]
    assert laid[5].tolist()[:3] == [1, 2, 2]
    assert laid[:3].isnan().all()
    assert laid[:, 3:].isnan().all()


@pytest.mark.parametrize("name", ["pairwise strided", "patchwise", "patchwise clique zeros"])
def test_bands_do_not_matter(name, monkeypatch):
    observed = _observed(name)
    whole, far = attention_weights(observed), effective_footprint(observed)
    monkeypatch.setattr(weights, "_BAND_ELEMENTS", 1)
    assert len(list(weights.bands(observed))) == observed.output_size[0]
    torch.testing.assert_close(attention_weights(observed), whole)
    torch.testing.assert_close(effective_footprint(observed).distance, far.distance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    observed = _observed("pairwise", dtype)
    found = attention_weights(observed)
    assert found.dtype is torch.float32
    assert (found.sum(2) - 1).abs().max() < 1e-5
    y = san.ops.aggregation(observed.value, found, kernel_size=5)
    torch.testing.assert_close(y.float(), _output(observed).float(), rtol=0.05, atol=0.05)


def test_gamma_may_have_hooks():
    """What is done to γ's modules counts, as it does in the layer."""
    observed = _observed("patchwise")
    observed.layer.conv_w[-1].register_forward_hook(lambda part, inputs, y: 3 * y)
    y = san.ops.aggregation(observed.value, attention_weights(observed), kernel_size=5)
    torch.testing.assert_close(y, _output(observed), rtol=1e-10, atol=1e-10)


def test_statistics_of_the_batch_are_refused():
    layer = san.PairwiseAttention(8, 16, 3)
    layer.conv_w[0] = nn.BatchNorm2d(layer.conv_w[0].num_features, track_running_stats=False)
    observed = observe(nn.Sequential(layer), torch.randn(1, 8, 4, 4))["0"]
    with pytest.raises(UserError, match="BatchNorm must keep running averages"):
        attention_weights(observed)


# How far layers look


@pytest.mark.parametrize("name", ["pairwise strided", "patchwise", "patchwise clique zeros"])
def test_distance_and_entropy_by_hand(name):
    observed = _observed(name)
    found = effective_footprint(observed)
    step = observed.layer.footprint.stride
    for x, y in [(0, 0), (4, 3), (6, 5)]:
        pixel = pixel_attention(observed, (x, y))
        at = pixel.row, pixel.column
        distance, entropy, negative, even = 0.0, 0.0, 0.0, []
        inside = [place for place in range(25) if pixel.rows[place] >= 0]
        total = sum(abs(float(pixel.weights[1, 0, place])) for place in inside)
        for place in inside:
            weight = float(pixel.weights[1, 0, place])
            share = abs(weight) / total
            apart = math.dist((pixel.rows[place], pixel.columns[place]), (at[0] * step, at[1] * step))
            distance += share * apart
            entropy -= share * math.log2(share)
            negative += share * (weight < 0)
            even.append(apart)
        assert float(found.distance[1, 0, *at]) == pytest.approx(distance)
        assert float(pixel.distance()[1, 0]) == pytest.approx(distance)
        assert float(found.entropy[1, 0, *at]) == pytest.approx(entropy)
        assert float(found.negative[1, 0, *at]) == pytest.approx(negative)
        assert float(found.uniform[at]) == pytest.approx(sum(even) / len(even))


def test_equal_weights_look_as_far_as_equal_weights():
    """A pairwise layer whose γ is 0 has weights 1/K; in the image, distances grow with the poolings before it."""
    model = _network(kernels=[3, 3, 5])
    for part in (each.conv_w[-1] for each in attention_layers(model).values()):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    for observed in observe(model, torch.randn(1, 3, 32, 32, dtype=torch.float64)).values():
        found = effective_footprint(observed)
        torch.testing.assert_close(found.distance, found.uniform.expand_as(found.distance))
        assert float(found.entropy.mean()) == pytest.approx(math.log2(observed.layer.footprint.places))
        assert float(found.negative.max()) == 0
    # In the middle of the last map: 8 pixels at each of 8 × 8 places, a footprint of 5×5.
    apart = [8 * math.hypot(row, column) for row in range(-2, 3) for column in range(-2, 3)]
    stride = observed.stride[0]
    assert float(found.uniform[4, 4]) == pytest.approx(stride / 8 * sum(apart) / 25)


# Roll-out


def _dense(observed: ObservedLayer) -> Tensor:
    """The layer's share of attention of every output pixel on every pixel of its map: [P, H·W], for the first image."""
    found = attention_weights(observed)[0]
    share = (found.abs() / found.abs().sum(1, keepdim=True)).mean(0)
    height, width = observed.size
    rows, columns = weights.reading(observed.layer.footprint.window(height, width), found.device)
    matrix = torch.zeros(share.shape[1], height * width, dtype=share.dtype)
    for place in range(len(share)):
        matrix[torch.arange(len(matrix)), rows[place] * width + columns[place]] += share[place]
    return matrix


def _halved(height: int, width: int) -> Tensor:
    """Each pixel of a map's half handed on to its four: [h·w, H·W]."""
    found = torch.zeros(height // 2 * (width // 2), height * width, dtype=torch.float64)
    for row in range(height // 2 * 2):
        for column in range(width // 2 * 2):
            found[row // 2 * (width // 2) + column // 2, row * width + column] = 1 / 4
    return found


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
@pytest.mark.parametrize("residual", [0.5, 0.1])
def test_rollout_is_a_product_of_matrices(form, residual):
    model = _network(form)
    observed = observe(model, torch.randn(1, 3, 9, 10, dtype=torch.float64))
    found = rollout(observed, (5, 3), residual=residual)
    names, sizes = ["layer2.0.sam", "layer1.0.sam", "layer0.0.sam"], [(2, 2), (4, 5), (9, 10)]
    arriving = torch.zeros(4, dtype=torch.float64)
    arriving[1] = 1
    for name, size, below in zip(names, sizes, [*sizes[1:], None], strict=True):
        step = _dense(observed[name])
        arriving = arriving @ (residual * torch.eye(len(step), dtype=torch.float64) + (1 - residual) * step)
        torch.testing.assert_close(found[name][0].flatten(), arriving)
        assert found[name].shape == (1, *size)
        arriving = arriving if below is None else arriving @ _halved(*below)
    torch.testing.assert_close(found["image"][0].flatten(), arriving)
    assert list(found) == [*names, "image"]
    assert float(found["image"].sum()) == pytest.approx(1)


def test_rollout_without_attention_stays_at_its_pixel():
    """All goes through the shortcuts: what is left is the part of the image that the last map's pixel stands for."""
    observed = observe(_network(), torch.randn(2, 3, 16, 16, dtype=torch.float64))
    expected = torch.zeros(2, 16, 16, dtype=torch.float64)
    expected[:, 8:12, 4:8] = 1 / 16
    torch.testing.assert_close(rollout(observed, (6, 9), residual=1.0)["image"], expected)
    with pytest.raises(UserError, match="residual from 0 to 1, not 3, 2"):
        rollout(observed, (6, 9), residual=2)
    with pytest.raises(UserError, match="outside the preprocessed image"):
        rollout(observed, (16, 9))


def test_rollout_loses_nothing_where_all_weights_are_zero():
    """As in a patchwise layer whose last γ starts at 0: every place that is read has an equal share."""
    observed = _observed("patchwise clique zeros")
    with torch.no_grad():
        for parameter in observed.layer.parameters():
            parameter.zero_()
    pixel = pixel_attention(observed, (6, 5))
    assert not pixel.weights.any()
    torch.testing.assert_close(pixel.shares().sum(-1), torch.ones_like(pixel.shares().sum(-1)))
    found = rollout({"layer": observed}, (6, 5), residual=0.0)["image"]
    assert found.sum((1, 2)).tolist() == pytest.approx([1, 1])


def test_weights_that_are_no_numbers_have_no_shares():
    pixel = pixel_attention(_observed("patchwise clique zeros"), (6, 5))
    pixel.weights.fill_(float("nan"))
    assert pixel.shares().isnan().all()


def test_the_middles_rollout_is_that_of_the_middle_pixel():
    model, images = _network(), torch.randn(2, 3, 16, 12, dtype=torch.float64)
    expected = rollout(observe(model, images), (6, 8))["image"]
    torch.testing.assert_close(middle_rollout(model, images), expected)
    assert middle_rollout(nn.Conv2d(3, 2, 1), images.float()) is None


def test_rollout_through_strides_and_zeros():
    """Centres of a strided layer hand on their own part; what a border of zeros would get goes to the others."""
    for name in ("pairwise strided", "patchwise clique zeros"):
        observed = {"layer": _observed(name)}
        found = rollout(observed, (6, 5))["image"]
        assert found.sum((1, 2)).tolist() == pytest.approx([1, 1])
        pixel = pixel_attention(observed["layer"], (6, 5))
        expected = 0.5 * pixel.on_map(pixel.shares().mean(1)).nan_to_num()
        expected[:, pixel.row * 2, pixel.column * 2] += 0.5
        torch.testing.assert_close(found, expected)


# Grad-CAM


@pytest.mark.parametrize(
    ("name", "options"),
    [("san4_pairwise", NETWORK), ("baseline_resnet26", {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16)})],
)
def test_grad_cam_by_hand(name, options):
    """Behind the last map are a mean and a Linear: the gradient's mean is a class' weight divided by the pixels."""
    model = _randomised(san.create_model(name, 5, **options)).float()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last, logits = model.forward_features(image), model(image)
    for target in (None, 3):
        classes = logits.argmax(1) if target is None else torch.tensor([3, 3])
        evidence = torch.einsum("bc,bchw->bhw", model.fc.weight[classes], last) / last[0, 0].numel()
        found = grad_cam(model, image, target)
        torch.testing.assert_close(found, evidence.relu().detach(), rtol=1e-4, atol=1e-6)
        assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grad_cam_refuses_what_it_cannot_do():
    image = torch.randn(1, 3, 16, 16)
    with pytest.raises(UserError, match="there is no class 5; the network has classes 0 to 4"):
        grad_cam(_network(dtype=torch.float32), image, 5)
    with pytest.raises(UserError, match="needs a classifier"):
        grad_cam(san.create_model("san4_pairwise", 0, **NETWORK), image)
    with pytest.raises(UserError, match="forward_features and forward_head, which Conv2d lacks"):
        grad_cam(nn.Conv2d(3, 4, 1), image)


# Images


def test_images_are_prepared_as_for_the_network_and_shown_in_colours(tmp_path):
    """28 pixels wide, nothing is resized; a file, an image and what `san predict` reads are alike."""
    model = san.create_model("san4_pairwise", 5)
    pixels = torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    prepared = prepare_image(model, tmp_path / "image.png")
    assert prepared.shape == (1, 3, 28, 28)
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    expected = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    torch.testing.assert_close(prepared, expected)
    assert torch.equal(prepare_image(model, Image.fromarray(pixels)), prepared)
    np.testing.assert_allclose(shown_image(model, prepared), pixels / 255, atol=1e-6)


# Figures


def _laid(axes) -> tuple[np.ma.MaskedArray, list[float]]:
    """The map that lies over the image, and its left, right, bottom and top."""
    over = axes.images[1]
    return over.get_array(), list(over.get_extent())


def test_a_footprint_lies_where_it_reads():
    """Pixel 2,29 of 32×32, in the last layer of 8×8 places of 4 pixels: row 7, column 0, a corner of the map."""
    model = _network(dtype=torch.float32, kernels=[3, 3, 3])
    image = torch.randn(1, 3, 32, 32)
    attentions = [pixel_attention(each, (2, 29)) for each in observe(model, image).values()]
    figure = draw_footprints(np.zeros((32, 32, 3), np.float32), attentions, (2, 29))
    # Three layers: their whole images, then their enlargements, then three scales.
    whole, near = figure.axes[2], figure.axes[5]
    laid, extent = _laid(whole)
    assert extent == [-0.5, 31.5, 31.5, -0.5]
    assert laid.shape == (8, 8)
    assert [tuple(place) for place in np.argwhere(~laid.mask)] == [(6, 0), (6, 1), (7, 0), (7, 1)]
    assert float(laid.sum()) == pytest.approx(1, abs=1e-5)
    assert whole.get_xlim() == (-0.5, 31.5)
    # On the whole image only a frame, for a cross would hide a footprint of 3×3 pixels.
    assert not whole.lines
    frame, centre = near.patches
    for each in (*whole.patches, frame):
        assert (each.get_xy(), each.get_width(), each.get_height()) == ((-0.5, 23.5), 8, 8)
    assert (centre.get_xy(), centre.get_width(), centre.get_height()) == ((-0.5, 27.5), 4, 4)
    # At the edge, frame and cross are drawn whole.
    assert not any(mark.get_clip_on() for mark in (frame, *near.lines[:2]))
    # The enlargement stays on the image, and has a dot at the middle of each place that the border mirrors to.
    assert near.get_xlim() == (-0.5, 15.5)
    assert near.get_ylim() == (31.5, 15.5)
    dots = near.lines[-1].get_xydata()
    assert {tuple(dot) for dot in dots.tolist()} == {(5.5, 29.5), (1.5, 25.5), (5.5, 25.5)}
    assert near.get_title() == "5 of 9 places mirrored"
    assert "through the mirrored border" in figure.get_suptitle()


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_groups_share_a_scale_with_a_meaning(form):
    """Of many groups as many as fit, from the nearest-looking to the farthest; signed weights have a zero in colour."""
    model = _network(form, torch.float32, widths=[32, 32, 640])
    (observed,) = observe(model, torch.randn(1, 3, 16, 16), ["layer2"]).values()
    attention = pixel_attention(observed, (8, 8))
    figure = draw_groups(np.zeros((16, 16, 3), np.float32), attention, (8, 8))
    assert "16 of 20 weight groups" in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes[1:17]]
    groups = [int(title.split(":")[0].removeprefix("group ")) for title in titles]
    distances = attention.distance()[0]
    assert len(set(groups)) == 16
    assert distances[groups].tolist() == sorted(distances[groups].tolist())
    assert {groups[0], groups[-1]} == {int(distances.argmin()), int(distances.argmax())}
    laid = np.ma.stack([_laid(axes)[0] for axes in figure.axes[1:17]])
    limits = {axes.images[1].get_clim() for axes in figure.axes[1:17]}
    # Opaque: what is drawn has the colours of the scale.
    assert all(axes.images[1].get_alpha() == 1 for axes in figure.axes[1:17])
    most = float(np.abs(laid).max())
    assert limits == {(-most if form == "patchwise" else 0, most)}
    assert (laid.min() < 0) == (form == "patchwise")
    with pytest.raises(UserError, match="has no weight group 20, only 0 to 19"):
        draw_groups(np.zeros((16, 16, 3), np.float32), attention, (8, 8), groups=[20])


def test_distances_of_all_layers():
    model = _network("patchwise", torch.float32)
    found = {name: effective_footprint(each) for name, each in observe(model, torch.randn(1, 3, 16, 16)).items()}
    figure = draw_distances(found)
    distance, entropy, negative = figure.axes
    assert [label.get_text() for label in distance.get_xticklabels()] == list(found)
    mean, even = distance.lines[-2:]
    assert mean.get_ydata() == pytest.approx([float(each.distance.mean()) for each in found.values()])
    assert even.get_ydata() == pytest.approx([float(each.uniform.mean()) for each in found.values()])
    assert entropy.lines[-1].get_ydata() == pytest.approx([math.log2(9)] * 3)
    assert negative.get_ylim()[0] == 0


def test_figures_of_an_explanation():
    model = _network("patchwise", torch.float32)
    explanation = explain(model, torch.randn(1, 3, 16, 16), pixel=(1, 2))
    every = ["overview", "footprints", *(f"groups-layer{n}.0.sam" for n in range(3)), "distances", "rollout"]
    assert list(figures.figures(explanation)) == every
    # A chosen group is drawn in the footprints, and no others beside it.
    assert list(figures.figures(explanation, 0)) == ["overview", "footprints", "distances", "rollout"]
    with pytest.raises(UserError, match=r"layer layer0\.0\.sam has no weight group 1, only 0 to 0"):
        figures.figures(explanation, 1)
    overview = figures.figures(explanation)["overview"]()
    assert [axes.get_title() for axes in overview.axes[:3]] == [
        "what is shown to the network",
        "roll-out from pixel 1,2",
        "Grad-CAM: what speaks for the class",
    ]
    # Each scale says what it counts.
    assert [axes.get_xlabel() for axes in overview.axes[3:]] == ["times an even spread", "relative to the largest"]
    rollout = figures.figures(explanation)["rollout"]()
    assert {axes.get_xlabel() for axes in rollout.axes[4:]} == {"times an even spread"}


# The command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """An untrained network of each kind for images of 28 pixels."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for name, options in (
        ("san4_pairwise", {}),
        ("san4_patchwise", {}),
        ("baseline_resnet26", {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 16), "small_images": True}),
    ):
        model = san.create_model(name, num_classes=2, **options)
        model.pretrained_cfg.update(input_size=(3, 28, 28), label_names=["cat", "dog"])
        found[name] = str(folder / f"{name}.safetensors")
        save_model(model, found[name])
    return found


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run `san explain` in this process; gives exit code, standard output and standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["explain", *map(str, words)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def test_the_command_draws_and_tells(run, checkpoints, photo, tmp_path):
    code, out, err = run(checkpoints["san4_patchwise"], photo, "--pixel", "3,20", "--out", tmp_path)
    assert (code, err) == (0, "")
    head, header, *rows, written = out.splitlines()
    assert head.startswith(f"{photo}: ")
    assert head.endswith("%; pixel 3,20 of 28×28")
    assert header.split()[:4] == ["layer", "form", "map", "footprint"]
    assert [row.split()[:5] for row in rows][2] == ["layer1.1.sam", "patchwise", "14×14", "5×5", "4"]
    names = ["overview", "footprints", *(f"groups-layer{name}.sam" for name in ("0.0", "1.1", "2.0")), "distances"]
    files = [tmp_path / "photo" / f"{name}.png" for name in [*names, "rollout"]]
    assert written == f"wrote {tmp_path / 'photo'}: {', '.join(file.name for file in files)}, arrays.npz"
    for file in files:
        with Image.open(file) as picture:
            assert min(picture.size) > 200
            # Something is drawn in colours.
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 50


def test_the_arrays_are_what_the_page_says(run, checkpoints, photo, tmp_path):
    words = (checkpoints["san4_pairwise"], photo, "--layer", "layer1", "--group", 3, "--whole-maps", "--json")
    code, out, _ = run(*words, "--out", tmp_path, "--target", "dog")
    found = json.loads(out)
    assert code == 0
    assert (found["pixel"], found["class_name"], found["note"]) == ([14, 14], "dog", None)
    assert found["layers"][0]["layer"] == "layer0.0.sam"
    with np.load(found["files"][-1], allow_pickle=False) as file:
        arrays = dict(file)
    assert arrays["layers"].tolist() == [row["layer"] for row in found["layers"]]
    assert arrays["layer1.1.sam/weights"].shape == (4, 25)
    assert arrays["layer1.1.sam/all_weights"].shape == (4, 25, 14, 14)
    assert arrays["rollout"].shape == (28, 28)
    row, column = arrays["layer1.1.sam/place"]
    at_pixel = arrays["layer1.1.sam/all_weights"][..., row, column]
    np.testing.assert_allclose(at_pixel, arrays["layer1.1.sam/weights"], rtol=1e-6)
    values = arrays["layer1.1.sam/values"].reshape(8, 4, 25)
    rebuilt = (arrays["layer1.1.sam/weights"] * values).sum(-1).reshape(-1)
    np.testing.assert_allclose(rebuilt, arrays["layer1.1.sam/output"], atol=1e-5)
    # Only layers that were chosen have a pixel's weights; all have distances.
    assert "layer0.0.sam/weights" not in arrays
    assert "layer0.0.sam/distance" in arrays
    page = (ROOT / "docs" / "attention.md").read_text()
    kinds = {"LAYER/" * ("/" in key) + key.rpartition("/")[2] for key in arrays}
    assert [kind for kind in kinds if f"`{kind}`" not in page] == []


@pytest.mark.parametrize("name", ["n01443537", "goldfish", "goldfish, Carassius auratus", "0"])
def test_a_class_of_imagenet_goes_by_its_id_and_its_words(run, photo, tmp_path, name):
    model = san.create_model("baseline_resnet26", 2, layers=(1, 1, 1, 1), channels=(8, 16, 16, 16))
    model.pretrained_cfg.update(input_size=(3, 28, 28), label_names=["n01443537", "n04398044"])
    save_model(model, tmp_path / "things.safetensors")
    code, out, _ = run(tmp_path / "things.safetensors", photo, "--target", name, "--json", "--out", tmp_path)
    assert (code, json.loads(out)["class_name"]) == (0, "goldfish, Carassius auratus")


def test_scores_that_overflow_are_told(run, photo, tmp_path):
    model = san.create_model("san4_patchwise", num_classes=2)
    with torch.no_grad():
        next(model.parameters()).mul_(1e30)
    save_model(model, tmp_path / "wild.safetensors")
    code, out, err = run(tmp_path / "wild.safetensors", photo, "--json", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert err == "san: error: the network gives the image no finite scores, so there is no class to explain\n"


def test_networks_without_attention_get_grad_cam(run, checkpoints, photo, tmp_path):
    code, out, err = run(checkpoints["baseline_resnet26"], photo, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith("the network has no attention layers")
    assert {path.name for path in (tmp_path / "photo").iterdir()} == {"overview.png", "arrays.npz"}
    with np.load(tmp_path / "photo" / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["grad_cam"].shape == (4, 4)
        assert arrays["layers"].tolist() == []


def test_images_of_one_name_and_broken_ones(run, checkpoints, photo, tmp_path):
    (tmp_path / "other").mkdir()
    Image.open(photo).save(tmp_path / "other" / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    images = (photo, tmp_path / "broken.png", tmp_path / "other" / "photo.png")
    code, out, err = run(checkpoints["baseline_resnet26"], *images, "--out", tmp_path / "out", "--json")
    assert code == 2
    assert len(out.splitlines()) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo", "photo-2"}
    skipped, sentence = err.splitlines()
    assert skipped == f"san: {tmp_path}/broken.png is not a readable image; skipped"
    assert sentence == "san: error: 1 of 3 images could not be read and were skipped; they are named above"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is nothing to explain: name image files"),
        (["no.png"], "there is no file no.png"),
        (["."], "is a folder; name image files"),
        (["PHOTO", "--pixel", "28,3"], "x must be 0 to 27 and y 0 to 27"),
        (["PHOTO", "--pixel", "3"], "--pixel must be two whole numbers x,y such as 112,80, not 3"),
        (["PHOTO", "--pixel", "3,a"], "--pixel must be two whole numbers"),
        (["PHOTO", "--layer", "layer9"], "choose among: layer0.0.sam, layer1.0.sam, layer1.1.sam, layer2.0.sam"),
        (["PHOTO", "--layer", "layer1", "--group", "4"], "layer layer1.0.sam has no weight group 4, only 0 to 3"),
        (["PHOTO", "--group", "-1"], "has no weight group -1"),
        (["PHOTO", "--target", "dgo"], "--target dgo is no class; give a number up to 1, or a name such as dog"),
        (["PHOTO", "--target", "2"], "--target 2 is no class"),
        # What is wrong with the arguments comes first: nothing is said of the image, which is none.
        (["BROKEN", "--group", "9"], "has no weight group 9"),
        (["PHOTO", "--out", "PHOTO"], "cannot be the folder for the results"),
    ],
)
def test_mistakes_have_their_sentence(run, checkpoints, photo, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BROKEN").write_bytes(b"nothing")
    code, out, err = run(checkpoints["san4_pairwise"], *(photo if word == "PHOTO" else word for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("san: error: ")
    assert sentence in err
    assert len(err.splitlines()) == 1

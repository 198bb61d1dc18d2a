"""The paper's theory as properties: what attention is invariant to, and what it can represent (sections 3.1, 3.2).

In float64, where both sides of an exact equality differ by rounding alone. That the operators follow the formulas,
scalar attention among them, is in tests/ops/test_formulas.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import theory
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import san
from plain_san import randomised
from san import ops
from san.checkpoints import save_model
from san.data import load_dataset
from san.errors import UserError
from san.evaluation.invariance import (
    PROPERTIES,
    VIEWS,
    measure_network,
    measure_operators,
    patchwise_from_convolution,
    permute_groups,
    relabel_groups,
)
from san.evaluation.invariance.networks import in_random_order
from san.evaluation.invariance.operators import find_operators, operators_with_inputs, shuffled, unplaced
from san.evaluation.invariance.views import resize, shift
from san.evaluation.robustness import LabelledImages, PixelModel
from san.layers import TRANSFORMATIONS, PairwiseAttention, PatchwiseAttention, ScalarAttention, SelfAttentionBlock
from san.ops.footprint import BORDERS
from san.ops.mapping import MAPPINGS
from san.ops.relations import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS
from tiny_run import make_images

DOCUMENT = Path(__file__).parents[1] / "docs" / "theory.md"
NETWORK = {"widths": [64, 64, 64], "blocks": [1, 1, 1], "kernels": [3, 3, 3]}
"""Of two weight groups, and with three poolings."""
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def _random(module: nn.Module) -> Any:
    """`module` in float64 and eval mode, with every tensor random."""
    module = module.double().eval()
    module.load_state_dict(randomised(module.state_dict()))
    for name, parameter in module.named_parameters():
        if name.endswith("conv_p.weight"):
            # Positions of neighbours are close, and ReLU behind a random BatchNorm would hide them.
            parameter.data *= 20
    return module


def _network(form: str, **options: Any) -> Any:
    return _small(san.create_model(f"san4_{form}", 3, **NETWORK, **options))


def _resnet() -> Any:
    options = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "small_images": True}
    return _small(san.create_model("baseline_resnet26", 3, **options))


def _small(model: Any) -> Any:
    model.pretrained_cfg["input_size"] = (3, 16, 16)
    return _random(model)


def _pairwise(**options: Any) -> PairwiseAttention:
    return _random(PairwiseAttention(8, 16, **{"kernel_size": 3, "relation_channels": 4, **options}))


def _maps(layer: Any, side: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Query, key and value [2, ., side, side]."""
    widths = (layer.relation_channels, layer.relation_channels, layer.out_channels)
    return [torch.randn(2, width, side, side, generator=generator, dtype=torch.float64) for width in widths]


def _places(x: Tensor, order: Tensor) -> Tensor:
    """A map whose pixels are in another order; a map of the footprint's size is one footprint around its middle."""
    return x.flatten(2)[:, :, order].view(*x.shape[:2], *[round(len(order) ** 0.5)] * 2)


def _middle(y: Tensor) -> Tensor:
    return y[:, :, y.shape[2] // 2, y.shape[3] // 2]


# Pairwise attention is a set operator


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(PAIRWISE_RELATIONS)),
    st.sampled_from(sorted(MAPPINGS)),
    st.sampled_from((3, 5)),
    st.sampled_from(BORDERS),
    st.randoms(use_true_random=False),
)
def test_pairs_of_key_and_value_may_come_in_any_order(relation, mapping, kernel_size, border, random):
    layer = _pairwise(relation=relation, mapping=mapping, kernel_size=kernel_size, border=border, position="none")
    query, key, value = _maps(layer, kernel_size)
    order = torch.tensor(random.sample(range(kernel_size**2), kernel_size**2))
    expected = layer.attend(query, key, value)
    found = layer.attend(query, _places(key, order), _places(value, order))
    torch.testing.assert_close(_middle(found), _middle(expected), **EXACT)


@pytest.mark.parametrize("relation", PAIRWISE_RELATIONS)
def test_only_the_shares_of_pairs_matter_not_their_number(relation):
    """Nine pairs, each nine times among 81 in any order, give what they give once; and γ takes a set of any size."""
    few = _pairwise(relation=relation, position="none")
    many = _pairwise(relation=relation, position="none", kernel_size=9)
    many.load_state_dict(few.state_dict())
    query, key, value = _maps(few, 3)
    order = torch.arange(9).repeat(9)[torch.randperm(81)]
    large = torch.zeros(2, 4, 9, 9, dtype=torch.float64)
    large[:, :, 4, 4] = _middle(query)
    found = many.attend(large, _places(key, order), _places(value, order))
    torch.testing.assert_close(_middle(found), _middle(few.attend(query, key, value)), **EXACT)


@pytest.mark.parametrize("border", BORDERS)
def test_relative_position_is_two_more_channels_of_query_and_key(border):
    """[φ, p]_i − [ψ, p]_j: with them, attention is a set operator again, of key, position and value."""
    layer, side = _pairwise(border=border), 3
    placed = (
        ops.Position("relative", layer.conv_p.weight.flatten(1), layer.conv_p.bias)
        .map(side, side)
        .expand(2, -1, -1, -1)
    )
    query, key, value = _maps(layer, side)
    expected = layer.attend(query, key, value)
    free = PairwiseAttention(8, 16, 3, position="none", relation_channels=6, border=border).double().eval()
    free.conv_w = layer.conv_w
    extended = [torch.cat([each, placed], 1) for each in (query, key)]
    torch.testing.assert_close(free.attend(*extended, value), expected, **EXACT)
    order = torch.randperm(9)
    alone = layer.attend(query, _places(key, order), _places(value, order))
    along = free.attend(extended[0], _places(extended[1], order), _places(value, order))
    torch.testing.assert_close(_middle(along), _middle(expected), **EXACT)
    assert (_middle(alone) - _middle(expected)).abs().max() > 1e-3


def test_patchwise_tells_places_apart_in_the_smallest_case():
    """Weight 1 at the first of nine places, 0 at the others: y is what lies at the upper left."""
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    convolution.weight.data = torch.eye(9)[0].view(1, 1, 3, 3)
    attention = patchwise_from_convolution(convolution)
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 0, 0] = 1
    swapped = x.flip((2, 3))
    assert (_middle(attention(x)).item(), _middle(attention(swapped)).item()) == (1, 0)


@pytest.mark.parametrize("relation", PATCHWISE_RELATIONS)
def test_patchwise_tells_places_apart_with_every_relation(relation):
    layer = _random(PatchwiseAttention(8, 16, 3, relation=relation, relation_channels=4))
    query, key, value = _maps(layer, 3)
    order = torch.tensor([1, 0, *range(2, 9)])
    found = layer.attend(query, _places(key, order), _places(value, order))
    assert (_middle(found) - _middle(layer.attend(query, key, value))).abs().max() > 1e-3


# Patchwise attention represents any convolution


@st.composite
def convolutions(draw) -> nn.Conv2d:
    groups = draw(st.sampled_from((1, 1, 2)))
    kernel, stride, dilation = (draw(st.sampled_from(each)) for each in ((1, 3, 5), (1, 2), (1, 2)))
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(
        groups * draw(st.sampled_from((1, 2, 3, 11))),
        groups * draw(st.sampled_from((1, 2, 3, 11))),
        kernel,
        stride,
        draw(st.sampled_from((padding, "same"))) if stride == 1 else padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(BORDERS)),
    ).double()


@settings(max_examples=50)
@given(convolutions(), st.sampled_from(sorted(PATCHWISE_RELATIONS)), st.sampled_from(sorted(MAPPINGS)), st.booleans())
def test_patchwise_equals_any_convolution(convolution, relation, mapping, training):
    """In training too, where γ's BatchNorms see the batch."""
    pair = patchwise_from_convolution(convolution.train(training), relation=relation, mapping=mapping)
    assert isinstance(pair[0], PatchwiseAttention)
    assert all(part.training == training for part in pair.modules())
    x = torch.randn(2, convolution.in_channels, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(pair(x), convolution(x), **EXACT)


@pytest.mark.parametrize(
    ("sizes", "groups", "width"),
    [
        ((3, 16, 3), 1, (27, 9)),
        ((16, 3, 3), 1, (27, 9)),
        ((3, 4, 5), 1, (12, 12)),
        ((32, 32, 5), 32, (32, 32)),
        ((4, 8, 1), 1, (4, 1)),
    ],
)
def test_widths_are_the_least_of_three(sizes, groups, width):
    """K·C_in, K·C_out, C_in·C_out/groups."""
    attention: Any = patchwise_from_convolution(nn.Conv2d(*sizes, padding="same", groups=groups))[0]
    assert (attention.out_channels, attention.groups) == width


def test_training_goes_on_from_the_convolution():
    pair = patchwise_from_convolution(nn.Conv2d(4, 4, 3, padding=1))
    attention: Any = pair[0]
    optimizer = torch.optim.SGD(pair.parameters(), 0.1)
    x = torch.randn(2, 4, 8, 8)
    before = pair(x)
    before.square().sum().backward()
    optimizer.step()
    assert attention.conv_w[-1].weight.abs().max() > 0
    assert not torch.allclose(pair(x), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 2}, "odd, square"),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, "odd, square"),
        ({"kernel_size": 3, "padding": 0}, "padded by"),
        ({"kernel_size": 3, "padding": 1, "stride": (1, 2)}, "no footprint"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, "pad by reflect or zeros"),
    ],
)
def test_convolutions_without_such_a_footprint_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        patchwise_from_convolution(nn.Conv2d(2, 2, **options))


def test_a_block_s_relu_costs_twice_the_width():
    """Each value channel and its negative: x = ReLU(x) − ReLU(−x), behind a BatchNorm that does nothing."""
    convolution = nn.Conv2d(3, 5, 3, padding=1).double()
    attention, output = patchwise_from_convolution(convolution)
    wide = PatchwiseAttention(
        3, 2 * attention.out_channels, 3, share=2 * attention.out_channels // attention.groups, border="zeros"
    )
    narrow = {**attention.state_dict()}
    for name in ("conv3.weight", "conv3.bias"):
        narrow[name] = torch.cat([narrow[name], -narrow[name]])
    wide.load_state_dict(narrow)
    norm = nn.BatchNorm2d(wide.out_channels, eps=0.0)
    last = nn.Conv2d(wide.out_channels, 5, 1)
    last.weight.data, last.bias.data = torch.cat([output.weight, -output.weight], 1).data, output.bias.data
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    tail = nn.Sequential(wide, norm, nn.ReLU(), last).double().eval()
    torch.testing.assert_close(tail(x), convolution(x), **EXACT)


def test_weights_alone_are_a_convolution_too():
    """Value 1, and γ a convolution of [ψ, −ψ] that gives the weight of the centre: V = C_out, R = 2·C_in, no output."""
    convolution = nn.Conv2d(3, 5, 3, padding=1).double()
    layer: Any = PatchwiseAttention(3, 5, 3, mapping="L", share=1, relation_channels=6, border="zeros").double().eval()
    with torch.no_grad():
        layer.conv2.weight.copy_(torch.cat([torch.eye(3), -torch.eye(3)])[:, :, None, None])
        layer.conv2.bias.zero_()
        layer.conv3.weight.zero_()
        layer.conv3.bias.fill_(1.0)
        layer.conv_w[0].eps = 0.0
        kernel = convolution.weight.flatten(2)
        last = layer.conv_w[2]
        last.weight.zero_()
        last.bias.zero_()
        last.weight[4::9, 6:, 0, 0] = torch.cat([kernel, -kernel], 1).flatten(1)
        last.bias[4::9] = convolution.bias
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), convolution(x), **EXACT)


# and more; pairwise attention does not


def test_the_smallest_patchwise_attention_that_no_convolution_equals():
    """y = x³, where a convolution of one place gives w·x + b: f(a + b) − f(a) − f(b) + f(0) = 3ab(a + b), not 0."""
    layer = theory.cube()
    a, b = (torch.randn(1, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(layer(a), a**3, **EXACT)
    bent = layer(a + b) - layer(a) - layer(b) + layer(torch.zeros_like(a))
    torch.testing.assert_close(bent, 3 * a * b * (a + b), **EXACT)
    assert bent.abs().max() > 0.1


@pytest.mark.parametrize("relation", PATCHWISE_RELATIONS)
def test_patchwise_attention_is_not_affine_in_general(relation):
    layer = _random(PatchwiseAttention(8, 16, 3, relation=relation))
    a, b = torch.randn(2, 1, 8, 6, 6, dtype=torch.float64)
    assert (layer(a + b) - layer(a) - layer(b) + layer(torch.zeros_like(a))).abs().max() > 1e-3
    convolution = nn.Conv2d(8, 16, 3, padding=1).double()
    parts = convolution(a + b), convolution(a), convolution(b), convolution(torch.zeros_like(a))
    torch.testing.assert_close(parts[0] + parts[3], parts[1] + parts[2], **EXACT)


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(PAIRWISE_RELATIONS)),
    st.sampled_from(sorted(MAPPINGS)),
    st.permutations([0, 1, 2, 3, 5, 6, 7, 8]),
    st.integers(0, 1000),
)
def test_pairwise_without_position_misses_a_convolution_by_half_of_what_permuting_does(relation, mapping, order, seed):
    """Whatever stands behind it pointwise. Both images look alike to it, the convolution tells them apart."""
    torch.manual_seed(seed)
    order = torch.tensor([*order[:4], 4, *order[4:]])
    pairwise = _random(PairwiseAttention(3, 8, 3, relation=relation, mapping=mapping, position="none"))
    network = nn.Sequential(pairwise, nn.ReLU(), nn.Conv2d(8, 5, 1)).double()
    convolution = nn.Conv2d(3, 5, 3, padding=1).double()
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64)
    images = x, _places(x, order)
    ours = [_middle(network(image)) for image in images]
    theirs = [_middle(convolution(image)) for image in images]
    torch.testing.assert_close(ours[0], ours[1], **EXACT)
    gap = (theirs[0] - theirs[1]).abs().max()
    moved = not torch.equal(order, torch.arange(9))
    assert (gap > 1e-6) == moved
    missed = torch.stack([(our - their).abs().max() for our, their in zip(ours, theirs, strict=True)]).max()
    assert missed >= gap / 2 - 1e-12


def test_position_lets_pairwise_attention_be_a_convolution_inside_a_map_of_one_size():
    """Nine softmaxes of linear functions of position are independent (Vandermonde), so 1×1 products turn them into any.

    At the border, and on maps of another size, relative positions are others, and so is the result.
    """
    side, places = 9, 9
    convolution = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    layer: Any = (
        PairwiseAttention(2, 2 * places, 3, mapping="L", share=2, relation_channels=1, border="zeros").double().eval()
    )
    steps = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * side / 2
    rates = torch.cartesian_prod(steps, steps)
    with torch.no_grad():
        layer.conv_p.weight.copy_(torch.eye(2)[:, :, None, None])
        layer.conv_w[0].eps = 0.0
        # So that ReLU lets every relative position through.
        layer.conv_w[0].bias.fill_(10.0)
        layer.conv_w[2].weight.copy_(torch.cat([torch.zeros(places, 1), rates], 1)[:, :, None, None])
        layer.conv3.weight.copy_(torch.eye(2).repeat_interleave(places, 0)[:, :, None, None])
        layer.conv3.bias.zero_()
    y, x = torch.meshgrid(torch.arange(3) - 1, torch.arange(3) - 1, indexing="ij")
    relative = -torch.stack([x.flatten(), y.flatten()]).double() * 2 / (side - 1)
    weight = (rates @ relative).softmax(1)
    output = convolution.weight.flatten(2) @ torch.linalg.inv(weight)
    image = torch.randn(2, 2, side, side, dtype=torch.float64)
    difference = (F.conv2d(layer(image), output.flatten(1)[:, :, None, None]) - convolution(image)).abs()
    assert difference[:, :, 1:-1, 1:-1].max() < 1e-11
    assert difference.max() > 1e-2
    other = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    elsewhere = (F.conv2d(layer(other), output.flatten(1)[:, :, None, None]) - convolution(other)).abs()
    assert elsewhere[:, :, 1:-1, 1:-1].max() > 1e-2


# What operators are invariant to: exact where PROPERTIES says so, and only there


def _pair(**options: Any) -> PairwiseAttention:
    return PairwiseAttention(8, 16, **{"kernel_size": 3, "relation_channels": 4, **options})


def _patch(**options: Any) -> PatchwiseAttention:
    return PatchwiseAttention(8, 16, **{"kernel_size": 3, "relation_channels": 4, **options})


OPERATORS: dict[str, nn.Module] = {
    **{f"pairwise {each}": _pair(relation=each) for each in PAIRWISE_RELATIONS},
    **{f"pairwise {each}, no position": _pair(relation=each, position="none") for each in PAIRWISE_RELATIONS},
    **{f"pairwise {each}": _pair(transformations=each, relation_channels=16) for each in TRANSFORMATIONS[1:]},
    "pairwise absolute": _pair(position="absolute"),
    "pairwise dilated": _pair(dilation=2, border="zeros"),
    "pairwise unplaced": _pair(kernel_size=5),
    **{f"patchwise {each}": _patch(relation=each) for each in PATCHWISE_RELATIONS},
    "patchwise zeros": _patch(kernel_size=5, border="zeros"),
    "scalar": ScalarAttention(8, 16, 3),
    "convolution": nn.Conv2d(8, 16, 3, padding=1),
    "convolution dilated": nn.Conv2d(8, 16, 3, padding=2, dilation=2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_exact_equalities_hold_to_rounding_and_no_others(name):
    operator = _random(copy.deepcopy(OPERATORS[name]))
    if name == "pairwise unplaced":
        operator = unplaced(operator)
    x = torch.randn(2, 8, 11, 11, dtype=torch.float64)
    for label, each in PROPERTIES.items():
        with torch.no_grad():
            change = each.measure(operator, x)
        assert change is None or (change < 1e-9 if each.exact(operator) else change > 1e-4), (label, change)


def test_what_is_not_compared():
    absent = {
        name: {
            label
            for label, each in PROPERTIES.items()
            if each.measure(_random(copy.deepcopy(OPERATORS[name])), x) is None
        }
        for name, x in {
            "pairwise subtraction": torch.randn(2, 8, 9, 9, dtype=torch.float64),
            "pairwise query=key=value": torch.randn(2, 8, 9, 9, dtype=torch.float64),
            "convolution": torch.randn(2, 8, 9, 9, dtype=torch.float64),
            "patchwise zeros": torch.randn(2, 8, 3, 3, dtype=torch.float64),
        }.items()
    }
    assert absent == {
        "pairwise subtraction": set(),
        "pairwise query=key=value": {"groups numbered anew"},
        "convolution": {"constant added to query and key", "groups numbered anew"},
        # A map smaller than the footprint has no place away from the border.
        "patchwise zeros": {
            "places permuted",
            "shifted 1 px",
            "constant added to input",
            "constant added to query and key",
        },
    }


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (5, 1), (3, 2)])
def test_places_are_permuted_within_windows_around_centres(kernel_size, dilation):
    footprint = ops.Footprint(kernel_size, 1, dilation)
    x = torch.arange(2 * 17 * 12).view(1, 2, 17, 12)
    moved, (rows, columns) = shuffled(x, footprint)
    assert torch.equal(moved[:, :, rows, columns], x[:, :, rows, columns])
    assert not torch.equal(moved, x)
    untouched = torch.ones(17, 12, dtype=torch.bool)
    span = slice(-footprint.padding, footprint.padding + 1, dilation)
    steps = range(span.start, span.stop, dilation)
    for row in rows.flatten().tolist():
        for column in columns.tolist():
            window = (..., [[row + down] for down in steps], [column + right for right in steps])
            assert torch.equal(*(each[window].flatten(2).sort(2).values for each in (moved, x)))
            assert untouched[window].all()
            untouched[window] = False
    assert torch.equal(moved[:, :, untouched], x[:, :, untouched])


def test_operators_are_measured_where_they_stand():
    """On the maps that reach them, at stride 1; the network is left as it was."""
    model = _resnet().train()
    state = copy.deepcopy(model.state_dict())
    pixels = torch.randn(4, 3, 28, 28)
    met = operators_with_inputs(model, pixels)
    assert [each.name for each in met] == list(find_operators(model))
    assert [each.name for each in met] == ["conv1", *(f"layer{stage}.0.conv2" for stage in (1, 2, 3, 4))]
    assert torch.equal(met[0].maps, pixels.double())
    assert all(each.operator.stride == (1, 1) for each in met)
    assert model.layer2[0].conv2.stride == (2, 2)
    rows = measure_operators(model, pixels)
    assert [row["operator"] for row in rows] == [each.name for each in met]
    assert {row["kind"] for row in rows} == {"convolution"}
    assert rows[1]["properties"]["mirrored"] == {
        "change": PROPERTIES["mirrored"].measure(met[1].operator, met[1].maps),
        "exact": False,
    }
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in model.modules())


# What networks are invariant to


SYMMETRIES = [name for name in VIEWS if name.startswith(("turned", "mirrored", "upside"))]


@pytest.mark.parametrize("view", SYMMETRIES)
def test_a_pairwise_network_without_position_sees_no_turns_and_flips(view):
    """Every part commutes with them; a 2×2 pooling does on maps of even sides only, and the mean forgets them."""
    (alter,) = VIEWS[view].alterations
    model = _network("pairwise", position="none")
    with torch.no_grad():
        even, odd = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 3, 20, 20).double()
        torch.testing.assert_close(model(alter(even)), model(even), **EXACT)
        assert (model(alter(odd)) - model(odd)).abs().max() > 1e-4
        for other in (_network("pairwise"), _network("patchwise")):
            assert (other(alter(even)) - other(even)).abs().max() > 1e-4


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_groups_are_numbered_as_one_likes(form, mapping):
    block = _random(SelfAttentionBlock(128, 3, form, mapping=mapping))
    x, order = torch.randn(2, 128, 6, 6, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        torch.testing.assert_close(relabel_groups(block, order)(x), block(x), **EXACT)
        swapped = copy.deepcopy(block)
        swapped.sam = permute_groups(block.sam, order)
        assert (swapped(x) - block(x)).abs().max() > 1e-4


def test_groups_without_values_of_their_own_keep_their_numbers():
    layer = PairwiseAttention(8, 16, 3, relation_channels=16, transformations="query=key=value")
    with pytest.raises(UserError, match="transformation of its own"):
        relabel_groups(layer, torch.tensor([1, 0]))


def test_images_are_altered_pixel_by_pixel():
    image = torch.arange(20.0).view(1, 1, 4, 5)
    assert torch.equal(shift(image, 1, -2)[0, 0, 1:, :3], image[0, 0, :3, 2:])
    assert torch.equal(shift(image, 1, 0)[0, 0, 0], image[0, 0, 0])
    assert torch.equal(shift(image, 0, -1)[0, 0, :, -1], image[0, 0, :, -1])
    assert resize(image, 1.5).shape == (1, 1, 6, 8)
    grey = torch.full((2, 3, 4, 4), 0.5)
    levels = {
        "unchanged": (0.5, 0.5, 0.5),
        "all pixels + 0.2": (0.7, 0.7, 0.7),
        "all pixels − 0.2": (0.3, 0.3, 0.3),
        "channels + 0.2, 0, − 0.2": (0.7, 0.5, 0.3),
        "contrast × 0.5": (0.5, 0.5, 0.5),
        "channels × 1.5, 1, 0.5": (0.75, 0.5, 0.25),
    }
    for name, level in levels.items():
        (alter,) = VIEWS[name].alterations
        torch.testing.assert_close(alter(grey)[0, :, 0, 0], torch.tensor(level))
    (contrast,) = VIEWS["contrast × 1.5"].alterations
    torch.testing.assert_close(contrast(grey + 0.2), grey + 0.3)
    moved = [alter(image) for alter in VIEWS["shifted 2 px"].alterations]
    assert all(
        torch.equal(found, shift(image, *way))
        for found, way in zip(moved, [(2, 0), (-2, 0), (0, 2), (0, -2)], strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "colours")


@pytest.fixture
def examples(folder) -> LabelledImages:
    dataset = load_dataset(str(folder))
    return in_random_order(LabelledImages(dataset.split("test"), dataset.class_names, batch_size=7))


def test_numbers_of_a_network_are_what_a_second_look_gives(examples):
    model = _network("patchwise").float()
    rows = {row["view"]: row for row in measure_network(model, examples)}
    assert list(rows) == [*VIEWS, "groups numbered anew", "groups swapped"]
    for name in ("unchanged", "groups numbered anew"):
        assert rows[name]["kept"] == 100
        assert rows[name]["cosine"] == pytest.approx(1)
        assert rows[name]["change"] == pytest.approx(0, abs=1e-5)
    assert rows["groups swapped"]["change"] > 1e-3
    network, features, classes, labels = PixelModel(model), [], [], []
    for batch in examples.batches(network):
        for alter in (VIEWS["unchanged"].alterations[0], *VIEWS["shifted 3 px"].alterations):
            maps = model.forward_features(network.normalise(alter(batch.images)))
            features.append(maps.mean((2, 3)).detach().double())
            classes.append(network.classes(alter(batch.images)))
            labels.append(batch.labels)
    before, after = (
        torch.cat(features[0::5]).repeat(4, 1),
        torch.cat([torch.cat(features[way::5]) for way in range(1, 5)]),
    )
    old, new = (torch.cat(classes[0::5]).repeat(4), torch.cat([torch.cat(classes[way::5]) for way in range(1, 5)]))
    row, truth = rows["shifted 3 px"], torch.cat(labels[0::5]).repeat(4)
    assert row["kept"] == pytest.approx(100 * float((old == new).double().mean()))
    assert row["top1"] == pytest.approx(100 * float((new == truth).double().mean()))
    assert row["cosine"] == pytest.approx(float(F.cosine_similarity(before, after).mean()), abs=1e-5)
    expected = (after - before).square().sum(1).mean() / (before - before.mean(0)).square().sum(1).mean()
    assert row["change"] == pytest.approx(float(expected.sqrt()), rel=1e-3)
    assert rows["unchanged"]["top1"] == pytest.approx(100 * float((old == truth).double().mean()))


def test_networks_without_groups_have_no_such_rows(examples):
    for model in (_resnet(), _network("pairwise", attention="scalar")):
        assert [row["view"] for row in measure_network(model.float(), examples.some(4))] == list(VIEWS)


# The document


def test_figures_and_numbers_come_from_run_folders(folder, tmp_path, capsys):
    models = {
        "free": _network("pairwise", position="none"),
        "placed": _network("pairwise"),
        "patches": _network("patchwise"),
    }
    for name, model in models.items():
        save_model(model.float(), tmp_path / f"{name}.safetensors")
    out = tmp_path / "out"
    runs = [str(tmp_path / f"{name}.safetensors") for name in models]
    theory.main([*runs, "--data", str(folder), "--limit", "6", "--out", str(out)])
    printed = capsys.readouterr().out
    numbers = json.loads((out / "theory.json").read_text())
    assert numbers["invariance"]["images"] == 6
    assert all(table in printed for table in theory.tables(numbers).values())
    rows = {row["network"]: row for row in numbers["invariance"]["networks"]}
    assert list(rows) == list(models)
    assert [bool(row["unplaced"]) for row in rows.values()] == [False, True, False]
    assert all(row["largest_error"] < 1e-12 for row in numbers["convolution"]["kernels"].values())
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert set(pictures) == {"footprints.png", "convolution.png", "operators.png", "networks.png"}
    for path in out.glob("*.png"):
        path.unlink()
    theory.main(["--out", str(out)])
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == pictures
    assert capsys.readouterr().out == printed


def test_mistakes_end_in_a_sentence(folder, tmp_path, capsys):
    save_model(_network("patchwise").float(), tmp_path / "one.safetensors")
    one = ["--data", str(folder), "--limit", "1"]
    for words, reason in (
        ([], "name run folders or checkpoints"),
        ([str(tmp_path / "nothing")], "does not exist"),
        ([str(tmp_path / "one.safetensors"), *one], "give at least two"),
    ):
        with pytest.raises(SystemExit, match="2"):
            theory.main([*words, "--out", str(tmp_path / "out")])
        assert reason in capsys.readouterr().err


def test_the_document_shows_its_numbers():
    text = DOCUMENT.read_text()
    numbers = json.loads((DOCUMENT.parent / "theory" / "theory.json").read_text())
    for name, table in theory.tables(numbers).items():
        assert table in text, name
    for picture in (DOCUMENT.parent / "theory").glob("*.png"):
        assert f"](theory/{picture.name})" in text
        assert picture.stat().st_size <= 150_000
        assert min(Image.open(picture).size) > 200

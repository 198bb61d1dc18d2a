"""Parameters and cost: the paper's table, each part of the count by hand, and torch's own counter as a witness."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import san
from san.errors import UserError
from san.evaluation.cost import COMPARED, complexity

# Zhao, Jia, Koltun, CVPR 2020, tables 2 and 3: millions of parameters, billions of operations.
PAPER = {
    "baseline_resnet26": (13.7, 2.4),
    "san10_pairwise": (10.5, 2.2),
    "san10_patchwise": (11.8, 1.9),
    "baseline_resnet38": (19.6, 3.2),
    "san15_pairwise": (14.1, 3.0),
    "san15_patchwise": (16.2, 2.6),
    "baseline_resnet50": (25.6, 4.1),
    "san19_pairwise": (17.6, 3.8),
    "san19_patchwise": (20.5, 3.3),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_table(name):
    row = complexity(name)
    assert (round(row["params"] / 1e6, 1), round(row["paper_cost"] / 1e9, 1)) == PAPER[name]
    assert 0.9 * row["paper_cost"] < row["macs"] < row["paper_cost"]


def test_compared_are_the_paper_s_nine():
    assert list(PAPER) == COMPARED


@pytest.mark.parametrize("name", ["resnet18", "baseline_resnet26", "efficientnet_b0"])
def test_multiply_adds_agree_with_torch(name):
    """torch counts convolutions and linear layers exactly, at two operations per multiply-add."""
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert complexity(model, 64)["macs"] == counter.get_total_flops() // 2


class _Wrapped(nn.Module):
    """A layer with an input size, as a network has one."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.pretrained_cfg = {"input_size": (channels, 5, 5)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_plain_layers_by_hand():
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(5), nn.Flatten())
    row = complexity(_Wrapped(nn.Sequential(*layers, nn.Linear(6, 2)), 4))
    assert row["macs"] == 25 * 6 * 4 * 9 + 2 * 6
    assert row["paper_cost"] == row["macs"] + 25 * 6 + 2 + 2 * 25 * 6 + 25 * 6 + 25 * 6


def test_pairwise_attention_by_hand():
    layer = san.PairwiseAttention(4, 16, kernel_size=3, relation_channels=4)
    row = complexity(_Wrapped(layer, 4))
    pixels, pairs, groups = 25, 25 * 9, 2
    assert row["macs"] == pixels * 4 * (4 + 4 + 16) + pixels * 2 * 2 + pairs * (6 * 4 + 4 * groups) + 16 * pairs
    biases = pixels * (4 + 4 + 16 + 2) + pairs * groups
    assert row["paper_cost"] == row["macs"] + biases + pairs * 6 + 3 * pairs * (6 + 4)


def test_patchwise_attention_by_hand():
    layer = san.PatchwiseAttention(4, 16, kernel_size=3, stride=2, relation_channels=4)
    row = complexity(_Wrapped(layer, 4))
    pixels, centres, groups, width = 25, 9, 2, 4 * 10
    mapping = centres * (width * groups + groups * 9 * groups)
    assert row["macs"] == pixels * 4 * (4 + 4 + 16) + mapping + 16 * 9 * centres
    biases = pixels * (4 + 4 + 16) + centres * 9 * groups
    assert row["paper_cost"] == row["macs"] + biases + centres * width + 3 * centres * (width + groups)


def test_products_count_each_channel():
    """φᵀψ is one multiply-add per channel, φ − ψ one operation per channel."""
    options = {"mapping": "L", "position": "none", "relation_channels": 4}
    dot = complexity(_Wrapped(san.PairwiseAttention(4, 16, 3, relation="dot", **options), 4))
    scalar = complexity(_Wrapped(san.ScalarAttention(4, 16, 3, relation_channels=4), 4))
    pairs = 25 * 9
    assert dot["macs"] - scalar["macs"] == pairs * 2


@pytest.mark.parametrize("form", ["pairwise", "patchwise"])
def test_input_size_scales_the_cost(form):
    small, large = (complexity(f"san10_{form}", size)["macs"] - 2_048_000 for size in (64, 128))
    assert large == 4 * small


def test_model_is_left_as_it_was():
    model = san.create_model("san4_pairwise", num_classes=10).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    row = complexity(model)
    assert row["model"] == "san4_pairwise"
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_hooks_are_removed():
    model = san.create_model("san4_patchwise", num_classes=10)
    complexity(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("network", "size", "sentence"),
    [
        ("san11_pairwise", None, "'san11_pairwise' is unknown"),
        ("san10_pairwise", 0, "must be at least 1"),
        ("vit_tiny_patch16_224", 100, "does not take images of 100×100 pixels"),
        ("san10_pairwise", 8, "8×8"),
    ],
)
def test_mistakes(network, size, sentence):
    with pytest.raises(UserError, match=sentence):
        complexity(network, size)

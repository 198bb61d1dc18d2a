"""The reference against the paper's formulas written as loops over pixels, and the paper's claims as properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.ops.test_footprint import gathered
from torch import Tensor
from torch.nn import functional as F

from san import ops
from san.ops.cases import CASES, Case

PAIRWISE = {
    "subtraction": lambda q, k: q - k,
    "summation": lambda q, k: q + k,
    "hadamard": lambda q, k: q * k,
    "concatenation": lambda q, k: torch.cat([q, k]),
    "dot": lambda q, k: (q @ k).view(1),
}
PATCHWISE = {
    "concatenation": lambda q, k, c: torch.cat([c, k.flatten()]),
    "star": lambda q, k, c: torch.stack([c @ k[:, j] for j in range(k.shape[1])]),
    "clique": lambda q, k, c: torch.stack([q[:, j] @ k[:, m] for j in range(k.shape[1]) for m in range(k.shape[1])]),
}


def mapped(rows: Tensor, mapping: ops.Mapping | None) -> Tensor:
    """γ of N samples [N, D] in nn.functional's words, with the running averages or the samples' own statistics."""
    for layer in mapping.layers if mapping else ():
        norm = layer.norm
        mean, variance = (None, None) if norm.uses_batch else (norm.running_mean, norm.running_var)
        rows = F.batch_norm(rows, mean, variance, norm.weight, norm.bias, norm.uses_batch, 0.0, norm.eps)
        rows = F.linear(rows.relu(), layer.weight, layer.bias)
    return rows


def positions(position: ops.Position, height: int, width: int) -> Tensor:
    """p [2, H, W] pixel by pixel."""
    axis = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in (height, width)]
    rows = [[position.weight @ torch.stack([x, y]) + position.bias for x in axis[1]] for y in axis[0]]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def plain_attention(case: Case, query: Tensor, key: Tensor, value: Tensor, mapping, position) -> Tensor:
    """y by loops: relation for every image, pixel and place, then γ, softmax and the weighted sum."""
    rule, places = case.footprint, case.footprint.places
    rows, columns = rule.output_size(case.height, case.width)
    pixels = rows * columns
    keys, queries = ([gathered(x, rule) for x in maps] for maps in (key, query))
    centre = [x[:, :: rule.stride, :: rule.stride].flatten(1) for x in query]
    samples = []
    for image in range(case.batch):
        for pixel in range(pixels):
            c, k, q = centre[image][:, pixel], keys[image][:, :, pixel], queries[image][:, :, pixel]
            if case.operator == "patchwise_attention":
                samples.append(PATCHWISE[case.relation](q, k, c))
                continue
            for j in range(places):
                extra = []
                if position is not None:
                    p = positions(position, case.height, case.width)
                    p_i = p[:, :: rule.stride, :: rule.stride].flatten(1)[:, pixel]
                    p_j = gathered(p, rule)[:, j, pixel]
                    extra = [p_i - p_j] if position.kind == "relative" else [p_i, p_j]
                samples.append(torch.cat([PAIRWISE[case.relation](c, k[:, j]), *extra]))
    scores = mapped(torch.stack(samples), mapping)
    if case.operator == "patchwise_attention":
        weight = scores.view(case.batch, pixels, -1, places)
    else:
        weight = scores.view(case.batch, pixels, places, -1).transpose(2, 3).softmax(-1)
    groups = weight.shape[2]
    y = torch.stack(
        [
            torch.stack(
                [(weight[b, :, c % groups] * gathered(value[b], rule)[c].T).sum(1) for c in range(case.channels)]
            )
            for b in range(case.batch)
        ]
    )
    return y.view(case.batch, case.channels, rows, columns)


SMALL = [
    replace(case, height=3, width=4, batch=min(case.batch, 2))
    for case in CASES.values()
    if case.operator != "aggregation" and case.batch and case.kernel_size <= 5
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_equals_loops_over_pixels(case: Case) -> None:
    problem = case.build(torch.float64)
    expected = plain_attention(case, *problem.arguments, problem.options.get("position"))
    with ops.use_backend("reference"):
        y = getattr(ops, case.operator)(*problem.arguments, **problem.options)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def test_composable_functions_make_the_operator() -> None:
    """relation → softmax → aggregation is pairwise attention with the identity mapping."""
    problem = CASES["pairwise-identity"].build()
    query, key, value, _ = problem.arguments
    pairs = ops.relation(query, key, "subtraction", kernel_size=3)
    y = ops.aggregation(value, pairs.softmax(2), kernel_size=3)
    torch.testing.assert_close(y, ops.pairwise_attention(query, key, value, relation="subtraction", kernel_size=3))


def test_pairwise_without_position_is_a_set_operator() -> None:
    """Permuting what surrounds the centre changes nothing; the same permutation changes patchwise attention (§3)."""
    torch.manual_seed(0)
    order = torch.randperm(9)
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64)
    centre = int((order == 4).nonzero())
    order[[4, centre]] = order[[centre, 4]]
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    for operator, case, equal in (
        (
            ops.pairwise_attention,
            replace(CASES["pairwise-subtraction-LRL-relative"], position="none", relation_channels=8),
            True,
        ),
        (ops.patchwise_attention, replace(CASES["patchwise-concatenation-LRL"], relation_channels=8), False),
    ):
        mapping = replace(case, training=False).build().arguments[3]
        here, there = (operator(m, m, m, mapping, kernel_size=3, border="zeros")[:, :, 1, 1] for m in (x, shuffled))
        assert torch.allclose(here, there, rtol=1e-12, atol=1e-12) == equal


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(3, 1, 1), (5, 2, 1), (3, 1, 2)])
def test_patchwise_can_represent_any_convolution(kernel_size: int, stride: int, dilation: int) -> None:
    """Constant one-hot weights, one copy of value a place and input channel, and a 1×1 output transformation (§3)."""
    torch.manual_seed(0)
    channels, out, places = 3, 5, kernel_size**2
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    kernel = torch.randn(out, channels, kernel_size, kernel_size, dtype=torch.float64)
    value = x.repeat_interleave(places, dim=1)
    one_hot = torch.eye(places, dtype=torch.float64).flatten()
    norm = ops.BatchNorm(
        None, None, *torch.tensor([[0.0], [1.0]]).double().expand(2, places), None, 0.1, 1e-5, False, False
    )
    constant = ops.MappingLayer(norm, torch.zeros(places * places, places, dtype=torch.float64), one_hot)
    y = ops.patchwise_attention(
        x,
        x,
        value,
        ops.Mapping((constant,)),
        relation="star",
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        border="zeros",
    )
    y = F.conv2d(y, kernel.flatten(1)[:, :, None, None])
    expected = F.conv2d(x, kernel, stride=stride, padding=dilation * (kernel_size - 1) // 2, dilation=dilation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_dot_without_mapping_is_scalar_attention() -> None:
    """One softmax-normalised dot product for all channels, by torch's own attention on the gathered keys."""
    query, key, value, _ = CASES["pairwise-scalar"].build().arguments
    rule = CASES["pairwise-scalar"].footprint
    window = rule.window(*key.shape[2:])
    q, k, v = (t.permute(0, 3, 2, 1) for t in (window.centre(query), window.gather(key), window.gather(value)))
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, :, 0].transpose(1, 2)
    y = ops.pairwise_attention(query, key, value, relation="dot", kernel_size=5)
    torch.testing.assert_close(y.flatten(2), expected)


def test_double_backward_works_through_the_reference() -> None:
    for case in (
        replace(CASES["pairwise-subtraction-LRL-relative"], height=3, width=2),
        replace(CASES["patchwise-concatenation-LRL"], height=3, width=2),
    ):
        problem = case.build()

        def operator(*maps: Tensor, problem=problem, case=case) -> Tensor:
            with ops.use_backend("reference"):
                return getattr(ops, case.operator)(*maps, problem.arguments[3], **problem.options)

        assert torch.autograd.gradgradcheck(operator, problem.arguments[:3], fast_mode=True, atol=1e-4)

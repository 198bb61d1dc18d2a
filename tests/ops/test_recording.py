"""Recorded kernel calls, repeated on other memory, do what the calls did."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from san.errors import UserError
from san.ops.kernels.native import library, operators
from san.ops.kernels.native.recording import active, record
from san.ops.kernels.pointwise.native import Linear, Norm, fold, products

pytestmark = pytest.mark.skipif(library.load() is None, reason="the native library is not installed")

NORM = Norm(torch.tensor([1.0, 2.0, -1.0]), None, torch.randn(3), torch.rand(3) + 0.5, 1e-5)
LINEAR = Linear(torch.randn(4, 3), torch.randn(4))
EYE = torch.eye(4)


def run(x: Any, output: Any) -> None:
    """Two products, the first of which is made on the way."""
    (norm,) = fold([(NORM, None)], x)
    (between,) = products(x, [LINEAR], norm=norm)
    products(between, [Linear(EYE, None)], output=output)


def test_repeated_calls_give_what_the_calls_gave():
    shapes = [2, 3, 5, 7], [2, 4, 5, 7]
    recording = record(run, *shapes)
    assert active() is None
    for seed in range(3):
        x = torch.randn(shapes[0], generator=torch.Generator().manual_seed(seed))
        expected, output = torch.empty(shapes[1]), torch.full(shapes[1], torch.nan)
        run(x, expected)
        room = torch.empty(recording.bytes, dtype=torch.uint8)
        recording.repeat(room.data_ptr(), x.data_ptr(), output.data_ptr())
        assert torch.equal(output, expected)


def test_calls_one_by_one_give_what_all_give():
    shapes = [2, 3, 5, 7], [2, 4, 5, 7]
    recording = record(run, *shapes)
    x, expected, output = torch.randn(shapes[0]), torch.empty(shapes[1]), torch.full(shapes[1], torch.nan)
    run(x, expected)
    room = torch.empty(recording.bytes, dtype=torch.uint8)
    for _, single in recording.apart():
        single.repeat(room.data_ptr(), x.data_ptr(), output.data_ptr())
    assert [kernel for kernel, _ in recording.apart()] == ["fold", "pointwise_forward", "pointwise_forward"]
    assert torch.equal(output, expected)


def test_nothing_is_computed_while_recording():
    before = LINEAR.weight.clone()
    record(run, [1, 3, 2, 2], [1, 4, 2, 2])
    assert torch.equal(LINEAR.weight, before)


def test_scratch_gives_its_room_back():
    def nested(x: Any) -> None:
        operators.call("channel_moments", 1, 1, 1, *operators.addresses(x, x, x))
        x.new_empty(100)
        for _ in range(3):
            with x.scratch():
                x.new_empty(10, 100)

    lines = -(-400 // 64) + -(-4000 // 64)
    assert record(nested, [1]).bytes == 64 * lines


def test_an_interrupted_recording_ends():
    def fails(x: Any) -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        record(fails, [1])
    assert active() is None


def test_the_kernel_that_refuses_is_named():
    def wrong(x: Any) -> None:
        operators.call("position_map", 1, 1, *operators.addresses(EYE, None, x))
        operators.call("channel_moments", 0, 1, 1, *operators.addresses(x, x, x))

    recording, x = record(wrong, [1, 2, 1, 1]), torch.zeros(2)
    with pytest.raises(UserError, match=re.escape("channel_moments")):
        recording.repeat(0, x.data_ptr())

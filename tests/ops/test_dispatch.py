"""Backends: their order, forcing one, their refusals, and the sentences for bad calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from san import ops
from san.errors import UserError
from san.ops import tiled
from san.ops.cases import CASES

PAIRWISE = CASES["pairwise-subtraction-LRL-relative"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that ran attention, in order."""
    from san.ops import dispatch

    names: list[str] = []
    for name, found in dispatch._implementations["pairwise_attention"].items():

        def run(call, found=found, name=name):
            names.append(name)
            return found.run(call)

        spied = dispatch._Implementation(found.supports, run, found.pays)
        monkeypatch.setitem(dispatch._implementations["pairwise_attention"], name, spied)
    return names


def attend(**changes: object) -> torch.Tensor:
    problem = PAIRWISE.build()
    return ops.pairwise_attention(*problem.arguments, **{**problem.options, **changes})


def test_backends_come_in_order() -> None:
    assert ops.backends()[-2:] == ("tiled", "reference")


def test_automatic_choice_takes_tiles_for_large_maps_only(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    attend()
    monkeypatch.setattr(tiled, "TRAINING_ELEMENTS", 100)
    attend()
    with torch.no_grad():
        attend()
        monkeypatch.setattr(tiled, "TILE_ELEMENTS", 100)
        attend()
    assert ran == ["reference", "tiled", "reference", "tiled"]


def test_a_backend_can_be_forced(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use_backend("tiled"):
        attend()
        with ops.use_backend("reference"):
            attend()
        attend()
    monkeypatch.setenv("SAN_BACKEND", "tiled")
    attend()
    with ops.use_backend("auto"):
        attend()
    assert ran == ["tiled", "reference", "tiled", "tiled", "reference"]


def test_threads_force_backends_apart(ran: list[str]) -> None:
    with ops.use_backend("tiled"), ThreadPoolExecutor(1) as pool:
        pool.submit(attend).result()
        attend()
    assert ran == ["reference", "tiled"]


def test_the_forced_backend_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), ops.use_backend("tiled"):
        raise RuntimeError
    attend()


def test_unknown_backends_are_answered_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"choose one of: auto, .*tiled, reference"), ops.use_backend("cupy"):
        pass
    monkeypatch.setenv("SAN_BACKEND", "cupy")
    with pytest.raises(UserError, match="backend 'cupy' is unknown"):
        attend()


def test_a_forced_backend_refuses_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    problem = PAIRWISE.build()
    query, key, value, _ = problem.arguments
    opaque = nn.Conv2d(6, 2, 1).double()
    answers = ops.support("pairwise_attention", query, key, value, opaque, **problem.options)
    assert answers["reference"] is None
    assert "opaque callable" in str(answers["tiled"])
    assert capsys.readouterr().out.splitlines()[-1] == "reference: yes"
    with (
        pytest.raises(ValueError, match=r"backend tiled cannot run this call: .*opaque callable"),
        ops.use_backend("tiled"),
    ):
        ops.pairwise_attention(query, key, value, opaque, **problem.options)


def test_any_callable_serves_as_mapping() -> None:
    problem = PAIRWISE.build()
    query, key, value, mapping = problem.arguments
    y = ops.pairwise_attention(query, key, value, lambda x: mapping(x), **problem.options)
    torch.testing.assert_close(y, ops.pairwise_attention(*PAIRWISE.build().arguments, **problem.options))


def test_autocast_does_not_round_inside_an_operator() -> None:
    problem = PAIRWISE.build(torch.float32)
    plain = ops.pairwise_attention(*problem.arguments, **problem.options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.pairwise_attention(*problem.arguments, **problem.options), plain)


def maps(*channels: int, size: tuple[int, int] = (4, 4)) -> list[torch.Tensor]:
    return [torch.randn(1, width, *size) for width in channels]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: attend(relation="addition"), "choose one of: subtraction, summation, hadamard, concatenation, dot"),
        (lambda: ops.patchwise_attention(*maps(2, 2, 4), kernel_size=3, relation="dot"), "concatenation, star, clique"),
        (lambda: attend(kernel_size=4), "kernel_size is 4"),
        (
            lambda: ops.pairwise_attention(*maps(2, 3, 4), kernel_size=3),
            "query has 2 channels of torch.float32 and key 3",
        ),
        (lambda: ops.pairwise_attention(*maps(3, 3, 4), kernel_size=3), "3 weight groups do not divide the 4 channels"),
        (lambda: ops.pairwise_attention(*maps(2, 2), torch.zeros(1, 4, 3, 3), kernel_size=3), "must agree"),
        (
            lambda: ops.pairwise_attention(*maps(2, 2), torch.zeros(1, 4), kernel_size=3),
            r"floating tensor \[B, C, H, W\]",
        ),
        (lambda: ops.pairwise_attention(*maps(2, 2, 4, size=(0, 4)), kernel_size=3), "must be at least 1"),
        (lambda: ops.patchwise_attention(*maps(2, 2, 4), kernel_size=3), "multiple of the footprint's 9 places"),
        (lambda: ops.aggregation(*maps(4), torch.zeros(1, 2, 9, 15), kernel_size=3), r"must be \[1, G, 9, 16\]"),
        (lambda: ops.relation(*maps(2, 3), kernel_size=3), "must have one shape"),
        (lambda: ops.relation(*maps(2, 2), form="clique", kernel_size=3), "choose one of: pairwise, patchwise"),
        (lambda: ops.support("attention"), "choose one of: aggregation, pairwise_attention, patchwise_attention"),
        (lambda: ops.Position("polar", torch.eye(2), None), "choose relative or absolute"),
        (lambda: ops.Mapping(()), "at least one layer"),
        (lambda: attend(position=None), "the mapping takes 6 channels, but relation 'subtraction' gives 4"),
        (lambda: ops.Position("relative", torch.eye(3), None), r"must be \[2, 2\]"),
        (lambda: attend_with(lambda pairs: pairs[:, :3]), "a G that divides the 8 channels"),
        (lambda: ops.patchwise_attention(*maps(2), maps(2)[0].double(), *maps(4), kernel_size=3), "must be alike"),
        (
            lambda: ops.aggregation(*maps(4), torch.zeros(1, 2, 9, 16, dtype=torch.long), kernel_size=3),
            "must be a floating",
        ),
        (lambda: ops.relation(*maps(2, 2, size=(0, 4)), kernel_size=3), "none of R, H, W 0"),
        (lambda: _one_pixel(), "more than one value per channel"),
    ],
)
def test_a_bad_call_ends_in_one_sentence(call, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def attend_with(mapping) -> torch.Tensor:
    problem = PAIRWISE.build()
    return ops.pairwise_attention(*problem.arguments[:3], mapping, **problem.options)


def _one_pixel() -> None:
    problem = CASES["patchwise-concatenation-LRL"].build()
    one = [x[:1, :, :1, :1] for x in problem.arguments[:3]]
    ops.patchwise_attention(*one, problem.arguments[3], **problem.options)


def test_reference_runs_every_registered_operator() -> None:
    for name in ("aggregation", "pairwise_attention", "patchwise_attention"):
        problem = next(case for case in CASES.values() if case.operator == name).build()
        with ops.use_backend("reference"):
            assert getattr(ops, name)(*problem.arguments, **problem.options).isfinite().all()

"""BatchNorm taken apart behaves as nn.BatchNorm2d, in one process and over several."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from san.errors import UserError
from san.ops.kernels.gpu import launch
from san.ops.normalization import (
    BatchNorm,
    Moments,
    SynchronizedBatchNorm2d,
    merge_moments,
    moments,
    synchronize_batch_norm,
)


def randomised(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for x in (*layer.parameters(), layer.running_mean):
        if x is not None:
            nn.init.normal_(x)
    return layer.double()


def stacked(parts: list[Tensor]) -> Moments:
    return Moments(*map(torch.stack, zip(*map(moments, parts), strict=True)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_merged_moments_are_those_of_the_union(sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 3, 2, 2, dtype=torch.float64) + 100
    found = merge_moments(stacked(list(x.split(sizes))))
    for merged, whole in zip(found, moments(x), strict=True):
        torch.testing.assert_close(merged, whole, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_taken_apart_equals_the_layer(
    momentum: float | None, tracked: bool, affine: bool, training: bool
) -> None:
    torch.manual_seed(0)
    layer = randomised(nn.BatchNorm2d(3, momentum=momentum, track_running_stats=tracked, affine=affine)).train(training)
    ours = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
        expected, found = layer(x), BatchNorm.of(ours)(x)
        if training and tracked:
            ours.num_batches_tracked.copy_(layer.num_batches_tracked)
        cotangent = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad(y, [x, *owner.parameters()], cotangent)
            for y, owner in ((expected, layer), (found, ours))
        ]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(list(ours.buffers()), list(layer.buffers()), rtol=1e-12, atol=1e-12)


def test_batches_are_counted() -> None:
    layer = nn.BatchNorm2d(2)
    BatchNorm.of(layer)(torch.randn(2, 2, 3, 3))
    assert layer.num_batches_tracked == 1


def test_an_empty_batch_leaves_the_running_averages_alone() -> None:
    layer = randomised(nn.BatchNorm2d(3))
    before = copy.deepcopy(layer.state_dict())
    assert BatchNorm.of(layer)(torch.empty(0, 3, 2, 2, dtype=torch.float64)).shape == (0, 3, 2, 2)
    for key in ("running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[key], before[key])


def test_synchronising_keeps_parameters_and_names() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    parameters, names = list(map(id, network.parameters())), list(network.state_dict())
    synchronize_batch_norm(network)
    assert isinstance(network[1][0], SynchronizedBatchNorm2d)
    assert (list(map(id, network.parameters())), list(network.state_dict())) == (parameters, names)
    assert network(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


def test_what_cannot_be_synchronised_is_named() -> None:
    class NormAndMore(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="NormAndMore cannot be synchronised"):
        synchronize_batch_norm(nn.Sequential(NormAndMore(3)))


def _worker(rank: int, folder: str) -> None:
    """Two processes with unequal shares of one batch: a plain layer, and both attentions on every backend."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    results = [_synchronised_step(build, rank) for build in _NETWORKS]
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _network(kind: str, backend: str) -> tuple[nn.Module, str]:
    from san.layers import PairwiseAttention, PatchwiseAttention

    torch.manual_seed(0)
    attention = {"pairwise": PairwiseAttention, "patchwise": PatchwiseAttention}[kind](4, 8, 3, relation_channels=4)
    network = nn.Sequential(nn.BatchNorm2d(4), attention, nn.BatchNorm2d(8)).to(_dtype(backend))
    for x in network.parameters():
        nn.init.normal_(x)
    return network, backend


_BACKENDS = ["reference", "tiled", *["triton"] * (launch.installed() and launch.interpreting())]
_NETWORKS = [(kind, backend) for kind in ("pairwise", "patchwise") for backend in _BACKENDS]


def _dtype(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else torch.float64


def _step(network: nn.Module, backend: str, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    from san import ops

    x = x.to(_dtype(backend), copy=True).requires_grad_()
    with ops.use_backend(backend):
        y = network(x)
    y.backward(cotangent.to(y.dtype))
    gradients = {f"d{name}": p.grad for name, p in network.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(network.named_buffers())}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(5, width, 6, 5, generator=generator, dtype=torch.float64) for width in (4, 8))


def _synchronised_step(build: tuple[str, str], rank: int) -> dict[str, Tensor]:
    network, backend = _network(*build)
    share = slice(0, 2) if rank == 0 else slice(2, 5)
    x, cotangent = _batch()
    return _step(synchronize_batch_norm(network), backend, x[share], cotangent[share])


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Outputs, input gradients, summed parameter gradients and running averages, with 2 and 3 images a process."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for number, build in enumerate(_NETWORKS):
        network, backend = _network(*build)
        expected = _step(network, backend, *_batch())
        first, second = (part[number] for part in parts)
        for key, whole in expected.items():
            if key in ("y", "dx"):
                found = torch.cat([first[key], second[key]])
            else:
                found = first[key] + second[key] if key.startswith("d") else first[key]
            precision = 1e-9 if whole.dtype == torch.float64 or not whole.is_floating_point() else 1e-4
            torch.testing.assert_close(found, whole, rtol=precision, atol=precision, msg=f"{build} {key}")

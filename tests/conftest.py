"""What all tests share: one thread per worker, fixed seeds, and no writing outside temporary folders."""

from __future__ import annotations

import os

# Before torch is imported anywhere: pytest-xdist already uses every core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, Triton's kernels run in its interpreter, on request only; read when they are first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Processes that tests start may say so where SAN is installed without its C++ kernels; what they say is compared.
os.environ.setdefault("PYTHONWARNINGS", "ignore:attention runs on the portable backend")

import pytest
import torch
from hypothesis import settings

settings.register_profile("san", deadline=None, derandomize=True)
settings.load_profile("san")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield

"""Compile every Triton kernel that SAN10 launches, without a GPU: registers, spills and shared memory of each.

    python benchmarks/gpu_compile.py [--target sm_80 sm_90 gfx942] [--dtype bfloat16] [--layers all|few]
        [--json results.json]

The attention layers of both SAN10 at 224×224 run once, forward and backward, in training, on the CPU, with launches
noted instead of done, and what surrounds them in the networks likewise; each kernel is then compiled for the given
GPUs, NVIDIA's by compute capability and AMD's by architecture, with its constants and its number of warps; with few
layers those of stage 1, and a SAN4 around them. Exit code 1 if one does not compile, spills registers or asks for more
shared memory than a multiprocessor has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from san import create_model, fused, ops
from san.ops.cases import SAN10_LAYERS, Case
from san.ops.kernels.aggregation import triton as aggregation_host
from san.ops.kernels.gpu import launch
from san.ops.kernels.pairwise import triton as pairwise_host
from san.ops.kernels.patchwise import triton as patchwise_host

RUN = {
    "aggregation": aggregation_host.run,
    "pairwise_attention": pairwise_host.run,
    "patchwise_attention": patchwise_host.run,
}
# Shared memory of a block at most, in bytes.
SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
SHOWN = ("C", "POOLED", "R", "G", "GIVEN", "LAYERS", "ATTEND", "FROM", "TO", "LANES", "KERNEL")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}


def kind_of(x: Any) -> str:
    """What Triton calls an argument's type."""
    return POINTERS[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32"


@contextmanager
def noting(noted: list[dict[str, Any]]) -> Generator[None]:
    """Inside, launches of kernels are noted, arguments' kinds and constants, and not done."""

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
        names = [name for name in kernel.arg_names if name not in constants]
        given = dict(zip(names, arguments, strict=True))
        absent = {name: x for name, x in given.items() if x is None}
        found = {
            "kernel": kernel.__name__,
            "module": kernel.__module__,
            "kinds": {name: kind_of(x) for name, x in given.items() if name not in absent},
            "constants": constants | absent,
            "options": options,
        }
        if found not in noted:
            noted.append(found)

    with patch.object(launch, "instead", note):
        yield


def note_call(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Forward, with gradients and without, and backward of a case, with channels last."""
    problem = case.build(dtype, channels_last=True)
    call = ops.make_call(problem.operator, *problem.arguments, **problem.options)
    RUN[problem.operator](call).float().sum().backward()
    with torch.no_grad():
        RUN[problem.operator](call)


@contextmanager
def as_on_a_gpu() -> Generator[None]:
    """Inside, networks on the CPU do around the attention what they do on a GPU."""
    with (
        patch.object(fused, "suits", lambda x: False),
        patch.object(fused.gpu, "DEVICES", {"cpu"}),
        patch.object(launch, "map_refusal", lambda x: None),
    ):
        yield


def note_network(name: str, dtype: torch.dtype = torch.float32, image: tuple[int, ...] = (2, 3, 64, 64)) -> None:
    """What surrounds attention in a network, without gradients and in a training step; attention is the CPU's."""
    network, images = create_model(name).to(dtype), torch.zeros(image, dtype=dtype)
    with as_on_a_gpu():
        network(images).float().sum().backward()
        with torch.no_grad():
            network.eval()(images)


def gpu(target: str) -> GPUTarget:
    """What Triton calls a target."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def compiled(noted: dict[str, Any], target: str) -> dict[str, Any]:
    """Registers of a thread, what it spills, and shared memory of a block, for one GPU."""
    function = getattr(importlib.import_module(noted["module"]), noted["kernel"])
    kinds, constants = noted["kinds"], noted["constants"]
    signature = {name: kinds.get(name, "constexpr") for name in function.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(function.arg_names) if kinds.get(name, "").startswith("*")}
    source = ASTSource(function, signature, constants, attributes)
    row = {
        "kernel": noted["kernel"],
        "form": noted["module"].split(".")[-2],
        "target": target,
        **{key: constants[key] for key in SHOWN if key in constants},
        "warps": noted["options"].get("num_warps", 4),
    }
    try:
        found = triton.compile(source, target=gpu(target), options=noted["options"])
    except RuntimeError as error:
        return {**row, "error": str(error).splitlines()[0]}
    usage = resources(found.asm["cubin"]) if "cubin" in found.asm else amd_resources(found.asm["amdgcn"])
    return {**row, **usage, "shared": found.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    """What the compiled code asks for, as Triton's cuobjdump tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "stack": stack}


def amd_resources(assembly: str) -> dict[str, int]:
    """The same of an AMD kernel, whose assembly lists it; `stack` are bytes that lie outside of registers."""
    keys = {"registers": "vgpr_count", "stack": "private_segment_fixed_size"}
    return {name: int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for name, key in keys.items()}


def main() -> None:
    """Compile all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=["sm_90"], choices=list(SHARED))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", default="all", choices=["all", "few"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    noted: list[dict[str, Any]] = []
    cases = [case for case in SAN10_LAYERS.values() if given.layers == "all" or case.name.endswith("stage1")]
    with noting(noted):
        for case, training in product(cases, (True, False)):
            note_call(replace(case, training=training), getattr(torch, given.dtype))
        for name in ("san10_pairwise", "san10_patchwise") if given.layers == "all" else ("san4_pairwise",):
            note_network(name, getattr(torch, given.dtype))
    jobs = [(each, target) for target in given.target for each in noted]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(compiled, *zip(*jobs, strict=True)))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(str(row.get(column, "")) for column in columns))
    if given.json:
        given.json.write_text(
            json.dumps({"dtype": given.dtype, "triton": triton.__version__, "kernels": rows}, indent=1)
        )
    bad = [row for row in rows if "error" in row or row["stack"] or row["shared"] > SHARED[row["target"]]]
    sys.exit(f"{len(bad)} of {len(rows)} kernels fail, spill or ask for too much shared memory" if bad else 0)


if __name__ == "__main__":
    main()

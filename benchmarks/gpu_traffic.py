"""The bytes that networks move on a GPU, and those that exist at a time, counted without a GPU and without data.

    python benchmarks/gpu_traffic.py [--batch 256] [--json results.json]

Inference and a training step (forward, cross-entropy, backward) of ResNet26 and both SAN10 at 224×224 run on tensors
without data, in bfloat16, channels-last, eager, the baseline's BatchNorm folded in inference; SAN10 twice, as its
modules are written and with the kernels of GPUs around its attention, which are Triton's both times. Every operator and
kernel counts each of its tensors once, and twice what it overwrites: **moved** is the least that they read and write,
whatever caches may spare and second looks of one operator may add; **kept** what a training step holds between forward
and backward; **peak** the most that exists at a time, gradients included, parameters and images not. What operators
allocate inside is not in it.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from san import create_model, fused
from san.evaluation.speed.contestants import fold_batch_norm
from san.ops import use_backend
from san.ops.kernels.gpu import launch, normalization
from san.ops.kernels.native import operators
from san.ops.kernels.pairwise import triton as pairwise
from san.ops.kernels.pointwise_training.device import back_to_input


class Count(TorchDispatchMode):
    """Bytes that operators and launches move, and those of storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.alive, self.peak = 0, 0, 0
        self.seen: dict[int, Any] = {}

    def see(self, x: Tensor, *, counts: bool = True) -> None:
        """Count a tensor's storage from now on until it is freed."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key not in self.seen:

            def freed(_: Any) -> None:
                self.alive -= size
                del self.seen[key]

            self.seen[key] = weakref.ref(storage, freed)
            self.alive += size
            self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        for x in given:
            self.see(x, counts=False)
        found = function(*args, **(kwargs or {}))
        made = _tensors(found)
        for x in made:
            self.see(x)
        own = {x.untyped_storage()._cdata for x in given}
        is_view = not function._schema.is_mutable and any(x.untyped_storage()._cdata in own for x in made)
        # Memory that nobody has written yet.
        if not is_view and "empty" not in function._opname:
            self.moved += _bytes([*given, *made])
        return found

    def start(self, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        """Stands for a kernel's launch."""
        given = [x for x in arguments if isinstance(x, Tensor)]
        # What a kernel overwrites it has read as well.
        overwritten = given[:1] if kernel is back_to_input else []
        self.moved += _bytes([*given, *overwritten])


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of each once; what is expanded takes no more than its storage."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


@contextmanager
def counted(*, joined: bool) -> Generator[Count]:
    """Inside, operators and launches on tensors without data are counted; with `joined`, networks do around the
    attention what they do on a GPU."""
    count = Count()
    with ExitStack() as stack:
        stack.enter_context(patch.object(launch, "instead", count.start))
        for holder in (operators, pairwise, normalization):
            stack.enter_context(patch.object(holder, "unobserved", lambda: True))
        stack.enter_context(patch.object(launch, "map_refusal", lambda x: None))
        stack.enter_context(patch.object(fused.gpu, "DEVICES", {"meta"} if joined else set()))
        stack.enter_context(count)
        yield count


def measure(name: str, mode: str, batch: int, *, joined: bool) -> dict[str, Any]:
    """A row, in MB an image."""
    with torch.device("meta"):
        model, images = create_model(name).bfloat16(), torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16)
        labels = torch.zeros(batch, dtype=torch.long)
    model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    trains, kept = mode == "training", None
    if not trains:
        model, _ = fold_batch_norm(model.eval()) if name.startswith("baseline") else (model.eval(), False)
    backend = use_backend("triton") if name.startswith("san") else nullcontext()
    with counted(joined=joined) as count, backend, torch.set_grad_enabled(trains):
        for x in (*model.parameters(), *model.buffers(), images, labels):
            count.see(x, counts=False)
        y = model(images)
        if trains:
            kept = count.alive
            F.cross_entropy(y.float(), labels).backward()
    shown = {"moved": count.moved, "kept": kept, "peak": count.peak}
    form = "as written" if name.startswith("san") and not joined else "with kernels" if joined else ""
    row = {key: None if value is None else value / batch / 2**20 for key, value in shown.items()}
    return {"network": name, "mode": mode, "form": form, **row}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images (default 256)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    if given.batch < 1:
        parser.error(f"--batch is {given.batch}, but it must be at least 1")
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json {given.json} cannot be written: there is no folder {given.json.parent}")
    rows = []
    print("| network | mode | around the attention | moved, MB an image | of ResNet26's | kept | peak |")
    print("|---" * 7 + "|")
    for mode in ("inference", "training"):
        contestants = [("baseline_resnet26", False)]
        contestants += [(f"san10_{form}", joined) for form in ("pairwise", "patchwise") for joined in (False, True)]
        for name, joined in contestants:
            row = measure(name, mode, given.batch, joined=joined)
            rows.append(row)
            ratio = row["moved"] / next(each["moved"] for each in rows if each["mode"] == mode)
            shown = [
                f"{row['moved']:.1f}",
                f"{ratio:.2f}",
                *("" if row[key] is None else f"{row[key]:.1f}" for key in ("kept", "peak")),
            ]
            print("| " + " | ".join([name, mode, row["form"], *shown]) + " |")
    if given.json:
        found = {"batch": given.batch, "dtype": "bfloat16", "torch": torch.__version__, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

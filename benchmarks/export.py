"""Size, time and memory of exported networks beside PyTorch, on the CPU.

    python benchmarks/export.py [--network san10_pairwise] [--batches 1 4] [--rounds 7] [--keep FOLDER]
        [--json results.json]

Contestants: the library as it is ("san"), the library with its reference formulas ("reference", what the files hold),
ONNX Runtime, AOTInductor and the torch.export program. Time: they take turns in one process, all on as many threads;
medians of the rounds and of the ratios to "san" round by round. Memory: a fresh process for each runs one batch and
reports how far its peak resident memory rises above what it held before. With --keep, exported files stay in a folder
and are not written again; `--batches` without numbers only writes them, as compiling takes longer than measuring. With
--json, the networks that the file holds already stay in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from san import create_model, ops
from san.evaluation.speed.clock import ratios, spread, take_turns
from san.evaluation.speed.machine import describe_machine, describe_versions
from san.export import FORMATS, export_model
from san.export.formats import OPSET

SIDE = 224
FILES = ("onnx", "aot-inductor", "torch-export")
CONTESTANTS = ("san", "reference", *FILES)
Step = Callable[[], object]


def network(name: str) -> torch.nn.Module:
    """A network with random weights."""
    torch.manual_seed(0)
    return create_model(name).eval()


def file_of(folder: Path, name: str, format: str) -> Path:
    """Where an exported file lies."""
    return folder / f"{name}{FORMATS[format].mark}{FORMATS[format].suffix}"


def write(name: str, format: str, folder: Path) -> float:
    """Export once; gives the file's size in MB."""
    path = file_of(folder, name, format)
    if not path.exists():
        export_model(network(name), path, format, limit=4)
    return round(path.stat().st_size / 1e6, 1)


def step(contestant: str, name: str, folder: Path, batch: int) -> Step:
    """One inference of a contestant, ready to be repeated."""
    images = np.random.default_rng(0).standard_normal((batch, 3, SIDE, SIDE), dtype=np.float32)
    if contestant in FILES:
        run = FORMATS[contestant].load(file_of(folder, name, contestant))
        return lambda: run(images)
    model, given = network(name), torch.from_numpy(images)

    @torch.inference_mode()
    def infer() -> object:
        with ops.use_backend("reference" if contestant == "reference" else "auto"):
            return model(given)

    return infer


def resident(field: str) -> float:
    """A field of Linux' process status in MiB: VmRSS (now) or VmHWM (peak)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


def report_peak(contestant: str, name: str, folder: Path, batch: int) -> None:
    """Print the rise of peak resident memory over one inference, in MiB."""
    infer = step(contestant, name, folder, batch)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    infer()
    print(resident("VmHWM") - before)


def peak(contestant: str, name: str, folder: Path, batch: int) -> float:
    """`report_peak` in a process of its own."""
    words = ["--network", name, "--batches", str(batch), "--peak-of", contestant, "--keep", str(folder)]
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, text=True)
    return round(float(done.stdout.split()[-1]), 1)


def measure(name: str, batches: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Everything about one network."""
    found: dict[str, Any] = {"megabytes": {format: write(name, format, folder) for format in FILES}, "batches": {}}
    for batch in batches:
        times = take_turns({each: step(each, name, folder, batch) for each in CONTESTANTS}, rounds)
        found["batches"][str(batch)] = {
            each: {
                "milliseconds": {key: round(1e3 * value, 1) for key, value in spread(times[each]).items()},
                "ratio_to_san": {key: round(value, 2) for key, value in ratios(times[each], times["san"]).items()},
                "peak_MiB": peak(each, name, folder, batch),
            }
            for each in CONTESTANTS
        }
    return found


def main() -> None:
    """Parse, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="san10_pairwise")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4], help="images at a time (default 1 and 4)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--keep", type=Path, help="folder for exported files")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--peak-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        report_peak(options.peak_of, options.network, options.keep, options.batches[0])
        return
    with TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        result = measure(options.network, options.batches, options.rounds, folder)
    result |= {
        "what": f"{options.network}, {SIDE}x{SIDE}, float32, inference, random weights",
        "date": datetime.date.today().isoformat(),
        "machine": {**describe_machine(), "threads": torch.get_num_threads()},
        "versions": {**describe_versions(), "onnxruntime": version("onnxruntime")},
        "opset": OPSET,
    }
    earlier = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    text = json.dumps({**earlier, options.network: result}, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

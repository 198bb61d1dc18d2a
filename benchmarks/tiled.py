"""Time and memory of the tiled backend beside the reference, on the attention layers of SAN10 at 224×224.

    python benchmarks/tiled.py [--form pairwise|patchwise] [--batch 4] [--rounds 5] [--json results.json]

Time: both backends take turns layer by layer in one process; medians of the rounds, ratio of their sums. Memory: one
fresh process per backend runs the forward pass of every layer once and reports how far its peak resident memory rises
above what it held before the first layer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from san import create_model, ops

BACKENDS = ("reference", "tiled")


def attention_layers(form: str, batch: int) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """The attention layers of SAN10 in evaluation mode, each with a random input of its size."""
    torch.manual_seed(0)
    model = create_model(f"san10_{form}").eval()
    stages = [(getattr(model, f"layer{stage}"), 112 >> stage) for stage in range(5)]
    return [
        (block.sam, torch.randn(batch, block.sam.in_channels, side, side)) for stage, side in stages for block in stage
    ]


def seconds(layer: torch.nn.Module, x: torch.Tensor, backend: str) -> float:
    """One forward pass."""
    with torch.no_grad(), ops.use_backend(backend):
        start = time.perf_counter()
        layer(x)
        return time.perf_counter() - start


def measure_time(form: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Median seconds of every layer, per backend, after one round that does not count."""
    layers = attention_layers(form, batch)
    found: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for layer, x in layers:
        times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for round_ in range(rounds + 1):
            for backend in BACKENDS:
                elapsed = seconds(layer, x, backend)
                times[backend] += [elapsed] if round_ else []
        for backend in BACKENDS:
            found[backend].append(statistics.median(times[backend]))
    return found


def resident(field: str) -> float:
    """A field of Linux' process status in MiB: VmRSS (now) or VmHWM (peak)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def report_peak(form: str, batch: int, backend: str) -> None:
    """Print the rise of peak resident memory over one forward pass of every layer, in MiB."""
    layers = attention_layers(form, batch)
    seconds(layers[-1][0], layers[-1][1][:1], backend)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    for layer, x in layers:
        seconds(layer, x, backend)
    print(resident("VmHWM") - before)


def measure_peaks(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak rise of every backend, each in a process of its own."""
    command = [sys.executable, __file__, "--form", arguments.form, "--batch", str(arguments.batch), "--peak-of"]
    return {
        backend: float(subprocess.run([*command, backend], capture_output=True, check=True, text=True).stdout)
        for backend in BACKENDS
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, with machine, versions and date."""
    times = measure_time(arguments.form, arguments.batch, arguments.rounds)
    peaks = measure_peaks(arguments)
    return {
        "what": f"SAN10 {arguments.form} attention layers, 224x224, batch {arguments.batch}, float32, inference",
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "milliseconds": {name: [round(1e3 * t, 1) for t in found] for name, found in times.items()},
        "peak_MiB": {name: round(peak, 1) for name, peak in peaks.items()},
        "time_ratio": round(sum(times["tiled"]) / sum(times["reference"]), 3),
        "memory_ratio": round(peaks["tiled"] / peaks["reference"], 3),
    }


def main() -> None:
    """Parse, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("pairwise", "patchwise"), default="pairwise")
    parser.add_argument("--batch", type=int, default=4, help="images (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--peak-of", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        report_peak(arguments.form, arguments.batch, arguments.peak_of)
        return
    text = json.dumps(measure(arguments), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

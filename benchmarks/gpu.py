"""The Triton kernels on a GPU: right, then fast. One command, under 8 minutes, nothing to install.

    python benchmarks/gpu.py [--quick] [--seconds 420] [--json results.json] [--processes N]
    python benchmarks/gpu.py --device cpu          # a rehearsal: every line on small sizes in Triton's interpreter

Needs torch, triton, timm, numpy and safetensors; the package need not be installed. In this order:
the machine and what it can do; every operator against float64, in several processes, which also compile what is timed
later; kernels compiled over 20 sizes; the attention layers of SAN10 against their plain form; whole networks against
ResNet26; other promises. A step that fails is reported and the next one goes on; what there is no time for is named.
The tables come last, the targets at their end; the JSON is written after every step, by default beside the other
results under the GPU's name. Exit code 1 if a comparison or a promise is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DTYPE = "bfloat16"
# When the last part of a step may begin, as shares of the time there is.
CHECKS, WARM_UPS, COMPILATIONS, OPERATORS, NETWORKS, FEATURES = 0.28, 0.42, 0.45, 0.66, 0.86, 1.05
# A job in another process takes no longer, in seconds.
PATIENCE = 120.0


class Run:
    """A run: what has been found so far, and the time."""

    def __init__(self, device: str, seconds: float, target: Path | None) -> None:
        self.device, self.seconds, self.target, self.begin = device, seconds, target, time.monotonic()
        self.lost = ""
        lists = ("checks", "compilations", "operators", "networks", "features", "failures", "skipped")
        self.result: dict[str, Any] = {name: [] for name in lists}

    def at(self, share: float) -> float:
        """The moment, of `time.monotonic`, at which this share of the time is over."""
        return self.begin + share * self.seconds

    def say(self, text: str) -> None:
        """Tell the time and what is going on."""
        print(f"[{time.monotonic() - self.begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    def attempt(self, name: str, until: float, call: Callable[[], Any]) -> Any:
        """What `call` gives; None if it fails, or if there is no time or no device for it any more."""
        from benchmarks.gpu_parts.clock import free, one_sentence

        if self.lost or time.monotonic() > self.at(until):
            self.result["skipped"].append(f"{name}{self.lost}")
            return None
        self.say(name)
        problem = None
        try:
            return call()
        except Exception as found:
            problem = one_sentence(found)
            self.result["failures"].append(f"{name}: {problem}")
            self.say(f"failed: {problem}")
        finally:
            try:
                free(self.device)
            except RuntimeError as broken:
                self.lost = f" (the device answers no more: {one_sentence(broken)})"
        return None

    def keep(self) -> None:
        """Write what there is."""
        self.result["seconds"] = time.monotonic() - self.begin
        if self.target:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.target.write_text(json.dumps(self.result, indent=1, ensure_ascii=False) + "\n")


def prepare(device: str) -> None:
    """Paths and environment, before torch and Triton are imported."""
    os.environ["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
    # Where processes of this run, and the next run on this machine, find what was compiled.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "san-gpu-benchmark"))
    # What is measured is what lies here, installed or not.
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]


def measure_machine(run: Run, scale: Any) -> None:
    """Rates of memory and arithmetic."""
    from benchmarks.gpu_parts import machine

    run.result["rates"] = run.attempt("machine", 1.0, lambda: machine.measure(scale, run.device))


def check_operators(run: Run, scale: Any, processes: int) -> None:
    """Every operator against float64."""
    from benchmarks.gpu_parts import correctness, workers

    checks = [
        workers.Job(f"{case.name}, {dtype}", partial(correctness.check, case, dtype, run.device), run.at(CHECKS))
        for case, dtype in scale.checks
    ]
    run.say(f"{len(checks)} comparisons with float64 in {processes or 'this'} process(es)")
    for outcome in workers.run(checks, processes, run.device, PATIENCE, partial(_tell, run)):
        if outcome.skipped:
            run.result["skipped"].append(f"comparison of {outcome.name}")
            continue
        case, _, dtype = outcome.name.rpartition(", ")
        row = outcome.value or {"case": case, "dtype": dtype, "right": False, "error": outcome.error}
        run.result["checks"].append(row)


def _tell(run: Run, outcome: Any) -> None:
    if outcome.error or (outcome.value and not outcome.value["right"]):
        run.say(f"{outcome.name}: {outcome.error or outcome.value}")


def warm_up(run: Run, scale: Any, processes: int) -> None:
    """Compile what is timed later, several at once; what fails fails again there, and is reported.

    Fewer processes than for checks, because code that is to compile a backward pass must run the forward at full size.
    """
    import torch

    from benchmarks.gpu_parts import networks, operators, workers

    dtype, batch, device = getattr(torch, DTYPE), scale.operator_batches[0], run.device
    nets = [
        (f"{name}, {mode}, batch {size}", partial(networks.warm, name, mode, size, True, scale, DTYPE, device))
        for name, mode, size, compiled in networks.rounds(scale)
        if compiled
    ]
    layers = [
        (f"{name}, {what}", partial(operators.warm, scale.layers[name][0], batch, what, dtype, device))
        for name in scale.compiled
        for what in operators.PASSES
    ]
    # The kernels' own, which no batch changes.
    kernels = [
        (f"{name}'s kernels, {mode}", partial(networks.warm, name, mode, 2, False, scale, DTYPE, device))
        for name in scale.sans.values()
        for mode in ("training", "inference")
    ]
    first = 2 * (1 + len(scale.sans))
    calls = [*kernels, *nets[:first], *layers, *nets[first:]] if processes else []
    jobs = [workers.Job(f"compilation of {name}", call, run.at(WARM_UPS)) for name, call in calls]
    run.say(f"{len(jobs)} compilations")
    workers.run(jobs, min(processes, 4), device, PATIENCE, partial(_tell, run))
    _forget_choices()


def _forget_choices() -> None:
    """Inductor chose among variants of its kernels while others used the GPU; it shall choose again, alone."""
    for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.best_config"):
        path.unlink(missing_ok=True)


def count_compilations(run: Run, scale: Any) -> None:
    """Kernels compiled over sizes."""
    from benchmarks.gpu_parts import features

    for form in scale.sans:
        call = partial(features.count_compilations, form, scale, run.device)
        run.result["compilations"] += run.attempt(f"compilations, {form}", COMPILATIONS, call) or []


def time_operators(run: Run, scale: Any) -> None:
    """The attention layers: kernels and plain form, then the plain form compiled, then smaller batches."""
    import torch

    from benchmarks.gpu_parts import machine, operators

    if not run.result["rates"]:
        run.result["skipped"].append("attention layers, as the machine's rates are not known")
        return
    rates, dtype = machine.rates(run.result["rates"]), getattr(torch, DTYPE)
    unsafe = [row["case"] for row in run.result["checks"] if row["dtype"] == DTYPE and row.get("error")]
    crashed = {case.removesuffix("-evaluation") for case in unsafe}
    first, *others = scale.operator_batches
    rounds = [(first, form) for form in ("triton", "eager", "compiled")]
    rounds += [(batch, form) for batch in others for form in ("triton", "eager")]
    for batch, form in rounds:
        for name, (case, _) in scale.layers.items():
            if form == "compiled" and name not in scale.compiled:
                continue
            for what in operators.PASSES:
                title = f"{name}, {what}, batch {batch}, {form}"
                if name in crashed and form == "triton":
                    run.result["skipped"].append(f"{title}, which did not survive its comparison")
                    continue
                call = partial(operators.measure, case, batch, what, form, scale, run.device, rates, dtype)
                row = run.attempt(title, OPERATORS, call)
                run.result["operators"] += [row] if row else []
        run.keep()


def time_networks(run: Run, scale: Any) -> None:
    """Whole networks."""
    from benchmarks.gpu_parts import networks

    for name, mode, batch, compiled in networks.rounds(scale):
        title = f"{name}, {mode}, batch {batch}, {'compiled' if compiled else 'eager'}"
        call = partial(networks.measure, name, mode, batch, compiled, scale, DTYPE, run.device)
        row = run.attempt(title, NETWORKS, call)
        run.result["networks"] += [row] if row else []
        run.keep()


def try_features(run: Run, scale: Any) -> None:
    """The other promises, yes or no."""
    from benchmarks.gpu_parts.features import FEATURES as promises
    from benchmarks.gpu_parts.features import GPU_ONLY

    for name, promise in promises.items():
        if name in GPU_ONLY and run.device == "cpu":
            run.result["features"].append({"promise": name, "kept": "not tried", "detail": "needs a GPU"})
            continue
        before = len(run.result["failures"])
        detail = run.attempt(name, FEATURES, partial(promise, scale, run.device))
        if detail is not None:
            run.result["features"].append({"promise": name, "kept": "yes", "detail": detail})
        elif len(run.result["failures"]) > before:
            problem = run.result["failures"].pop().partition(": ")[2]
            run.result["features"].append({"promise": name, "kept": "no", "detail": problem})


def measure(run: Run, scale: Any, processes: int) -> dict[str, Any]:
    """All steps."""
    from benchmarks.gpu_parts import machine
    from benchmarks.gpu_parts.clock import one_sentence

    layers = {name: count for name, (_, count) in scale.layers.items()}
    settings = {"scale": scale.name, "dtype": DTYPE, "layers": layers, "sans": scale.sans, "baseline": scale.baseline}
    run.result = {**machine.describe(run.device), "settings": settings, "rates": None, **run.result}
    steps = [
        partial(measure_machine, run, scale),
        partial(check_operators, run, scale, processes),
        partial(warm_up, run, scale, processes),
        partial(count_compilations, run, scale),
        partial(time_operators, run, scale),
        partial(time_networks, run, scale),
        partial(try_features, run, scale),
    ]
    for step in steps:
        try:
            step()
        except Exception as problem:
            # What is not part of an attempt: a module that cannot be imported, for instance.
            run.result["failures"].append(f"{step.func.__name__}: {one_sentence(problem)}")
        run.keep()
    return run.result


def is_right(result: dict[str, Any]) -> bool:
    """Whether every comparison, count and promise that was tried came out right, and any comparison was."""
    rows = [*result["checks"], *result["compilations"]]
    return (
        bool(result["checks"])
        and all(row["right"] for row in rows)
        and all(row["kept"] != "no" for row in result["features"])
    )


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses (default cuda)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few checks, one size")
    parser.add_argument("--seconds", type=float, default=420.0, help="nothing begins after these (default 420)")
    parser.add_argument("--processes", type=int, help="that check and compile; 0: this one alone (default: by cores)")
    parser.add_argument("--json", type=Path, help="where the result goes (default benchmarks/results/gpu-NAME.json)")
    return parser.parse_args()


def main() -> None:
    """Run, print, and say by the exit code whether all is right."""
    given = arguments()
    prepare(given.device)
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; rehearse with --device cpu", file=sys.stderr)
        sys.exit(2)
    from benchmarks.gpu_parts.report import as_page
    from benchmarks.gpu_parts.scale import FULL, QUICK, REHEARSAL

    target, cores = given.json, len(os.sched_getaffinity(0))
    if given.device == "cuda":
        torch.backends.cudnn.benchmark = True
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
        target = target or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    usual = max(1, min(12, cores - 2)) if given.device == "cuda" else 1
    scale = REHEARSAL if given.device == "cpu" else QUICK if given.quick else FULL
    run = Run(given.device, given.seconds, target)
    result = measure(run, scale, usual if given.processes is None else given.processes)
    print(as_page(result), flush=True)
    sys.exit(0 if is_right(result) else 1)


if __name__ == "__main__":
    main()

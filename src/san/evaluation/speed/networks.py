"""Networks against the baseline: for every task one group of contestants that take turns, and a row for each."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from san.errors import UserError
from san.evaluation.speed.attention import has_attention
from san.evaluation.speed.clock import Step, ratios, spread, take_turns
from san.evaluation.speed.contestants import AttentionLayers, Runner, Task, build_network, prepare, variants
from san.evaluation.speed.memory import kept, peak_bytes
from san.evaluation.speed.settings import Settings

__all__ = ["LAYERS", "WHOLE", "measure_networks"]

WHOLE, LAYERS = "network", "attention layers"

_PRESELECTION = 5


@dataclass(frozen=True)
class _Contestant:
    """A network in its fastest variant; `memory` of that one, of the baseline's thriftiest; empty in inference."""

    network: str
    backend: str
    runner: Runner
    preselection: dict[str, float]
    memory: dict[str, Any]

    @property
    def parts(self) -> dict[str, Step]:
        """What is timed: the whole network, and in inference its attention layers alone."""
        if self.runner.operators and not self.runner.task.trains:
            return {WHOLE: self.runner, LAYERS: AttentionLayers(self.runner)}
        return {WHOLE: self.runner}


def measure_networks(settings: Settings, say: Callable[[str], None], notes: list[str]) -> list[dict[str, Any]]:
    """A row for every network, task and backend, the baseline first in each task.

    `ratio` is to the baseline's whole step in the same round, also for the `part` "attention layers". `memory` is in
    training only, the baseline's of the variant that keeps least; `peak_bytes` belongs to one whole step. What had to
    be left out is told in `notes`.
    """
    tasks = itertools.product(settings.modes, settings.batches, settings.resolutions, settings.dtypes)
    rows: list[dict[str, Any]] = []
    for mode, batch, resolution, dtype in tasks:
        rows += _measure_task(Task(mode, batch, resolution, dtype, settings.device), settings, say, notes)
    return rows


def _measure_task(task: Task, settings: Settings, say: Callable[[str], None], notes: list[str]) -> list[dict[str, Any]]:
    # Otherwise code compiled for another batch size would make this one's sizes variables.
    torch.compiler.reset()
    contestants: list[_Contestant] = []
    for network, backend in _entries(settings):
        say(f"{task}: choosing the fastest variant of {network}")
        try:
            contestants.append(_choose(network, backend, task, settings, notes))
        except UserError as problem:
            # A backend that was asked for by name may refuse one task and run the others.
            if backend == "auto":
                raise
            notes.append(f"{network} on {backend} was left out of {task}: {problem}")
    parts = {(place, part): step for place, each in enumerate(contestants) for part, step in each.parts.items()}
    found = take_turns(parts, settings.rounds, task.device, lambda turn: say(f"{task}: {turn}"))
    rows = []
    for (place, part), times in found.items():
        say(f"{task}: peak memory of {contestants[place].network}")
        row = _row(contestants[place], part, times, settings.peak)
        rows.append(row | _against(row, rows[0] if rows else row))
    return rows


def _entries(settings: Settings) -> list[tuple[str, str]]:
    """Networks and their backends, the baseline first and once; without attention layers backends are all one."""
    entries = [(settings.baseline, "auto")]
    for model in dict.fromkeys(settings.models):
        backends = settings.backends if has_attention(build_network(model)) else ("auto",)
        entries += [(model, backend) for backend in backends if (model, backend) not in entries]
    return entries


def _choose(network: str, backend: str, task: Task, settings: Settings, notes: list[str]) -> _Contestant:
    """The fastest variant by the median of a few rounds among the variants themselves."""
    compiled = settings.compile if network == settings.baseline else settings.compile_models
    runners: dict[str, Runner] = {}
    for variant in variants(task, compiled):
        try:
            runners[str(variant)] = prepare(network, backend, task, variant)
        except RuntimeError as problem:
            if not variant.compiled:
                raise
            reason = str(problem).strip().partition("\n")[0]
            notes.append(f"compiled variants of {network} were left out in {task.mode}: {reason}")
            break
    times = take_turns(runners, _PRESELECTION, task.device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(medians, key=lambda name: medians[name])
    # The baseline has both advantages, a model must be fast and thrifty at once.
    counted = runners if network == settings.baseline else {fastest: runners[fastest]}
    return _Contestant(network, backend, runners[fastest], medians, _least_kept(counted) if task.trains else {})


def _least_kept(runners: dict[str, Runner]) -> dict[str, Any]:
    """Memory of the variant that keeps least; which one it is stands beside the bytes."""
    found = {name: kept(runner) for name, runner in runners.items()}
    thriftiest = min(found, key=lambda name: found[name]["kept"])
    return {**found[thriftiest], "variant": thriftiest}


def _row(contestant: _Contestant, part: str, times: list[float], peak: bool) -> dict[str, Any]:
    runner, task = contestant.runner, contestant.runner.task
    row = {
        "network": contestant.network,
        "part": part,
        "backend": contestant.backend if runner.operators else None,
        **{name: value for name, value in asdict(task).items() if name != "device"},
        "variant": str(runner.variant),
        "batch_norm_folded": runner.folded,
        "preselection_seconds": contestant.preselection,
        "seconds": times,
        "ms_per_image": spread([1e3 * seconds / task.batch for seconds in times]),
    }
    if part == WHOLE:
        row["memory"] = contestant.memory
        if peak:
            row["peak_bytes"] = peak_bytes(contestant.network, contestant.backend, task, runner.variant)
    return row


def _against(row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Ratios to the baseline's row of the same task; left out where there is nothing to compare."""
    found: dict[str, Any] = {"ratio": ratios(row["seconds"], baseline["seconds"])}
    if row.get("memory"):
        found["kept_ratio"] = row["memory"]["kept"] / baseline["memory"]["kept"]
    if row.get("peak_bytes") and baseline.get("peak_bytes"):
        found["peak_ratio"] = row["peak_bytes"] / baseline["peak_bytes"]
    return found

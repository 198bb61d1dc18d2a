"""Speed and memory of networks and operators on this machine: `measure` runs what `Settings` ask for.

Ratios are the product: everything is compared within one process, in rounds in which each contestant runs once, against
the fastest form of the baseline. Absolute times drift with the machine's load; ratios of the same round hardly do.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from san.evaluation.speed.clock import threads_set
from san.evaluation.speed.machine import describe_machine, describe_versions
from san.evaluation.speed.networks import measure_networks
from san.evaluation.speed.operators import measure_operators, measure_sweep
from san.evaluation.speed.settings import Settings

__all__ = ["Settings", "measure"]


def measure(settings: Settings, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure what `settings` ask for.

    The result is plain data for JSON: `date`, `machine`, `versions`, `settings`, `notes` (sentences about what was
    left out), and the rows of `networks`, `operators` and `sweep`, empty where not asked for. Every row keeps the
    seconds of its single rounds; sizes are in bytes.

    Args:
        settings: What to measure, and how.
        say: Told what is being measured, between measurements only.

    Raises:
        UserError: A network does not take the images, or a backend that was not named refuses.
    """
    notes: list[str] = []
    with threads_set(settings.threads) as threads:
        networks = measure_networks(settings, say, notes) if settings.networks else []
        operators = measure_operators(settings, say, notes) if settings.operators else []
        sweep = measure_sweep(settings, say, notes) if settings.sweep else []
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device),
        "versions": describe_versions(),
        "settings": {**asdict(settings), "threads": threads},
        "notes": list(dict.fromkeys(notes)),
        "networks": networks,
        "operators": operators,
        "sweep": sweep,
    }

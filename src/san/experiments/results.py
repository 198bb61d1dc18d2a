"""What a table's runs came to: every run's numbers, their mean and standard deviation over seeds, and the order."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch

from san.checkpoints import load_model
from san.data import Batch, load_dataset
from san.errors import UserError
from san.evaluation.cost import complexity
from san.evaluation.robustness import Attack, LabelledImages, attack_accuracy, rotation_accuracy
from san.evaluation.speed.machine import describe_machine, describe_versions
from san.experiments.campaign import Campaign, Run
from san.experiments.tables import REPORTED, TABLES
from san.training.folder import replacing

__all__ = ["ATTACK", "ITERATIONS", "agreement", "check_images", "measured", "order", "summary"]

ITERATIONS = (2, 4)
"""Iterations of the attack that a table shows; its chart shows all up to the last."""
ATTACK = Attack(iterations=max(ITERATIONS))
"""How networks are attacked, untargeted and targeted; the seed is the run's."""


@contextmanager
def _reading(file: Path, advice: str) -> Generator[None]:
    """Raise `UserError` that names the file where its content is not what was written."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, csv.Error) as error:
        raise UserError(f"{file} is damaged: {advice} and run the command again") from error


def check_images(runs: Sequence[Run], measures: str) -> None:
    """Raise `UserError` before anything is trained where there will be no test images to rotate or attack."""
    if measures != "accuracy" and not all(run.folder.finished for run in runs):
        load_dataset(runs[0].settings["data"], validation_share=runs[0].settings["validation_share"]).split("test")


def measured(run: Run, campaign: Campaign, measures: str) -> dict[str, float]:
    """What the table tells of a finished run.

    Accuracy is that of the last epoch, on test images, or without any on those held out. Rotation and attack are
    measured once and kept beside the run; where another process is measuring them, its result is waited for.
    """
    again = f"delete it and {run.folder.report}, so that both are made anew from the last checkpoint,"
    with _reading(_judged(run), again):
        found = _accuracy(run)
    with _reading(run.folder.metrics, again):
        found["step_ms"] = _step_time(run)
    found |= _cost(run)
    if measures == "accuracy":
        return found
    _measure_robustness(run, campaign, measures, wait=True)
    with _reading(_notes(run, measures), "delete it"):
        return {**found, **json.loads(_notes(run, measures).read_text())}


def _notes(run: Run, measures: str) -> Path:
    return run.folder.path / f"{measures}.json"


def _measure_robustness(run: Run, campaign: Campaign, measures: str, wait: bool) -> None:
    """Measure it unless that is done; without `wait` leave it to the process that is doing so."""
    notes = _notes(run, measures)
    if not notes.exists():
        with campaign.locked(run.folder.path.name, wait) as mine:
            if mine and not notes.exists():
                with replacing(notes) as temporary:
                    temporary.write_text(json.dumps(_robustness(run, campaign, measures)))


def _judged(run: Run) -> Path:
    """What the test images said of the last epoch; there is no file where there are none."""
    return run.folder.path / "checkpoints" / "test-last.json"


def _images(run: Run) -> str:
    """Which images the accuracy is of."""
    if not _judged(run).exists():
        return "validation images"
    return f"{np.sum(json.loads(_judged(run).read_text())['confusion'])} test images"


def _accuracy(run: Run) -> dict[str, float]:
    if _judged(run).exists():
        plain = json.loads(_judged(run).read_text())
        confusion = np.array(plain["confusion"])
        images = confusion.sum()
        return {"top1": 100 * np.trace(confusion) / images, "top5": 100 * sum(plain["in_top5"]) / images}
    last = _epochs(run)[-1]
    return {name: float(last[f"validation_{name}"]) for name in ("top1", "top5") if last[f"validation_{name}"]}


def _epochs(run: Run) -> list[dict[str, str]]:
    with run.folder.metrics.open() as lines:
        return list(csv.DictReader(lines))


def _step_time(run: Run) -> float:
    """Milliseconds of a step, the epochs' median; reading and judging images included."""
    rows = _epochs(run)
    each = int(rows[0]["step"]) / int(rows[0]["epoch"])
    return 1000 * median(float(row["seconds"]) / each for row in rows)


def _cost(run: Run) -> dict[str, float]:
    found = complexity(load_model(run.folder.path))
    return {"params": found["params"], "paper_cost": found["paper_cost"]}


def _robustness(run: Run, campaign: Campaign, measures: str) -> dict[str, float]:
    """Rotation: top-1 of every view. Attack: success and top-1 of both aims after every number of iterations."""
    model = load_model(run.folder.path).to("cuda" if torch.cuda.is_available() else "cpu")
    stored = run.folder.settings()
    # Its images may lie elsewhere than when it was trained.
    data = run.settings["data"]
    dataset = load_dataset(data, validation_share=stored["validation_share"], seed=run.seed)

    def progress(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
        return campaign.progress(batches, f"{run.variant.label}, seed {run.seed}: {what}")

    examples = LabelledImages(dataset.split("test"), dataset.class_names, progress=progress)
    if measures == "rotation":
        return {row["view"]: row["top1"] for row in rotation_accuracy(model, examples)["views"]}
    found: dict[str, float] = {}
    for aim in ("untargeted", "targeted"):
        attack = replace(ATTACK, targeted=aim == "targeted", seed=run.seed)
        for row in attack_accuracy(model, examples, attack)["rows"]:
            found |= {f"{aim} {key} {row['iterations']}": row[key] for key in ("success", "top1")}
    return found


def summary(table: str, campaign: Campaign, runs: Sequence[Run], failed: dict[str, str]) -> dict[str, Any]:
    """The table as plain data for JSON.

    `rows` have `label`, `model`, `options`, `seeds` (those finished), `means` and `deviations` of every number
    (deviation None of a single seed), `images` (what they are of), `runs` (folders below the campaign's) and `failed`.
    Besides: what was asked, settings, the `attack` if there is one, `complete`, `trained_with` (machines and versions
    of the runs), and machine, versions and date of this summary.
    """
    rows = _rows(runs, campaign, TABLES[table].measures, failed)
    wanted = {run.seed for run in runs}
    return {
        "table": table,
        "title": TABLES[table].title,
        "question": TABLES[table].question,
        "measures": TABLES[table].measures,
        **({"attack": asdict(ATTACK)} if TABLES[table].measures == "pgd" else {}),
        "data": Path(runs[0].settings["data"]).name,
        "settings": {key: value for key, value in runs[0].settings.items() if key not in ("model", "options", "seed")},
        "complete": all(len(row["seeds"]) == len(wanted) for row in rows),
        "wanted": len(wanted),
        "rows": rows,
        "trained_with": _environments(runs),
        "machine": describe_machine("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": describe_versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _rows(runs: Sequence[Run], campaign: Campaign, measures: str, failed: dict[str, str]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    _measure_free(runs, campaign, measures)
    for run in runs:
        row = rows.setdefault(run.variant.label, _empty(run))
        name = run.folder.path.name
        if name in failed:
            row["failed"].append(failed[name])
        elif run.folder.finished:
            _add(row, run, campaign, measures)
    for row in rows.values():
        row |= _statistics(row.pop("each"))
    return list(rows.values())


def _add(row: dict[str, Any], run: Run, campaign: Campaign, measures: str) -> None:
    """Add what a finished run came to, or why that cannot be told."""
    try:
        found, images = measured(run, campaign, measures), _images(run)
    except UserError as error:
        row["failed"].append(str(error))
        return
    row["each"].append(found)
    row["seeds"].append(run.seed)
    row["runs"].append(str(Path("runs") / run.folder.path.name))
    row["images"] += [images] * (images not in row["images"])


def _measure_free(runs: Sequence[Run], campaign: Campaign, measures: str) -> None:
    """Measure what no other process does, so that several share the work; what goes wrong is met again and told."""
    for run in runs:
        if run.folder.finished and measures != "accuracy":
            with suppress(UserError):
                _measure_robustness(run, campaign, measures, wait=False)


def _environments(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The different machines and versions that finished runs were trained with."""
    found: list[dict[str, str]] = []
    for run in runs:
        if run.folder.finished and (versions := run.folder.versions()) not in found:
            found.append(versions)
    return found


def _empty(run: Run) -> dict[str, Any]:
    names = {"label": run.variant.label, "model": run.settings["model"], "options": run.settings["options"]}
    return {**names, "seeds": [], "images": [], "runs": [], "failed": [], "each": []}


def _statistics(each: list[dict[str, float]]) -> dict[str, Any]:
    columns = {name: [found[name] for found in each if found.get(name) is not None] for name in (each or [{}])[0]}
    means = {name: mean(values) for name, values in columns.items() if values}
    deviations = {name: stdev(columns[name]) if len(columns[name]) > 1 else None for name in means}
    return {"means": means, "deviations": deviations}


def order(result: dict[str, Any]) -> list[str]:
    """Labels of the rows that have results, best top-1 first."""
    rows = [row for row in result["rows"] if "top1" in row["means"]]
    return [row["label"] for row in sorted(rows, key=lambda row: -row["means"]["top1"])]


def _pairs(labels: Sequence[str], scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Pairs of labels, the better first; none for equals."""
    for one, other in combinations(labels, 2):
        if scores[one] != scores[other]:
            yield (one, other) if scores[one] > scores[other] else (other, one)


def agreement(result: dict[str, Any]) -> tuple[list[str], int, int] | None:
    """Reported order of the rows, how many pairs of rows lie as reported, and of how many; None if nothing is."""
    ours = {row["label"]: row["means"]["top1"] for row in result["rows"] if "top1" in row["means"]}
    labels = [label for label in ours if label in REPORTED]
    if result["table"] != "main" or len(labels) < 2:
        return None
    reported = {label: REPORTED[label][0] for label in labels}
    pairs = list(_pairs(labels, reported))
    same = sum(ours[better] > ours[worse] for better, worse in pairs)
    return sorted(labels, key=lambda label: -reported[label]), same, len(pairs)

"""A table for people: columns as text, the page in Markdown with its chart, and the numbers beside it as JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from san.evaluation.robustness.tables import meaning
from san.experiments.results import ATTACK, ITERATIONS, agreement, order
from san.experiments.tables import REPORTED
from san.training.folder import replacing

__all__ = ["as_markdown", "columns", "write"]

_VIEWS = ("0°", "90°", "180°", "270°", "upside-down")
_LEGENDS = {"rotation": "images turned by", "pgd": "iterations of the untargeted attack"}


def columns(result: dict[str, Any]) -> list[dict[str, str]]:
    """The table's rows as text, one column for each thing measured."""
    return [_row(row, result) for row in result["rows"]]


def _row(row: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    means = row["means"]
    cells = {"variant": row["label"]}
    cells["params (M)"] = _short(means["params"] / 1e6) if means else ""
    cells["cost (G)"] = _short(means["paper_cost"] / 1e9) if means else ""
    if result["measures"] == "accuracy":
        cells |= {"top-1": _spread(row, "top1"), "top-5": _spread(row, "top5")}
        cells["ms/step"] = f"{means['step_ms']:.0f}" if means else ""
    if result["measures"] == "rotation":
        cells |= {view: _spread(row, view) for view in _VIEWS}
    if result["measures"] == "pgd":
        cells["top-1"] = _spread(row, "top1")
        for aim in ("targeted", "untargeted"):
            cells |= {f"{aim} {n}: success": _spread(row, f"{aim} success {n}") for n in ITERATIONS}
            cells |= {f"{aim} {n}: top-1": _spread(row, f"{aim} top1 {n}") for n in ITERATIONS}
    if result["table"] == "main":
        cells["ImageNet, paper: top-1"] = f"{REPORTED[row['label']][0]}" if row["label"] in REPORTED else ""
    cells["seeds"] = f"{len(row['seeds'])} of {result['wanted']}" + (
        f", {len(row['failed'])} failed" * bool(row["failed"])
    )
    return cells


def _short(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _spread(row: dict[str, Any], name: str) -> str:
    if name not in row["means"]:
        return ""
    deviation = row["deviations"][name]
    return f"{row['means'][name]:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def as_markdown(result: dict[str, Any], command: str, picture: str | None = None) -> str:
    """The page: what was asked and how, the table, the chart, the order, and how to repeat it."""
    rows = columns(result)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    settings = result["settings"]
    how = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if key != "data")
    images = sorted({images for row in result["rows"] for images in row["images"]})
    same = "same images, order" if len(images) < 2 else "same order"
    sections = [
        f"# {result['title']} on {result['data']}",
        result["question"],
        "\n".join(lines),
        _meaning(result, images),
        "" if result["complete"] else "Not complete: run the command below again to go on.",
        "\n".join(f"- Failed: {row['label']}: {problem}" for row in result["rows"] for problem in row["failed"]),
        _order(result),
        f"![{result['title'].lower()}]({picture})" if picture else "",
        f"Settings of every row: {how}; {same}, augmentation and seeds.",
        "\n".join(f"- Last trained with {_environment(found)}." for found in result["trained_with"]),
        f"Summary of {result['date'][:10]}.",
        f"```sh\n{command}\n```" if command else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _meaning(result: dict[str, Any], images: list[str]) -> str:
    """What the columns are, and of which images."""
    of = images[0] if len(images) == 1 else "the images"
    notes = {
        "accuracy": "ms/step: the epochs' median, reading and judging images included",
        "rotation": "images turned clockwise, or flipped so that top and bottom change places, untrained for it",
        "pgd": meaning("attacks", asdict(ATTACK)),
    }
    text = (
        f"Percent of {of}, last epoch; mean and standard deviation over seeds; cost as the paper counts it, for one "
        f"image of the size trained on; {notes[result['measures']]}."
    )
    if len(images) > 1:
        text += f" Rows do not compare: they were judged by different images, {' and '.join(images)}."
    return text


def _environment(found: dict[str, str]) -> str:
    versions = defaultdict(lambda: "unknown", found)
    used = versions["machine"] if versions["gpu"] == "none" else f"{versions['gpu']}, {versions['machine']}"
    software = ", ".join(f"{name} {versions[name]}" for name in ("san-vision", "torch", "python"))
    return f"{software}, commit {versions['git commit']}, {versions['threads']} threads; {used}"


def _order(result: dict[str, Any]) -> str:
    if not (labels := order(result)):
        return ""
    clean = "" if result["measures"] == "accuracy" else " of images as they are"
    text = f"Order by top-1{clean}: {' > '.join(labels)}."
    if (known := agreement(result)) is None:
        return text
    reported, same, pairs = known
    return f"{text}\n\nReported on ImageNet: {' > '.join(reported)}; {same} of {pairs} pairs lie the same way here."


def write(result: dict[str, Any], folder: Path, command: str) -> list[Path]:
    """Write TABLE.md, .json, .png and .svg to the folder; gives their paths."""
    paths = {kind: folder / f"{result['table']}.{kind}" for kind in ("md", "json", "png", "svg")}
    for kind in ("png", "svg"):
        _draw(result, paths[kind])
    for kind, text in {
        "json": json.dumps({**result, "command": command}, indent=1, ensure_ascii=False) + "\n",
        "md": as_markdown(result, command, paths["png"].name),
    }.items():
        with replacing(paths[kind]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(paths.values())


def _draw(result: dict[str, Any], path: Path) -> None:
    """Top-1 as a dot with its deviation and its value: one a row, or one for every view or number of iterations."""
    rows = [row for row in result["rows"] if row["means"]]
    shown = _shown(result["measures"])
    height = 0.8 / len(shown)
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.13 * len(rows) * (2 + len(shown))), layout="constrained")
    for number, (label, name) in enumerate(shown.items()):
        shift = (number - (len(shown) - 1) / 2) * height
        _dots(axes, {place + shift: row for place, row in enumerate(rows) if name in row["means"]}, name, label)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    _fit(axes, [bound for row in rows for name in shown.values() for bound in _bounds(row, name)])
    over = " ± standard deviation over seeds" if any(row["deviations"].get("top1") is not None for row in rows) else ""
    axes.set(xlabel=f"top-1, percent{over}", title=f"{result['title']} on {result['data']}")
    if len(shown) > 1:
        figure.legend(loc="outside lower center", ncols=len(shown), title=_LEGENDS[result["measures"]])
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    pyplot.close(figure)


def _shown(measures: str) -> dict[str, str]:
    """What the chart shows, by its label, under the names that the rows have for it."""
    if measures == "rotation":
        return {view: view for view in _VIEWS}
    if measures == "pgd":
        return {f"{n}": f"untargeted top1 {n}" for n in range(max(ITERATIONS) + 1)}
    return {"top-1": "top1"}


def _dots(axes: Any, rows: dict[float, dict[str, Any]], name: str, label: str) -> None:
    """A dot for each row at its height; no error bar where a single seed has no deviation."""
    values = [row["means"][name] for row in rows.values()]
    errors = [row["deviations"].get(name) or float("nan") for row in rows.values()]
    axes.errorbar(values, list(rows), xerr=errors, fmt="o", label=label, markersize=5, capsize=3, linewidth=1.2)
    for place, row in rows.items():
        end = _bounds(row, name)[1], place
        axes.annotate(_spread(row, name), end, (7, 0), textcoords="offset points", va="center", fontsize="small")


def _bounds(row: dict[str, Any], name: str) -> tuple[float, ...]:
    """The ends of an error bar; none without a value."""
    if name not in row["means"]:
        return ()
    deviation = row["deviations"].get(name) or 0.0
    return row["means"][name] - deviation, row["means"][name] + deviation


def _fit(axes: Any, values: list[float]) -> None:
    """A scale around the values, with room for the numbers; of 10 percent at least, so that trifles look small."""
    low, high = min(values, default=0.0), max(values, default=100.0)
    spare = max(10 - (high - low), 0) / 2
    high = max(high, min(high + spare, 100.0), 10.0)
    low = min(low, high - 10)
    axes.set_xlim(low - 0.05 * (high - low), high + 0.22 * (high - low))
    left, right = axes.get_xlim()
    axes.set_xticks([tick for tick in axes.get_xticks() if max(0, left) <= tick <= min(100, right)])

"""The files that `san benchmark --out` keeps: the numbers, a page, and bars of the ratios with their quartiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from san.errors import UserError
from san.evaluation.speed.networks import LAYERS
from san.evaluation.speed.tables import as_markdown

__all__ = ["draw_ratios", "make_folder", "write_results"]

_COLOURS = {"inference": "tab:blue", "training": "tab:orange"}


def make_folder(folder: str | Path) -> Path:
    """Create the folder for the results; `UserError` where it cannot be. Files of an earlier run stay until then."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"{folder} cannot be the folder for the results: {problem.strerror}") from None
    return path


def write_results(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write benchmark.json, benchmark.md and, if networks were measured, benchmark.png; gives their paths."""
    written = [folder / "benchmark.json", folder / "benchmark.md"]
    picture = folder / "benchmark.png"
    if result["networks"]:
        draw_ratios(result["networks"], result["settings"]["baseline"], picture)
        written.append(picture)
    written[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = as_markdown(result, picture.name if result["networks"] else None)
    written[1].write_text(page, encoding="utf-8")
    return written


def draw_ratios(rows: list[dict[str, Any]], baseline: str, target: Path) -> None:
    """Bars of each row's time ratio to the baseline, with quartiles; the baseline is the line at 1."""
    others = [row for row in rows if row["network"] != baseline] or rows
    labels, medians = [_label(row) for row in others], [row["ratio"]["median"] for row in others]
    below = [row["ratio"]["median"] - row["ratio"]["q1"] for row in others]
    above = [row["ratio"]["q3"] - row["ratio"]["median"] for row in others]
    colours = ["tab:green" if row["part"] == LAYERS else _COLOURS[row["mode"]] for row in others]
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.35 * len(others)), layout="constrained")
    axes.barh(labels, medians, xerr=[below, above], color=colours, capsize=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    # Beyond this the bars near 1, which matter most, could not be told apart.
    if max(medians) > 8:
        axes.set_xscale("log")
    axes.set_xlabel(f"time / {baseline}'s, median and quartiles")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def _label(row: dict[str, Any]) -> str:
    what = row["network"] + (f" {LAYERS}" if row["part"] == LAYERS else "")
    backend = f" on {row['backend']}" if row["backend"] else ""
    return f"{what}{backend}, {row['mode']}, batch {row['batch']}, {row['resolution']} px, {row['dtype']}"

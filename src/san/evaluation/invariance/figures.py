"""Heat maps of what operators and networks are invariant to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot

from san.evaluation.invariance.tables import network_rows, operator_rows, rounding

__all__ = ["draw_networks", "draw_operators"]


def draw_operators(result: dict[str, Any], target: Path) -> None:
    """Largest relative change of every kind of operator, as a PNG; what is exact by construction is framed."""
    rows = operator_rows(result)
    values = [
        [np.nan if cell is None else np.log10(max(cell[0], 1e-17)) for cell in row.values()] for row in rows.values()
    ]
    texts = [
        ["–" if cell is None else rounding(cell[0]) if cell[1] else f"{cell[0]:.2f}" for cell in row.values()]
        for row in rows.values()
    ]
    figure, axes = _heat_map(rows, values, texts, "log₁₀ of the relative change", (-16, 0), "viridis")
    for y, row in enumerate(rows.values()):
        for x, cell in enumerate(row.values()):
            if cell is not None and cell[1]:
                axes.add_patch(pyplot.Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, edgecolor="white", lw=2))
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def draw_networks(result: dict[str, Any], target: Path) -> None:
    """Share of images that each network classifies as before, as a PNG."""
    rows = network_rows(result)
    kept = [[np.nan if cell is None else cell["kept"] for cell in row.values()] for row in rows.values()]
    texts = [["–" if np.isnan(value) else f"{value:.1f}" for value in line] for line in kept]
    figure, _ = _heat_map(rows, kept, texts, "classified as before, in %", (0, 100), "viridis")
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def _heat_map(
    rows: dict[str, dict[str, Any]],
    values: list[list[float]],
    texts: list[list[str]],
    label: str,
    limits: tuple[float, float],
    colours: str,
) -> tuple[Any, Any]:
    columns = list(next(iter(rows.values())))
    size = (3.2 + 1.9 * len(columns), 1.2 + 0.36 * len(rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    picture = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
    axes.set_xticks(range(len(columns)), [column.replace(", ", ",\n") for column in columns])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.tick_top()
    middle = sum(limits) / 2
    for y, line in enumerate(texts):
        for x, text in enumerate(line):
            dark = values[y][x] <= middle
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize="small")
    figure.colorbar(picture, ax=axes, label=label)
    return figure, axes

"""Draws the figures of docs/operators.md beside itself: python docs/figures/operators.py [FOLDER].

What a footprint reads, and which key moves which weight, is asked of the operators themselves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

from san import PairwiseAttention, PatchwiseAttention
from san.ops import Footprint
from san.ops.relations import find_relation

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#d8dde1"
MIDDLE, OTHERS = {"color": ORANGE, "markersize": 6}, {"color": "black", "markersize": 2}
STYLE = {"font.size": 9, "svg.hashsalt": "san"}


def reads(rule: Footprint, side: int, pixel: int) -> list[int]:
    """The pixels (from 1, row-major) of a map of `side`×`side` that an output pixel's footprint reads; 0 is outside."""
    numbers = torch.arange(1.0, side**2 + 1).view(1, 1, side, side)
    return [int(number) for number in rule.window(side, side).gather(numbers)[0, 0, :, pixel]]


def grid(axes: Any, side: int, title: str) -> None:
    """An empty map of `side`×`side` pixels."""
    axes.set(xlim=(-0.55, side - 0.45), ylim=(side - 0.45, -0.55), aspect="equal")
    axes.set_title(title)
    axes.axis("off")
    for pixel in range(side**2):
        row, column = divmod(pixel, side)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor=GREY))


def fill(axes: Any, row: float, column: float, color: str, **options: Any) -> None:
    """Colour one pixel."""
    axes.add_patch(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, facecolor=color, **options))


def footprint() -> Any:
    """What the footprint of one output pixel reads, for three rules."""
    rules = {
        "k = 3": Footprint(3),
        "k = 3, dilation 2": Footprint(3, dilation=2),
        "k = 3, stride 2": Footprint(3, stride=2),
    }
    side = 7
    figure, panels = pyplot.subplots(1, 3, figsize=(7.2, 2.6))
    for axes, (title, rule) in zip(panels, rules.items(), strict=True):
        grid(axes, side, title)
        columns = rule.output_size(side, side)[1]
        middle = (columns // 2) * (columns + 1)
        for number in reads(rule, side, middle):
            fill(axes, *divmod(number - 1, side), BLUE, alpha=0.45)
        for pixel in range(columns**2):
            row, column = (rule.stride * place for place in divmod(pixel, columns))
            axes.plot(column, row, "o", **(MIDDLE if pixel == middle else OTHERS))
    return figure


def borders() -> Any:
    """What a footprint of 5×5 at the corner of a map of 4×4 reads under both rules."""
    side, k = 4, 5
    figure, panels = pyplot.subplots(1, 3, figsize=(7.2, 2.7))
    grid(panels[0], side, "the map")
    for pixel in range(side**2):
        panels[0].text(pixel % side, pixel // side, str(pixel + 1), ha="center", va="center")
    fill(panels[0], 0, 0, ORANGE, alpha=0.5)
    for axes, border in zip(panels[1:], ("reflect", "zeros"), strict=True):
        grid(axes, k, f'border = "{border}"')
        for place, number in enumerate(reads(Footprint(k, border=border), side, 0)):
            row, column = divmod(place, k)
            inside = row >= k // 2 and column >= k // 2
            color = ORANGE if row == column == k // 2 else BLUE if inside else GREY
            fill(axes, row, column, color, alpha=0.5)
            axes.text(column, row, str(number), ha="center", va="center")
    return figure


def moved(form: str, *, softmax: bool) -> Tensor:
    """|∂α_j/∂ψ_l| [K, K], summed over groups and channels, at the middle of a random map, for a layer of k = 3."""
    torch.manual_seed(0)
    kind, relation = (PairwiseAttention, "subtraction") if form == "pairwise" else (PatchwiseAttention, "concatenation")
    layer = kind(16, 16, 3, relation_channels=8, **({"position": "none"} if form == "pairwise" else {})).double().eval()
    query, keys = torch.randn(1, 8, 1, 1).double(), torch.randn(1, 8, 9, 1).double()

    def weights(keys: Tensor) -> Tensor:
        related = find_relation(form, relation).formula(query, keys)
        scores = layer.conv_w(related.unflatten(1, (related.shape[1], 1)) if related.dim() == 3 else related)
        scores = scores.view(1, layer.groups, 9, 1)
        return scores.softmax(2) if softmax else scores

    jacobian = torch.autograd.functional.jacobian(weights, keys)
    return jacobian[0, :, :, 0, 0, :, :, 0].abs().sum((0, 2))


def dependence() -> Any:
    """Which key of the footprint moves the weight of which place."""
    panels = {
        "pairwise, γ's output": moved("pairwise", softmax=False),
        "pairwise, after softmax": moved("pairwise", softmax=True),
        "patchwise": moved("patchwise", softmax=False),
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(7.2, 2.7), sharey=True)
    for panel, (title, matrix) in zip(axes, panels.items(), strict=True):
        panel.pcolormesh((matrix / matrix.max()).numpy(), cmap="Blues", vmin=0, vmax=1)
        panel.set(title=title, xlabel="key of place", aspect="equal", ylim=(9, 0))
        middles, numbers = [place + 0.5 for place in range(9)], range(1, 10)
        panel.set(xticks=middles, yticks=middles, xticklabels=numbers, yticklabels=numbers)
    axes[0].set_ylabel("weight of place")
    return figure


def box(axes: Any, x: float, y: float, words: str, color: str) -> None:
    """A step of the layer around (x, y)."""
    axes.add_patch(Rectangle((x - 0.42, y - 0.3), 0.84, 0.6, facecolor=color, edgecolor="black", alpha=0.55))
    axes.text(x, y, words, ha="center", va="center", fontsize=8)


def arrow(axes: Any, start: tuple[float, float], stop: tuple[float, float], words: str = "") -> None:
    """From one step to the next, with the shape of what goes there."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, stop, **style))
    axes.text((start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2 + 0.07, words, ha="center", va="bottom", fontsize=7)


def layer() -> Any:
    """A layer from its input to its output, in both forms."""
    figure, panels = pyplot.subplots(2, 1, figsize=(7.2, 4.6))
    for axes, form in zip(panels, ("pairwise", "patchwise"), strict=True):
        pairwise = form == "pairwise"
        axes.set(xlim=(-0.6, 6.6), ylim=(-1.55, 1.45))
        axes.set_title(f"{form} attention", loc="left")
        axes.axis("off")
        axes.text(0, 0, "x\n[B, C, H, W]", ha="center", va="center", fontsize=8)
        for y, words in ((1, "query φ"), (0, "key ψ"), (-1, "value β")):
            arrow(axes, (0.45, 0.3 * y), (0.98, y))
            box(axes, 1.4, y, words, GREY)
        box(axes, 2.9, 0.5, "relation δ", BLUE)
        arrow(axes, (1.82, 1), (2.48, 0.65), "[R]")
        arrow(axes, (1.82, 0), (2.48, 0.35), "[R, K]")
        box(axes, 4.4, 0.5, "γ, softmax" if pairwise else "γ", BLUE)
        arrow(axes, (3.32, 0.5), (3.98, 0.5), "[D, K]" if pairwise else "[D]")
        box(axes, 5.2, -1, "aggregation", ORANGE)
        arrow(axes, (4.5, 0.2), (5.05, -0.7))
        axes.text(4.95, -0.15, "α [G, K]", fontsize=7)
        arrow(axes, (1.82, -1), (4.78, -1), "[C_out, K]")
        arrow(axes, (5.62, -1), (6.1, -1))
        axes.text(6.3, -1, "y", ha="center", va="center", fontsize=9)
        if pairwise:
            axes.text(2.9, -0.32, "position joins δ", ha="center", va="center", fontsize=7)
            arrow(axes, (2.9, -0.22), (2.9, 0.2))
    return figure


def main(folder: Path) -> None:
    """Write every figure as an SVG that is the same each time."""
    for draw in (layer, footprint, borders, dependence):
        with pyplot.rc_context(STYLE):
            figure = draw()
            figure.tight_layout()
            figure.savefig(folder / f"{draw.__name__}.svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close("all")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

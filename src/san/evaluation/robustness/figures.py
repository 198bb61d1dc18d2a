"""The files that `san robustness --out` keeps: numbers, a page, curves over angle and iterations, attacked images."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot, ticker
from torch import Tensor, nn

from san.evaluation.classes import class_words
from san.evaluation.robustness.attack import Attack, attack_images
from san.evaluation.robustness.inputs import LabelledImages, PixelModel
from san.evaluation.robustness.tables import as_markdown

__all__ = [
    "Attending",
    "draw_angles",
    "draw_attacked",
    "draw_iterations",
    "remove_earlier",
    "write_images",
    "write_results",
]

Attending: TypeAlias = Callable[[nn.Module, Tensor], Tensor | None]
"""From a network and normalised images [B, 3, H, W] to what it attends to, [B, H, W] with sum 1; None if nothing."""


def write_results(result: dict[str, Any], folder: Path, images: Sequence[Path] = ()) -> list[Path]:
    """Write robustness.json, robustness.md, and as PNG and SVG the curves that were measured; gives their paths.

    `images` are what `write_images` wrote to the same folder; the page shows them.
    """
    numbers, page = folder / "robustness.json", folder / "robustness.md"
    # First: what goes wrong with a picture should not cost what took long to measure.
    numbers.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    charts = []
    if any(row["rotation"] and row["rotation"]["angles"] for row in result["models"]):
        charts += draw_angles(result, folder / "angles")
    if result["settings"]["aims"]:
        charts += draw_iterations(result, folder / "iterations")
    shown = [path.name for path in [*charts, *images] if path.suffix == ".png"]
    page.write_text(as_markdown(result, shown), encoding="utf-8")
    return [numbers, page, *charts, *images]


def remove_earlier(folder: Path, written: Sequence[Path]) -> None:
    """Delete the pictures of an earlier run in a folder, but for those `written` now."""
    ours = re.compile(r"(angles|iterations)\.(png|svg)|attacked-\d+-.*\.png")
    for file in folder.iterdir():
        if ours.fullmatch(file.name) and file.is_file() and file not in written:
            file.unlink()


def write_images(
    models: Mapping[str, nn.Module],
    examples: LabelledImages,
    attack: Attack,
    folder: Path,
    count: int,
    attending: Attending | None = None,
) -> list[Path]:
    """Draw `count` images, evenly spread over the set, as each model's attack changes them; gives the PNGs' paths.

    `attending` is as in `draw_attacked`.
    """
    written = []
    for number, (name, model) in enumerate(models.items(), 1):
        path = folder / f"attacked-{number}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-.')}.png"
        draw_attacked(name, model, examples.some(count), attack, path, attending)
        written.append(path)
    return written


def draw_angles(result: dict[str, Any], target: Path) -> list[Path]:
    """Top-1 over the angle, a line for every model, as target.png and target.svg."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for row in result["models"]:
        curve = sorted((each["angle"], each["top1"]) for each in row["rotation"]["angles"])
        axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=row["model"])
    low, high = axes.get_xlim()
    step = next((each for each in (15, 30, 45) if high - low < 13 * each), 90)
    axes.xaxis.set_major_locator(ticker.MultipleLocator(step))
    axes.set(xlabel="degrees, clockwise", ylabel="top-1 accuracy in %", ylim=(-2, 102))
    return _saved(figure, [axes], target)


def draw_iterations(result: dict[str, Any], target: Path) -> list[Path]:
    """Top-1 and success over iterations, a row of panels for each aim, as target.png and target.svg."""
    aims = result["settings"]["aims"]
    figure, panels = pyplot.subplots(len(aims), 2, figsize=(11, 4 * len(aims)), layout="constrained", squeeze=False)
    for aim, line in zip(aims, panels, strict=True):
        for axes, quantity, label in zip(line, ("top1", "success"), ("top-1 accuracy", "success"), strict=True):
            for row in result["models"]:
                curve = row["attacks"][aim]["rows"]
                values = [float("nan") if each[quantity] is None else each[quantity] for each in curve]
                axes.plot([each["iterations"] for each in curve], values, "o-", markersize=3, label=row["model"])
            axes.set(title=f"{aim} attack", xlabel="iterations", ylabel=f"{label} in %", ylim=(-2, 102))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    return _saved(figure, list(panels.flat), target)


def draw_attacked(
    name: str,
    model: nn.Module,
    examples: LabelledImages,
    attack: Attack,
    target: Path,
    attending: Attending | None = None,
) -> None:
    """Each image, what the attack adds to it (grey: nothing, black and white: ∓ε), and both together, as a PNG.

    Above them stand the true class and those that the model takes them for; what is added is shown 1/(2ε) times as
    large, and its title says so. Where `attending` tells what the model attends to, a last picture shows what the
    attack took from it (blue) and gave to it (red), and how much moved.
    """
    words, rows = class_words(model, short=True), _attacked(PixelModel(model), examples, attack, attending)
    columns = 3 if rows[0][-1] is None else 4
    size, scale = (3 * columns, 3.2 * len(rows)), 1 / (2 * attack.epsilon or 1)
    figure, panels = pyplot.subplots(len(rows), columns, figsize=size, layout="constrained", squeeze=False)
    kind = "targeted" if attack.targeted else "untargeted"
    figure.suptitle(textwrap.fill(f"{name}, {kind} attack, {attack.iterations} iterations", 10 * int(size[0])))
    for line, (image, attacked, label, before, after, moved) in zip(panels, rows, strict=True):
        _draw_picture(line[0], image, f"{words[label]}, {_taken(words, before, label)}")
        added = (attacked - image) * scale + 0.5
        _draw_picture(line[1], added, f"what is added, magnified {scale:.3g}× (grey: 0)")
        _draw_picture(line[2], attacked, f"attacked, {_taken(words, after, label)}")
        if moved is not None:
            _draw_moved(line[-1], moved)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


_TITLE = 42
"""Letters of a small title that fit above a picture of 3 inches."""


def _taken(words: Sequence[str], found: int, label: int) -> str:
    if found < 0:
        return "no finite scores"
    return "recognised" if found == label else f"taken for {words[found]}"


def _attacked(
    network: PixelModel, examples: LabelledImages, attack: Attack, attending: Attending | None
) -> list[tuple[Any, ...]]:
    """Image, attacked image, their class and what they are taken for, and `_moved`, of every image."""
    rows: list[tuple[Any, ...]] = []
    for batch in examples.batches(network, "figures"):
        found = attack_images(network, batch.images, batch.labels, attack, batch.indices.tolist())
        classes = batch.labels, network.classes(batch.images), found.predicted[-1]
        moved = _moved(network, batch.images, found.images, attending)
        rows += zip(batch.images.cpu(), found.images.cpu(), *classes, moved, strict=True)
    return rows


def _moved(network: PixelModel, before: Tensor, after: Tensor, attending: Attending | None) -> Sequence[Tensor | None]:
    """What an attack changed in what is attended to, [H, W] for each image."""
    if attending is not None:
        first, second = (attending(network.network, network.normalise(pixels)) for pixels in (before, after))
        if first is not None and second is not None:
            return list((second - first).float().cpu())
    return [None] * len(before)


def _draw_picture(axes: Any, picture: Tensor, title: str) -> None:
    axes.set_axis_off()
    axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy())
    axes.set_title(textwrap.fill(title, _TITLE), fontsize="small")


def _draw_moved(axes: Any, moved: Tensor) -> None:
    most = float(moved.abs().max()) or 1.0
    axes.set_axis_off()
    axes.imshow(moved.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
    # What one place lost, another gained.
    axes.set_title(f"attention: {50 * float(moved.abs().sum()):.0f} % moved", fontsize="small")


def _saved(figure: Any, panels: list[Any], target: Path) -> list[Path]:
    for axes in panels:
        axes.grid(alpha=0.3)
    _add_legend(figure, panels[0])
    paths = [target.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths


def _add_legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, below them, in as many columns as the models' names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    if not names:  # matplotlib's way with names that begin with _
        return
    names = [textwrap.fill(name, 9 * int(figure.get_figwidth())) for name in names]
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, min(len(names), int(11 * figure.get_figwidth()) // (longest + 7)))
    lines = sum(1 + name.count("\n") for name in names)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-lines // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)

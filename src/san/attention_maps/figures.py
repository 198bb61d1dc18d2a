"""Figures of what `san.attention_maps` computes, as matplotlib's `Figure`; `figure.savefig(path)` writes one.

Maps lie over the pale grey image at their true place and scale: a place of a layer's map covers as many pixels as it
stands for. They are made without pyplot, so several threads may draw at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from san.attention_maps.explanation import Explanation
from san.attention_maps.extent import EffectiveFootprint
from san.attention_maps.observation import pixels_per_place
from san.attention_maps.weights import PixelAttention
from san.errors import UserError

__all__ = [
    "check_group",
    "draw_distances",
    "draw_footprints",
    "draw_groups",
    "draw_overview",
    "draw_rollout",
    "figures",
]

_MOST_GROUPS = 16
# Shares are 0 or more; weights have a sign in patchwise attention, and 0 is white there.
_SEQUENTIAL, _DIVERGING = "viridis", "RdBu_r"
# A colour that neither of them has.
_MARK = "#ff00c8"


def figures(explanation: Explanation, group: int | None = None) -> dict[str, Callable[[], Figure]]:
    """By name, what there is to draw of an explanation; a figure is drawn when it is called.

    "overview": the image, the pixel's roll-out and Grad-CAM. "footprints": what the pixel attends to in the chosen
    layers, by one weight group or the mean over groups. "groups-LAYER": the weights of groups, for the last chosen
    layer at each size of map. "distances": how far all layers look. "rollout": its way through the layers. Networks
    without attention have the overview alone.

    Raises `UserError` for a group that a chosen layer lacks.
    """
    shown, pixel = explanation.shown, explanation.pixel
    found: dict[str, Callable[[], Figure]] = {"overview": lambda: draw_overview(explanation)}
    if not explanation.pixels:
        return found
    attentions = list(explanation.pixels.values())
    for attention in attentions:
        check_group(attention.observed.name, attention.observed.groups, group)
    found["footprints"] = lambda: draw_footprints(shown, attentions, pixel, group)
    if group is None:
        for attention in {each.observed.size: each for each in attentions}.values():
            found[f"groups-{attention.observed.name}"] = lambda attention=attention: draw_groups(
                shown, attention, pixel
            )
    found["distances"] = lambda: draw_distances(explanation.footprints)
    found["rollout"] = lambda: draw_rollout(shown, explanation.rollout, pixel)
    return found


def check_group(layer: str, groups: int, group: int | None) -> None:
    """Raise `UserError` unless `group` is None or one of a layer's weight groups."""
    if group is not None and not 0 <= group < groups:
        raise UserError(
            f"layer {layer} has no weight group {group}, only 0 to {groups - 1}; choose another, or the layers that "
            "have it"
        )


def draw_overview(explanation: Explanation) -> Figure:
    """The image with the pixel, beside it what the pixel draws on by roll-out, and what speaks for the class."""
    shown, (_, name, probability) = explanation.shown, explanation.target
    panels = [("what is shown to the network", None, ""), *_overlays(explanation)]
    figure, axes = _panels(len(panels), len(panels), 3.6)
    for each, (title, quantity, label) in zip(axes, panels, strict=True):
        _show(each, shown if quantity is None else _grey(shown))
        if quantity is not None:
            _lay_over(each, figure, quantity, shown.shape[:2], label, smooth=True)
        if explanation.rollout:
            _mark(each, explanation.pixel)
        each.set_title(title, fontsize="medium")
    _title(figure, f"class {name}: {100 * probability:.1f} %")
    return figure


def _overlays(explanation: Explanation) -> list[tuple[str, np.ndarray, str]]:
    """Title, quantity and what its scale counts."""
    x, y = explanation.pixel
    found = []
    if explanation.rollout:
        found.append((f"roll-out from pixel {x},{y}", _relative(explanation.rollout["image"]), _RELATIVE))
    evidence = explanation.grad_cam.cpu().numpy()
    most = evidence.max()
    relative = evidence / most if most > 0 else evidence
    found.append(("Grad-CAM: what speaks for the class", relative, "relative to the largest"))
    return found


_RELATIVE = "times an even spread"


def _relative(arriving: Tensor) -> np.ndarray:
    """What arrives at places of a map, as a multiple of what each would get if all got the same: [H, W]."""
    return arriving.shape[-2] * arriving.shape[-1] * arriving[0].cpu().numpy()


def draw_footprints(
    shown: np.ndarray, attentions: list[PixelAttention], pixel: tuple[int, int], group: int | None = None
) -> Figure:
    """What a pixel attends to in several layers: at true scale on the whole image, and below enlarged, with a cross.

    Colours are α of a weight `group`, or, for None, the mean over groups of the shares |α_j| / Σ_l |α_l|. Pixels of
    the map that places outside are mirrored onto have a dot; what they get is summed.
    """
    columns = _columns(len(attentions), 5)
    lines = -(-len(attentions) // columns)
    figure, axes = _panels(2 * lines * columns, columns, 2.5, height=2.9)
    for place in range(lines * columns):
        upper = 2 * columns * (place // columns) + place % columns
        pair = axes[upper], axes[upper + columns]
        if place < len(attentions):
            _draw_footprint(figure, pair, shown, attentions[place], pixel, group)
        else:
            for each in pair:
                each.set_visible(False)
    what = "mean over groups of the share of attention" if group is None else f"weight α of group {group}"
    border = _MIRRORED if any(map(_is_mirrored, attentions)) else ""
    _title(figure, f"what pixel {pixel[0]},{pixel[1]} attends to", what, border)
    return figure


_MIRRORED = "dots: also read through the mirrored border, weights added up"


def _is_mirrored(attention: PixelAttention) -> bool:
    return bool(attention.outside.any()) and attention.observed.layer.footprint.border == "reflect"


def _title(figure: Figure, *lines: str) -> None:
    letters = int(10 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, letters) for line in lines if line), fontsize="medium")


def _draw_footprint(
    figure: Figure,
    pair: tuple[Any, Any],
    shown: np.ndarray,
    attention: PixelAttention,
    pixel: tuple[int, int],
    group: int | None,
) -> None:
    observed = attention.observed
    quantity = attention.shares().mean(1)[0] if group is None else attention.weights[0, group]
    laid = attention.on_map(quantity).cpu().numpy()
    limits = _limits(laid, signed=group is not None and observed.form == "patchwise")
    for axes in pair:
        _show(axes, _grey(shown))
        drawn = _lay(axes, laid, observed.stride, limits)
    # At true scale a footprint may be 3 pixels wide: more marks than its frame would hide it.
    _outline(pair[0], attention)
    _frame(pair[0], observed.image_size)
    _decorate(pair[1], attention, pixel)
    bar = figure.colorbar(drawn, ax=pair[1], orientation="horizontal", shrink=0.9, aspect=25, pad=0.03)
    _ticks(bar)
    size = observed.layer.footprint.kernel_size
    pair[0].set_title(f"{observed.name}\n{size}×{size} places of {observed.stride[0]:.3g} px", fontsize="small")
    pair[1].set_title(_outside(attention), fontsize="small")


def _outside(attention: PixelAttention) -> str:
    """How many places the border rule decides about."""
    count, all_places = int(attention.outside.sum()), len(attention.outside)
    if not count:
        return ""
    what = "mirrored" if attention.observed.layer.footprint.border == "reflect" else "read zeros"
    return f"{count} of {all_places} places {what}"


def draw_groups(
    shown: np.ndarray,
    attention: PixelAttention,
    pixel: tuple[int, int],
    groups: Iterable[int] | None = None,
    most: int = _MOST_GROUPS,
) -> Figure:
    """The weights α of a pixel in one layer, a panel for every weight group, on one scale.

    Of more groups than `most`, so many are taken, evenly spread from the one that looks nearest to the one that looks
    farthest; the title says so. They stand in this order; `groups` chooses otherwise.
    """
    observed = attention.observed
    distance = attention.distance()[0].cpu().numpy()
    chosen = _spread(distance, most) if groups is None else list(groups)
    for group in chosen:
        check_group(observed.name, observed.groups, group)
    figure, axes = _panels(1 + len(chosen), _columns(1 + len(chosen), 6), 2.1, height=2.3)
    laid = attention.on_map(attention.weights[0]).cpu().numpy()
    limits = _limits(laid[chosen], signed=observed.form == "patchwise")
    drawn: Any = None
    for each, group in zip(axes, [None, *chosen], strict=False):
        _show(each, shown if group is None else _grey(shown))
        if group is not None:
            drawn = _lay(each, laid[group], observed.stride, limits)
        _decorate(each, attention, pixel)
        each.set_title("image" if group is None else f"group {group}: {distance[group]:.3g} px", fontsize="small")
    figure.colorbar(drawn, ax=list(axes), shrink=0.6, aspect=30, label="weight α")
    _title_groups(figure, attention, pixel, len(chosen))
    return figure


def _title_groups(figure: Figure, attention: PixelAttention, pixel: tuple[int, int], count: int) -> None:
    observed = attention.observed
    part = "all" if count == observed.groups else f"{count} of"
    what = f"{observed.name}, {observed.form}, pixel {pixel[0]},{pixel[1]}: {part} {observed.groups} weight groups"
    border = f"{_outside(attention)}; {_MIRRORED}" if _is_mirrored(attention) else _outside(attention)
    order = "in order of mean attended distance" + (", evenly spread over all" if part != "all" else "")
    _title(figure, what, order, border)


def _spread(values: np.ndarray, most: int) -> list[int]:
    """At most `most` indices, evenly spread over the ranking of values, in ascending order of these."""
    ranks = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)
    return np.argsort(values, kind="stable")[ranks].tolist()


def draw_distances(footprints: Mapping[str, EffectiveFootprint]) -> Figure:
    """Attended distance and entropy of every weight group and layer, in the order in which layers run.

    A point is a group's mean over pixels, the line the mean over groups; dashed is what equal weights would give. With
    patchwise attention, also the share of negative weights.
    """
    signed = any(each.observed.form == "patchwise" for each in footprints.values())
    titles = {"distance": "mean attended distance in pixels", "entropy": "entropy in bits"}
    if signed:
        titles["negative"] = "share of negative weights in %"
    figure = Figure(figsize=(4.6 * len(titles), 4.2), layout="constrained")
    panels = figure.subplots(1, len(titles))
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        _draw_quantity(axes, footprints, quantity)
        axes.set(title=title, ylim=(0, None))
        axes.set_xticks(range(len(footprints)), list(footprints), rotation=60, ha="right", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _draw_quantity(axes: Any, footprints: Mapping[str, EffectiveFootprint], quantity: str) -> None:
    scale = 100 if quantity == "negative" else 1
    groups = [scale * getattr(each, quantity).mean((0, 2, 3)).cpu().numpy() for each in footprints.values()]
    for place, values in enumerate(groups):
        label = "weight group" if place == 0 else None
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.35, markersize=4, label=label)
    axes.plot([values.mean() for values in groups], "-", color="tab:orange", linewidth=2, label="mean over groups")
    if quantity != "negative":
        even = {
            "distance": [float(each.uniform.mean()) for each in footprints.values()],
            "entropy": [2 * np.log2(each.observed.layer.footprint.kernel_size) for each in footprints.values()],
        }
        axes.plot(even[quantity], "--", color="black", linewidth=1, label="equal weights")


def draw_rollout(shown: np.ndarray, rollout: Mapping[str, Tensor], pixel: tuple[int, int]) -> Figure:
    """The way of a pixel's roll-out: what arrives at each layer's input, from the last to the first, and at the image.

    As a multiple of what a place of the map would get if all got the same, on each panel's own scale from 0.
    """
    figure, axes = _panels(len(rollout), _columns(len(rollout), 5), 2.6, height=2.8)
    for each, (name, arriving) in zip(axes, rollout.items(), strict=False):
        _show(each, _grey(shown))
        _lay_over(each, figure, _relative(arriving), shown.shape[:2], _RELATIVE)
        _mark(each, pixel)
        each.set_title(f"at {'the' if name == 'image' else 'the input of'} {name}", fontsize="small")
    _title(figure, f"roll-out from pixel {pixel[0]},{pixel[1]} of the last map")
    return figure


def _columns(count: int, most: int) -> int:
    """How many panels to set in a row, so that rows are alike."""
    return -(-count // -(-count // most))


def _panels(count: int, columns: int, width: float, height: float | None = None) -> tuple[Figure, Any]:
    """A figure of `count` panels without axes, in rows; the places that are left over stay empty."""
    rows = -(-count // columns)
    # The titles of a single column need more room than it.
    figure = Figure(figsize=(max(width * columns, 5.0), (height or width) * rows + 0.6), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for each in axes:
        each.set_axis_off()
    return figure, axes


def _show(axes: Any, picture: np.ndarray) -> None:
    """An image with a thin line around it, which tells white parts of it from the page."""
    axes.imshow(picture)
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.6", linewidth=0.6)


def _grey(shown: np.ndarray) -> np.ndarray:
    """The image without colours, which belong to what lies over it, and pale, so that it does not darken these."""
    grey = 0.5 + 0.5 * shown @ np.array([0.299, 0.587, 0.114], dtype=shown.dtype)
    return np.repeat(grey[..., None], 3, axis=2)


def _limits(laid: np.ndarray, *, signed: bool) -> dict[str, Any]:
    most = float(np.nanmax(np.abs(laid))) or 1.0
    lowest, colours = (-most, _DIVERGING) if signed else (0.0, _SEQUENTIAL)
    return {"cmap": colours, "vmin": lowest, "vmax": most}


def _lay(axes: Any, laid: np.ndarray, stride: tuple[float, float], options: dict[str, Any], alpha: float = 1.0) -> Any:
    """A map over the image, opaque so that its colours are those of its scale; NaN is left out."""
    height, width = laid.shape
    extent = (-0.5, width * stride[1] - 0.5, height * stride[0] - 0.5, -0.5)
    return axes.imshow(np.ma.masked_invalid(laid), extent=extent, alpha=alpha, **options)


def _lay_over(
    axes: Any, figure: Figure, quantity: np.ndarray, size: tuple[int, int], label: str, *, smooth: bool = False
) -> None:
    """A map of the whole image over it, which shines through, with its scale and what this counts."""
    stride = (pixels_per_place(size[0], quantity.shape[0]), pixels_per_place(size[1], quantity.shape[1]))
    options = _limits(quantity, signed=False)
    if smooth:
        options["interpolation"] = "bilinear"
    drawn = _lay(axes, quantity, stride, options, alpha=0.6)
    _frame(axes, size)
    bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.9, aspect=25, pad=0.03)
    bar.set_label(label, fontsize="small")
    _ticks(bar)


def _ticks(bar: Any) -> None:
    bar.ax.locator_params(nbins=3)
    bar.ax.tick_params(labelsize="x-small")


def _frame(axes: Any, size: tuple[int, int]) -> None:
    """Show the whole image and nothing beside it."""
    height, width = size
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _decorate(axes: Any, attention: PixelAttention, pixel: tuple[int, int]) -> None:
    """Enlarge a footprint, and mark its frame, its centre, the pixel and what the border mirrors to."""
    # A dark rim, for magenta is weak on white.
    _outline(axes, attention, path_effects=[withStroke(linewidth=3, foreground="black")])
    _outline_centre(axes, attention)
    _mark(axes, pixel)
    _dot(axes, attention)
    _zoom(axes, attention)


def _outline(axes: Any, attention: PixelAttention, **options: Any) -> None:
    """A frame around what a footprint reads, whole at the image's edge too."""
    left, top, width, height = attention.box()
    options |= {"fill": False, "edgecolor": _MARK, "linewidth": 1.4, "clip_on": False}
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, **options))


def _outline_centre(axes: Any, attention: PixelAttention) -> None:
    down, across = attention.observed.stride
    step = attention.observed.layer.footprint.stride
    centre = attention.column * step * across - 0.5, attention.row * step * down - 0.5
    axes.add_patch(Rectangle(centre, across, down, fill=False, edgecolor=_MARK, linewidth=0.8))


def _dot(axes: Any, attention: PixelAttention) -> None:
    """Mark what places outside are mirrored onto."""
    down, across = attention.observed.stride
    mirrored = attention.outside & (attention.rows >= 0)
    x, y = (attention.columns[mirrored] + 0.5) * across - 0.5, (attention.rows[mirrored] + 0.5) * down - 0.5
    axes.plot(x.cpu(), y.cpu(), "o", color="white", markeredgecolor="black", markeredgewidth=0.7, markersize=4)


def _zoom(axes: Any, attention: PixelAttention) -> None:
    """Show what a footprint reads and a place more on each side, as far as the image goes."""
    left, top, width, height = attention.box()
    side = max(width, height) + 2 * max(attention.observed.stride)
    rows, columns = attention.observed.image_size
    x, y = _within(left + width / 2 - 0.5, side, columns), _within(top + height / 2 - 0.5, side, rows)
    axes.set(xlim=(x, x + min(side, columns)), ylim=(y + min(side, rows), y))


def _within(centre: float, side: float, pixels: int) -> float:
    """Where a stretch of length `side` around `centre` begins, moved so that it lies on the image."""
    return min(max(centre - side / 2, -0.5), max(pixels - 0.5 - side, -0.5))


def _mark(axes: Any, pixel: tuple[int, int]) -> None:
    """A cross at the pixel, whole at the image's edge too."""
    axes.plot(*pixel, "+", color="white", markersize=9, markeredgewidth=3, clip_on=False)
    axes.plot(*pixel, "+", color=_MARK, markersize=8, markeredgewidth=1.4, clip_on=False)

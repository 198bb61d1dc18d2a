"""One network's part of the page, as HTML: what it sees, what a pixel attends to, what it says, what makes it fall."""

from __future__ import annotations

from html import escape

import numpy as np

from san.attention_maps import PixelAttention
from san.demo.answers import Changed, Taken, pixel_at
from san.demo.charts import draw_bars, draw_turning, is_changed, verdict
from san.demo.networks import Network
from san.demo.pictures import Weighing, draw_attention, draw_group, draw_pixels, gradient, pixels_of

__all__ = ["draw_panel"]

_MOST_GROUPS = 16
"""As many weight groups are drawn side by side; any can be chosen."""


def draw_panel(
    network: Network,
    taken: Taken,
    changed: Changed,
    point: tuple[float, float],
    attention: PixelAttention | None,
    group: int | None,
) -> str:
    """All that is shown of one network; `group` None is the mean over groups, `attention` None a network without."""
    pixel, pixels = pixel_at(changed.pixels, point), pixels_of(changed.pixels)
    seen = draw_pixels(pixels, "what the network sees", pixel, attention)
    tiles = [
        _tile("sees", "What it sees", seen, f"pixel {pixel[0]}, {pixel[1]} · click to choose another"),
        _attention(pixels, attention, group, pixel),
        _says(network, taken, changed),
        _turning(network, taken, changed),
        _change(changed),
        _groups(attention, group),
    ]
    about = f'<p class="san-about"><b>{escape(network.name)}</b>{escape(network.about)}</p>'
    return f'<div class="san-look">{about}<div class="san-tiles">{"".join(tiles)}</div></div>'


def _tile(name: str, title: str, content: str, caption: str = "") -> str:
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="san-tile san-{name}"><h3>{title}</h3>{content}{below}</figure>'


def _attention(pixels: np.ndarray, attention: PixelAttention | None, group: int | None, pixel: tuple[int, int]) -> str:
    title = "What it attends to"
    if attention is None:
        return _tile("attends", title, _empty("This network has no attention layers, so there are no weights to show."))
    weighing = _weighing(attention, group)
    return _tile(
        "attends", title, draw_attention(pixels, attention, weighing, pixel), _scale(attention, weighing, group)
    )


def _weighing(attention: PixelAttention, group: int | None) -> Weighing:
    """The mean share of attention over groups, or α of one group, on the map."""
    quantity = attention.shares().mean(1)[0] if group is None else attention.weights[0, group]
    laid = attention.on_map(quantity).cpu().numpy()
    return Weighing(laid, _most(laid), group is not None and attention.observed.form == "patchwise")


def _most(laid: np.ndarray) -> float:
    return float(np.nanmax(np.abs(laid))) or 1.0


def _scale(attention: PixelAttention, weighing: Weighing, group: int | None) -> str:
    what = f"mean share over {attention.observed.groups} groups" if group is None else f"weight α of group {group}"
    size = attention.observed.layer.footprint.kernel_size
    lowest = f"−{weighing.most:.2f}" if weighing.signed else "0"
    outside = int(attention.outside.sum())
    border = f", {outside} beyond the border" if outside else ""
    return (
        f'<span class="san-scale"><span>{lowest}</span><i style="background:{gradient(weighing.signed)}"></i>'
        f"<span>{weighing.most:.2f}</span></span>{what} · {size}×{size} places{border}"
    )


def _says(network: Network, taken: Taken, changed: Changed) -> str:
    caption = "mark: before it was turned or attacked" if is_changed(changed) else ""
    content = verdict(network.words, taken, changed) + draw_bars(network.words, taken, changed)
    return _tile("says", "What it says", content, caption)


def _turning(network: Network, taken: Taken, changed: Changed) -> str:
    word = network.words[taken.answer]
    stays = sum(stays for *_, stays in taken.turning[:-1])
    caption = f"{escape(word)}, in %, without attack; first at {stays} of {len(taken.turning) - 1} angles (filled)"
    return _tile("turning", "Turned all the way", draw_turning(word, taken, changed.degrees), caption)


def _change(changed: Changed) -> str:
    title = "What the attack adds"
    if not changed.strength:
        return _tile("change", title, _empty("Nothing yet: raise the attack's strength, and see what PGD adds."))
    most = changed.strength / 255
    added = 0.5 + (changed.pixels - changed.turned) / (2 * most)
    caption = f"at most ±{changed.strength:g} of 255, shown ×{127.5 / changed.strength:.0f}; grey is no change"
    return _tile("change", title, draw_pixels(pixels_of(added), "what the attack adds"), caption)


def _groups(attention: PixelAttention | None, group: int | None) -> str:
    if attention is None:
        return ""
    shown = min(attention.observed.groups, _MOST_GROUPS)
    laid = attention.on_map(attention.weights[0, :shown]).cpu().numpy()
    most, signed = _most(laid), attention.observed.form == "patchwise"
    mean = _weighing(attention, None)
    buttons = [_button("mean", "mean", draw_group(attention, mean), group is None)]
    buttons += [
        _button(str(place), str(place), draw_group(attention, Weighing(each, most, signed)), group == place)
        for place, each in enumerate(laid)
    ]
    part = f"{shown} of {attention.observed.groups}" if shown < attention.observed.groups else f"all {shown}"
    title = "Weight groups"
    return _tile(
        "groups", title, f'<div class="san-strip">{"".join(buttons)}</div>', f"{part}, on one scale · click to choose"
    )


def _button(value: str, label: str, picture: str, chosen: bool) -> str:
    pressed = "true" if chosen else "false"
    return f'<button type="button" data-group="{value}" aria-pressed="{pressed}">{picture}<span>{label}</span></button>'


def _empty(sentence: str) -> str:
    return f'<div class="san-empty">{sentence}</div>'

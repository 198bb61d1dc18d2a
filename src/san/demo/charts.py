"""Charts of the page: the likeliest classes as bars, and one class's probability all the way round."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from san.demo.answers import Changed, Taken

__all__ = ["draw_bars", "draw_turning", "is_changed", "verdict"]

_TOP = 5
# Of the curve's plane, inside a picture of 320×250.
_LEFT, _RIGHT, _UP, _DOWN = 36, 302, 12, 222


def is_changed(changed: Changed) -> bool:
    """Whether a picture is turned or attacked at all."""
    return bool(changed.degrees % 360 or changed.strength)


def verdict(words: Sequence[str], taken: Taken, changed: Changed) -> str:
    """What became of the answer, in a line."""
    first, now = taken.answer, int(changed.probabilities.argmax())
    name, before, after = escape(words[first]), _percent(taken.probabilities[first]), changed.probabilities
    if not is_changed(changed):
        return f'<p class="san-verdict"><b>{name}</b> {before}</p>'
    if now == first:
        return f'<p class="san-verdict san-holds"><b>Holds: {name}</b> {before} → {_percent(after[first])}</p>'
    return (
        f'<p class="san-verdict san-falls"><b>Falls to {escape(words[now])}</b> {_percent(after[now])} '
        f"· {name} {before} → {_percent(after[first])}</p>"
    )


def draw_bars(words: Sequence[str], taken: Taken, changed: Changed) -> str:
    """The five likeliest classes now, a mark where each was before, and the first answer if it is no longer there."""
    classes: list[int] = changed.probabilities.topk(min(_TOP, len(words))).indices.tolist()
    lost = [] if taken.answer in classes else [taken.answer]
    now, before, mark = changed.probabilities, taken.probabilities, is_changed(changed)
    rows = [_bar(words[each], now[each], before[each], mark) for each in classes + lost]
    return f'<div class="san-bars">{"".join(rows)}</div>'


def _bar(word: str, now: Tensor, before: Tensor, is_marked: bool) -> str:
    mark = f'<i style="left:{100 * float(before):.1f}%"></i>' if is_marked else ""
    name = escape(word)
    return (
        f'<span title="{name}">{name}</span><div><b style="width:{100 * float(now):.1f}%"></b>{mark}</div>'
        f"<span>{_percent(now)}</span>"
    )


def _percent(share: Tensor | float) -> str:
    # The space must not break.
    return f"{100 * float(share):.1f}\N{NO-BREAK SPACE}%"


def draw_turning(word: str, taken: Taken, degrees: float) -> str:
    """The probability of the first answer at all angles; filled points where it stays the likeliest."""
    places = [(_across(angle), _up(share), stays) for angle, share, stays in taken.turning]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="{"san-stays" if stays else "san-lost"}"/>'
        for x, y, stays in places
    )
    now = f'<line class="san-now" x1="{_across(degrees):.1f}" x2="{_across(degrees):.1f}" y1="{_UP}" y2="{_DOWN}"/>'
    label = f"probability of {escape(word)} when the picture is turned"
    return (
        f'<svg class="san-chart" viewBox="0 0 320 250" role="img" aria-label="{label}">{_axes()}{now}'
        f'<polyline points="{line}"/>{points}</svg>'
    )


def _axes() -> str:
    levels = "".join(
        f'<line class="san-grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{_up(share):.1f}" y2="{_up(share):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{_up(share) + 4:.1f}" text-anchor="end">{100 * share:.0f}</text>'
        for share in (0, 0.5, 1)
    )
    angles = "".join(
        f'<text x="{_across(angle):.1f}" y="{_DOWN + 18}" text-anchor="middle">{angle}°</text>'
        for angle in range(0, 361, 90)
    )
    return levels + angles


def _across(degrees: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * degrees / 360


def _up(share: float) -> float:
    return _DOWN - (_DOWN - _UP) * share

"""The page: what stands where, and which answer follows which change. What is shown is made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from san.demo.answers import MOST_STRENGTH
from san.demo.networks import Network
from san.demo.pictures import thumbnail
from san.demo.showing import MEAN, Controls, Look, Picture, Showing, group_name
from san.errors import UserError

__all__ = ["STYLE", "build_page"]

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
"""The page's own style sheet, for `launch`."""
_CLICKS = (Path(__file__).parent / "clicks.js").read_text(encoding="utf-8")
_NOTHING = "nothing"
_UPLOADS = 600, 3600
"""So many seconds apart, uploaded files older than so many are removed; they are read at once."""
# One event at a time: gradio's queue is the place to wait in, first come, first served. What is asked while an answer
# is on its way is not lost, and of a slider that is dragged only the place where it stops counts.
_QUEUED: dict[str, Any] = {
    "concurrency_id": "san",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "trigger_mode": "always_last",
}
_QUIET: dict[str, Any] = {**_QUEUED, "show_progress": "hidden"}
_HEADER = (
    "<h1>What self-attention sees</h1><p>Choose a picture, click a pixel, turn the picture, attack it. "
    "Everything is computed on this machine.</p>"
)


@dataclass(frozen=True)
class _Shared:
    """What both networks look at: the components whose values they share."""

    picture: gr.State
    point: gr.State
    degrees: gr.Slider
    strength: gr.Slider


@dataclass(frozen=True)
class _Panel:
    """One network's components."""

    column: gr.Column
    network: gr.Dropdown
    layer: gr.Dropdown
    group: gr.Dropdown
    look: gr.State
    view: gr.HTML

    def controls(self, shared: _Shared) -> list[Any]:
        """In the order of the fields of `Controls`."""
        return [self.network, shared.degrees, shared.strength, shared.point, self.layer, self.group]


def build_page(networks: Sequence[Network]) -> gr.Blocks:
    """The page for one or more networks; what is seen first is computed here."""
    showing = Showing(networks)
    first = showing.sample(0)
    beside = networks[1].name if len(networks) > 1 else _NOTHING
    with gr.Blocks(title="SAN: what self-attention sees", analytics_enabled=False, delete_cache=_UPLOADS) as page:
        gr.HTML(_HEADER, elem_classes="san-header", apply_default_css=False, js_on_load=None)
        with gr.Row(elem_classes="san-page"):
            with gr.Column(scale=0, min_width=290, elem_classes="san-side"):
                upload = gr.File(label="Your picture", height=128, elem_id="san-upload")
                said = gr.HTML(_said(first.name), elem_id="san-said", apply_default_css=False, js_on_load=None)
                samples = gr.HTML(
                    _strip(showing, 0), elem_id="san-samples", apply_default_css=False, js_on_load=_CLICKS
                )
                shared = _shared(first)
                network = gr.Dropdown([*showing.networks], value=networks[0].name, label="Network")
                second = gr.Dropdown([_NOTHING, *showing.networks], value=beside, label="Beside it")
            one = _panel(showing, first, networks[0].name, "one", network)
            two = _panel(showing, first, beside, "two", second)
        _connect_pictures(showing, shared, (one, two), upload, samples, said)
        for panel in (one, two):
            _connect_panel(showing, shared, panel, (one, two))
    return page


def _shared(first: Picture) -> _Shared:
    angle = "Turn, in degrees"
    bound = "Attack, ± of 255"
    return _Shared(
        picture=gr.State(first),
        point=gr.State((0.5, 0.5)),
        degrees=gr.Slider(0, 360, 0, step=5, label=angle, elem_id="san-degrees"),
        strength=gr.Slider(0, MOST_STRENGTH, 0, step=1, label=bound, elem_id="san-strength"),
    )


def _panel(showing: Showing, first: Picture, name: str, place: str, chooser: gr.Dropdown) -> _Panel:
    """A network's column, which `chooser` fills; it stands elsewhere, because the column may be hidden."""
    is_shown = name != _NOTHING
    network = showing.networks[name] if is_shown else next(iter(showing.networks.values()))
    controls = Controls(network.name, layer=network.first_layer)
    look = showing.take(first, controls)
    layers, groups = showing.layers(network.name), showing.groups(network.name, controls.layer)
    with gr.Column(visible=is_shown, min_width=420, elem_classes="san-panel", elem_id=f"san-{place}") as column:
        with gr.Row(elem_classes="san-choices"):
            layer = gr.Dropdown(layers, value=controls.layer, label="Attention layer", min_width=120)
            group = gr.Dropdown(groups, value=MEAN, label="Weight group", min_width=120)
        view = gr.HTML(
            showing.draw(look, controls), apply_default_css=False, js_on_load=_CLICKS, elem_id=f"san-view-{place}"
        )
    return _Panel(column, chooser, layer, group, gr.State(look), view)


def _connect_pictures(
    showing: Showing, shared: _Shared, panels: Sequence[_Panel], upload: gr.File, samples: gr.HTML, said: gr.HTML
) -> None:
    """Another picture, from a file or the samples, and then both networks' looks at it."""

    def take_upload(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        try:
            picture = showing.upload(path)
        except UserError as problem:
            return None, gr.skip(), _said(f"{problem}.", is_problem=True), gr.skip()
        return None, picture, _said(picture.name), _strip(showing, None)

    def take_sample(event: gr.EventData) -> tuple[Any, ...]:
        number = int(event._data["sample"]) % len(showing.samples)
        picture = showing.sample(number)
        return picture, _said(picture.name), _strip(showing, number)

    outputs = [shared.picture, said, samples]
    changes = [
        upload.upload(take_upload, upload, [upload, *outputs], **_QUEUED),
        samples.click(take_sample, None, outputs, **_QUIET),
    ]
    for changed in changes:
        for panel in panels:
            inputs = [shared.picture, *panel.controls(shared)]
            changed.then(partial(_relook, showing, showing.take), inputs, [panel.look, panel.view], **_QUIET)


def _connect_panel(showing: Showing, shared: _Shared, panel: _Panel, panels: Sequence[_Panel]) -> None:
    controls = panel.controls(shared)
    rechange = partial(_relook, showing, showing.change)
    for slider in (shared.degrees, shared.strength):
        slider.change(rechange, [panel.look, *controls], [panel.look, panel.view], **_QUIET)
    everything = [panel.column, panel.layer, panel.group, panel.look, panel.view]
    panel.network.input(partial(_switch, showing), [shared.picture, *controls], everything, **_QUEUED)
    redraw = partial(_redraw, showing)
    panel.layer.input(partial(_groups, showing), [panel.network, panel.layer], panel.group, **_QUIET).then(
        redraw, [panel.look, *controls], panel.view, **_QUIET
    )
    panel.group.input(redraw, [panel.look, *controls], panel.view, **_QUIET)
    panel.view.click(_group, None, panel.group, **_QUIET).then(redraw, [panel.look, *controls], panel.view, **_QUIET)
    pointed = panel.view.select(_point, None, shared.point, **_QUIET)
    for each in panels:
        pointed.then(redraw, [each.look, *each.controls(shared)], each.view, **_QUIET)


def _relook(showing: Showing, step: Callable[..., Look], known: Picture | Look, *values: Any) -> Any:
    """What `step`, a method of `showing`, makes of another picture, or of the same under another angle or attack."""
    controls = Controls(*values)
    if controls.network == _NOTHING:
        return gr.skip(), gr.skip()
    look = step(known, controls)
    return look, showing.draw(look, controls)


def _redraw(showing: Showing, look: Look, *values: Any) -> Any:
    """Another pixel, layer or group."""
    controls = Controls(*values)
    return gr.skip() if controls.network == _NOTHING else showing.draw(look, controls)


def _switch(showing: Showing, picture: Picture, name: str, degrees: float, strength: float, point: Any, *_: Any) -> Any:
    """Another network, with its own layers and groups."""
    if name == _NOTHING:
        return gr.Column(visible=False), gr.skip(), gr.skip(), gr.skip(), gr.skip()
    layer = showing.networks[name].first_layer
    controls = Controls(name, degrees, strength, point, layer)
    look = showing.take(picture, controls)
    layers = gr.Dropdown(showing.layers(name), value=layer)
    groups = gr.Dropdown(showing.groups(name, layer), value=MEAN)
    return gr.Column(visible=True), layers, groups, look, showing.draw(look, controls)


def _groups(showing: Showing, name: str, layer: str) -> Any:
    return gr.Dropdown(showing.groups(name, layer), value=MEAN)


def _group(event: gr.EventData) -> str:
    chosen = str(event._data["group"])
    return MEAN if chosen == "mean" else group_name(int(chosen))


def _point(event: gr.EventData) -> tuple[float, float]:
    x, y = (min(max(float(event._data[side]), 0.0), 1.0) for side in ("x", "y"))
    return x, y


def _said(sentence: str, *, is_problem: bool = False) -> str:
    """What is looked at, or why a file is not."""
    kind = "san-problem" if is_problem else "san-name"
    return f'<p class="{kind}" role="status">{escape(sentence)}</p>'


def _strip(showing: Showing, chosen: int | None) -> str:
    """The samples as buttons."""
    buttons = "".join(
        f'<button type="button" data-sample="{number}" aria-pressed="{"true" if number == chosen else "false"}" '
        f'title="{escape(sample.name)}"><img src="{thumbnail(sample.image)}" alt="{escape(sample.name)}"></button>'
        for number, sample in enumerate(showing.samples)
    )
    return f'<h3>Samples</h3><div class="san-samples">{buttons}</div>'

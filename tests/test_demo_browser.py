"""The page of `san demo` in a real browser: everything that a visitor does, and that no other host is asked.

`SAN_SHOTS=FOLDER` keeps the pictures of the screen; those in docs/figures are made so.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

import san
from san.checkpoints import save_model
from san.demo.networks import PACKAGED, load_networks
from san.demo.serving import HOST, served

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
Page, expect = sync_api.Page, sync_api.expect

CHROMIUM = shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt-get install --no-install-recommends chromium"),
]
# No sandbox, because tests may run as root; the others keep the browser from asking its makers for anything.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
]
ONE, TWO = "#san-view-one", "#san-view-two"
WAIT = 60_000


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The package's network, and beside it a patchwise one that has learnt nothing."""
    torch.manual_seed(0)
    model = san.create_model("san4_patchwise", 20)
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    path = tmp_path_factory.mktemp("networks") / "untrained.safetensors"
    save_model(model, path)
    with served(load_networks([PACKAGED, path])) as (_, address):
        yield address


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    with served(load_networks()) as (_, address):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield found
        found.close()


@pytest.fixture
def visit(browser) -> Iterator:
    """Opens an address as a visitor of its own; at the end, no page may have asked another host or failed."""
    contexts, asked, errors = [], [], []

    def open_page(address: str) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        # Gradio shows some parts before others.
        for part in (f"{ONE} svg.san-picture", "#san-strength input[type=number]", "#san-one input[role=combobox]"):
            expect(page.locator(part).first).to_be_visible(timeout=WAIT)
        expect(page.get_by_text("Loading...")).to_have_count(0, timeout=WAIT)
        return page

    yield open_page
    for context in contexts:
        context.close()
    outside = [url for url in asked if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).hostname != HOST]
    assert asked
    assert not outside
    assert not errors


def _shot(page: Page, name: str) -> np.ndarray:
    """The screen as colours [H, W, 3], kept where SAN_SHOTS says."""
    image = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    if folder := os.environ.get("SAN_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Few colours make a small file; the best ones keep it faithful.
        few = image.quantize(256, kmeans=3, dither=Image.Dither.NONE)
        few.save(Path(folder) / f"{name}.png", optimize=True)
    return np.asarray(image).astype(int)


def _part(screen: np.ndarray, page: Page, selector: str) -> np.ndarray:
    box = page.locator(selector).first.bounding_box()
    left, top, width, height = (round(box[side]) for side in ("x", "y", "width", "height"))
    return screen[top : top + height, left : left + width]


def _set(page: Page, slider: str, value: int) -> None:
    field = page.locator(f"{slider} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def _choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=option, exact=True).first.click()


def _upload(page: Page, path: Path) -> None:
    page.locator("#san-upload input[type=file]").set_input_files(path)


def test_what_is_seen_first_already_works(visit, alone):
    page = visit(alone)
    expect(page.locator("#san-samples button[aria-pressed=true]")).to_have_attribute("title", "a drawn goldfish")
    expect(page.locator(f"{ONE} .san-verdict")).to_contain_text("goldfish")
    expect(page.locator(f"{ONE} .san-bars b")).to_have_count(5)
    expect(page.locator(TWO)).to_have_count(0)
    screen = _shot(page, "demo")
    assert screen.shape[:2] == (900, 1280), "everything fits on one screen"
    sees = _part(screen, page, f"{ONE} .san-sees svg")
    orange = (sees[..., 0] > 200) & (sees[..., 2] < 90)
    assert orange.mean() > 0.1
    magenta = (np.abs(sees - [255, 0, 200]) < 40).all(2)
    assert magenta.any(), "the pixel is marked"
    attends = _part(screen, page, f"{ONE} .san-attends svg")
    assert (attends.max(2) - attends.min(2) > 40).mean() > 0.05, "weights lie over the grey picture"
    bars = _part(screen, page, f"{ONE} .san-bars")
    assert ((bars[..., 0] > 220) & (bars[..., 2] < 80)).mean() > 0.02
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, "nothing is cut off at the side"


def test_a_click_a_layer_and_a_group_change_what_is_shown(visit, address):
    page = visit(address)
    sees = page.locator(f"{ONE} .san-sees svg")
    box = sees.bounding_box()
    sees.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.75})
    for view in (ONE, TWO):
        caption = page.locator(f"{view} .san-sees figcaption")
        expect(caption).to_have_text(re.compile(r"^pixel 1[56], 4[78] "), timeout=WAIT)
    scale = page.locator(f"{ONE} .san-attends figcaption")
    _choose(page, "Attention layer", "layer0.0.sam")
    expect(scale).to_contain_text("3×3 places", timeout=WAIT)
    page.locator(f"{ONE} button[data-group='1']").click()
    expect(scale).to_contain_text("weight α of group 1", timeout=WAIT)
    _choose(page, "Weight group", "mean of all")
    expect(scale).to_contain_text("mean share over", timeout=WAIT)


def test_turning_and_attack_are_followed_by_both_networks(visit, address):
    page = visit(address)
    page.get_by_role("button", name="Grace Hopper, 1984").click()
    expect(page.locator(f"{ONE} .san-verdict")).to_contain_text("academic gown", timeout=WAIT)
    before = _part(_shot(page, "demo-before"), page, f"{ONE} .san-sees svg")
    _set(page, "#san-degrees", 30)
    expect(page.locator(f"{ONE} .san-verdict")).to_have_text(re.compile("Holds|Falls"), timeout=WAIT)
    _set(page, "#san-strength", 6)
    for view in (ONE, TWO):
        expect(page.locator(f"{view} .san-change svg")).to_be_visible(timeout=WAIT)
    expect(page.locator(f"{ONE} .san-bars i").first).to_be_visible()
    screen = _shot(page, "demo-pair")
    after = _part(screen, page, f"{ONE} .san-sees svg")
    size = min(len(before), len(after))
    assert np.abs(after[:size, :size] - before[:size, :size]).mean() > 5
    assert _part(screen, page, f"{ONE} .san-change svg").std() > 30
    _set(page, "#san-strength", 0)
    expect(page.locator(f"{ONE} .san-change .san-empty")).to_be_visible(timeout=WAIT)


def test_a_network_is_set_beside_and_taken_away(visit, alone):
    page = visit(alone)
    _choose(page, "Beside it", "SAN4 pairwise")
    expect(page.locator(f"{TWO} .san-bars b")).to_have_count(5, timeout=WAIT)
    _choose(page, "Beside it", "nothing")
    expect(page.locator(f"{TWO} .san-bars")).to_have_count(0, timeout=WAIT)


def _files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Uploads of every kind, and what the page says to each."""
    picture = Image.effect_mandelbrot((120, 80), (-2, -1.2, 0.8, 1.2), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(folder / "print.jpg")
    picture.save(folder / "film.gif", save_all=True, append_images=[picture.rotate(9), picture.rotate(18)])
    (folder / "notes.txt").write_text("no picture")
    (folder / "lie.png").write_text("no picture either")
    (folder / "cut.jpg").write_bytes((folder / "print.jpg").read_bytes()[:1500])
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    wrong = {"notes.txt": "is not an image", "lie.png": "is not an image", "cut.jpg": "damaged", "huge.png": "million"}
    right = {name: name for name in ("turned.jpg", "print.jpg", "film.gif")}
    return {name: (folder / name, said) for name, said in (wrong | right).items()}


def test_uploads_of_every_kind_get_a_picture_or_a_sentence(visit, address, tmp_path):
    page = visit(address)
    said = page.locator("#san-said")
    for name, (path, words) in _files(tmp_path).items():
        _upload(page, path)
        expect(said).to_contain_text(name, timeout=WAIT)
        expect(said).to_contain_text(words)
        expect(page.locator("#san-said .san-problem")).to_have_count(0 if words == name else 1)
        expect(page.locator(f"{ONE} .san-bars b").first).to_be_visible()
    page.get_by_role("button", name="a drawn goldfish").click()
    expect(page.locator(f"{ONE} .san-verdict")).to_contain_text("goldfish", timeout=WAIT)


def test_eight_visitors_at_once_each_see_their_own(visit, alone):
    pages = [visit(alone) for _ in range(8)]
    for number, page in enumerate(pages):
        page.get_by_role("button", name="Grace Hopper, 1984" if number % 2 else "a drawn goldfish").click()
        _set(page, "#san-degrees", 5 * (number + 1))
        _set(page, "#san-strength", number)
    for number, page in enumerate(pages):
        expected = "academic gown" if number % 2 else "goldfish"
        expect(page.locator("#san-said")).to_contain_text("Grace" if number % 2 else "goldfish", timeout=WAIT)
        expect(page.locator(f"{ONE} .san-turning figcaption")).to_contain_text(expected, timeout=WAIT)
        added = f"at most ±{number} of 255" if number else "Nothing yet"
        expect(page.locator(f"{ONE} .san-change")).to_contain_text(added, timeout=WAIT)

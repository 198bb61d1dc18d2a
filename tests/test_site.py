"""The documentation site: it builds without a warning, leads nowhere that is not there, and asks nobody for anything.

One test builds it; with SAN_SITE, as in `make docs`, it looks at what was built there.
"""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from san.cli import COMMANDS

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
# What a browser fetches by itself, unlike the target of a link that somebody may click.
FETCHED = {("link", "href"), ("object", "data"), ("use", "href")}


class Page(HTMLParser):
    """What a page points to, what it has fetched, what may be pointed to in it, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value or "")
            elif name == "style":
                self.fetched += _in_style(value or "")
            elif name in ("src", "poster") or (tag, name) in FETCHED:
                self.fetched.append(value or "")
            elif name == "srcset":
                self.fetched += [part.split()[0] for part in (value or "").split(",")]
            elif (tag, name) == ("a", "href"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """The words with single spaces, and nothing between the parts of a highlighted line."""
        return " ".join("".join(self.words).split())


def _in_style(style: str) -> list[str]:
    """Addresses in a style sheet."""
    return re.findall(r"(?:url\(|@import\s+(?:url\()?)[\"']?([^\"')\s]+)", style)


def _is_foreign(address: str) -> bool:
    return bool(urlsplit(address).netloc)


@pytest.fixture
def site(tmp_path) -> Path:
    if "SAN_SITE" in os.environ:
        return ROOT / os.environ["SAN_SITE"]
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path / "site"


def test_site(site, subtests):
    """All promises about the built site in one test, because building it is what takes time."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        name = str(path.relative_to(site))
        with subtests.test(name, promise="links and images lead somewhere"):
            assert not [link for link in [*page.links, *page.fetched] if not _leads_somewhere(link, path, pages)]
        with subtests.test(name, promise="nothing is fetched from elsewhere"):
            assert not [address for address in page.fetched if _is_foreign(address)]
    with subtests.test("style sheets fetch nothing from elsewhere"):
        styles = [address for sheet in site.rglob("*.css") for address in _in_style(sheet.read_text(encoding="utf-8"))]
        assert not [address for address in styles if _is_foreign(address)]
    for name in COMMANDS:
        with subtests.test(name, promise="the page of commands is the command's help"):
            _check_command(name, pages[site / "commands.html"].text)
    anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "reference"))
    for module in _documented_modules():
        with subtests.test(module, promise="every public name is in the reference"):
            assert not [name for name, homes in _public(module).items() if not homes & anchors]


def _leads_somewhere(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    # A server gives 404.html for any address, so only that page's links are absolute.
    if parts.scheme or parts.netloc or (path.name == "404.html" and parts.path.startswith("/")):
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if parts.fragment and target in pages:
        return unquote(parts.fragment) in pages[target].anchors
    return target.is_file()


def _check_command(name: str, text: str) -> None:
    """The page has the options that `san NAME --help` prints, and the examples."""
    words = [sys.executable, "-m", "san", name, "--help"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    section = re.split(r"\bsan [a-z]+¶", text.partition(f" san {name}¶")[2])[0]
    common = {"--help", "--config", "--print-config"}
    options = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
    described = printed.partition("options:")[2].partition("examples:")[0]
    printed_options = {line.split()[0].rstrip(",") for line in described.splitlines() if line.startswith("  --")}
    assert printed_options
    assert printed_options - common <= set(options.findall(section))
    for example in inspect.cleandoc(COMMANDS[name].examples).splitlines():
        assert " ".join(example.split()) in section


def _documented_modules() -> list[str]:
    """The modules that the pages of reference show as a whole, not member by member only."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    named = re.findall(r"^::: (san[\w.]*)", text, re.MULTILINE)
    return sorted({name for name in named if _is_module(name)})


def _is_module(name: str) -> bool:
    folder = ROOT / "src" / Path(*name.split("."))
    return folder.is_dir() or folder.with_suffix(".py").is_file()


def _public(module: str) -> dict[str, set[str]]:
    """Classes and functions of `__all__` and what they may be called, but those that belong to another module."""
    found = import_module(module)
    members = {name: getattr(found, name) for name in getattr(found, "__all__", [])}
    own = {name: each for name, each in members.items() if getattr(each, "__module__", "").startswith(module)}
    return {name: {f"{module}.{name}", f"{each.__module__}.{each.__qualname__}"} for name, each in own.items()}


def test_every_public_module_is_in_the_reference():
    """Modules of the package's first two levels that say what is public, but for what is only ours."""
    ours = {"san.cli", "san.errors", "san.fused", "san.weights", "san.demo"}
    first = {f"san.{path.stem}" for path in (ROOT / "src" / "san").iterdir() if path.is_dir() or path.suffix == ".py"}
    named = {name for name in first if not name.startswith("san.__")} - ours
    described = {".".join(name.split(".")[:2]) for name in _documented_modules()}
    assert named == described


def test_figures_are_what_their_script_draws(tmp_path, monkeypatch):
    """The committed figures; their very bytes where matplotlib is the version that drew them."""
    script = ROOT / "docs" / "figures" / "operators.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    committed = {path.name: path.read_text(encoding="utf-8") for path in script.parent.glob("*.svg")}
    assert drawn.keys() == committed.keys()
    for name, picture in drawn.items():
        creator = re.search(r"Matplotlib v[\d.]+", picture)
        assert creator
        if creator[0] in committed[name]:
            assert picture == committed[name]

"""What the documents say works: links lead somewhere, Python runs, commands exist and take these options."""

from __future__ import annotations

import re
import shlex
from functools import wraps
from importlib import import_module
from pathlib import Path

import pytest

from san.cli import COMMANDS
from san.cli.parsing import call

ROOT = Path(__file__).parents[1]
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}


def _blocks(language: str) -> list[tuple[str, str]]:
    """(document, block) of every fenced block in a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(name, block) for name, path in DOCUMENTS.items() for block in fence.findall(path.read_text())]


def _lines(blocks: list[tuple[str, str]], program: str) -> list[list[str]]:
    """The words behind `program`, of every line or part of a pipe that calls it."""
    parts = [part for _, block in blocks for line in block.splitlines() for part in re.split(r" [|>] ", line)]
    words = [shlex.split(part, comments=True) for part in parts]
    return [line[1:] for line in words if line[:1] == [program]]


EXAMPLES = [("san --help", command.examples) for command in COMMANDS.values()]
SAN_LINES = _lines([*_blocks("sh"), *EXAMPLES], "san")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#\s]+)", DOCUMENTS[name].read_text())
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (DOCUMENTS[name].parent / link).exists()]


@pytest.mark.parametrize(("name", "block"), _blocks("python"))
def test_python_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, name, "exec"), {"__name__": "example"})


def test_every_command_is_shown():
    assert {line[0] for line in _lines(_blocks("sh"), "san")} == set(COMMANDS)


RECIPES = [["train", "--config", f"recipes/{path.name}"] for path in sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.mark.parametrize("words", [*SAN_LINES, *RECIPES], ids=" ".join)
def test_commands_parse(words, monkeypatch):
    """The real parser takes the line and the recipe; only the work behind it is left out."""
    monkeypatch.chdir(ROOT)
    name, *rest = words
    module, _, function = COMMANDS[name].home.partition(":")
    called = []

    @wraps(getattr(import_module(module), function))
    def work(*args, **kwargs):
        called.append((args, kwargs))

    call(f"san {name}", work, rest, "")
    assert called


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = _lines(_blocks("sh"), "make")
    assert lines
    assert {word for line in lines for word in line if "=" not in word} <= targets

"""What the documents say works: links lead somewhere, Python runs, commands exist and take these options."""

from __future__ import annotations

import re
import shlex
from functools import wraps
from importlib import import_module
from inspect import signature
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
    """The words behind `program`, of every line or part of a pipe that calls it, itself or through a launcher."""
    lines = [line for _, block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [shlex.split(part, comments=True) for line in lines for part in re.split(r" [|>] ", line)]
    calls = [part[part.index(program) :] if _launches(part, program) else part for part in parts]
    return [call[1:] for call in calls if call[:1] == [program]]


def _launches(words: list[str], program: str) -> bool:
    return words[:1] in (["srun"], ["torchrun"]) and program in words


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


def test_options_in_the_text_exist():
    """What the prose calls an option is one of some command, or of a script in benchmarks/."""
    homes = [command.home.partition(":") for command in COMMANDS.values()]
    functions = [getattr(import_module(module), function) for module, _, function in homes]
    names = {name.replace("_", "-") for function in functions for name in signature(function).parameters}
    scripts = "".join(path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    options = {f"--{name}" for name in ("help", "version", "config", "print-config", *names)}
    options |= set(re.findall(r'"(--[a-z-]+)"', scripts))
    fence = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    prose = "".join(fence.sub("", path.read_text()) for path in DOCUMENTS.values())
    named = set(re.findall(r"`(--[a-z][a-z-]+)", prose))
    assert len(named) > 10
    assert {option.replace("--no-", "--") for option in named} <= options


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = _lines(_blocks("sh"), "make")
    assert lines
    assert {word for line in lines for word in line if "=" not in word} <= targets

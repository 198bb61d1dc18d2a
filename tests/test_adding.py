"""docs/adding.md, followed to the letter in a copy of the package: its diffs fit, its commands give what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from san.ops.kernels import native

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
# An editable installation answers for `san` before PYTHONPATH is asked.
FORGET_INSTALLED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


def _section(heading: str) -> str:
    """The page from one heading of the second level to the next."""
    return re.split(r"^## ", PAGE.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def _patch(file: Path, diff: str) -> None:
    """What a reader does: find the lines without a plus, and have those without a minus instead."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] or "\n" for line in lines if line[0] != sign) for sign in "+-")
    text = file.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file.name} does not have, or has several times:\n{before}"
    file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture
def clone(tmp_path):
    """A copy of what the page asks for, in which `python` and `pytest` see its package and no other."""
    leave = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=leave)
    shutil.copytree(ROOT / "tests" / "ops", tmp_path / "tests" / "ops", ignore=leave)
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "src" / "sitecustomize.py").write_text(FORGET_INSTALLED)
    assert run("python -c 'import san; print(san.__file__)'", tmp_path).startswith(str(tmp_path))
    return tmp_path


def run(line: str, folder: Path) -> str:
    """What a command of the page prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder / "src")}
    # The C++ kernels need no compiling, because the page changes nothing of them.
    for library in (file for place in native.__path__ for file in Path(place).glob("*.so")):
        environment["SAN_NATIVE_LIBRARY"] = str(library)
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("heading", ["A relation", "A backend"])
def test_the_page_followed_as_written(heading, clone):
    printed, kinds = "", []
    for kind, title, text in FENCE.findall(_section(heading)):
        kinds.append(kind)
        if kind == "diff":
            _patch(clone / title, text)
        elif kind == "python":
            (clone / title).write_text(text, encoding="utf-8")
        elif kind == "sh":
            printed = "".join(run(line, clone) for line in text.splitlines())
        else:
            assert (kind, title) == ("text", "output")
            assert printed == text
    assert set(kinds) == {"diff", "python", "sh", "text"}


def test_what_the_page_names_exists():
    """Files and names of the package that are mentioned outside the diffs."""
    words = re.findall(r"`([^`]+)`", FENCE.sub("", PAGE))
    files = [word for word in words if word.startswith("src/")]
    assert files
    assert not [name for name in files if not (ROOT / name).exists()]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src" / "san").rglob("*.py"))
    names = [word for word in words if re.fullmatch(r"[A-Za-z_]+(\.[a-z_]+)*", word) and "_" in word]
    assert names
    assert not [name for name in names if name.rpartition(".")[2] not in source]

"""Every example runs, at a small setting, and keeps the promise that its docstring makes."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import san

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "digits")

Main = Callable[[list[str]], dict[str, float]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Main]:
    """The `main` of an example, by its name; scripts find `digits.py` because it lies beside them."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_segmentation_finds_digits(main):
    found = main("segmentation")(["--steps", "40", "--batch", "8", "--judged", "30"])
    assert found["after"] > found["background"] > found["before"]


def test_replacing_convolutions_keeps_the_other_weights_and_new_layers_learn(main, capsys):
    found = main("replace_convolutions")(["--steps", "40", "--judged", "200"])
    assert found["kept"] == 1
    assert found["convolutions"] > found["replaced"]
    assert found["attention"] > found["replaced"]
    assert "layer2.0.conv2, layer2.1.conv2, layer3.0.conv2, layer3.1.conv2" in capsys.readouterr().out


@pytest.mark.parametrize("layer", ["pairwise", "patchwise"])
def test_next_frame_is_better_than_a_copy_of_the_last(main, layer: str):
    copied, *predicted = main("next_frame")(f"--layer {layer} --footprints 3 5 --steps 15 --batch 4".split()).values()
    assert len(predicted) == 2
    assert max(predicted) < copied


def test_fine_tuning_is_better_than_training_from_scratch(main):
    pretraining = ["--known", "60", "--pretraining-epochs", "2"]
    found = main("fine_tuning")([*pretraining, "--images", "6", "--epochs", "6", "--tested", "20"])
    assert found["fine-tuned"] > found["from scratch"]


def test_fine_tuning_takes_a_checkpoint_in_the_authors_form(main, tmp_path: Path):
    state = san.create_model("san4_pairwise", num_classes=3).state_dict()
    published = {"epoch": 100, "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(published, tmp_path / "published.pth", _use_new_zipfile_serialization=False)
    found = main("fine_tuning")(
        ["--checkpoint", str(tmp_path / "published.pth"), "--images", "2", "--epochs", "1", "--tested", "2"]
    )
    assert found.keys() == {"from scratch", "fine-tuned"}


def test_notebook_runs_from_top_to_bottom():
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count], "it is committed without outputs"
    assert code[0].metadata.tags == ["parameters"]
    code[0].source = "STEPS, ROUNDS = 3, 1"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs: list[Any] = [output for cell in code for output in cell.outputs]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 3, "the digit and two figures of attention"
    assert "M parameters" in outputs[-1].text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_says_how_it_is_run_and_stands_on_the_page(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    command = f"python examples/{path.name}"
    assert command in (ast.get_docstring(ast.parse(text)) or "")
    assert command in PAGE

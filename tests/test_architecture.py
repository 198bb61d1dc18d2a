"""The rules of the house, read from the source: who may import whom, what is public, how long a function may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import san

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

# Each row may import from itself and from the rows above it.
ROWS = [
    ["san", "san.errors"],
    ["san.ops.footprint", "san.ops.relations", "san.ops.mapping", "san.ops.normalization", "san.ops.dispatch"],
    ["san.ops.kernels", "san.ops.tiled"],
    ["san.ops"],
    ["san.fused"],
    ["san.layers"],
    ["san.weights"],
    ["san.models"],
    ["san.replacement"],
    ["san.checkpoints"],
    ["san.data"],
    ["san.evaluation"],
    ["san.attention_maps", "san.export"],
    ["san.training"],
    ["san.experiments"],
    ["san.demo"],
    ["san.cli", "san.__main__"],
]
EXTRAS = [
    "captum",
    "gradio",
    "onnx",
    "onnxruntime",
    "lightning",
    "jsonargparse",
    "matplotlib",
    "mlxtend",
    "rich",
    "tensorboard",
]
BEYOND_TORCH = ["timm", "torchvision", "safetensors", "PIL", "huggingface_hub", *EXTRAS]


def _module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in sorted((SOURCE / "san").rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def _row(module: str) -> int:
    """The row with the longest name that `module` is or lies in."""
    fits = [
        (len(name), row)
        for row, names in enumerate(ROWS)
        for name in names
        if module == name or (name != "san" and module.startswith(name + "."))
    ]
    assert fits, f"{module} has no place in ROWS"
    return max(fits)[1]


def _imports(module: str) -> set[str]:
    """Our modules that `module` imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found & MODULES.keys() - {module}


# The package itself only names its lazy members, for type checkers.
@pytest.mark.parametrize("module", [module for module in MODULES if module != "san"])
def test_imports_point_one_way(module):
    wrong = {name for name in _imports(module) if _row(name) > _row(module)}
    assert not wrong, f"{module} imports {wrong}"


def test_imports_have_no_cycle():
    list(TopologicalSorter({module: _imports(module) for module in MODULES if module != "san"}).static_order())


def _run(code: str, *, blocked: list[str]) -> None:
    block = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_san_costs_nothing():
    _run("import san; dir(san); assert not {'torch', 'numpy', 'timm'} & set(sys.modules)", blocked=[])


def test_operators_need_torch_alone():
    code = """
import san, torch
from torch import rand
y = san.ops.aggregation(rand(1, 4, 5, 5), rand(1, 2, 9, 25), kernel_size=3)
assert y.shape == (1, 4, 5, 5)
"""
    _run(code, blocked=BEYOND_TORCH)


def test_core_needs_no_extra():
    code = (
        "import san, san.layers, san.models, san.checkpoints, san.evaluation.cost; san.create_model('san4_patchwise')"
    )
    _run(code, blocked=EXTRAS)


def test_public_surface():
    assert san.__all__ == sorted(san.__all__)
    assert set(san.__all__) == {
        "PairwiseAttention",
        "PatchwiseAttention",
        "ScalarAttention",
        "SelfAttentionBlock",
        "create_model",
        "list_models",
        "ops",
        "replace_convolutions",
    }
    for name in san.__all__:
        assert getattr(san, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = san.nothing


def _public(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_listed_and_documented(module):
    tree = TREES[module]
    assert ast.get_docstring(tree), f"{module} does not say what it is for"
    undocumented = [node.name for node in _public(tree) if not ast.get_docstring(node)]
    assert not undocumented, f"{module}: no docstring on {undocumented}"
    if "kernels" not in module and _public(tree):
        exported = import_module(module).__all__
        assert not [name for name in exported if not hasattr(import_module(module), name)]
        unlisted = {node.name for node in _public(tree)} - set(exported)
        assert not unlisted, f"{module}: not in __all__: {unlisted}"


def _body_lines(function: ast.FunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("module", [module for module in MODULES if "kernels" not in module])
def test_functions_are_short(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    long = {node.name: _body_lines(node) for node in functions if _body_lines(node) > 30}
    assert not long, f"{module}: {long}"


@pytest.mark.parametrize("module", MODULES)
def test_files_of_users_are_never_unpickled(module):
    """ruff refuses pickle itself; torch.load unpickles too, unless told to read weights only."""
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert all("weights_only=True" in ast.unparse(call) for call in loads)


def test_nothing_names_a_machine():
    """No path of somebody's machine in anything that is published."""
    kinds = {".py", ".md", ".toml", ".yaml", ".txt", ".cpp", ".h", ""}
    folders = [ROOT / name for name in ("src", "tests", "recipes", "docs", "examples", "benchmarks", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    texts = [path for path in files if path.suffix in kinds and path.is_file()]
    machine = re.compile(r"(?<![\w.])/(root|home|work|Users|opt)/\w")
    assert len(texts) > 30
    assert not [path.name for path in texts if machine.search(path.read_text())]

"""The file formats: how each is written, and how what was written is used, to be compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from san.checkpoints import load_model, save_model
from san.errors import UserError
from san.export.description import INPUT, KEY, OUTPUT, Description
from san.ops import use_backend

__all__ = ["EXTRA_FILE", "FORMATS", "OPSET", "Format", "capture"]

OPSET = 18
"""Of ONNX: the oldest that PyTorch writes without conversion, which most runtimes read."""
EXTRA_FILE = f"{KEY}.json"
"""Where a torch.export file holds the description."""

Run = Callable[[np.ndarray], np.ndarray]
"""From prepared images [B, 3, H, W] to scores [B, classes], both float32."""


@dataclass(frozen=True)
class Format:
    """A file format.

    suffix: How its files' names end.
    mark: Comes before the suffix where nobody chooses a name.
    write: Writes a model (float32, on the CPU, in eval mode) with its description to a path.
    load: Makes what was just written usable.
    """

    suffix: str
    mark: str
    write: Callable[[nn.Module, Description, Path], None]
    load: Callable[[Path], Run]


def capture(model: nn.Module, input_size: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The model as a graph of PyTorch's own operators, for any number of images of this size.

    Attention is captured in its reference form, because other systems do not have our kernels.
    """
    # Of two images, because sizes of 0 and 1 become constants of the graph.
    example = torch.zeros(2, *input_size)
    with torch.no_grad(), use_backend("reference"):
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    _forget_places(program.graph_module)
    return program


def _forget_places(module: nn.Module) -> None:
    """Take out where on this machine every line of code lies; parts of a graph may be graphs of their own."""
    graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in chain.from_iterable(graph.nodes for graph in graphs):
        node.meta.pop("stack_trace", None)


def _write_safetensors(model: nn.Module, description: Description, path: Path) -> None:
    save_model(model, path)


def _load_safetensors(path: Path) -> Run:
    return _from_torch(load_model(path))


def _write_torch_export(model: nn.Module, description: Description, path: Path) -> None:
    program = capture(model, description.input_size)
    # Images without content, which nobody needs.
    program.example_inputs = None
    torch.export.save(program, path, extra_files={EXTRA_FILE: description.text()})


def _load_torch_export(path: Path) -> Run:
    # This unpickles, and may: the file was written by this process.
    return _from_torch(torch.export.load(path).module())


def _write_aot_inductor(model: nn.Module, description: Description, path: Path) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError("AOTInductor needs a C++ compiler; install g++, or name one with CXX") from None
    program = capture(model, description.input_size)
    configuration = {"aot_inductor.metadata": {KEY: description.text()}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configuration)


def _load_aot_inductor(path: Path) -> Run:
    return _from_torch(torch._inductor.aoti_load_package(str(path)))


def _write_onnx(model: nn.Module, description: Description, path: Path) -> None:
    # The exporter wants it and would name it only in passing.
    import_module("onnxscript")
    program = capture(model, description.input_size)
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
        opset_version=OPSET,
    )
    for node in exported.model.graph:
        node.metadata_props.clear()
    exported.model.graph.name = description.architecture
    exported.model.metadata_props[KEY] = description.text()
    exported.save(path, external_data=False)


def _load_onnx(path: Path) -> Run:
    from san.export.onnx_model import OnnxModel

    return OnnxModel(path)


def _from_torch(model: Callable[[Tensor], Tensor]) -> Run:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return run


FORMATS = {
    "onnx": Format(".onnx", "", _write_onnx, _load_onnx),
    "torch-export": Format(".pt2", "", _write_torch_export, _load_torch_export),
    "aot-inductor": Format(".pt2", ".aot", _write_aot_inductor, _load_aot_inductor),
    "safetensors": Format(".safetensors", "", _write_safetensors, _load_safetensors),
}

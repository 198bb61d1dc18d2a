"""Networks that leave Python: ONNX, torch.export and AOTInductor, each compared with PyTorch when it is written.

`export_model` writes a file and tells how well it agrees; `OnnxModel` uses an ONNX file with NumPy, Pillow and ONNX
Runtime alone. The names are loaded when first used, so that `OnnxModel` works where torch is not installed.

The graphs hold PyTorch's own operators only, SAN's reference formulas: no file needs this package to run, and none has
its kernels.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from san.export.agreement import Agreement
    from san.export.description import Description
    from san.export.exporting import Exported, export_model
    from san.export.formats import FORMATS
    from san.export.onnx_model import OnnxModel

__all__ = ["FORMATS", "Agreement", "Description", "Exported", "OnnxModel", "export_model"]

_HOMES = {
    "FORMATS": "san.export.formats",
    "Agreement": "san.export.agreement",
    "Description": "san.export.description",
    "Exported": "san.export.exporting",
    "OnnxModel": "san.export.onnx_model",
    "export_model": "san.export.exporting",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'san.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Vector self-attention on images.

The public names are loaded when first used, so that `import san` costs nothing and `san.ops` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from san import ops
    from san.layers import PairwiseAttention, PatchwiseAttention, ScalarAttention, SelfAttentionBlock
    from san.models import create_model, list_models
    from san.replacement import replace_convolutions

__version__ = "0.1.0"
__all__ = [
    "PairwiseAttention",
    "PatchwiseAttention",
    "ScalarAttention",
    "SelfAttentionBlock",
    "create_model",
    "list_models",
    "ops",
    "replace_convolutions",
]

_HOMES = {
    "PairwiseAttention": "san.layers",
    "PatchwiseAttention": "san.layers",
    "ScalarAttention": "san.layers",
    "SelfAttentionBlock": "san.layers",
    "create_model": "san.models",
    "list_models": "san.models",
    "replace_convolutions": "san.replacement",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("san.ops")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'san' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

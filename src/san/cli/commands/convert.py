"""`san convert`: a published checkpoint to a safetensors file."""

from __future__ import annotations

__all__ = ["convert"]


def convert(source: str, target: str) -> None:
    """Turn a published checkpoint into a .safetensors file, which also says which network it is.

    The network is recognised by its weights. Nothing in the file is run: one that holds code is refused.

    Args:
        source: The authors' .pth, or any checkpoint of ours.
        target: The .safetensors file to write.
    """
    from san.checkpoints import convert

    print(f"wrote {target} ({convert(source, target)})")

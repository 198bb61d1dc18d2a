"""`san complexity`: parameters and multiply-adds of networks."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path

from san.cli.printing import as_table

__all__ = ["complexity"]


def complexity(*networks: str, input_size: int | None = None, json: bool = False) -> None:
    """Count parameters and multiply-adds of networks, for one image.

    "paper" is the count behind the tables of the SAN paper, which adds to the multiply-adds what biases, relations,
    BatchNorm, ReLU and pooling cost. A network named here has 1000 classes, one from a checkpoint its own.

    Args:
        networks: Names, or checkpoints (run folder, .safetensors, published .pth); default the paper's nine networks.
        input_size: Side of the square image; default the network's own, 224 for those of the paper.
        json: Print a JSON list of {"model", "params", "paper_cost", "macs"}.
    """
    from san.checkpoints import load_model
    from san.evaluation.cost import COMPARED, complexity

    models = (load_model(name) if Path(name).exists() else name for name in networks or COMPARED)
    rows = [complexity(model, input_size) for model in models]
    if json:
        print(jsonlib.dumps(rows))
        return
    table = [
        {
            "model": row["model"],
            "params (M)": _millions(row["params"]),
            "paper (G)": _billions(row["paper_cost"]),
            "multiply-adds (G)": _billions(row["macs"]),
        }
        for row in rows
    ]
    print(as_table(table))
    pixels = f"{input_size}×{input_size} pixels" if input_size else "the network's own size (the paper's: 224×224)"
    print(
        f"one image of {pixels}, 1000 classes (checkpoints: their own); millions of parameters, "
        "billions of operations as the paper counts them, of which multiply-adds"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count >= 1e7 else f"{count / 1e6:.3f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}" if count >= 5e7 else f"{count / 1e9:.4f}"

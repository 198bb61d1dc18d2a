"""Results of a benchmark for people: rows with short columns, and the page that `--out` keeps."""

from __future__ import annotations

from typing import Any

from san.evaluation.speed.networks import LAYERS
from san.ops.dispatch import ORDER

__all__ = ["MEANINGS", "as_markdown", "heading", "tables"]

MEANINGS = {
    "networks": (
        "ms/image: median; ratio: median and quartiles of the step's time to the baseline's in the same round; kept: "
        "MB per image that PyTorch's allocator holds between forward and backward, and its ratio; peak: MB by which "
        "one step raises the process' memory; backend auto: for every attention layer the first of "
        f"{', '.join(ORDER)} that accepts it, unless the next is known to be faster"
    ),
    "operators": (
        "ms: median of forward, and of forward and backward; of peak: share of a large float32 matrix product's rate; "
        "roof: what bounds the forward pass, operations at that rate or least bytes at a large copy's; of roof: how "
        "near it is to that bound"
    ),
    "sweep": (
        "ns/pixel is constant where time is linear in pixels, ns/pair (pixel and place of its footprint) where it is "
        "linear in k² too; B/pixel: kept between forward and backward, constant where k does not matter"
    ),
}


def heading(result: dict[str, Any]) -> str:
    """Machine, threads, versions and date in one line."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    used = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores{memory}"
    level = machine["instruction_set"]
    kernels = "" if level is None else f", C++ kernels for {f'x86-64-{level}' if level.startswith('v') else level}"
    software = ", ".join(f"{name} {versions[name]}" for name in ("san", "torch", "timm", "python"))
    return f"{used}{kernels}, {settings['threads']} threads; {software}; {result['date'][:10]}"


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows to show of every table that was measured, by its name; columns that are the same in all rows stay."""
    shown = {"networks": _network, "operators": _operator, "sweep": _sweep}
    return {name: [row(found) for found in result[name]] for name, row in shown.items() if result[name]}


def as_markdown(result: dict[str, Any], picture: str | None = None) -> str:
    """The page: heading, every table with its meaning, notes; `picture` is a file beside it."""
    sections = ["# Benchmark", heading(result) + "."]
    if picture is not None:
        sections.append(f"![ratios to {result['settings']['baseline']}]({picture})")
    for name, rows in tables(result).items():
        lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
        sections += [f"## {name.capitalize()}", "\n".join(lines), MEANINGS[name][0].upper() + MEANINGS[name][1:] + "."]
    if result["notes"]:
        sections += ["## Left out", "\n".join(f"- {note}" for note in result["notes"])]
    return "\n\n".join(sections) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _network(row: dict[str, Any]) -> dict[str, Any]:
    memory, peak, ratio = row.get("memory") or {}, row.get("peak_bytes"), row["ratio"]
    folded = ", folded" if row["batch_norm_folded"] else ""
    return {
        "network": row["network"] + (f" ({LAYERS})" if row["part"] == LAYERS else ""),
        "backend": row["backend"],
        "mode": row["mode"],
        "batch": row["batch"],
        "px": row["resolution"],
        "dtype": row["dtype"],
        "ms/image": _number(row["ms_per_image"]["median"]),
        "ratio": f"{ratio['median']:.2f}",
        "quartiles": f"{ratio['q1']:.2f}–{ratio['q3']:.2f}",
        "kept": _number(memory["kept"] / 1e6 / row["batch"]) if memory else None,
        "kept ratio": f"{row['kept_ratio']:.2f}" if memory else None,
        "peak": _number(peak / 1e6) if peak is not None else None,
        "fastest variant": row["variant"] + folded,
    }


def _operator(row: dict[str, Any]) -> dict[str, Any]:
    more = f" and {len(row['layers']) - 1} more" if len(row["layers"]) > 1 else ""
    return {
        "layer": f"{row['network']} {row['layers'][0]}{more}",
        "map": f"{row['height']}×{row['width']}",
        "k": row["kernel_size"],
        "backend": row["backend"],
        "batch": row["batch"],
        "dtype": row["dtype"],
        "forward ms": _number(row["forward_ms"]["median"]),
        "training ms": _number(row["training_ms"]["median"]),
        "GFLOP": f"{row['gflop']:.3f}",
        "GFLOP/s": _number(row["gflops"]),
        "of peak": f"{row['share_of_peak']:.1%}",
        "in training": f"{row['training_share_of_peak']:.1%}",
        "least MB": _number(row["least_bytes"] / 1e6),
        "roof": row["roof"],
        "of roof": f"{row['share_of_roof']:.1%}",
    }


def _sweep(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "form": row["form"],
        "backend": row["backend"],
        "map": f"{row['side']}×{row['side']}",
        "k": row["kernel_size"],
        "dtype": row["dtype"],
        "forward ms": _number(row["forward_ms"]),
        "ns/pixel": _number(row["forward_ns_per_pixel"]),
        "ns/pair": _number(row["forward_ns_per_pixel_and_place"]),
        "training ms": _number(row["training_ms"]),
        "training ns/pixel": _number(row["training_ns_per_pixel"]),
        "training ns/pair": _number(row["training_ns_per_pixel_and_place"]),
        "kept B/pixel": _number(row["kept_bytes_per_pixel"]),
    }


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

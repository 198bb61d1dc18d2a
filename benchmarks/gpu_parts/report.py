"""What was measured, as Markdown: against the targets first, then all rows; and the ratios behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.floors import as_markdown

__all__ = ["TARGETS", "as_page", "attention_ratio", "network_ratio", "targets"]

Rows = list[dict[str, Any]]
FORMS = ("pairwise", "patchwise")

# (what, form): must and goal, and whether more is better. On an H200, bfloat16, 224×224, the largest batch.
TARGETS: dict[tuple[str, str], tuple[float, float, bool]] = {
    ("inference throughput against ResNet26", "pairwise"): (0.7, 1.0, True),
    ("inference throughput against ResNet26", "patchwise"): (0.9, 1.0, True),
    ("training step throughput against ResNet26", "pairwise"): (0.5, 1.0, True),
    ("training step throughput against ResNet26", "patchwise"): (0.7, 1.0, True),
    ("peak memory of a training step against ResNet26", "pairwise"): (1.25, 1.0, False),
    ("peak memory of a training step against ResNet26", "patchwise"): (1.25, 1.0, False),
    ("attention against its faster plain form, forward", "pairwise"): (10.0, 20.0, True),
    ("attention against its faster plain form, forward", "patchwise"): (10.0, 20.0, True),
    ("attention against its faster plain form, forward and backward", "pairwise"): (5.0, 10.0, True),
    ("attention against its faster plain form, forward and backward", "patchwise"): (5.0, 10.0, True),
}


def targets(result: dict[str, Any]) -> Rows:
    """A row for each target: what was measured at the largest batch at which everyone ran, and what it says."""
    rows, full = [], result["settings"]["scale"] == "full"
    for (what, form), (must, goal, more) in TARGETS.items():
        value, where = _measured(result, what, form)
        sign = "≥" if more else "≤"
        rows.append(
            {
                "SAN10": form,
                "target": what,
                "must": f"{sign} {must:g}",
                "goal": f"{sign} {goal:g}",
                "measured": value,
                "verdict": _verdict(value, must, goal, more) if full else "no measurement",
                "where": where,
            }
        )
    return rows


def _verdict(value: float | None, must: float, goal: float, more: bool) -> str:
    if value is None:
        return "not measured"
    side = 1 if more else -1
    return "goal met" if side * value >= side * goal else "must met" if side * value >= side * must else "not met"


def _measured(result: dict[str, Any], what: str, form: str) -> tuple[float | None, str]:
    if what.startswith("attention"):
        return attention_ratio(result, form, "training" if what.endswith("backward") else "inference")
    mode = "inference" if what.startswith("inference") else "training"
    return network_ratio(result, form, mode, "peak_bytes" if what.startswith("peak") else "images_per_second")


def network_ratio(result: dict[str, Any], form: str, mode: str, column: str) -> tuple[float | None, str]:
    """The network's number to the baseline's, each in its faster form, at the largest batch that both have."""
    rows = [row for row in result["networks"] if row["mode"] == mode]
    for batch in _falling(rows):
        best = [
            max((row for row in rows if (row["network"], row["batch"]) == (name, batch)), key=_speed, default=None)
            for name in (result["settings"]["sans"][form], result["settings"]["baseline"])
        ]
        if all(best) and all(row[column] is not None for row in best):
            mine, other = best
            return mine[column] / other[column], f"batch {batch}, {mine['form']} against {other['form']}"
    return None, ""


def _speed(row: dict[str, Any]) -> float:
    return row["images_per_second"]


def _falling(rows: Rows) -> list[int]:
    return sorted({row["batch"] for row in rows}, reverse=True)


def attention_ratio(result: dict[str, Any], form: str, what: str) -> tuple[float | None, str]:
    """Time of all attention layers of a network in the faster plain form to the kernels', at the largest batch at which
    every layer has both; with the least of a single layer."""
    rows = [row for row in result["operators"] if row["pass"] == what and form in row["layer"]]
    counts = {name: count for name, count in result["settings"]["layers"].items() if form in name}
    for batch in _falling(rows):
        pairs = {name: _plain_and_fused([r for r in rows if r["batch"] == batch], name) for name in counts}
        if pairs and all(pairs.values()):
            plain, fused = (sum(counts[name] * pair[i] for name, pair in pairs.items()) for i in range(2))
            worst = min(pairs, key=lambda name: pairs[name][0] / pairs[name][1])
            least = pairs[worst][0] / pairs[worst][1]
            compiled = sum(row["form"] == "compiled" and row["batch"] == batch for row in rows)
            where = f"batch {batch}; least {least:.3g} in {worst}; {compiled} of {len(pairs)} plain forms compiled too"
            return plain / fused, where
    return None, ""


def _plain_and_fused(rows: Rows, layer: str) -> tuple[float, float] | None:
    times = {row["form"]: row["seconds"] for row in rows if row["layer"] == layer}
    plain = [times[form] for form in ("eager", "compiled") if form in times]
    return (min(plain), times["triton"]) if plain and "triton" in times else None


def as_page(result: dict[str, Any]) -> str:
    """Everything, the targets last."""
    sections = [f"# GPU benchmark ({result['settings']['scale']})", _heading(result)]
    shown: list[tuple[str, Rows, Callable[[dict[str, Any]], dict[str, Any]]]] = [
        ("Correctness: what is wrong", [row for row in result["checks"] if not row["right"]], _wrong),
        ("Compilations over sizes", result["compilations"], _compilation),
        ("Other promises", result["features"], lambda row: row),
        ("Attention layers", result["operators"], _operator),
        ("Networks", result["networks"], _network),
    ]
    sections.append(_summary(result["checks"]))
    sections += [f"## {title}\n\n{as_markdown(list(map(row, rows)))}" for title, rows, row in shown if rows]
    for title, key in (("Failed", "failures"), ("Skipped for lack of time", "skipped")):
        sections += [f"## {title}\n\n" + _listed(result[key])] if result[key] else []
    sections.append("## Against the targets\n\n" + as_markdown(targets(result)))
    if result["settings"]["scale"] != "full":
        sections.append("Not a measurement: a smoke run on small sizes.")
    return "\n\n".join(sections)


def _heading(result: dict[str, Any]) -> str:
    gpu, rates = result["gpu"], result["rates"]
    name = f"{gpu['name']}, driver {gpu['driver']}" if gpu else result["machine"]["processor"]
    versions = ", ".join(f"{each} {result['versions'][each]}" for each in ("torch", "triton", "cuda", "python", "san"))
    lines = [f"{name}; {versions}; {result['date']}; {result['settings']['dtype']}; {result['seconds']:.0f} s in all."]
    if rates:
        products = ", ".join(
            f"{each} {rates[f'{each}_flops'] / 1e12:.3g} TFLOP/s" for each in ("bfloat16", "tf32", "float32")
        )
        lines.append(f"Measured: copy {rates['copy_bytes_per_second'] / 1e12:.3g} TB/s, square products {products}.")
    return " ".join(lines)


def _summary(checks: Rows) -> str:
    right = sum(row["right"] for row in checks)
    return f"{right} of {len(checks)} comparisons of operators with float64 are right."


def _wrong(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("case", "dtype", "worst", "error_of_tolerance", "beyond", "numbers", "error")
    return {key: row.get(key) for key in keys}


def _compilation(row: dict[str, Any]) -> dict[str, Any]:
    shown = {key: row[key] for key in ("layer", "sizes", "first", "later", "right")}
    return shown | {"first call, s": row["first_seconds"]}


def _operator(row: dict[str, Any]) -> dict[str, Any]:
    shown = {key: row[key] for key in ("layer", "pass", "batch", "form")}
    shown |= {"µs": 1e6 * row["seconds"], "peak MB": _scaled(row["peak_bytes"], 1e-6)}
    shown |= {"floor µs": _scaled(row.get("floor_seconds"), 1e6), "× floor": row.get("of_floor")}
    shown |= {"× floor with recomputation": row.get("of_recomputing_floor")}
    shown |= {"TB/s": _scaled(row.get("bytes_per_second"), 1e-12), "of copy": row.get("share_of_copy")}
    return shown | {
        "TFLOP/s": _scaled(row.get("flops"), 1e-12),
        "of product": row.get("share_of_product"),
        "graph": row["graph"],
    }


def _network(row: dict[str, Any]) -> dict[str, Any]:
    shown = {key: row[key] for key in ("network", "mode", "batch", "form")}
    shown |= {"ms": 1e3 * row["seconds"], "images/s": row["images_per_second"]}
    return shown | {"peak GB": _scaled(row["peak_bytes"], 1e-9), "graph": row["graph"]}


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _listed(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {each}" for each in sentences)

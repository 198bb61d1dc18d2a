"""Results of `san robustness` for people: rows with short columns, the checks as lines, and the page of `--out`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["MEANINGS", "as_markdown", "check_lines", "heading", "meaning", "tables"]

MEANINGS = {
    "rotation": "top-1 in percent on images turned clockwise, and flipped so that top and bottom change places",
    "angles": "top-1 in percent on images turned clockwise by any angle (degrees), corners filled with the mean colour",
    "attacks": (
        "PGD on the {loss} within L∞ ≤ {epsilon:.3g} of pixels in [0, 1], steps of {step:.3g}, from {start}; success: "
        "percent of the images that reached the target, or were right at first and no longer are; top-1 of all images, "
        "attacked"
    ),
}


def heading(result: dict[str, Any]) -> str:
    """Images, machine, versions and date in one line."""
    machine, versions = result["machine"], result["versions"]
    broken = f", {len(result['broken'])} of them not readable" if result["broken"] else ""
    used = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    software = ", ".join(f"{name} {versions[name]}" for name in ("san", "torch", "python"))
    return f"{result['data']}{broken}; {used}; {software}; {result['date'][:10]}"


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows to show of every table that was measured, by its name."""
    found = {"rotation": _rotation(result), "angles": _angles(result), "attacks": _attacks(result)}
    return {name: rows for name, rows in found.items() if rows}


def meaning(table: str, settings: dict[str, Any]) -> str:
    """What the columns of a table are."""
    restarts = f", {settings['restarts']} times" if settings["restarts"] > 1 else ""
    start = f"a random start{restarts}" if settings["random_start"] else "the image itself"
    loss = {"cross_entropy": "cross-entropy", "margin": "margin between logits"}[settings["loss"]]
    return MEANINGS[table].format(loss=loss, epsilon=settings["epsilon"], step=settings["step"], start=start)


def check_lines(result: dict[str, Any]) -> list[str]:
    """A sentence for every check that gradients are not masked, with its verdict in front."""
    verdicts = {True: "holds", False: "FAILS", None: "open"}
    lines = [f"{verdicts[row['holds']]}: {row['check']}, {row['model']}: {row['sentence']}" for row in result["checks"]]
    if any(row["holds"] is False for row in result["checks"]):
        lines.append("Where a check FAILS gradients may be masked, and the network weaker than the attacks above tell.")
    return lines


def as_markdown(result: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The page: heading, every table with its meaning, checks, and `pictures`, which are files beside it."""
    sections = ["# Robustness", heading(result) + "."]
    for name, rows in tables(result).items():
        lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
        text = meaning(name, result["settings"])
        sections += [f"## {name.capitalize()}", "\n".join(lines), text[0].upper() + text[1:] + "."]
    if result["checks"]:
        sections += ["## Whether gradients are masked", "\n".join(f"- {line}" for line in check_lines(result))]
    sections += [f"![{picture.rpartition('.')[0]}]({picture})" for picture in pictures]
    return "\n\n".join(sections) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "–" if value is None else str(value)


def _rotation(result: dict[str, Any]) -> list[dict[str, Any]]:
    turned = [row for row in result["models"] if row["rotation"]]
    return [{"model": row["model"], **_column(row["rotation"]["views"], "view")} for row in turned]


def _column(rows: list[dict[str, Any]], name: str) -> dict[Any, float]:
    return {row[name]: row["top1"] for row in rows}


def _angles(result: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {row["model"]: row["rotation"]["angles"] for row in result["models"] if row["rotation"]}
    angles = [row["angle"] for row in next(iter(columns.values()), [])]
    tops = {model: [row["top1"] for row in rows] for model, rows in columns.items()}
    return [
        {"angle": f"{angle:g}", **{model: top1[place] for model, top1 in tops.items()}}
        for place, angle in enumerate(angles)
    ]


def _attacks(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "attack": aim,
            "iterations": number,
            "model": row["model"],
            "success": row["attacks"][aim]["rows"][number]["success"],
            "top-1": row["attacks"][aim]["rows"][number]["top1"],
            "top-1 without": row["attacks"][aim]["top1"],
        }
        for aim in result["settings"]["aims"]
        for number in result["settings"]["iterations"]
        for row in result["models"]
    ]

"""What was measured of invariance, for people: one row for what is done, one column for each network or operator."""

from __future__ import annotations

from typing import Any

from san.evaluation.invariance.operators import PROPERTIES
from san.evaluation.invariance.views import VIEWS

__all__ = ["as_markdown", "heading", "network_rows", "operator_rows", "rounding"]


def heading(result: dict[str, Any]) -> str:
    """Images, machine, versions and date in one line."""
    machine, versions = result["machine"], result["versions"]
    used = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    software = ", ".join(f"{name} {versions[name]}" for name in ("san", "torch", "python"))
    return f"{result['data']}; {used}; {software}; {result['date'][:10]}"


def rounding(change: float) -> str:
    """A change that is nothing but rounding, to one digit."""
    return f"{change:.0e}" if change else "0"


def operator_rows(result: dict[str, Any]) -> dict[str, dict[str, tuple[float, bool] | None]]:
    """For each property, for each column: the largest change over the column's operators, and whether it is exact.

    A column is a network, or "NAME, position taken away". None where nothing was to be compared.
    """
    columns = {}
    for row in result["networks"]:
        columns[row["network"]] = row["operators"]
        columns[f"{row['network']}, position taken away"] = row["unplaced"]
    return {
        name: {column: _largest(operators, name) for column, operators in columns.items() if operators}
        for name in PROPERTIES
    }


def network_rows(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any] | None]]:
    """For each view, for each network: its row, or None where the network has none."""
    found = {row["network"]: {view["view"]: view for view in row["views"]} for row in result["networks"]}
    names = dict.fromkeys(name for views in found.values() for name in views)
    return {name: {network: views.get(name) for network, views in found.items()} for name in names}


def as_markdown(result: dict[str, Any]) -> dict[str, str]:
    """The tables `operators` (largest change) and `networks` (images classified as before in %, mean cosine)."""
    operators, networks = operator_rows(result), network_rows(result)
    right = {network: row["top1"] for network, row in networks["unchanged"].items() if row is not None}
    return {
        "operators": _table(
            ["what is done", *next(iter(operators.values()))],
            [[name, *map(_change, row.values())] for name, row in operators.items()],
        ),
        "networks": _table(
            ["what is done", *(f"{network} ({top1:.1f} % right)" for network, top1 in right.items()), "caveat"],
            [
                [name, *map(_kept, row.values()), VIEWS[name].caveat if name in VIEWS else ""]
                for name, row in networks.items()
            ],
        ),
    }


def _largest(operators: list[dict[str, Any]], name: str) -> tuple[float, bool] | None:
    found = [row["properties"][name] for row in operators]
    changes = [each["change"] for each in found if each["change"] is not None]
    return (max(changes), all(each["exact"] for each in found)) if changes else None


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _change(found: tuple[float, bool] | None) -> str:
    if found is None:
        return "–"
    change, exact = found
    return f"**exact** ({rounding(change)})" if exact else f"{change:.2f}"


def _kept(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['kept']:.1f} · {row['cosine']:.2f}"

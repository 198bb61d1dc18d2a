"""How commands show things: tables on standard output, progress on standard error, as a bar or now and then a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["as_table", "progress"]

SECONDS = 30.0
"""Between two lines about progress where there is no terminal."""


def progress(batches: Any, what: str = "judging") -> Iterable[Any]:
    """The batches, with a bar on a terminal that tells how many have been taken, elsewhere a line every `SECONDS`."""
    from rich.console import Console
    from rich.progress import track

    terminal = Console(stderr=True)
    return track(batches, what, console=terminal, transient=True) if terminal.is_terminal else _told(batches, what)


def _told(batches: Any, what: str) -> Iterator[Any]:
    last = time.monotonic()
    for number, batch in enumerate(batches):
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            print(f"{what}: {number} of {len(batches)}", file=sys.stderr, flush=True)
        yield batch


def as_table(rows: list[dict[str, Any]]) -> str:
    """Columns under their names, words to the left, numbers to the right."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    columns = [_aligned(column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    is_number = all(cell[:1].isdigit() for cell in column[1:] if cell)
    return [cell.rjust(width) if is_number else cell.ljust(width) for cell in column]


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)

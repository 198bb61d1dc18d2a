"""Which backend runs an operator: the first in order that accepts the call, or the one that the user forces.

A backend is a pair of functions for one operator: `supports(call)` returns None or one sentence of refusal, `run(call)`
computes. It may add `pays(call)`: the automatic choice passes it over where a later one is known to be faster. A call
is the operator's validated arguments, one dataclass per operator. Adding a backend is one `register`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from san.errors import UserError

__all__ = ["ORDER", "answers", "backends", "forced_backend", "register", "run", "use_backend"]

ORDER = ("triton", "native", "tiled", "reference")


@dataclass(frozen=True)
class _Implementation:
    supports: Callable[[Any], str | None]
    run: Callable[[Any], Tensor]
    pays: Callable[[Any], bool]


_implementations: dict[str, dict[str, _Implementation]] = {}
_forced: ContextVar[str | None] = ContextVar("backend", default=None)


def register(
    operator: str,
    backend: str,
    *,
    supports: Callable[[Any], str | None],
    run: Callable[[Any], Tensor],
    pays: Callable[[Any], bool] = lambda call: True,
) -> None:
    """Offer `backend` (a name of `ORDER`) for `operator`."""
    _implementations.setdefault(operator, {})[backend] = _Implementation(supports, run, pays)


def backends() -> tuple[str, ...]:
    """Names of the backends known here, in the order in which they are asked; `support` tells whether they run."""
    present = {name for offered in _implementations.values() for name in offered}
    return tuple(name for name in ORDER if name in present)


@contextmanager
def use_backend(name: str) -> Generator[None]:
    """Force one backend inside a `with` block, for every operator: `with san.ops.use_backend("tiled"): …`.

    "auto" restores the automatic choice. It outranks the environment variable `SAN_BACKEND`, and holds for this thread.
    A call that the forced backend cannot run raises `ValueError` with the backend's sentence.
    """
    _check_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str:
    """The backend that `use_backend` or `SAN_BACKEND` forces here, or "auto"."""
    return _forced.get() or os.environ.get("SAN_BACKEND") or "auto"


def answers(operator: str, call: Any) -> dict[str, str | None]:
    """Every backend's answer to a call, in order: None where it accepts, else its sentence."""
    return {name: _answer(operator, name, call) for name in backends()}


def _answer(operator: str, name: str, call: Any) -> str | None:
    found = _implementations[operator].get(name)
    return found.supports(call) if found else f"{name} does not implement {operator}"


def run(operator: str, call: Any) -> Tensor:
    """Run a call on the forced backend, or on the first that accepts it and pays."""
    forced = forced_backend()
    _check_name(forced)
    if forced != "auto":
        refusal = _answer(operator, forced, call)
        if refusal is not None:
            raise UserError(f"backend {forced} cannot run this call: {refusal}")
        return _implementations[operator][forced].run(call)
    offered = [_implementations[operator][name] for name in backends() if name in _implementations[operator]]
    return next(found for found in offered if found.supports(call) is None and found.pays(call)).run(call)


def _check_name(name: str) -> None:
    if name != "auto" and name not in backends():
        raise UserError(f"backend {name!r} is unknown here; choose one of: auto, {', '.join(backends())}")

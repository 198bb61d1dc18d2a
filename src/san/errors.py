"""The one exception for mistakes of a user: the command line shows its sentence and exits with code 2."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake that the caller can mend; the message is one sentence: what was wrong, what would be right.

    It is a `ValueError`, so code that uses the library may catch either. Any other exception is a defect of the
    library and keeps its traceback.
    """

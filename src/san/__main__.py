"""`python -m san` is `san`."""

from __future__ import annotations

import sys

from san.cli import main

if __name__ == "__main__":
    sys.exit(main())

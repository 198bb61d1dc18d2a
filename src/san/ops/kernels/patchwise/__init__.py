"""Backends of the patchwise operator; `reference.py` defines it."""

"""Backends of the pairwise operator; `reference.py` defines it."""

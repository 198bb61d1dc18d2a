"""Backends of the aggregation operator; `reference.py` defines it."""

"""Measurements of this repository: each file is a command, see its first lines."""

"""The steps of `benchmarks/gpu.py`, one module each."""

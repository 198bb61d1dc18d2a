"""Kernels for what surrounds attention; only the native backend has them, others run PyTorch's operators."""

"""What the Triton backends of all operators share: index arithmetic, products, launching, borders, BatchNorm."""

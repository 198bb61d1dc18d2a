"""A training run of a second, for the tests of training: its images, its settings, and what two runs must share."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

NETWORK = {"widths": [32, 32, 32], "blocks": [1, 1, 1], "kernels": [3, 3, 3]}
# Everything random at once: augmentation, mixup and drop path, with a moving average and two micro-batches a step.
VARIED = {"mixup": 0.2, "cutmix": 1.0, "drop_path": 0.1, "ema_decay": 0.9, "accumulate": 2, "rand_augment": "rand-m5"}


def make_images(folder: Path, names: Sequence[str] = ("red", "green", "blue")) -> Path:
    """A folder of noisy 16×16 images, 20 to train on and 8 to test of each class; classes differ in their colour."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 8)):
        for channel, name in enumerate(names):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 60
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def settings(images: Path, **more: Any) -> dict[str, Any]:
    """Arguments of `train` for two epochs of four steps on `make_images`."""
    tiny = {"data": str(images), "options": NETWORK, "epochs": 2, "batch_size": 12, "validation_share": 0.2}
    return {**tiny, "accelerator": "cpu", **more}


def rows(run: Path) -> list[dict[str, str]]:
    """`metrics.csv` without its clock."""
    with (run / "metrics.csv").open() as lines:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(lines)]


def assert_same_result(one: Path, other: Path) -> None:
    """Both runs ended with the same weights, bit for bit, and the same metrics."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(one) == rows(other)


def command(*words: str) -> list[str]:
    """The command line `san train …` of this environment."""
    return [sys.executable, "-m", "san", "train", *words]


def start(words: list[str], **more: Any) -> subprocess.Popen[str]:
    """Start a command that owns one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def recipe(path: Path, values: dict[str, Any]) -> Path:
    """Settings as a file for `--config`."""
    path.write_text(yaml.safe_dump(values))
    return path

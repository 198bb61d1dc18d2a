"""Exported networks beside PyTorch on photographs: error of the scores, equal top-1, and the margin that it has.

    python benchmarks/export_check.py PHOTOS [--networks san10_pairwise ...] [--formats onnx ...] [--keep FOLDER]
        [--json results.json]

PHOTOS is a folder or an archive. A network is an architecture's name or a .safetensors file. Named ones have random
weights and 10 classes. The last convolution of each of their blocks is scaled by 0.1, and their BatchNorm statistics
are those of the photographs, all in one batch: so scores vary from image to image as a trained network's do. Without
the scaling, the scores of the deepest, random as they are, hardly differ, and margins say little. A line passes where
every photograph has the same top-1, no score differs by more than 0.0001, and the smallest margin between a
photograph's two likeliest classes is at least 100 times the largest difference, so that equal top-1 is no luck. With
--keep, networks, exported files and results.json stay in a folder, and what is there already is not made again, however
the earlier run ended; --json says where the results lie instead. Exit code 1 if a line fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from san import create_model
from san.checkpoints import load_model, save_model
from san.cli.arguments import images_below
from san.cli.printing import as_table
from san.data import ImageFiles, ImageSet, transform
from san.data.archives import extracted
from san.evaluation.speed.machine import describe_machine, describe_versions
from san.export import FORMATS, export_model
from san.export.agreement import compare
from san.export.exporting import describe
from san.export.formats import OPSET
from san.layers import SelfAttentionBlock

NETWORKS = [f"san{size}_{form}" for size in (10, 15, 19) for form in ("pairwise", "patchwise")]
CLASSES, SCALE, ERROR, MARGIN = 10, 0.1, 1e-4, 100


def calibrated(name: str, images: ImageSet) -> nn.Module:
    """A network with random weights, small in the residual branches, whose BatchNorm averages are the images'."""
    torch.manual_seed(0)
    model = create_model(name, CLASSES).train()
    for part in model.modules():
        if isinstance(part, SelfAttentionBlock):
            for parameter in part.conv.parameters():
                parameter.data *= SCALE
        if isinstance(part, nn.BatchNorm2d):
            # The averages become the batch's own: patchwise attention squares, block by block, what differs from them.
            part.momentum = 1.0
    prepare = transform(resolve_model_data_config(model), training=False)
    with torch.no_grad():
        model(torch.stack([prepare(images.load(index)) for index in range(len(images))]))
    return model.eval()


def network(name: str, images: ImageSet, folder: Path) -> nn.Module:
    """`calibrated`, once, or what a file holds."""
    if name.endswith(".safetensors"):
        return load_model(name)
    path = folder / f"{name}.safetensors"
    if not path.exists():
        save_model(calibrated(name, images), path)
    return load_model(path)


def check(model: nn.Module, name: str, format: str, images: ImageSet, folder: Path) -> dict[str, Any]:
    """One line of the table."""
    name = Path(name).stem
    path = folder / f"{name}{FORMATS[format].mark}{FORMATS[format].suffix}"
    if not path.exists():
        export_model(model, path, format, images=images, limit=2)
    found = compare(model, FORMATS[format].load(path), describe(model), images)
    margin = found.smallest_margin / max(found.max_error, 1e-30)
    return {
        "network": name,
        "format": format,
        "images": found.images,
        "same_top1": found.same_top1,
        "max_error": found.max_error,
        "largest_score": found.largest_score,
        "smallest_margin": found.smallest_margin,
        "margin_by_error": margin,
        "megabytes": path.stat().st_size / 1e6,
        "passes": found.same_top1 == found.images and found.max_error <= ERROR and margin >= MARGIN,
    }


def check_all(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The lines, also those of earlier runs."""
    photos = options.photos if options.photos.is_dir() else extracted(options.photos)
    images, results = ImageFiles(images_below(photos)), options.json or folder / "results.json"
    lines = json.loads(results.read_text())["lines"] if results.exists() else []
    done = {(line["network"], line["format"]) for line in lines}
    for name in options.networks:
        for format in options.formats:
            if (Path(name).stem, format) not in done:
                lines.append(check(network(name, images, folder), name, format, images, folder))
                results.write_text(json.dumps({**circumstances(), "lines": lines}, indent=1) + "\n")
    return lines


def circumstances() -> dict[str, Any]:
    """When, where and with what."""
    versions: dict[str, Any] = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    today = datetime.date.today().isoformat()
    versions |= describe_versions()
    return {"date": today, "machine": describe_machine(), "versions": versions, "opset": OPSET}


def _brief(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def main() -> int:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=["onnx", "aot-inductor"])
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lines = check_all(options, folder)
    print(as_table([{key: _brief(value) for key, value in line.items()} for line in lines]))
    return 0 if all(line["passes"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())

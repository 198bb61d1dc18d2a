"""`san export`: a network for use elsewhere, compared with PyTorch."""

from __future__ import annotations

import json as jsonlib
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from san.cli.arguments import images_below, trained_on
from san.errors import UserError

if TYPE_CHECKING:
    from san.data import ImageSet
    from san.export import Exported

__all__ = ["export"]


def export(
    checkpoint: str,
    *,
    format: Literal["onnx", "torch-export", "aot-inductor", "safetensors"] = "onnx",
    out: str | None = None,
    input_size: int | None = None,
    check: str | None = None,
    limit: int = 64,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Write a network for use elsewhere, and compare it with PyTorch.

    The file takes any number of prepared images of one size and gives scores before softmax; how to prepare images and
    what the classes are called stands in its metadata. It is compared with PyTorch on images before it gets its place:
    where a score differs by more than 0.0001 of the largest, or an image gets another likeliest class, there is no
    file, and the exit code is 2. `san predict model.onnx` uses an ONNX file where torch is not installed.

    The formats are explained in docs/export.md.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth.
        format: onnx; torch-export for PyTorch; aot-inductor, compiled for processors like this one; safetensors.
        out: The file to write; default beside the checkpoint, such as model.onnx, model.pt2 or model.aot.pt2.
        input_size: Side of the square images that the file is for; default the network's own.
        check: Images to compare on: a file, a folder, an archive, a data set's name, or random; default the test
            images of the data that a run was trained on, else random ones.
        limit: How many images to compare on.
        overwrite: Replace a file that exists.
        json: Print JSON.
    """
    from san.checkpoints import load_model
    from san.export import FORMATS, export_model

    model = load_model(checkpoint)
    images, source = _images(checkpoint, check)
    kind = FORMATS[format]
    target = out or _beside(checkpoint, kind.mark + kind.suffix)
    exported = export_model(
        model, target, format, input_size=input_size, images=images, limit=limit, overwrite=overwrite
    )
    _show(exported, source, json)


def _beside(checkpoint: str, ending: str) -> Path:
    path = Path(checkpoint)
    return path / f"model{ending}" if path.is_dir() else path.with_suffix(ending)


def _images(checkpoint: str, check: str | None) -> tuple[ImageSet | None, str]:
    """The images to compare on, None for random ones, and what to call them."""
    from san.data import ImageFiles, load_dataset
    from san.data.archives import extracted

    if check == "random" or (check is None and not _says_data(checkpoint)):
        return None, "random"
    if check is None or not Path(check).exists():
        dataset = load_dataset(**trained_on(checkpoint, check))
        sets = {"test": dataset.test, "validation": dataset.validation, "training": dataset.train}
        split, images = next((split, images) for split, images in sets.items() if images is not None)
        return images, f"{dataset.name} ({split})"
    path = Path(check)
    if path.is_file() and tarfile.is_tarfile(path):
        path = extracted(path)
    files = images_below(path) if path.is_dir() else [str(path)]
    if not files:
        raise UserError(f"{check} holds no images to compare on; name others, or --check random")
    return ImageFiles(files), check


def _says_data(checkpoint: str) -> bool:
    config = Path(checkpoint) / "config.yaml"
    return config.is_file() and "data" in yaml.safe_load(config.read_text(encoding="utf-8"))


def _show(exported: Exported, source: str, json: bool) -> None:
    if json:
        content = exported.as_dict()
        content["check"] = {"source": source, **content["check"]}
        print(jsonlib.dumps(content, ensure_ascii=False))
        return
    found, agreement = exported.description, exported.agreement
    kind = exported.format if exported.opset is None else f"{exported.format}, opset {exported.opset}"
    _, height, width = found.input_size
    print(f"wrote {exported.path} ({found.architecture}, {kind}, {exported.bytes / 1e6:.3g} MB)")
    print(f"takes images [batch, 3, {height}, {width}], gives scores [batch, {len(found.label_names)}]")
    what = "random images (name real ones with --check)" if source == "random" else f"images of {source}"
    print(
        f"compared with PyTorch on {agreement.images} {what}: largest error {agreement.max_error:.1e} in scores up to "
        f"{agreement.largest_score:.3g}, the same top-1 on {agreement.same_top1} of {agreement.images}"
    )

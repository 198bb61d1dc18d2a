"""`san explain`: what pixels of images attend to, as figures, arrays and a table."""

from __future__ import annotations

import difflib
import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from san.cli.arguments import chosen_device, listed
from san.cli.printing import as_table, progress
from san.errors import UserError

__all__ = ["explain"]


def explain(
    checkpoint: str,
    *images: str,
    pixel: str | None = None,
    layer: str | None = None,
    group: int | None = None,
    target: str | None = None,
    whole_maps: bool = False,
    out: str = "explained",
    device: str | None = None,
    json: bool = False,
) -> None:
    """Show what a network attends to in images.

    For each image, a folder with figures and arrays: the footprint of a pixel over the image, at its true place and
    scale; the weights of many groups of one layer side by side; how far each layer looks; attention roll-out of the
    pixel from the last map to the image; and Grad-CAM. Networks without attention layers get Grad-CAM alone. Prints
    how far the layers look, in means over the image: attended distance in pixels, and what equal weights would give;
    entropy in bits, and the most that it can be; negative weights in percent of all. With --json an object a line.

    The arrays are explained in docs/attention.md. A file that is no image is reported on standard error and skipped,
    and the exit code is 2 then.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth.
        images: Image files.
        pixel: x,y in the image as it is shown to the network, resized and cropped; default its middle.
        layer: Layers in which to look at the pixel, or blocks or stages around them, separated by commas; default all.
        group: Weight group to draw; default the mean over groups, and many groups side by side.
        target: Class that Grad-CAM looks for, by number or name; default the likeliest.
        whole_maps: Also write the weights of all pixels of the chosen layers.
        out: Folder for a folder of each image, whose files replace those of an earlier run.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        json: Print JSON lines.
    """
    # First of all: a missing package or a wrong argument should not cost what is computed before it is noticed.
    from san.attention_maps import explain, figures
    from san.checkpoints import load_model

    place, paths = _pixel(pixel), _paths(images)
    folders = _folders(out, paths)
    model = load_model(checkpoint).to(chosen_device(device))
    options: dict[str, Any] = {"pixel": place, "layers": None if layer is None else listed(layer)}
    options |= {"target": _class(model, target), "progress": partial(progress, what="measuring layers")}
    _check_group(model, options["layers"], group)
    broken = 0
    for path, folder in zip(paths, folders, strict=True):
        image = _prepared(model, path)
        if image is None:
            broken += 1
            continue
        explanation = explain(model, image, **options)
        drawings = figures.figures(explanation, group)
        written = _write(folder, drawings, explanation.arrays(whole_maps=whole_maps))
        _show(path, explanation, written, json)
    if broken:
        raise UserError(f"{broken} of {len(paths)} images could not be read and were skipped; they are named above")


def _paths(images: Sequence[str]) -> list[Path]:
    if not images:
        raise UserError("there is nothing to explain: name image files")
    paths = list(map(Path, images))
    for path in paths:
        if not path.is_file():
            what = f"{path} is a folder" if path.is_dir() else f"there is no file {path}"
            raise UserError(f"{what}; name image files")
    return paths


def _pixel(words: str | None) -> tuple[int, int] | None:
    if words is None:
        return None
    try:
        x, y = map(int, words.split(","))
    except ValueError:
        raise UserError(f"--pixel must be two whole numbers x,y such as 112,80, not {words}") from None
    return x, y


def _class(model: Any, word: str | None) -> int | None:
    """The number of a class that was named, or numbered."""
    from san.evaluation.classes import class_words

    if word is None:
        return None
    words = class_words(model)
    for names in (model.pretrained_cfg.get("label_names") or [], words, class_words(model, short=True)):
        if word in names:
            return names.index(word)
    if word.isdecimal() and int(word) < len(words):
        return int(word)
    near = difflib.get_close_matches(word, words, 1, 0.0)
    raise UserError(f"--target {word} is no class; give a number up to {len(words) - 1}, or a name such as {near[0]}")


def _check_group(model: Any, names: Sequence[str] | None, group: int | None) -> None:
    """As `figures` does, but before images are worked on."""
    from san.attention_maps.figures import check_group
    from san.attention_maps.observation import find_layers

    for name, layer in find_layers(model, names).items():
        # Scalar attention has one.
        check_group(name, getattr(layer, "groups", 1), group)


def _folders(out: str, paths: Sequence[Path]) -> list[Path]:
    """A folder for each image, called as the file without its suffix, and numbered where names are alike."""
    names: list[str] = []
    for path in paths:
        tries = (path.stem if number == 1 else f"{path.stem}-{number}" for number in count(1))
        names.append(next(name for name in tries if name not in names))
    return [Path(out) / name for name in names]


def _prepared(model: Any, path: Path) -> Any:
    from san.attention_maps import prepare_image

    try:
        return prepare_image(model, path)
    except UserError as problem:
        print(f"san: {problem}; skipped", file=sys.stderr)
        return None


def _write(folder: Path, drawings: dict[str, Callable[[], Any]], arrays: dict[str, Any]) -> list[Path]:
    """Draw the figures and write them and the arrays; gives their paths."""
    import numpy as np

    written = [folder / f"{name}.png" for name in drawings]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, draw in progress(list(zip(written, drawings.values(), strict=True)), "drawing"):
            draw().savefig(path, dpi=120, bbox_inches="tight")
        np.savez_compressed(folder / "arrays.npz", **arrays)
    except OSError as problem:
        raise UserError(f"{folder} cannot be the folder for the results: {problem.strerror or problem}") from None
    return [*written, folder / "arrays.npz"]


_WITHOUT = "the network has no attention layers, whose weights could be shown: Grad-CAM only"


def _show(path: Path, explanation: Any, written: list[Path], json: bool) -> None:
    rows, (number, name, probability) = explanation.rows(), explanation.target
    files = list(map(str, written))
    if json:
        found = {"image": str(path), "pixel": explanation.pixel, "class": number, "class_name": name}
        found |= {"probability": probability, "layers": rows, "note": None if rows else _WITHOUT, "files": files}
        print(jsonlib.dumps(found, ensure_ascii=False), flush=True)
        return
    (height, width), (x, y) = explanation.shown.shape[:2], explanation.pixel
    print(f"{path}: class {name}, {100 * probability:.1f} %; pixel {x},{y} of {width}×{height}")
    print(f"{as_table(rows)}\nmeans over all pixels of the image" if rows else _WITHOUT)
    print(f"wrote {written[0].parent}: {', '.join(file.name for file in written)}", flush=True)

"""`san robustness`: accuracy on rotated images and under attack, several checkpoints side by side."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from san.cli.arguments import chosen_device, fraction, listed, numbers, trained_on
from san.cli.printing import as_table, progress
from san.errors import UserError

__all__ = ["robustness"]


def robustness(
    *checkpoints: str,
    data: str | None = None,
    split: Literal["test", "validation", "train"] = "test",
    limit: int | None = None,
    rotation: bool = True,
    angles: float | str = "0,30,60,90,120,150,180,210,240,270,300,330",
    attack: Literal["both", "untargeted", "targeted", "none"] = "both",
    epsilon: float | str = "8/255",
    step: float | str = "2/255",
    loss: Literal["cross_entropy", "margin"] = "cross_entropy",
    iterations: int | str = "2,4",
    curve: bool = False,
    random_start: bool = False,
    restarts: int = 1,
    seed: int = 0,
    checks: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    max_broken: float = 0.01,
    out: str | None = None,
    figures: int = 4,
    json: bool = False,
) -> None:
    """Tell how trained networks fare on rotated images and under attack, side by side on the same images.

    Rotation: the network's input is turned clockwise by 0, 90, 180 and 270 degrees, or flipped upside down, which
    only moves pixels; and by any angles, interpolated. Nothing is trained for it. 0° is what `san evaluate` tells.

    Attack: projected gradient descent in the L∞ norm (PGD), with the network known to the attacker and its statistics
    frozen. An untargeted attack succeeds where an image that was classified right no longer is, a targeted one where
    an image is taken for a wrong class that was drawn for it. The checks tell whether gradients are worth following:
    the loss grows with iterations, without a bound accuracy falls to about 0, and images made against another network
    do no more harm than those made against the network itself. Lists are separated by commas.

    Args:
        checkpoints: Run folders, .safetensors files or published .pth, which know the same classes.
        data: digits, a folder or archive with val/ or test/, or a data set's name; default what runs were trained on.
        split: Which of its images.
        limit: Judge only so many images, evenly spread over the set; default all.
        rotation: Turn and flip images.
        angles: More angles, in degrees, clockwise; none for none.
        attack: Which attacks.
        epsilon: Largest change of a pixel, for pixels from 0 to 1; a fraction or a number.
        step: Change of a pixel in one iteration, likewise.
        loss: What the attack follows; margin, the distance between logits, still tells where softmax is saturated.
        iterations: After how many iterations to tell the result.
        curve: Go on to 50 iterations, for the chart and JSON, which hold every iteration.
        random_start: Start somewhere within epsilon instead of at the image.
        restarts: Random starts; each image's best counts.
        seed: Of everything drawn.
        checks: Check on up to 128 images that gradients are not masked.
        batch_size: Images at a time.
        workers: Processes that read ahead; 0 reads in the main process.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        max_broken: Share of the images that may be unreadable.
        out: Folder for robustness.json, robustness.md and pictures, which replace those of an earlier run.
        figures: How many attacked images to draw for each network, with --out.
        json: Print JSON.
    """
    from san.evaluation.robustness import Settings, measure

    settings = Settings(
        rotation=rotation,
        angles=() if angles == "none" else tuple(fraction("angles", word) for word in listed(str(angles))),
        aims=tuple(aim for aim in ("untargeted", "targeted") if attack in (aim, "both")),
        epsilon=fraction("epsilon", epsilon),
        step=fraction("step", step),
        iterations=numbers("iterations", iterations),
        curve=curve,
        random_start=random_start,
        restarts=restarts,
        seed=seed,
        checks=checks,
        loss=loss,
    )
    if figures < 0:
        raise UserError(f"the number of figures is {figures}, but it must be at least 0")
    options = {"batch_size": batch_size, "workers": workers, "max_broken": max_broken}
    models = _models(checkpoints, device)
    named = dict(zip(models, checkpoints, strict=True))
    examples = _examples(checkpoints, data, split, limit, options)
    # Before anything is measured: a missing package or folder should not cost the results.
    write = _robustness_writer(out, models, examples, settings, figures) if out is not None else lambda result: []
    result = {**measure(models, examples, settings), "checkpoints": named}
    written = write(result)
    _show_robustness(result, written, json)


def _models(checkpoints: Sequence[str], device: str | None) -> dict[str, Any]:
    """Every checkpoint's model, by the part of its path that tells it from the others."""
    from san.checkpoints import load_model

    if not checkpoints:
        raise UserError("CHECKPOINTS is missing; name run folders, .safetensors files or published .pth")
    paths = [Path(name) for name in checkpoints]
    if twice := [name for place, name in enumerate(checkpoints) if paths[place] in paths[:place]]:
        raise UserError(f"{twice[0]} is named twice; name each checkpoint once")
    place = chosen_device(device)
    labels = _without_common_folder(checkpoints)
    return {label: load_model(name).to(place) for label, name in zip(labels, checkpoints, strict=True)}


def _without_common_folder(paths: Sequence[str]) -> list[str]:
    """Paths as seen from the folder that all lie in; a single one, and those without such a folder, as given."""
    folders = {Path(path).parent for path in paths}
    if len(paths) == 1 or len({folder.is_absolute() for folder in folders}) == 2:
        return list(paths)
    common = os.path.commonpath(folders)
    return [str(Path(path).relative_to(common)) for path in paths]


def _examples(checkpoints: Sequence[str], data: str | None, split: str, limit: int | None, options: Any) -> Any:
    """The images to judge all checkpoints by."""
    from san.data import load_dataset
    from san.evaluation.robustness import LabelledImages, spread

    asked = _all_trained_on(checkpoints, data, split)
    dataset = load_dataset(**asked)
    images = dataset.split(split)
    chosen = images if limit is None else spread(images, limit)
    part = f"{len(chosen)} of {len(images)}, evenly spread, of the" if len(chosen) < len(images) else len(images)
    name = f"{part} {split} images of {asked['where']}"
    return LabelledImages(chosen, dataset.class_names, name=name, progress=progress, **options)


def _all_trained_on(checkpoints: Sequence[str], data: str | None, split: str) -> dict[str, Any]:
    """What `load_dataset` is to be asked for so that the images suit all checkpoints, where runs say what they had."""
    runs = [name for name in checkpoints if (Path(name) / "config.yaml").is_file()] or [checkpoints[0]]
    asked = [trained_on(name, data) for name in runs]
    # Held out images, and how they were chosen, matter for the other splits only.
    matters = ("where",) if split == "test" else ("where", "validation_share", "seed")
    for name, each in zip(runs, asked, strict=True):
        if [each.get(key) for key in matters] != [asked[0].get(key) for key in matters]:
            raise UserError(
                f"{runs[0]} and {name} were not trained on the same images; compare them on test images of --data WHERE"
            )
    return asked[0]


def _robustness_writer(
    folder: str, models: dict[str, Any], examples: Any, settings: Any, figures: int
) -> Callable[[dict[str, Any]], list[Path]]:
    from san.attention_maps import middle_rollout
    from san.evaluation.robustness.figures import remove_earlier, write_images, write_results
    from san.evaluation.speed.chart import make_folder

    path = make_folder(folder)

    def write(result: dict[str, Any]) -> list[Path]:
        written = write_results(result, path)
        remove_earlier(path, written)
        if not (settings.aims and figures):
            return written
        # Numbers are on the disk by now, whatever goes wrong with a picture.
        images = write_images(models, examples, settings.attack(settings.aims[0]), path, figures, middle_rollout)
        return write_results(result, path, images)

    return write


def _show_robustness(result: dict[str, Any], written: list[Path], json: bool) -> None:
    from san.evaluation.robustness.tables import check_lines, heading, meaning, tables

    if json:
        print(jsonlib.dumps(result, ensure_ascii=False))
        return
    for name in result["broken"]:
        print(f"not readable: {name}")
    for name, rows in tables(result).items():
        print(as_table(rows), meaning(name, result["settings"]), "", sep="\n")
    for line in check_lines(result):
        print(line)
    print(heading(result))
    if written:
        print("wrote " + ", ".join(map(str, written)))

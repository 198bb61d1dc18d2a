"""`san evaluate`: accuracy of a trained network on labelled images."""

from __future__ import annotations

import json as jsonlib
from typing import Literal

from san.cli.arguments import chosen_device, trained_on
from san.cli.printing import as_table, progress

__all__ = ["evaluate"]


def evaluate(
    checkpoint: str,
    *,
    data: str | None = None,
    split: Literal["test", "validation", "train"] = "test",
    batch_size: int = 64,
    workers: int = 0,
    device: str | None = None,
    max_broken: float = 0.01,
    json: bool = False,
) -> None:
    """Tell how often a trained network is right on labelled images.

    Prints top-1 and top-5 accuracy, both for every class, and what a class is most often taken for; with --json also
    the confusion matrix, a row for each true class. With five classes or fewer top-5 is always 100 %, so only JSON
    has it. Images that cannot be read are named and left out.

    Classes are matched by name. A model of 1000 classes without names is taken for one of ImageNet where all folders
    of the data are named by ImageNet's WordNet ids, such as n01440764; they may be some of the 1000.

    Args:
        checkpoint: A run folder, a .safetensors file or a published .pth.
        data: digits, a folder or archive with val/ or test/, or a data set's name; default what a run was trained on.
        split: Which of its images.
        batch_size: Images at a time.
        workers: Processes that read ahead; 0 reads in the main process.
        device: Such as cpu or cuda:0; default the GPU if there is one.
        max_broken: Share of the images that may be unreadable.
        json: Print JSON.
    """
    from san.checkpoints import load_model
    from san.data import load_dataset
    from san.evaluation.accuracy import evaluate
    from san.evaluation.classes import class_words

    model = load_model(checkpoint).to(chosen_device(device))
    dataset = load_dataset(**trained_on(checkpoint, data))
    accuracy = evaluate(
        model,
        dataset.split(split),
        dataset.class_names,
        batch_size=batch_size,
        workers=workers,
        max_broken=max_broken,
        progress=progress,
    )
    if json:
        print(jsonlib.dumps(accuracy.as_dict(), ensure_ascii=False))
        return
    for name in accuracy.broken:
        print(f"not readable: {name}")
    has_top5 = len(accuracy.class_names) > 5
    words = dict(zip(accuracy.class_names, class_words(model, short=True), strict=True))
    rows = [
        {key: words.get(value, value) for key, value in row.items() if has_top5 or key != "top5"}
        for row in accuracy.per_class()
    ]
    top5 = f", top-5 {accuracy.top5:.2f} %" if has_top5 else ""
    print(as_table(rows))
    print(f"top-1 {accuracy.top1:.2f} %{top5} of {accuracy.images} images")

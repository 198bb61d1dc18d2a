"""`report.md` and its curves: what was trained, how it went, how good it is, and how to do it again."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot, ticker

from san.evaluation.accuracy import Accuracy
from san.training.folder import replacing
from san.training.journal import Journal, best_row

__all__ = ["report"]

NAMED = 100
"""Broken images that the report names; the rest are only counted."""


def report(network: Any, journal: Journal, judged: dict[str, Accuracy]) -> str:
    """Text of the report in Markdown; draws `curves.png` beside it.

    Args:
        network: What was trained.
        journal: Memory of the finished run.
        judged: Accuracy on the test images of the "last" and the "best" epoch; empty without test images.
    """
    _draw(journal.rows, journal.folder.path / "curves.png")
    sections = [
        f"# {network.architecture} on {journal.dataset.name}",
        _results(network, journal, judged),
        "![loss and accuracy by epoch](curves.png)",
        _broken(journal, judged),
        _repetition(journal),
        _settings(journal),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _results(network: Any, journal: Journal, judged: dict[str, Accuracy]) -> str:
    last, best = journal.rows[-1], best_row(journal.rows)
    lines = ["| | epoch | validation top-1 | test top-1 | test top-5 |", "|---|---|---|---|---|"]
    for name, row in (("last", last), ("best", best)):
        if row is not None:
            test = judged.get(name)
            tested = (test.top1, test.top5) if test else (None, None)
            cells = [_percent(value) for value in (row["validation_top1"], *tested)]
            lines.append(f"| {name} epoch | {row['epoch']} | {' | '.join(cells)} |")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    seconds = round(sum(row["seconds"] for row in journal.rows))
    decay = journal.settings.ema_decay
    average = f", the moving average ({decay}) of the weights" if decay else ""
    images = ", ".join(f"{len(images):,} for {name}" for name, images in _sets(journal).items())
    notes = (
        "The best epoch is the one with the highest accuracy on the validation images, and of several the one with the "
        "lowest loss; the test images were used only for this table. "
        f"`model.safetensors` holds the last epoch{average}.",
        f"Parameters: {parameters:,}. Images: {images}. "
        f"Training and validation took {timedelta(seconds=seconds)} (hours:minutes:seconds) in {last['step']:,} steps.",
    )
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes)


def _sets(journal: Journal) -> dict[str, Any]:
    dataset = journal.dataset
    named = {"training": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: images for name, images in named.items() if images is not None}


def _broken(journal: Journal, judged: dict[str, Accuracy]) -> str:
    names = [name for images in journal.broken.values() for name in images.names]
    names += judged["last"].broken if "last" in judged else []
    if not names:
        return "## Broken images\n\nNone."
    listed = "\n".join(f"- `{name}`" for name in names[:NAMED])
    rest = f"\n- and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"## Broken images\n\n{len(names)} could not be read and were left out:\n\n{listed}{rest}"


def _repetition(journal: Journal) -> str:
    versions = (journal.folder.path / "versions.txt").read_text(encoding="utf-8").strip()
    again = f"san train --config {journal.folder.config} --out {journal.folder.path}-again"
    return (
        f"## How to repeat\n\n```\n{again}\n```\n\n"
        f"On the CPU the result is the same bit for bit with the same versions and number of threads:\n\n"
        f"```\n{versions}\n```"
    )


def _settings(journal: Journal) -> str:
    return f"## Settings\n\n```yaml\n{journal.folder.config.read_text(encoding='utf-8').strip()}\n```"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss on the left, accuracy on the right, training and validation in each."""
    epochs = [row["epoch"] for row in rows]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, quantity, label in zip(panels, ("loss", "top1"), ("loss", "top-1 accuracy in %"), strict=True):
        for part, mark in (("train", "o-"), ("validation", "s-")):
            values = [row[f"{part}_{quantity}"] for row in rows]
            if values[-1] is not None:
                panel.plot(epochs, values, mark, markersize=3, label="training" if part == "train" else part)
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)

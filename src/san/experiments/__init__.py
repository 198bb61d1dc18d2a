"""The paper's tables as experiments that any data can answer: `reproduce` is the function behind `san reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from san.errors import UserError
from san.evaluation.robustness import Progress, silently
from san.evaluation.speed.chart import make_folder
from san.experiments.campaign import Campaign, check_settings, chosen, scale_of, shard_of
from san.experiments.report import columns, write
from san.experiments.results import check_images, summary
from san.experiments.tables import SCALES, TABLES

__all__ = ["SCALES", "TABLES", "columns", "reproduce"]


def reproduce(
    table: str,
    scale: str = "digits",
    *,
    seeds: int = 1,
    data: str | None = None,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    shard: str = "0/1",
    base: str | None = None,
    small_images: bool | None = None,
    settings: dict[str, Any] | None = None,
    command: str = "",
    progress: Progress = silently,
) -> dict[str, Any]:
    """Train what a table compares, as far as that is not done yet, and write the table to `out`.

    A run folder for every variant and seed lies in `out`/runs; a finished one is never trained again, one that was
    killed goes on, and one that another process works on is left to it. What is finished then makes the table, as
    `out`/TABLE.md, .json, .png and .svg. Where every run fails nothing is written.

    Args:
        table: One of `TABLES`.
        scale: One of `SCALES`.
        seeds: Seeds 0 to `seeds` − 1 for every variant.
        data: As `san.training.train` takes it; default the scale's.
        out: Folder of the campaign; default runs/reproduce-SCALE.
        only: Labels of the rows to take; default all.
        shard: "i/n" trains the i-th of n parts only, i from 0; the table is made of whatever is finished.
        base: Another base network, such as san4.
        small_images: Whether networks of five stages halve maps three times instead of five; default the scale's.
        settings: More arguments of `train`, for every run.
        command: How the user called it, for the page.
        progress: Wraps the batches of rotation and attack, with a word for what is done, to show how far it is.

    Returns:
        The table as `san.experiments.results.summary` describes it, with `files` written and `busy`, the number of
        runs that other processes still work on.

    Raises:
        UserError: A name or setting is wrong, the folder holds runs of other settings or cannot be made, or there are
            no test images to rotate or attack.
    """
    if seeds < 1:
        raise UserError(f"the number of seeds is {seeds}, but it must be at least 1")
    variants = chosen(table, only)
    folder = Path(out) if out is not None else Path("runs") / f"reproduce-{scale}"
    campaign = Campaign(scale_of(scale, base, small_images), folder, data, settings or {}, progress)
    make_folder(folder)
    runs = campaign.runs(variants, seeds)
    check_settings(runs)
    check_images(runs, TABLES[table].measures)
    busy, failed = campaign.train(shard_of(runs, shard))
    result = summary(table, campaign, runs, failed)
    nothing = bool(failed) and not any(row["seeds"] for row in result["rows"])
    files = [] if nothing else [str(path) for path in write(result, folder, command)]
    return {**result, "files": files, "busy": sum(not run.folder.finished for run in busy)}

"""`san reproduce`: the paper's tables, on any images."""

from __future__ import annotations

import builtins
import json as jsonlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from san.cli.printing import as_table, progress
from san.errors import UserError

__all__ = ["reproduce"]


# What `san reproduce` hands to `san.training.train`.
_OF_TRAIN = ("epochs", "batch_size", "image_size", "learning_rate", "workers", "precision", "devices")


def reproduce(
    *tables: str,
    scale: str = "digits",
    seeds: int = 1,
    data: str | None = None,
    out: str | None = None,
    only: str | None = None,
    shard: str = "0/1",
    base: str | None = None,
    small_images: bool | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    learning_rate: float | None = None,
    workers: int | None = None,
    precision: str | None = None,
    devices: str | None = None,
    list: bool = False,
    json: bool = False,
) -> None:
    """Repeat the paper's comparisons: train every variant of a table alike, and write the table with its chart.

    Every variant and seed is a run folder in OUT/runs, which tables share. The command may be stopped or killed and
    given again: what is finished is never trained again, and what was begun goes on. Several processes, also on several
    machines with one file system, may work on one OUT at once, with --shard or without: none takes what another has.
    Whoever ends last writes the whole table, the others what is finished by then.

    Args:
        tables: Such as main or relation; --list explains them.
        scale: digits, cifar10, tinyimagenet or imagenet: images, base network and recipe.
        seeds: Seeds 0 to N − 1 for every variant; tables show mean and standard deviation.
        data: Folder, archive or data set's name; default the scale's own.
        out: Folder of runs and tables; default runs/reproduce-SCALE.
        only: Some rows by their labels, separated by semicolons.
        shard: i/n trains the i-th of n parts alone, i from 0.
        base: Another base network: san4, san10, san15 or san19.
        small_images: Let networks of five stages halve maps three times instead of five.
        epochs: Instead of the scale's.
        batch_size: Instead of the scale's.
        image_size: Side of the networks' input; default the data's own.
        learning_rate: Instead of the scale's.
        workers: Processes that read images.
        precision: 32, bf16-mixed or 16-mixed.
        devices: Devices for each run, or auto.
        list: Explain tables and scales, and train nothing.
        json: Print JSON, an object for each table a line.
    """
    given = locals()
    from san.experiments import reproduce

    if list:
        _list_tables(json)
        return
    labels = _labels(only, tables)
    settings = {name: given[name] for name in _OF_TRAIN if given[name] is not None}
    command = shlex.join(["san", *_without_shard(sys.argv[1:])])
    failed: builtins.list[str] = []
    for table in tables:
        result = reproduce(
            table,
            scale,
            seeds=seeds,
            data=data,
            out=out,
            only=labels,
            shard=shard,
            base=base,
            small_images=small_images,
            settings=settings,
            command=command,
            progress=progress,
        )
        failed += _show_table(result, json)
    if failed:
        count = "1 run failed," if len(failed) == 1 else f"{len(failed)} runs failed, the first"
        raise UserError(f"{count} because {failed[0]}")


def _without_shard(words: Sequence[str]) -> builtins.list[str]:
    """A command for the whole table."""
    return [
        word
        for place, word in enumerate(words)
        if not word.startswith("--shard") and words[max(place - 1, 0)] != "--shard"
    ]


def _labels(only: str | None, tables: Sequence[str]) -> list[str]:
    """Rows that `only` names; raises `UserError` unless every table is known and has them."""
    from san.experiments import TABLES
    from san.experiments.campaign import chosen

    if not tables:
        raise UserError(f"TABLES is missing; choose among: {', '.join(TABLES)}, or ask for --list")
    labels = [label.strip() for label in only.split(";")] if only else []
    for table in tables:
        chosen(table, labels)
    return labels


def _list_tables(json: bool) -> None:
    from san.experiments import SCALES, TABLES

    if json:
        tables = {name: {"question": t.question, "rows": [v.label for v in t.variants]} for name, t in TABLES.items()}
        print(jsonlib.dumps({"tables": tables, "scales": {name: scale.summary for name, scale in SCALES.items()}}))
        return
    for name, table in TABLES.items():
        print(f"{name}: {table.question}")
        print("    " + "; ".join(variant.label for variant in table.variants))
    print("\nscales:")
    for name, scale in SCALES.items():
        settings = scale.settings
        print(
            f"{name}: {scale.summary}; base {scale.base}, {settings['epochs']} epochs, batch {settings['batch_size']}"
        )


def _show_table(result: dict[str, Any], json: bool) -> list[str]:
    """Print it; gives what went wrong with its runs."""
    from san.experiments import columns

    failed = [problem for row in result["rows"] for problem in row["failed"]]
    if json:
        print(jsonlib.dumps(result, ensure_ascii=False))
    else:
        if result["files"]:
            print(as_table(columns(result)))
        if result["busy"]:
            print(f"{result['busy']} runs are with other processes; run the command again for the whole table")
        elif not result["complete"] and not failed:
            print("not complete: what is missing belongs to other shards")
        if result["files"]:
            print(f"written: {', '.join(result['files'])}")
    return failed
